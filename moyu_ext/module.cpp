// moyu_ext._C: what takes no tensor. No torch here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/moyu.h"
#include "decode_step.h"

namespace py = pybind11;

namespace {

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
  moyu::bind_decode_step(m);
}
