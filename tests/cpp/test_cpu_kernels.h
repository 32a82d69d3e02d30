// What the files of the CPU kernel tests call of each other.
#pragma once

#include <string>
#include <vector>

namespace test {

// Those that this build has and this machine runs.
std::vector<std::string> instruction_sets();

// test_cpu_shadow.cpp: the low-bit shadow and the MLP that it steers.
void test_shadow(const std::vector<std::string>& isas);

// test_cpu_decode.cpp: a layer's attention at decode, and norms.
void test_decode(const std::vector<std::string>& isas);

}  // namespace test
