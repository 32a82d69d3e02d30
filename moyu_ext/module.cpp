// moyu_ext._C: what takes no tensor, and the raw kernels on numpy arrays for tests. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/moyu.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#ifdef MOYU_WITH_CUDA
  info["cuda"] = MOYU_WITH_CUDA;
#else
  info["cuda"] = py::none();
#endif
#ifdef MOYU_TORCH_BUILT_WITH
  info["built_with_torch"] = MOYU_TORCH_BUILT_WITH;
#endif
  return info;
}

std::vector<std::string> isa_list() {
  const char* names[8];
  const int n = moyu::cpu::isa_list(names, 8);
  return {names, names + n};
}

// float32 only: the tests of the other types go through the torch operators.
py::tuple threshold_compact(const Array<float>& values, float epsilon) {
  if (values.ndim() != 2) throw py::value_error("threshold_compact: values must be [rows, f]");
  const auto rows = values.shape(0), f = values.shape(1);
  Array<int32_t> indices({rows, f}), count(rows);
  moyu::cpu::threshold_compact(values.data(), rows, f, &epsilon, indices.mutable_data(),
                               count.mutable_data());
  return py::make_tuple(indices, count);
}

Array<float> sparse_mlp(const Array<float>& x, const Array<float>& gate, const Array<float>& up,
                        const Array<float>& down_t, const Array<int32_t>& indices) {
  if (x.ndim() != 2 || up.ndim() != 2 || x.shape(1) != up.shape(1))
    throw py::value_error("sparse_mlp: x must be [rows, d] and up [f, d]");
  const auto f = up.shape(0), d = up.shape(1);
  for (const auto* w : {&gate, &down_t})
    if (w->ndim() != 2 || w->shape(0) != f || w->shape(1) != d)
      throw py::value_error("sparse_mlp: gate and down_t must have the shape of up");
  const int32_t count = static_cast<int32_t>(indices.size());
  for (int32_t k = 0; k < count; ++k)
    if (indices.data()[k] < 0 || indices.data()[k] >= f)
      throw py::index_error("sparse_mlp: indices must lie in [0, f)");
  Array<float> out({x.shape(0), d});
  moyu::Mlp mlp;
  mlp.x = x.data();
  mlp.gate = gate.data();
  mlp.up = up.data();
  mlp.down_t = down_t.data();
  mlp.out = out.mutable_data();
  mlp.rows = x.shape(0);
  mlp.d = d;
  mlp.f = f;
  std::vector<float> workspace(moyu::cpu::workspace_floats(mlp.rows, d));
  moyu::cpu::sparse_mlp(mlp, {indices.data(), &count, nullptr}, workspace.data());
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of moyu_ext; importing it registers torch.ops.moyu_ext.";
  m.def("build_info", &build_info, "How this extension was built.");
  m.def(
      "isa_name", [] { return std::string(moyu::cpu::isa_name()); }, "The instruction set in use.");
  m.def("isa_list", &isa_list, "Instruction sets that this build has and this CPU runs.");
  m.def(
      "set_isa", [](const std::string& name) { moyu::cpu::set_isa(name.c_str()); }, py::arg("name"),
      "Switch the instruction set; ValueError where this CPU can't.");
  m.def(
      "use_huge_pages",
      [](uintptr_t address, size_t bytes) {
        return moyu::cpu::use_huge_pages(reinterpret_cast<const void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"),
      "Move this memory to huge pages; whether that was done. Its contents stay.");
  m.def("threshold_compact", &threshold_compact, py::arg("values").noconvert(), py::arg("epsilon"));
  m.def("sparse_mlp", &sparse_mlp, py::arg("x").noconvert(), py::arg("gate").noconvert(),
        py::arg("up").noconvert(), py::arg("down_t").noconvert(), py::arg("indices").noconvert());
}
