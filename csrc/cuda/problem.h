// What a call of the CUDA kernels is given. Every kernel library is plain C towards the outside: it
// knows nothing of torch, and exports
//
//   const char* stof_run(const stof::Problem*, void* stream);   // null, or what went wrong
//   int64_t stof_problem_bytes();                               // sizeof(Problem), checked by the caller
//
// The pointers of the first block are filled in by the binding at every call; the rest is prepared
// once per shape and mask (stof_hf/attention/cuda.py packs it).
#pragma once

#include <cstdint>

namespace stof {

struct Strides3 {
  int64_t batch, head, row;  // in elements
};

// A list of what blocks of query rows stream, made by stof_hf/attention/plan.py (class GranulePlan).
//
// Row tile: 64 query rows. Tile t >= 0 holds rows 64 t .. 64 t + 63; tile t < 0 is virtual, and its
// rows are listed in rows[-1 - t][64] (-1: no row), so that rows which see far more keys than their
// neighbours can share a tile.
//
// Item, 8 ints: row tile of half 0, row tile of half 1, first key and number of steps of the full
// run, first entry and number of listed steps, slot (-1: whole), reserved. Each half is 64 rows, computed by 4
// warps. Tile kNone: the item (half 0) or the half (half 1) is empty. Where both halves name the same
// tile, they divide its keys, and their results are combined: half h of the Hopper kernel takes the
// steps with index % 2 == h, counted through the full run and the list, that of the sm_80 kernel half
// of every step. slot >= 0: the item is a piece of its rows' keys; fp32 partial results go to the
// workspace and are combined by the merge kernel.
//
// Step, 8 ints: the first keys of 4 granules of 16 keys each, then for each half what it sees of
// these 64 keys: kFull, kEmpty, or an index into bits. Unused granules repeat a used one with zero
// bits. A step of the full run covers 64 consecutive keys, all of them seen by both halves.
//
// Bits, 128 words for 64 rows x 64 keys in the order of the tensor cores' accumulators: word
// 32 w + l belongs to lane l of warp w; its bit 4 j + 2 r + c to row 16 w + l / 4 + 8 r and key
// 8 j + 2 (l % 4) + c of the step.
//
// Queue: entry i is taken by thread block i % grid; item * copies + copy, or -1; without a queue,
// entry i is i. A copy is a (batch
// element, head) or, where the halves are two heads, a pair of heads.
//
// Merge, 4 ints: row tile (kNone: no entry), first slot, number of pieces, slots between them.
struct Plan {
  const int32_t* items;   // [patterns][n_items][8]
  const int32_t* steps;   // [n][8]
  const uint32_t* bits;   // [n][128]
  const int32_t* rows;    // [n][64]
  const int32_t* merges;  // [patterns][n_merges][4]
  const int32_t* queue;   // [n_queue], or null
  const int32_t* pattern_id;            // of batch element and head; null: there is one pattern
  int64_t pattern_batch, pattern_head;  // its strides, 0 where it broadcasts
  int64_t n_items, n_merges, n_queue, slots;  // slots: pieces of one head
};

// A mask as it is kept (stof_hf/masks/sparse_mask.py), for kernels that need no plan.
struct Mask {
  const int32_t* row_ptr;                       // [patterns][tile_rows + 1]; null: all is seen
  const int32_t *run_col, *run_len, *run_bits;  // [runs]
  const uint64_t* tile_bits;                    // [n][64]
  int64_t tile_rows;
  int64_t row_start, col_start;  // where the view begins, if no tensor says so
};

constexpr int32_t kNone = INT32_MIN, kFull = -1, kEmpty = -2;

// bias_dtype
constexpr int64_t kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2;

struct Problem {
  const void* query;         // [B, H, Sq, D]
  const void* key;           // [B, Hkv, Sk, D]
  const void* value;         // [B, Hkv, Sk, Dv]
  void* out;                 // [B, Sq, H, Dv], contiguous
  float* lse;                // [B, H, Sq], or null
  float* workspace;          // workspace_bytes, or null
  const uint64_t* kv_valid;  // [B, ceil(Sk / 64)]: padding as bits, or null
  const void* bias;          // broadcast to [B, H, Sq, Sk] by strides of 0, or null
  const float* sinks;        // [H], or null
  const int64_t* row_start;  // [1]: where the view of the mask begins, or null
  const int64_t* col_start;

  Strides3 q, k, v;
  int64_t bias_batch, bias_head, bias_row, bias_col, bias_dtype;
  int64_t valid_batch;  // stride of kv_valid, 0 where it broadcasts
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  int64_t workspace_bytes;
  // Thread blocks, and whether the halves of a block are two heads of one group (else two row tiles
  // of one head).
  int64_t grid, two_heads;
  int64_t device;
  double scale, softcap;
  Plan plan;
  Mask mask;
  int64_t splits;  // blocks that divide the keys of a row, where there is no plan
  int64_t with_lse;
  // Where there is neither plan nor mask, query i sees the keys i + offset - left .. i + offset + right.
  int64_t offset, left, right;
  int64_t rows;      // of a block
  int64_t together;  // heads whose blocks should run at a time: their keys and values stay in L2
};

}  // namespace stof
