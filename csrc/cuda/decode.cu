// Attention of at most 16 queries, as in decoding: memory-bound, so everything serves to keep loads
// of keys and values in flight.
//
// Tiling: the rows of a block are those of all heads that share keys, for every query: 8, 16, 32 or 64
// of them, 8 or 16 to a warp. Its warps, 4 to a tile of 64 keys, divide the keys of a step: with 16 rows
// each takes 16 keys, with 64 rows four share 64. Keys and values are the first operand of both products,
// 16 at a time, and the rows the second, in tiles of 8: one row a head would leave most of 16 empty. Blocks
// divide the tiles of a row between them (Problem::splits).
//
// Pipeline: further warps find what there is to see and copy it into a ring, so that lists, addresses
// and copies never hold up the products, which are mma.sync; with each step they say what it holds. From
// sm_90 on the copy engine copies, for head sizes of whole boxes of 64 columns; elsewhere cp.async. Where
// clusters exist, the blocks of a row form one, and send each other what they find of the elements that
// the other stores; else, or where they are too many, a second kernel combines. Both in fixed order.
//
// Masks need no plan: the producers read the runs of the block's tile row (row_start may lie on the
// device, and rows may begin anywhere), and list the block's share of their tiles. Where the rows lie in
// two tile rows, what is shared out are all tiles between the first and the last that either holds. Keys
// that padding hides, or that lie outside the view, are not read: zeros stand in for them.
//
// Most code runs once, out of a cold cache: loops that are not the products' are not unrolled, and the
// host divides.
//
// Limits: rows aligned to 16 bytes, values as wide as keys, at most kMostTiles key tiles.
#include <cuda_runtime.h>

#include "fragments.cuh"
#include "items.cuh"
#include "launch.cuh"
#include "maps.cuh"
#include "problem.h"
#include "scores.cuh"
#include "sm80_ptx.cuh"

namespace stof {
namespace {

constexpr int kQueries = 16, kMostTiles = 1 << 14;
constexpr int kAlignment = 1024;  // of swizzled boxes
constexpr int kListed = 128;  // tiles listed at a time
constexpr int kMostSplits = 256, kMostInCluster = 8, kMergeThreads = 128;
#if __CUDA_ARCH__ >= 900
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

struct Call {
  CUtensorMap key, value;  // where the copy engine is used
  Problem p;
  ScoreMap map;
  float scale, slack;  // of scores, whose exponentials are to base 2; see RowSoftmax
  // Heads of a block, blocks that divide their rows, heads that share keys, blocks that divide keys.
  Divisor pack, takes, group, splits;
};

// A tile of keys or values in shared memory. Bulk: in boxes of 64 columns, swizzled as the copy engine
// does it; else row by row, an odd number of units of 16 bytes apart. Either way 8 rows at one column
// lie in different banks.
template <typename T, int D, bool Bulk>
struct Tile {
  static constexpr int kPitch = Bulk ? 64 : D + 8;
  T data[Bulk ? D / 64 : 1][kTile][kPitch];

  // Where the columns from 8 * half on of a row lie, and, from there, those 16 * i further on.
  __device__ __forceinline__ uint32_t start(int row, int half) const {
    return shared_address(data[0][row]) + ((Bulk ? half ^ row % 8 : half) * 16);
  }
  static __device__ __forceinline__ uint32_t further(uint32_t start, int i) {
    if constexpr (!Bulk) return start + 32 * i;
    return (start ^ i % 4 * 32) + i / 4 * (int)sizeof(data[0]);
  }
  __device__ __forceinline__ T& at(int row, int column) {
    if constexpr (!Bulk) return data[0][row][column];
    return data[column / 64][row][(column / 8 % 8 ^ row % 8) * 8 + column % 8];
  }
};

// Warps hold 8 * RowTiles rows each.
template <typename T, int D, int RowTiles, int RowWarps, bool Bulk, int Stages>
struct Shared {
  // Without the copy engine, or with large heads, there is no room for steps of two tiles.
  static constexpr int kWarps = Bulk && D <= 128 ? 8 : 4, kTiles = kWarps / 4, kThreads = 32 * kWarps;
  static constexpr int kProducers = Bulk ? 32 : 64, kAll = kThreads + kProducers;
  static constexpr int kGroups = kWarps / RowWarps, kRows = 8 * RowTiles * RowWarps;

  // What the groups of warps find. Padding keeps every other row in different banks.
  struct Results {
    float part[kGroups][kRows][D + 4];
    float2 part_ml[kGroups][kRows];
    // From the blocks of the cluster, for the elements that this one stores.
    float4 sent[kRows * D / 4 + kMostInCluster];
    float2 sent_ml[kRows * D / 4 + kMostInCluster];
  };

