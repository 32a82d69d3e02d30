// Every operator's schema, and nothing else. Implementations register at the bottom of their files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moyu_ext, m) {
  m.def("threshold_compact(Tensor values, Tensor epsilon) -> (Tensor indices, Tensor count)");
  m.def(
      "gather_gemv(Tensor x, Tensor weight, Tensor? indices, Tensor? count, Tensor? bias=None) -> "
      "Tensor");
  m.def(
      "gather_gemv_t(Tensor values, Tensor weight_t, Tensor? indices, Tensor? count, "
      "Tensor? bias=None, int? columns=None) -> Tensor");
  m.def("unpack_rows(Tensor packed, Tensor(a!) out) -> ()");
  m.def(
      "sparse_mlp(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor? gate_bias, "
      "Tensor? up_bias, Tensor? down_bias, Tensor? indices, Tensor? count, Tensor? mask, "
      "str activation) -> Tensor");
  m.def(
      "threshold_mlp(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor? gate_bias, "
      "Tensor? up_bias, Tensor? down_bias, Tensor? scale, Tensor epsilon, str activation, "
      "str plan) -> (Tensor out, Tensor counts)");
  m.def(
      "shadow_scores(Tensor x, Tensor shadow, Tensor norms, Tensor? gate_bias, Tensor? up_bias, "
      "bool gated, int bits_gate, int bits_up, str activation) -> Tensor");
  m.def(
      "shadow_mlp(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor? gate_bias, "
      "Tensor? up_bias, Tensor? down_bias, Tensor shadow, Tensor norms, Tensor? inverse, "
      "Tensor? errors, "
      "Tensor? epsilon, int k, int estimated, int bits_gate, int bits_up, str activation) -> "
      "(Tensor out, Tensor counts)");
}
