// The shadow's estimates (format: Shadow in moyu.h), and where their scratch lies.
#pragma once

#include "common.cuh"

namespace moyu::cuda {

// All of a block of 256 elements is worked on by 4 lanes; lane q of them has the elements
// 64 t + 16 q + 0..15 (t < 4), whatever the number of bits.
inline constexpr int kQuarters = 4;

// Tiers of a row's neurons that take part: exact and estimated.
inline constexpr int kMaxTiers = 2;

// A call's scratch behind the partial sums of the exact MLP. Null where it is not needed.
struct ShadowScratch {
  int8_t* x;              // [rows, blocks of d, kShadowBlock], zeros behind d
  float* step;            // [rows, blocks of d]: x is step * its int8
  float* offset;          // [rows, blocks of d]: step * sum of the int8
  float* scores;          // [rows, f]
  uint64_t* cuts;         // [kMaxTiers, kMaxRows]
  int32_t* indices;       // [kMaxTiers, f]
  int32_t* count;         // [kMaxTiers]
  int32_t* piece_counts;  // [kMaxBlocks]
  uint8_t* mask;          // [rows, f]
  size_t floats;          // of the whole workspace
};

// For up to kMaxRows rows of a workspace of shadow_workspace_floats.
ShadowScratch shadow_scratch(float* workspace, int64_t rows, int64_t d, int64_t f);

// What the estimates are for: all of them, or those that reach epsilon.
struct EstimateResult {
  float* scores = nullptr;          // [rows, f] or null
  bool signs = false;               // scores keep those of the estimated activations
  const float* epsilon = nullptr;   // [1]; null: the rest is not written
  int32_t* indices = nullptr;       // [f], in pieces (given.cuh)
  int32_t* piece_counts = nullptr;  // [blocks]
  int32_t* block_counts = nullptr;  // [blocks, kMaxRows]
  int32_t* estimated = nullptr;     // [rows], set to 0: there are none with a threshold
  uint8_t* mask = nullptr;          // [rows, f] or null
};

// Two launches for rows first .. first + rows - 1 of mlp: x to int8, then the estimates.
void launch_estimate(const char* op, const Mlp& mlp, int64_t first, int64_t rows,
                     const Shadow& shadow, const ShadowScratch& scratch,
                     const EstimateResult& result, void* stream);

}  // namespace moyu::cuda