  union {
    Tile<T, D, Bulk> ring[Stages][kTiles][2];  // keys and values
    Results results;
  };
  // Of a step: the keys of each tile that are there and no padding, and what its tile rows see of them.
  struct Step {
    struct alignas(16) {
      uint64_t seen;
      int32_t content[2];
    } tile[kTiles];
    int32_t first_key[kTiles], tiles, last;
    int32_t second_query;  // the first of the block's queries that is in the second tile row
  } steps[Stages];
  uint64_t words[Stages][kTiles][kQueries];  // what each query sees of a partial tile
  uint64_t seen[kListed];
  int32_t tile[kListed], content[2][kListed], listed;
  uint64_t full[Stages], empty[Stages], received;
};

// Which of the 64 keys from `key` on are keys.
__device__ __forceinline__ uint64_t keys_there(const Problem& p, int key) {
  const uint64_t below = key < 0 ? ~0ull << -key : ~0ull;
  const int beyond = key + kTile - (int)p.kv_len;
  return beyond > 0 ? below & ~0ull >> beyond : below;
}

struct Run {
  int first, tiles, content;  // from the view's first tile on
};

// The part of the mask that a block's rows see.
struct View {
  int row, col;           // of query 0 and key 0 in the stored mask
  int first_tile, tiles;  // stored tiles that the view's keys lie in
  int begin, second, end;  // runs, and the first of the second tile row
  int second_query;       // the first of the block's queries that is in the second tile row
  bool two;               // whether there is one
  Run run;                // the lane's of the first 32 runs
  int low, count;         // tiles to share out, and the first, from first_tile on, where they follow each other
};

__device__ __forceinline__ Run load_run(const Mask& mask, const View& v, int i) {
  Run run = {0, 0, kEmpty};
  if (i < v.end) {
    const int first = mask.run_col[i] - v.first_tile;
    run.first = max(first, 0);
    run.tiles = max(min(first + mask.run_len[i], v.tiles) - run.first, 0);
    run.content = mask.run_bits[i];
  }
  return run;
}

// The lane's of the 32 runs from `first_run` on. Those of the first 32 are kept: few masks have more in a row.
__device__ __forceinline__ Run lane_run(const Mask& mask, const View& v, int first_run) {
  if (first_run == v.begin) return v.run;
  return load_run(mask, v, first_run + threadIdx.x % 32);
}

// Called by a warp.
__device__ __forceinline__ View find_view(const Problem& p, int pattern, int first_query, int last_query) {
  View v = {};
  const int kv_len = (int)p.kv_len;
  v.count = v.tiles = (kv_len + kTile - 1) / kTile;
  const Mask& mask = p.mask;
  if (!mask.row_ptr) return v;
  v.row = (int)(p.row_start ? *p.row_start : mask.row_start);
  v.col = (int)(p.col_start ? *p.col_start : mask.col_start);
  v.first_tile = v.col >> 6;
  v.tiles = ((v.col + kv_len - 1) >> 6) - v.first_tile + 1;
  const int tile_row = (v.row + first_query) >> 6, tile_rows = (int)mask.tile_rows;
  v.second_query = kTile - (v.row + first_query & (kTile - 1));
  v.two = last_query - first_query >= v.second_query;
  // Rows outside of the mask have no runs.
  const int32_t* row_ptr = mask.row_ptr + pattern * (mask.tile_rows + 1);
  auto begin = [&](int i) { return row_ptr[min(max(tile_row + i, 0), tile_rows)]; };
  v.begin = begin(0), v.second = begin(1), v.end = begin(v.two ? 2 : 1);
  int low = v.tiles, high = 0, held = 0;
  v.run = load_run(mask, v, v.begin + threadIdx.x % 32);
#pragma unroll 1
  for (int i = v.begin; i < v.end; i += 32) {
    const Run run = lane_run(mask, v, i);
    held += run.tiles;
    if (run.tiles) low = min(low, run.first), high = max(high, run.first + run.tiles);
  }
  if (v.two) {
    v.low = __reduce_min_sync(~0u, low);
    v.count = max(__reduce_max_sync(~0u, high) - v.low, 0);
  } else {
    v.count = __reduce_add_sync(~0u, held);
  }
  return v;
}

// Lists those of the n shared-out tiles from `begin` on that are held. Called by a warp.
template <typename S>
__device__ __forceinline__ void list_tiles(S& s, const Problem& p, const View& v, int batch, int begin, int n) {
  const int lane = threadIdx.x % 32;
  const bool follow = v.two || !p.mask.row_ptr;
  if (follow) {
#pragma unroll 1
    for (int e = lane; e < n; e += 32) {
      s.tile[e] = v.first_tile + v.low + begin + e;
      s.content[0][e] = s.content[1][e] = v.two ? kEmpty : kFull;
    }
    __syncwarp();
  }
  int before = 0;
#pragma unroll 1
  for (int i = v.begin; i < v.end; i += 32) {
    const Run run = lane_run(p.mask, v, i);
    int upto = run.tiles;
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
      const int other = __shfl_up_sync(~0u, upto, far);
      if (lane >= far) upto += other;
    }
    const int place = (follow ? run.first - v.low : before + upto - run.tiles) - begin;
    before += __shfl_sync(~0u, upto, 31);
    const int from = max(place, 0), to = min(place + run.tiles, n), tile = v.first_tile + run.first - place;
    auto list = [&](int e, int tile, int content, int row) {
      s.tile[e] = tile + e;
      s.content[row][e] = content;
    };
    if (to - from == 1) list(from, tile, run.content, i + lane >= v.second);
    for (uint32_t rest = __ballot_sync(~0u, to - from > 1); rest; rest &= rest - 1) {
      const int of = __ffs(rest) - 1, last = __shfl_sync(~0u, to, of), shift = __shfl_sync(~0u, tile, of);
      const int content = __shfl_sync(~0u, run.content, of);
#pragma unroll 1
      for (int e = __shfl_sync(~0u, from, of) + lane; e < last; e += 32) list(e, shift, content, i + of >= v.second);
    }
  }
  __syncwarp();
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += 32) {
    const int e = first + lane;
    const bool there = e < n;
    const int tile = there ? s.tile[e] : 0, content = there ? s.content[0][e] : kEmpty;
    const int other = there && v.two ? s.content[1][e] : content;
    const uint32_t held = __ballot_sync(~0u, content != kEmpty || other != kEmpty);
    if (held >> lane & 1) {
      const int at = kept + __popc(held & ((1u << lane) - 1)), key = tile * kTile - v.col;
      uint64_t seen = keys_there(p, key);
      if (p.kv_valid) {
        const uint64_t* valid = p.kv_valid + batch * p.valid_batch;
        // The tile's keys may lie in two words.
        const int w = key >> 6, words = ((int)p.kv_len + kTile - 1) / kTile, shift = key & 63;
        uint64_t x = w >= 0 ? valid[w] >> shift : 0;
        if (shift && w + 1 < words) x |= valid[w + 1] << (64 - shift);
        seen &= x;
      }
      s.seen[at] = seen;
      s.tile[at] = tile;
      s.content[0][at] = content;
      s.content[1][at] = other;
    }
    kept += __popc(held);
    __syncwarp();
  }
  if (lane == 0) s.listed = kept;
}

