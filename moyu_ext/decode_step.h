// One decode step of a stack of decoder layers, as a Python class on raw addresses: the caller keeps
// the tensors alive and their shapes right.
#pragma once

#include <pybind11/pybind11.h>

namespace moyu {

// Adds DecodeStep to moyu_ext._C.
void bind_decode_step(pybind11::module_& m);

}  // namespace moyu
