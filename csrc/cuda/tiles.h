// What the mask builder is given (stof_hf/masks/tiles.py packs it). The library exports
//
//   const char* stof_run(stof::TilesProblem*, void* stream);   // null, or what went wrong
//   int64_t stof_problem_bytes();                              // sizeof(TilesProblem)
//
// and is called several times for a mask, by `stage`. Nothing waits for the device: the caller does,
// once, before it reads `host`.
#pragma once

#include <cstdint>

namespace stof {

enum TilesStage : int64_t {
  kMeasure,  // sets workspace_bytes; the fields of mask and memory are all it needs
  kBegin,    // clears the workspace
  kAdd,      // packs and classifies tiles of the source, and keeps each distinct partial one once
  kFinish,   // writes the runs, what the host needs of them, and the counts
};

enum TilesType : int64_t { kBool, kHalf, kBfloat16, kFloat, kDouble };

// Counts, int64 each, at the start of `host`; then follow host_ints int32 and host_tiles * 64 words.
enum TilesCount {
  kRuns,
  kDistinct,  // partial tiles
  kPatterns,
  kOccupied,  // blocks of 16 x 16 pairs that hold one, over all patterns, repeated ones included
  kFlags,     // of additive masks: 1 where something is forbidden, 2 where another value than 0 is added
  kWanted,    // *wanted
  kCounts = 8
};

// The canonical arrays lie one behind the other in `out`: pattern_id [patterns], row_ptr
// [P, tile rows + 1], run_col, run_len and run_bits [runs], each beginning at a multiple of this.
constexpr int64_t kArrayAlignment = 16;

struct TilesProblem {
  int64_t stage;

  // Mask: patterns x q_len x kv_len, of which equal patterns are found.
  int64_t patterns, q_len, kv_len;

  // Source of kAdd, [batch, heads, source_rows, source_cols] by strides in elements. Booleans, or
  // additive floats, of which those up to half of the type's least value forbid. `tiles` null: it is
  // the mask itself, of whose tile rows `rows` are taken from `first` on. Otherwise it is 64 rows of
  // tiles side by side, and tile i holds what tile tiles[i] (-1: none) of the mask holds.
  const void* source;
  int64_t type, heads, batch_stride, head_stride, row_stride, col_stride;
  int64_t source_rows, source_cols;
  const int32_t* tiles;
  int64_t first, rows;
  int64_t chunk;  // how many calls with kAdd came before this one, or before kFinish

  // Memory. content, int32 [patterns, tile rows, tile columns]: -1 (full) or -2 (empty) for tiles that
  // no kAdd names. found: the distinct partial tiles, uint64 [capacity, 64]; where there are more,
  // kDistinct says how many at most.
  int32_t* content;
  uint64_t* found;
  int32_t* out;
  void* workspace;
  void* host;             // pinned
  const int64_t* wanted;  // or null
  int64_t chunk_tiles;    // the most tiles that a kAdd names
  int64_t slots;          // power of 2, at least twice the tiles of all kAdd together
  int64_t capacity, host_ints, host_tiles;
  int64_t workspace_bytes;
};

}  // namespace stof