// Copies the rows of a tile that `seen` shows, zeros for the others; called by Threads of a block.
template <int Threads, typename T, int D>
__device__ __forceinline__ void copy_rows(Tile<T, D, false>& to, const T* from, int64_t stride, uint64_t seen) {
  constexpr int kChunks = D / 8;
#pragma unroll 8
  for (int i = 0; i < kTile * kChunks / Threads; ++i) {
    const int index = threadIdx.x % Threads + i * Threads, row = index / kChunks, chunk = index % kChunks;
    copy_async(shared_address(&to.at(row, 8 * chunk)), from + row * stride + 8 * chunk, seen >> row & 1);
  }
}

// Running softmax of the rows of a warp's tiles, whose scores lie transposed: lane l holds, at index
// 4 t + 2 k + c, the score of key l / 4 + 8 k and row 8 t + 2 (l % 4) + c, which has index 2 t + c here. As
// in fragments.cuh, m follows the largest score only when that has grown by more than `slack`.
template <int RowTiles>
struct RowSoftmax {
  static constexpr int kRows = 2 * RowTiles, kScores = 4 * RowTiles;
  float m[kRows], l[kRows];

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) m[r] = -INFINITY, l[r] = 0;
  }

  // Whether the output must be scaled by `factor` before this step's product is added.
  __device__ __forceinline__ bool update(const float (&s)[kScores], float scale, float slack, float (&factor)[kRows]) {
    float top[kRows];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = r / 2 * 4 + r % 2;
      top[r] = fmaxf(s[i], s[i + 2]);
      grown |= top[r] > m[r] + slack;
    }
    if (!__any_sync(~0u, grown)) return false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int far = 4; far < 32; far *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], far));
      const float next = fmaxf(m[r], top[r]);
      factor[r] = m[r] == -INFINITY ? 0.f : exp2_fast((m[r] - next) * scale);
      l[r] *= factor[r];
      m[r] = next;
    }
    return true;
  }

  // Scores become weights.
  __device__ __forceinline__ void weigh(float (&s)[kScores], float scale) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = r / 2 * 4 + r % 2;
      const float base = m[r] == -INFINITY ? 0.f : m[r] * scale;
      s[i] = exp2_fast(fmaf(s[i], scale, -base));
      s[i + 2] = exp2_fast(fmaf(s[i + 2], scale, -base));
      l[r] += s[i] + s[i + 2];
    }
  }
};

// The sum of what lanes with the same rows hold.
__device__ __forceinline__ float sum_of_row(float x) {
#pragma unroll
  for (int far = 4; far < 32; far *= 2) x += __shfl_xor_sync(~0u, x, far);
  return x;
}

// Adds the bias of the 16 keys from `first` on that the bits show. row: the lane's first of the rows of the
// heads from first_head on, which end before `rows`.
template <typename B, int RowTiles>
__device__ __forceinline__ void add_bias(float (&x)[4 * RowTiles], const Call& call, int batch, int first_head, int row,
                                         int rows, int first, uint32_t bits) {
  const ScoreMap& map = call.map;
  const B* bias = static_cast<const B*>(map.bias) + batch * map.bias_batch +
                  (first + (int)threadIdx.x % 32 / 4) * map.bias_col;
#pragma unroll
  for (int r = 0; r < 2 * RowTiles; ++r) {
    const int own = row + r / 2 * 8 + r % 2, query = call.pack.divide(own);
    const B* from = bias + (first_head + own - query * call.pack.by) * map.bias_head + query * map.bias_row;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = r / 2 * 4 + k * 2 + r % 2;
      if (own < rows && (bits >> i & 1)) x[i] += kLog2e * (float)from[8 * k * map.bias_col];
    }
  }
}

