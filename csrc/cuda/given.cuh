// The exact MLP over a list of neurons, for the operators that have made one.
#pragma once

#include "mlp.cuh"

namespace moyu::cuda {

// A list in pieces: block b of `blocks` looked at neurons [f b / blocks, f (b + 1) / blocks), and
// those that it kept, counts[b] of them, begin at indices[f b / blocks].
struct Pieces {
  const int32_t* counts = nullptr;  // [blocks], null: the list is in one piece
  int blocks = 0;                   // at most kMaxBlocks
};

// What a neuron is for a row, as the mask of a set says it where some are estimated.
inline constexpr uint8_t kEstimated = 1, kExact = 2;

// The neurons whose activation is not computed: of their weights only the row of down is read.
struct Estimates {
  const float* scores = nullptr;   // [rows, f], with signs
  const float* inverse = nullptr;  // [f]: activation over score
  const int32_t* neurons =
      nullptr;  // [f], null: there are none. Estimated in some row, exact in none
  const int32_t* count = nullptr;  // [1], how many of neurons are valid
};

// What the blocks counted on the way, for the second stage to add up.
struct BlockCounts {
  const int32_t* of_blocks = nullptr;  // [blocks of persistent_blocks(f), kMaxRows] or null
  int32_t* counts = nullptr;           // [rows]
};

// Rows first .. first + rows - 1 of mlp, at most kMaxRows; set.mask, estimates.scores and counts
// begin at row first. With estimates there is a mask.
void launch_given(const char* op, const Mlp& mlp, int64_t first, int64_t rows, const ActiveSet& set,
                  int64_t capacity, const Pieces& pieces, const Estimates& estimates,
                  const BlockCounts& counted, float* workspace, void* stream);

}  // namespace moyu::cuda
