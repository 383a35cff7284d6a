// What a plan is made from (stof_hf/attention/granules.py packs it), and what its parts share.
// csrc/cuda/problem.h describes what it holds.
#pragma once

#include <climits>
#include <cstdint>

#include "../masks/result.h"
#include "../masks/tiles.h"

namespace stof {

constexpr int kGranule = 16;
constexpr int kPerTile = kTile / kGranule;
constexpr int32_t kNone = INT32_MIN;

// Every field is 8 bytes wide, so that the caller packs it without padding.
struct PlanRequest {
  // The mask's canonical runs.
  const int32_t* row_ptr;  // [patterns, tile_rows + 1]
  const int32_t* run_col;
  const int32_t* run_len;
  const int32_t* run_bits;
  const uint64_t* words;  // [contents, 64]
  int64_t patterns, tile_rows, contents, q_len, kv_len;
  // Row tiles of a block (1 or 2), and whether its halves divide the steps of one.
  int64_t tiles, paired;
  // Batch elements and heads, thread blocks that run at once, copies that should run together.
  int64_t copies, workers, together;
  Threads threads;
  double item_cost, merge_cost;
};

// What a half spends on a step of 64 keys, by what it sees of them, in steps without a mask; and on an
// item whose steps it shares with the other half.
inline double step_cost(int32_t content) { return content == kFull ? 1.0 : content == kEmpty ? 0.1 : 1.25; }
inline double divided_cost(double cost) { return cost / 2 + 0.5; }

struct Run {
  int32_t col, len, content;
  int32_t end() const { return col + len; }
};

// Calls work(first, last) for parts of [0, count), each of which takes about `cost` ns.
template <typename Work>
void in_parts(const Team& team, int64_t count, double cost, Work work) {
  const int64_t threads = team.threads(cost * (double)count);
  const int64_t parts = threads > 1 ? 4 * threads : 1;
  team.each(parts, threads, [&](int64_t i) { work(count * i / parts, count * (i + 1) / parts); });
}

}  // namespace stof