// A row's sum and the reference of its exponentials become its logarithm; returns the factor that its
// output takes. sink: a logit that takes part, or null.
__device__ __forceinline__ float finish_row(float& top, float total, const float* sink) {
  float mine = 1;
  if (sink) {
    const float logit = *sink * kLog2e, base = fmaxf(top, logit);
    mine = exp2_fast(top - base);
    total = total * mine + exp2_fast(logit - base);
    top = base;
  }
  top = total > 0 ? (top + __log2f(total)) * kLn2 : -INFINITY;
  return total > 0 ? __fdividef(mine, total) : 0.f;
}

// The producers' part: finds the tiles of the block's share, and copies them into the ring.
template <typename T, int D, bool Bulk, typename S>
__device__ __forceinline__ void produce(S& s, const Call& call, int batch, int first_head, int kv_head,
                                        int first_query, int last_query) {
  constexpr int kStages = sizeof(s.full) / sizeof(s.full[0]);
  const Problem& p = call.p;
  const int pattern =
      p.plan.pattern_id ? p.plan.pattern_id[batch * p.plan.pattern_batch + first_head * p.plan.pattern_head] : 0;
  const View view = find_view(p, pattern, first_query, last_query);
  const bool listed = p.mask.row_ptr || p.kv_valid;
  const T* keys = static_cast<const T*>(p.key) + batch * p.k.batch + kv_head * p.k.head;
  const T* values = static_cast<const T*>(p.value) + batch * p.v.batch + kv_head * p.v.head;
  // The query that this thread fetches words for, and of which of the step's tiles.
  const unsigned thread = threadIdx.x - S::kThreads;
  const int query = thread % kQueries, of = thread / kQueries;
  const bool fetches = p.mask.row_ptr && query <= last_query - first_query;
  const int row = (view.row + first_query + query) & (kTile - 1), list = query >= view.second_query;
  int slot = 0, phase = 0, start = call.splits.divide(view.count * blockIdx.x);
  const int end = call.splits.divide(view.count * (blockIdx.x + 1));
  bool last;
  do {
    const int first = start;
    int n = end - start;
    if (listed) {
      n = min(n, kListed);
      sync_part<S::kProducers>();
      if (thread < 32) list_tiles(s, p, view, batch, start, n);
      sync_part<S::kProducers>();
    }
    start += n;
    if (listed) n = s.listed;
    int e = 0;
    do {
      barrier_wait(&s.empty[slot], phase ^ 1);
      const int tiles = min(n - e, S::kTiles);
      last = start == end && e + tiles == n;
      if (fetches && of < tiles) {
        const int content = s.content[list][e + of];
        if (content >= 0)
          copy_word_async(shared_address(&s.words[slot][of][query]),
                          p.mask.tile_bits + (int64_t)content * kTile + row);
      }
      auto first_key = [&](int e) { return (listed ? s.tile[e] : first + e) * kTile - view.col; };
      if constexpr (!Bulk) {
        if (tiles) {
          const int key = first_key(e);
          const uint64_t seen = listed ? s.seen[e] : keys_there(p, key);
          copy_rows<S::kProducers>(s.ring[slot][0][0], keys + key * p.k.row, p.k.row, seen);
          copy_rows<S::kProducers>(s.ring[slot][0][1], values + key * p.v.row, p.v.row, seen);
        }
      }
      auto& step = s.steps[slot];
      if constexpr (Bulk) {
        // A thread a box.
        constexpr int kBoxes = D / 64;
        const int j = thread / (2 * kBoxes), i = thread / kBoxes % 2, box = thread % kBoxes;
        if (j < tiles)
          load_box(s.ring[slot][j][i].data[box], i ? &call.value : &call.key, &s.full[slot], 64 * box, first_key(e + j),
                   kv_head, batch);
      }
      if (thread < tiles) {
        const int at = e + thread, key = first_key(at);
        step.first_key[thread] = key;
        step.tile[thread].seen = listed ? s.seen[at] : keys_there(p, key);
        step.tile[thread].content[0] = listed ? s.content[0][at] : kFull;
        step.tile[thread].content[1] = listed ? s.content[1][at] : kFull;
      }
      __syncwarp();
      if (thread == 0) {
        step.tiles = tiles;
        step.last = last;
        step.second_query = view.second_query;
        if constexpr (Bulk)
          barrier_expect(&s.full[slot], tiles * (int)sizeof(s.ring[slot][0]));
        else
          barrier_arrive(&s.full[slot]);
      }
      barrier_arrive_copied(&s.full[slot]);
      if (++slot == kStages) slot = 0, phase ^= 1;
      e += tiles;
    } while (e < n);
  } while (!last);
}

// Makes values zero that have been copied though nobody may see them: weights of zero do not make up
// for what is no number. Called by a warp, for the 16 values from `first` on.
template <typename T, int D>
__device__ __forceinline__ void clear_values(Tile<T, D, true>& values, int first, uint64_t seen) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < 16 * D / 8; i += 32) {
    const int row = first + i / (D / 8);
    if (!(seen >> row & 1)) *reinterpret_cast<uint4*>(&values.at(row, i % (D / 8) * 8)) = make_uint4(0, 0, 0, 0);
  }
  // The copy engine writes here next.
  fence_async_proxy();
  __syncwarp();
}

// Combines `parts` parts (at most Most) of four elements of a row, given what their exponentials, to base 2,
// refer to and add up to; returns the same of all.
template <int Most, typename M, typename F>
__device__ __forceinline__ float4 combine_parts(int parts, float& top, float& total, M ml, F part) {
  float2 own[Most];
  float4 x[Most], sum = make_float4(0, 0, 0, 0);
  top = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < Most; ++i)
    if (i < parts) own[i] = ml(i), x[i] = part(i), top = fmaxf(top, own[i].x);
#pragma unroll
  for (int i = 0; i < Most; ++i)
    if (i < parts) {
      const float weight = top == -INFINITY ? 0.f : exp2_fast(own[i].x - top);
      total += weight * own[i].y;
      sum.x += weight * x[i].x, sum.y += weight * x[i].y;
      sum.z += weight * x[i].z, sum.w += weight * x[i].w;
    }
  return sum;
}

// Stores four elements of a row, counted from the block's first head on, and with the first its logarithm.
template <typename T, int D>
__device__ __forceinline__ void store_row(const Call& call, int row, int first_head, int batch, int column, float4 x,
                                          float top, float total) {
  const Problem& p = call.p;
  const int query = call.pack.divide(row), head = first_head + row - query * call.pack.by;
  const float factor = finish_row(top, total, p.sinks ? p.sinks + head : nullptr);
  const int64_t at = ((int64_t)batch * p.q_len + query) * p.heads + head;
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at * D + column) =
      make_uint2(pack<T>(x.x * factor, x.y * factor), pack<T>(x.z * factor, x.w * factor));
  if (column == 0 && p.lse) p.lse[((int64_t)batch * p.heads + head) * p.q_len + query] = top;
}

// How the blocks of a cluster divide what they find, four elements at a time: block i % blocks stores
// those at i.
struct Shares {
  int items, each;
  Divisor blocks;

  __device__ __forceinline__ Shares(int items, const Divisor& blocks)
      : items(items), each(blocks.divide(items + blocks.by - 1)), blocks(blocks) {}
  __device__ __forceinline__ int of(int block) const { return blocks.divide(items - block + blocks.by - 1); }
};

template <typename T, int D, int RowTiles, int RowWarps, bool General, bool Bulk, int Stages>
__device__ __forceinline__ void decode(const Call& call) {
  using S = Shared<T, D, RowTiles, RowWarps, Bulk, Stages>;
  constexpr int kGroups = S::kGroups, kKeys = S::kTiles * kTile / kGroups, kLaneRows = 2 * RowTiles;
  extern __shared__ __align__(kAlignment) unsigned char memory[];
  S& s = *reinterpret_cast<S*>(memory);
  const Problem& p = call.p;
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split = blockIdx.x, packed = call.takes.divide(blockIdx.y), take = blockIdx.y - packed * call.takes.by;
  const int first_row = take * S::kRows, rows = min((int)p.q_len * call.pack.by - first_row, S::kRows);
  const bool clustered = blocks_of_cluster() > 1;
  const Shares shares(rows * (D / 4), call.splits);
  if (thread == S::kThreads) {
#pragma unroll
    for (int i = 0; i < Stages; ++i) {
      barrier_init(&s.full[i], S::kProducers + 1);
      barrier_init(&s.empty[i], S::kWarps);
    }
    barrier_init(&s.received, 1);
    if constexpr (kHopper) fence_barrier_init();
    if constexpr (Bulk) {
      prefetch_map(&call.key);
      prefetch_map(&call.value);
    }
    if (clustered)
      barrier_expect(&s.received, shares.of(split) * call.splits.by * (int)(sizeof(float4) + sizeof(float2)));
  }
  __syncthreads();
  await_kernels_before();
  const bool producer = warp >= S::kWarps;
  const int group = warp / RowWarps, row_warp = warp % RowWarps;
  const int first_head = packed * call.pack.by, batch = blockIdx.z, kv_head = call.group.divide(first_head);
  const int first_query = call.pack.divide(first_row), last_query = call.pack.divide(first_row + rows - 1);

  // A lane's rows as they lie in results; see RowSoftmax.
  const int lane_row = row_warp * 8 * RowTiles + lane % 4 * 2;
  auto local_row = [&](int r) { return lane_row + r / 2 * 8 + r % 2; };
  uint32_t q[RowTiles][D / 16][2];
  RowSoftmax<RowTiles> softmax;
  float o[D / 16][RowTiles][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int t = 0; t < RowTiles; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) o[i][t][j] = 0;
  const int tile = group * kKeys / kTile, within = group * kKeys % kTile;
  // What the 16 keys from `own` on of the warp's tile add.
  auto compute = [&](int slot, int own) {
    using Ring = Tile<T, D, Bulk>;
    const uint32_t k = s.ring[slot][tile][0].start(own + lane / 8 % 2 * 8 + lane % 8, lane / 16);
    const uint32_t v = s.ring[slot][tile][1].start(own + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    // Chains of products: each waits for the one before it.
    constexpr int kChains = D / 16 < 4 / RowTiles ? D / 16 : 4 / RowTiles;
    float chain[kChains][4 * RowTiles] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t a[4];
      load_matrices(a, Ring::further(k, i));
#pragma unroll
      for (int t = 0; t < RowTiles; ++t) multiply_add<T>(chain[i % kChains] + 4 * t, a, q[t][i][0], q[t][i][1]);
    }
    // With few rows there are registers to have the values ready when the weights are.
    constexpr bool kEarly = RowTiles == 1 && D <= 128;
    uint32_t values[kEarly ? D / 16 : 1][4];
    auto load_values = [&] {
      if constexpr (kEarly)
#pragma unroll
        for (int i = 0; i < D / 16; ++i) load_transposed(values[i], Ring::further(v, i));
    };
    load_values();
    const auto& step = s.steps[slot];
    const auto held = step.tile[tile];
    uint32_t word = ~0u;
    if (~held.seen || held.content[0] != kFull || held.content[1] != kFull) {
      if constexpr (Bulk)
        if (~held.seen) {
          clear_values(s.ring[slot][tile][1], own, held.seen);
          load_values();
        }
      word = 0;
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const int query = min(call.pack.divide(first_row + local_row(r)), last_query) - first_query;
        const int content = query < step.second_query ? held.content[0] : held.content[1];
        const uint64_t bits = content >= 0 ? s.words[slot][tile][query] : content == kFull ? ~0ull : 0;
        const uint32_t mine = (uint32_t)((bits & held.seen) >> (own + lane / 4)), i = r / 2 * 4 + r % 2;
        word |= (mine & 1) << i | (mine >> 8 & 1) << (i + 2);
      }
    }
    float x[4 * RowTiles];
#pragma unroll
    for (int i = 0; i < 4 * RowTiles; ++i) {
      x[i] = chain[0][i];
#pragma unroll
      for (int j = 1; j < kChains; ++j) x[i] += chain[j][i];
    }
    if constexpr (General) map_scores(x, call.map);
    if constexpr (General) {
      if (call.map.bias) {
        const int first = step.first_key[tile] + own;
        auto add = [&](auto type) {
          add_bias<decltype(type), RowTiles>(x, call, batch, first_head, first_row + lane_row, first_row + rows, first,
                                             word);
        };
        if (call.map.bias_dtype == kFloat32)
          add(0.f);
        else if (call.map.bias_dtype == kFloat16)
          add(__half());
        else
          add(__nv_bfloat16());
      }
    }
    apply_bits(x, word);
    float factor[kLaneRows];
    if (softmax.update(x, call.scale, call.slack, factor)) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int t = 0; t < RowTiles; ++t)
#pragma unroll
          for (int j = 0; j < 4; ++j) o[i][t][j] *= factor[2 * t + j % 2];
    }
    softmax.weigh(x, call.scale);
    uint32_t weights[RowTiles][2];
#pragma unroll
    for (int t = 0; t < RowTiles; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) weights[t][i] = transpose(pack<T>(x[4 * t + 2 * i], x[4 * t + 2 * i + 1]));
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t(&a)[4] = values[kEarly ? i : 0];
      if constexpr (!kEarly) load_transposed(a, Ring::further(v, i));
#pragma unroll
      for (int t = 0; t < RowTiles; ++t) multiply_add<T>(o[i][t], a, weights[t][0], weights[t][1]);
    }
  };

  if (producer) {
    produce<T, D, Bulk>(s, call, batch, first_head, kv_head, first_query, last_query);
  } else {
#pragma unroll
    for (int t = 0; t < RowTiles; ++t) {
      const int local = row_warp * 8 * RowTiles + t * 8 + lane / 4, row = first_row + local;
      const int own = call.pack.divide(row);
      const T* from = static_cast<const T*>(p.query) + batch * p.q.batch + own * p.q.row +
                      (first_head + row - own * call.pack.by) * p.q.head + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        q[t][i / 2][i % 2] = local < rows ? *reinterpret_cast<const uint32_t*>(from + 8 * i) : 0;
    }
    int slot = 0, phase = 0;
    bool last;
    do {
      barrier_wait(&s.full[slot], phase);
      last = s.steps[slot].last;
      if (tile < s.steps[slot].tiles)
#pragma unroll 1
        for (int own = within; own < within + kKeys; own += 16) compute(slot, own);
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.empty[slot]);
      if (++slot == Stages) slot = 0, phase ^= 1;
    } while (!last);
  }

  launch_next_kernel();
  // The groups' results become one.
  __syncthreads();
  // Others may send once no block reads its ring any more.
  if (clustered) cluster_arrive();
  if (!producer) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const float l = sum_of_row(softmax.l[r]);
      const int local = local_row(r);
      if (local >= rows) continue;
      float* part = s.results.part[group][local] + lane / 4;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) part[8 * i] = o[i / 2][r / 2][i % 2 * 2 + r % 2];
      if (lane < 4) s.results.part_ml[group][local] = make_float2(softmax.m[r] * call.scale, l);
    }
  }
  __syncthreads();
  if (clustered) cluster_wait();
  const int64_t base = (int64_t)batch * p.q_len * p.heads;
#pragma unroll 1
  for (int i = thread; i < rows * (D / 4); i += S::kAll) {
    const int local = i / (D / 4), column = i % (D / 4) * 4;
    float top, total;
    float4 sum = combine_parts<kGroups>(
        kGroups, top, total, [&](int g) { return s.results.part_ml[g][local]; },
        [&](int g) { return *reinterpret_cast<const float4*>(&s.results.part[g][local][column]); });
    if (p.splits == 1) {
      store_row<T, D>(call, first_row + local, first_head, batch, column, sum, top, total);
    } else if (clustered) {
      const int in = shares.blocks.divide(i), to = i - in * shares.blocks.by, place = split * shares.each + in;
      send(&s.results.sent[place], &s.results.sent_ml[place], &s.received, to, sum, make_float2(top, total));
    } else {
      const int row = first_row + local, own_query = call.pack.divide(row);
      const int head = first_head + row - own_query * call.pack.by;
      const int64_t own = (base + (int64_t)own_query * p.heads + head) * p.splits + split;
      *reinterpret_cast<float4*>(p.workspace + own * D + column) = sum;
      float2* part_ml = reinterpret_cast<float2*>(p.workspace + p.batch * p.q_len * p.heads * p.splits * D);
      if (column == 0) part_ml[own] = make_float2(top, total);
    }
  }
  if (!clustered || thread >= shares.of(split)) return;
  barrier_wait_cluster(&s.received, 0);
#pragma unroll 1
  for (int i = thread; i < shares.of(split); i += S::kAll) {
    const int item = i * shares.blocks.by + split;
    float top, total;
    const float4 sum = combine_parts<kMostInCluster>(
        shares.blocks.by, top, total, [&](int other) { return s.results.sent_ml[other * shares.each + i]; },
        [&](int other) { return s.results.sent[other * shares.each + i]; });
    store_row<T, D>(call, first_row + item / (D / 4), first_head, batch, item % (D / 4) * 4, sum, top, total);
  }
}

template <typename T, int D, int RowTiles, int RowWarps, bool General, bool Bulk, int Stages>
__global__ void __launch_bounds__(Shared<T, D, RowTiles, RowWarps, Bulk, Stages>::kAll, 1)
    decode_kernel(const __grid_constant__ Call call) {
  if constexpr (!Bulk || kHopper) decode<T, D, RowTiles, RowWarps, General, Bulk, Stages>(call);
}

// Combines what the splits found, a block for each row: head, query, batch.
template <typename T, int D>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Call call) {
  constexpr int kWarps = kMergeThreads / 32;
  constexpr int kPairs = (D + 63) / 64;  // a lane's pairs of columns, 64 columns apart
  __shared__ float weights[kWarps][kMostSplits], parts[kWarps][D];
  const Problem& p = call.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, splits = (int)p.splits;
  const int head = blockIdx.x, query = blockIdx.y, batch = blockIdx.z;
  const int64_t row = (batch * p.q_len + query) * p.heads + head;
  const float* part = p.workspace + row * splits * D;
  const float2* ml =
      reinterpret_cast<const float2*>(p.workspace + p.batch * p.q_len * p.heads * splits * D) + row * splits;
  await_kernels_before();
  float top = -INFINITY, total = 0;
#pragma unroll 1
  for (int i = lane; i < splits; i += 32) top = fmaxf(top, ml[i].x);
#pragma unroll
  for (int far = 16; far > 0; far /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, far));
#pragma unroll 1
  for (int i = lane; i < splits; i += 32) {
    const float2 own = ml[i];
    const float weight = top == -INFINITY ? 0.f : exp2_fast(own.x - top);
    weights[warp][i] = weight;
    total += weight * own.y;
  }
#pragma unroll
  for (int far = 16; far > 0; far /= 2) total += __shfl_xor_sync(~0u, total, far);
  __syncwarp();
  float2 sum[kPairs] = {};
#pragma unroll 4
  for (int i = warp; i < splits; i += kWarps) {
    const float weight = weights[warp][i];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int column = 64 * j + 2 * lane;
      if (column >= D) continue;
      const float2 x = *reinterpret_cast<const float2*>(part + (int64_t)i * D + column);
      sum[j].x += weight * x.x;
      sum[j].y += weight * x.y;
    }
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j)
    if (64 * j + 2 * lane < D) *reinterpret_cast<float2*>(&parts[warp][64 * j + 2 * lane]) = sum[j];
  __syncthreads();
  const float factor = finish_row(top, total, p.sinks ? p.sinks + head : nullptr);
  if (threadIdx.x == 0 && p.lse) p.lse[(batch * p.heads + head) * p.q_len + query] = top;
  for (int i = threadIdx.x; i < D / 2; i += kMergeThreads) {
    float2 x = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x.x += parts[w][2 * i], x.y += parts[w][2 * i + 1];
    reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * D)[i] = pack<T>(x.x * factor, x.y * factor);
  }
}

template <typename T, int D, int RowTiles, int RowWarps, bool General, bool Bulk, int Stages>
const char* launch(Call& call, cudaStream_t stream) {
  using S = Shared<T, D, RowTiles, RowWarps, Bulk, Stages>;
  constexpr int kBytes = (int)sizeof(S);
  static Launcher launcher, merger;
  const Problem& p = call.p;
  const auto kernel = decode_kernel<T, D, RowTiles, RowWarps, General, Bulk, Stages>;
  cudaError_t error = launcher.prepare(kernel, p.device, kBytes);
  if (error == cudaSuccess) error = merger.prepare(merge_kernel<T, D>, p.device, 0);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  call.takes = Divisor((p.q_len * call.pack.by + S::kRows - 1) / S::kRows);
  const dim3 grid((unsigned)p.splits, (unsigned)(call.takes.by * p.heads / call.pack.by), (unsigned)p.batch);
  const bool clustered = p.splits > 1 && p.splits <= kMostInCluster && launcher.is_hopper();
  error = launcher.launch(kernel, grid, S::kAll, kBytes, clustered ? (int)p.splits : 1, stream, call);
  if (error == cudaSuccess && p.splits > 1 && !clustered)
    error =
        merger.launch(merge_kernel<T, D>, dim3((unsigned)p.heads, (unsigned)p.q_len, (unsigned)p.batch),
                      kMergeThreads, 0, 1, stream, call);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__global__ void probe_kernel() {}

// Whether kernels of this library may use what Hopper brought.
bool is_hopper(int64_t device) {
  static Launcher probe;
  probe.prepare(probe_kernel, device, 0);
  return probe.is_hopper();
}

template <typename T, int D, int RowTiles, int RowWarps, bool General>
const char* launch(Call& call, cudaStream_t stream) {
  constexpr int kDeep = D <= 64 ? 6 : 3;
  const Problem& p = call.p;
  if constexpr (D % 64 == 0) {
    int most = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)p.device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    constexpr int kNeeded = (int)sizeof(Shared<T, D, RowTiles, RowWarps, true, kDeep>);
    if (most >= kNeeded && is_hopper(p.device)) {
      const Encode encode = find_encode();
      if (!encode) return kNoEncode;
      if (!make_map<T>(call.key, encode, p.key, p.k, D, p.kv_len, p.kv_heads, p.batch, kTile) ||
          !make_map<T>(call.value, encode, p.value, p.v, D, p.kv_len, p.kv_heads, p.batch, kTile))
        return kNoMap;
      return launch<T, D, RowTiles, RowWarps, General, true, kDeep>(call, stream);
    }
  }
  // Two stages fit into the 99 KB of the smallest multiprocessors up to head size 128.
  constexpr int kStages = D <= 64 ? 4 : 2;
  return launch<T, D, RowTiles, RowWarps, General, false, kStages>(call, stream);
}

template <typename T, int D>
const char* run(const Problem& p, cudaStream_t stream) {
  if (p.q_len > kQueries || p.splits > kMostSplits || p.kv_len > (kMostTiles - 1) * (int64_t)kTile)
    return "the decode kernel takes at most 16 queries, 256 splits and 1,000,000 keys";
  const int group = (int)(p.heads / p.kv_heads);
  Call call = {
      {}, {}, p, ScoreMap(p), (float)(p.scale * kLog2e), 0, Divisor(p.plan.pattern_head ? 1 : group), Divisor(1),
      Divisor(group), Divisor(p.splits)};
  // Running maxima are kept of unscaled scores: a scale must not make differences of them vanish.
  const bool general = p.softcap != 0 || p.bias || !(p.scale > 1e-30);
  if (general) call.scale = 1;
  call.slack = kSlack / call.scale;
  const int64_t rows = p.q_len * call.pack.by;
  if (rows <= 8) return general ? launch<T, D, 1, 1, true>(call, stream) : launch<T, D, 1, 1, false>(call, stream);
  if (rows <= 16) return general ? launch<T, D, 2, 1, true>(call, stream) : launch<T, D, 2, 1, false>(call, stream);
  if (rows <= 32) return general ? launch<T, D, 2, 2, true>(call, stream) : launch<T, D, 2, 2, false>(call, stream);
  return general ? launch<T, D, 2, 4, true>(call, stream) : launch<T, D, 2, 4, false>(call, stream);
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::Problem* problem, void* stream) {
  return stof::run<STOF_DTYPE, STOF_HEAD_DIM>(*problem, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::Problem); }
