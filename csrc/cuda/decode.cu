// Attention of at most 16 queries, as in decoding: memory-bound, so everything serves to keep loads
// of keys and values in flight.
//
// Tiling: the rows of a block are those of all heads that share keys, for every query: 16, 32 or 64
// of them, 16 to a warp. Its warps, 4 to a tile of 64 keys, divide the keys of a step: with 16 rows each
// takes 16 keys, with 64 rows four share 64. Blocks divide the tiles of a row between them
// (Problem::splits).
//
// Pipeline: further warps copy tiles into a ring, so that addresses and copies never hold up the
// products, which are mma.sync. From sm_90 on the copy engine does it, for head sizes of whole boxes of
// 64 columns; elsewhere cp.async. Where clusters exist, the blocks of a row form one, and send each
// other what they find of the elements that the other stores; else, or where they are too many, a
// second kernel combines. Both in fixed order.
//
// Masks need no plan: a block reads the runs of its one or two tile rows (row_start may lie on the
// device, and rows may begin anywhere), marks the tiles that they hold in a bitmap, and takes its
// share of these. Keys that padding hides, or that lie outside the view, are not read: zeros stand
// in for them.
//
// Limits: rows aligned to 16 bytes, values as wide as keys, at most kMostTiles key tiles.
#include <cuda_runtime.h>

#include "fragments.cuh"
#include "launch.cuh"
#include "maps.cuh"
#include "problem.h"
#include "scores.cuh"
#include "sm80_ptx.cuh"

namespace stof {
namespace {

constexpr int kQueries = 16, kMapWords = 512, kMostTiles = 32 * kMapWords;
constexpr int kAlignment = 1024;  // of swizzled boxes
constexpr int kListed = 128;  // tiles listed at a time
constexpr int kMostSplits = 256, kMostInCluster = 8, kMergeThreads = 128;

struct Call {
  CUtensorMap key, value;  // where the copy engine is used
  Problem p;
  ScoreMap map;
  float scale;  // of scores, whose exponentials are to base 2
  int pack, takes;  // heads of a block, blocks that divide their rows
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

template <typename T, int D, int RowWarps, bool Bulk, int Stages>
struct Shared {
  // Without the copy engine, or with large heads, there is no room for steps of two tiles.
  static constexpr int kWarps = Bulk && D <= 128 ? 8 : 4, kTiles = kWarps / 4, kThreads = 32 * kWarps;
  static constexpr int kProducers = Bulk ? 32 : 64, kAll = kThreads + kProducers;
  static constexpr int kGroups = kWarps / RowWarps, kKeys = kTiles * kTile / kGroups, kRows = 16 * RowWarps;

  // What the groups of warps find. Padding keeps rows in different banks.
  struct Results {
    float part[kGroups][kRows][D + 8];
    float2 part_ml[kGroups][kRows];
    // From the blocks of the cluster, for the elements that this one stores.
    float4 sent[kRows * D / 4 + kMostInCluster];
    float2 sent_ml[kRows * D / 4 + kMostInCluster];
  };

  union {
    Tile<T, D, Bulk> ring[Stages][kTiles][2];  // keys and values
    Results results;
  };
  uint64_t words[Stages][kTiles][kQueries];  // what each query sees of a partial tile
  uint64_t seen[kListed];            // the keys of a tile that are there and no padding
  int32_t tile[kListed], content[2][kListed];
  uint32_t held[kMapWords];  // bit t: tile first_tile + t is held
  int32_t before[kMapWords];  // tiles held before each word
  int32_t sums[kMapWords / 128];
  uint64_t full[Stages], empty[Stages], received;
};

// The part of the mask that a block's rows see.
struct View {
  int64_t row, col;     // of query 0 and key 0 in the stored mask
  int first_tile, tiles;  // stored tiles that the view's keys lie in
  int begin[2], end[2];   // runs of its first tile row and of the next
  int tile_row;
};

__device__ __forceinline__ View find_view(const Problem& p, int pattern, int first_query, int last_query) {
  View v = {};
  v.tiles = (int)((p.kv_len + kTile - 1) / kTile);
  const Mask& mask = p.mask;
  if (!mask.row_ptr) return v;
  v.row = p.row_start ? *p.row_start : mask.row_start;
  v.col = p.col_start ? *p.col_start : mask.col_start;
  v.first_tile = (int)(v.col >> 6);
  v.tiles = (int)((v.col + p.kv_len - 1) >> 6) - v.first_tile + 1;
  v.tile_row = (int)((v.row + first_query) >> 6);
  const int rows = (int)((v.row + last_query) >> 6) - v.tile_row + 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = v.tile_row + i;
    if (i >= rows || at < 0 || at >= mask.tile_rows) continue;
    const int32_t* entry = mask.row_ptr + pattern * (mask.tile_rows + 1) + at;
    v.begin[i] = entry[0];
    v.end[i] = entry[1];
  }
  return v;
}

// Calls f(first tile, tiles, content, lane, lanes) for the runs of a tile row: once by a lane of its own
// where a run is a single tile, by all lanes of a warp where it is longer. Tiles count from first_tile.
template <int Threads, typename F>
__device__ __forceinline__ void for_runs(const Mask& mask, const View& v, int begin, int end, F f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = begin + 32 * warp; i < end; i += Threads) {
    int first = 0, last = 0, content = kEmpty;
    if (i + lane < end) {
      first = mask.run_col[i + lane] - v.first_tile;
      last = min(first + mask.run_len[i + lane], v.tiles);
      first = max(first, 0);
      content = mask.run_bits[i + lane];
    }
    if (last - first == 1) f(first, 1, content, 0, 1);
    for (uint32_t rest = __ballot_sync(~0u, last - first > 1); rest; rest &= rest - 1) {
      const int from = __ffs(rest) - 1;
      const int start = __shfl_sync(~0u, first, from), end = __shfl_sync(~0u, last, from);
      f(start, end - start, __shfl_sync(~0u, content, from), lane, 32);
    }
  }
}

// Marks the tiles that the view's rows hold, and returns how many they are.
template <typename S>
__device__ __forceinline__ int mark_tiles(S& s, const Mask& mask, const View& v) {
  const int thread = threadIdx.x, words = (v.tiles + 31) / 32;
  for (int w = thread; w < words; w += S::kAll) s.held[w] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for_runs<S::kAll>(mask, v, v.begin[i], v.end[i], [&](int first, int n, int, int lane, int lanes) {
      for (int w = first / 32 + lane; w <= (first + n - 1) / 32; w += lanes) {
        const int low = max(first - 32 * w, 0), high = min(first + n - 32 * w, 32);
        atomicOr(&s.held[w], (~0u >> (32 - (high - low))) << low);
      }
    });
  __syncthreads();
  // Each thread of the first warps adds up 4 words.
  const int own = thread * 4, warp = thread / 32;
  int count[4], sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    count[i] = sum;
    sum += own + i < words ? __popc(s.held[own + i]) : 0;
  }
  int upto = sum;
  for (int far = 1; far < 32; far *= 2) {
    const int other = __shfl_up_sync(~0u, upto, far);
    if (thread % 32 >= far) upto += other;
  }
  if (thread % 32 == 31 && warp < kMapWords / 128) s.sums[warp] = upto;
  __syncthreads();
  int total = 0, base = upto - sum;
#pragma unroll
  for (int w = 0; w < kMapWords / 128; ++w) {
    base += w < warp ? s.sums[w] : 0;
    total += s.sums[w];
  }
  if (warp < kMapWords / 128)
#pragma unroll
    for (int i = 0; i < 4; ++i) s.before[own + i] = base + count[i];
  return total;
}

// Which of the 64 keys from `key` on are keys.
__device__ __forceinline__ uint64_t keys_there(const Problem& p, int64_t key) {
  const uint64_t below = key < 0 ? ~0ull << -key : ~0ull;
  return key + kTile > p.kv_len ? below & ~0ull >> (key + kTile - p.kv_len) : below;
}

// Lists the held tiles begin .. end - 1, at most kListed of them.
template <typename S>
__device__ __forceinline__ void list_tiles(S& s, const Problem& p, const View& v, int batch, int begin, int end) {
  const int thread = threadIdx.x;
  const bool masked = p.mask.row_ptr;
  __syncthreads();
  if (masked) {
    for (int e = thread; e < kListed; e += S::kAll) s.content[0][e] = s.content[1][e] = kEmpty;
    for (int w = thread; w < (v.tiles + 31) / 32; w += S::kAll) {
      int rank = s.before[w] - begin;
      for (uint32_t rest = s.held[w]; rest; rest &= rest - 1, ++rank)
        if (rank >= 0 && rank < end - begin) s.tile[rank] = v.first_tile + 32 * w + __ffs(rest) - 1;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for_runs<S::kAll>(p.mask, v, v.begin[i], v.end[i], [&](int first, int n, int content, int lane, int lanes) {
        const int rank = s.before[first / 32] + __popc(s.held[first / 32] & ((1u << first % 32) - 1)) - begin;
        for (int e = max(rank, 0) + lane; e < min(rank + n, end - begin); e += lanes) s.content[i][e] = content;
      });
  }
  for (int e = thread; e < end - begin; e += S::kAll) {
    if (!masked) {
      s.tile[e] = begin + e;
      s.content[0][e] = kFull;
    }
    const int64_t key = (int64_t)s.tile[e] * kTile - v.col;
    uint64_t seen = keys_there(p, key);
    if (p.kv_valid) {
      const uint64_t* valid = p.kv_valid + batch * p.valid_batch;
      // The tile's keys may lie in two words.
      const int64_t w = key >> 6, words = (p.kv_len + kTile - 1) / kTile;
      const int shift = (int)(key & 63);
      uint64_t x = w >= 0 ? valid[w] >> shift : 0;
      if (shift && w + 1 < words) x |= valid[w + 1] << (64 - shift);
      seen &= x;
    }
    s.seen[e] = seen;
  }
  __syncthreads();
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

// Adds the bias of the keys that the bits show, 8 a group from key `first` on. at: the lane's rows of
// [Sq, H].
template <typename B, int N>
__device__ __forceinline__ void add_bias(float (&x)[N], const ScoreMap& map, int batch, const int (&at)[2], int heads,
                                         int64_t first, uint32_t bits) {
  const B* row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r)
    row[r] = static_cast<const B*>(map.bias) + batch * map.bias_batch + at[r] % heads * map.bias_head +
             at[r] / heads * map.bias_row;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t key = first + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (at[i / 2 % 2] >= 0 && (bits >> i & 1)) x[i] += kLog2e * (float)row[i / 2 % 2][key * map.bias_col];
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

// The producers' part: copies the listed tiles into the ring.
template <typename T, int D, bool Bulk, typename S>
__device__ __forceinline__ void produce(S& s, const Call& call, const View& view, int batch, int kv_head,
                                        int first_query, int queries, int start, int n, int& slot,
                                        int& phase) {
  constexpr int kStages = sizeof(s.full) / sizeof(s.full[0]);
  const Problem& p = call.p;
  const T* keys = static_cast<const T*>(p.key) + batch * p.k.batch + kv_head * p.k.head;
  const T* values = static_cast<const T*>(p.value) + batch * p.v.batch + kv_head * p.v.head;
  // The query that this thread fetches words for, and of which of the step's tiles.
  const int thread = threadIdx.x - S::kThreads, query = thread % kQueries, of = thread / kQueries;
  const int64_t row = view.row + first_query + query;
  const int list = (int)(row >> 6) - view.tile_row;
  const bool listed = p.mask.row_ptr || p.kv_valid;
  auto first_key = [&](int e) { return (int64_t)(listed ? s.tile[e] : start + e) * kTile - view.col; };
  for (int e = 0; e < n; e += S::kTiles) {
    barrier_wait(&s.empty[slot], phase ^ 1);
    if (p.mask.row_ptr && query < queries && of < S::kTiles && e + of < n) {
      const int content = s.content[list][e + of];
      if (content >= 0)
        copy_word_async(shared_address(&s.words[slot][of][query]),
                        p.mask.tile_bits + (int64_t)content * kTile + row % kTile);
    }
    if constexpr (Bulk) {
#if __CUDA_ARCH__ >= 900
      if (thread == 0) {
        const int tiles = min(n - e, S::kTiles);
        barrier_expect(&s.full[slot], tiles * (int)sizeof(s.ring[slot][0]));
#pragma unroll
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < tiles; ++j)
#pragma unroll
            for (int column = 0; column < D; column += 64)
              load_box(s.ring[slot][j][i].data[column / 64], i ? &call.value : &call.key, &s.full[slot], column,
                       (int)first_key(e + j), kv_head, batch);
      }
#endif
    } else {
      const int64_t first = first_key(e);
      const uint64_t seen = listed ? s.seen[e] : keys_there(p, first);
      copy_rows<S::kProducers>(s.ring[slot][0][0], keys + first * p.k.row, p.k.row, seen);
      copy_rows<S::kProducers>(s.ring[slot][0][1], values + first * p.v.row, p.v.row, seen);
    }
    barrier_arrive_copied(&s.full[slot]);
    if (++slot == kStages) slot = 0, phase ^= 1;
  }
}

// Makes values zero that have been copied though nobody may see them: weights of zero do not make up
// for what is no number. Called by a warp, for the 16 values from `first` on.
template <typename T, int D>
__device__ __forceinline__ void clear_values(Tile<T, D, true>& values, int first, uint64_t seen) {
  for (int i = threadIdx.x % 32; i < 16 * D / 8; i += 32) {
    const int row = first + i / (D / 8);
    if (!(seen >> row & 1)) *reinterpret_cast<uint4*>(&values.at(row, i % (D / 8) * 8)) = make_uint4(0, 0, 0, 0);
  }
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
  const int query = row / call.pack, head = first_head + row - query * call.pack;
  const float factor = finish_row(top, total, p.sinks ? p.sinks + head : nullptr);
  const int64_t at = ((int64_t)batch * p.q_len + query) * p.heads + head;
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at * D + column) =
      make_uint2(pack<T>(x.x * factor, x.y * factor), pack<T>(x.z * factor, x.w * factor));
  if (column == 0) p.lse[((int64_t)batch * p.heads + head) * p.q_len + query] = top;
}

// How a cluster of `blocks` divides a block's elements, four at a time: block i % blocks stores those at i.
struct Shares {
  int items, blocks, each;

  __device__ __forceinline__ Shares(int items, int blocks)
      : items(items), blocks(blocks), each((items + blocks - 1) / blocks) {}
  __device__ __forceinline__ int of(int block) const { return (items - block + blocks - 1) / blocks; }
};

template <typename T, int D, int RowWarps, bool General, bool Bulk, int Stages>
__global__ void __launch_bounds__(Shared<T, D, RowWarps, Bulk, Stages>::kAll)
    decode_kernel(const __grid_constant__ Call call) {
#if __CUDA_ARCH__ < 900
  // Never launched there.
  if constexpr (Bulk) return;
#endif
  using S = Shared<T, D, RowWarps, Bulk, Stages>;
  constexpr int kKeys = S::kKeys, kSteps = kKeys / 16, kGroups = S::kGroups;
  extern __shared__ unsigned char memory[];
  S& s = *reinterpret_cast<S*>(memory + (-shared_address(memory) & (kAlignment - 1)));
  const Problem& p = call.p;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const bool producer = warp >= S::kWarps;
  const int group = warp / RowWarps, row_warp = warp % RowWarps;
  const int split = blockIdx.x, take = blockIdx.y % call.takes, first_head = blockIdx.y / call.takes * call.pack;
  const int batch = blockIdx.z, kv_head = first_head / (int)(p.heads / p.kv_heads);
  const int first_row = take * S::kRows, rows = min((int)p.q_len * call.pack - first_row, S::kRows);
  const int first_query = first_row / call.pack, last_query = (first_row + rows - 1) / call.pack;

  const bool clustered = blocks_of_cluster() > 1;
  const Shares shares(rows * (D / 4), clustered ? (int)p.splits : 1);
  if (thread < Stages) {
    barrier_init(&s.full[thread], S::kProducers + Bulk);
    barrier_init(&s.empty[thread], S::kWarps);
  }
  if (thread == 0) {
    barrier_init(&s.received, 1);
    if (clustered) barrier_expect(&s.received, shares.of(split) * shares.blocks * (int)(sizeof(float4) + sizeof(float2)));
  }
  if constexpr (Bulk) {
    if (thread < Stages || thread == 0) fence_barrier_init();
    if (thread == S::kThreads) {
      prefetch_map(&call.key);
      prefetch_map(&call.value);
    }
  }
  // Rows of a lane: where they lie in [Sq, H], and which of the block's queries they are of.
  int at[2], query[2];
  const T* from[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int local = row_warp * 16 + lane / 4 + 8 * r, row = first_row + local;
    const bool there = !producer && local < rows;
    const int own = there ? row / call.pack : first_query, head = there ? first_head + row - own * call.pack : first_head;
    at[r] = there ? own * (int)p.heads + head : -1;
    query[r] = own - first_query;
    from[r] = static_cast<const T*>(p.query) + batch * p.q.batch + head * p.q.head + own * p.q.row + lane % 4 * 2;
  }
  __syncthreads();
  await_kernels_before();
  uint32_t q[D / 16][4];
  if (!producer) {
#pragma unroll
    for (int i = 0; i < 2 * D / 16; ++i) {
      q[i / 2][i % 2 * 2] = at[0] >= 0 ? *reinterpret_cast<const uint32_t*>(from[0] + 8 * i) : 0;
      q[i / 2][i % 2 * 2 + 1] = at[1] >= 0 ? *reinterpret_cast<const uint32_t*>(from[1] + 8 * i) : 0;
    }
  }
  const int pattern =
      p.plan.pattern_id ? p.plan.pattern_id[batch * p.plan.pattern_batch + first_head * p.plan.pattern_head] : 0;
  const View view = find_view(p, pattern, first_query, last_query);
  const bool listed = p.mask.row_ptr || p.kv_valid;
  const int count = p.mask.row_ptr ? mark_tiles(s, p.mask, view) : view.tiles;
  const int begin = (int)((int64_t)count * split / p.splits), end = (int)((int64_t)count * (split + 1) / p.splits);

  Softmax softmax;
  float o[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0;
  const float slack = 8 / call.scale;
  // Which of the two lists of tiles a lane's rows are in, and the last of the block's.
  const int last_list = (int)((view.row + last_query) >> 6) - view.tile_row;
  int list[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) list[r] = producer ? 0 : (int)((view.row + first_query + query[r]) >> 6) - view.tile_row;

  // 16 keys at a time, or as many as there are registers for.
  constexpr int kParts = D > 128 || kSteps == 1 ? 1 : 2;
  const int tile = group * kKeys / kTile, within = group * kKeys % kTile;
  auto compute = [&](int start, int e, int slot, int at_key, bool& cleared) {
    const int own = within + at_key;
    using Ring = Tile<T, D, Bulk>;
    const uint32_t k = s.ring[slot][tile][0].start(own + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const uint32_t v = s.ring[slot][tile][1].start(own + lane / 8 % 2 * 8 + lane % 8, lane / 16);
    constexpr int kFar = 16 * Ring::kPitch * (int)sizeof(T);  // from 16 rows to the next
    const uint64_t seen = listed ? s.seen[e] : keys_there(p, (int64_t)(start + e) * kTile);
    if constexpr (Bulk)
      if (~seen) {
        for (int j = 0; j < kParts; ++j) clear_values(s.ring[slot][tile][1], own + 16 * j, seen);
        cleared = true;
      }
    uint32_t word = ~0u;
    const bool whole = !~seen && (!listed || (s.content[0][e] == kFull && s.content[last_list][e] == kFull));
    if (!whole) {
      word = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int content = listed ? s.content[list[r]][e] : kFull;
        const uint64_t bits = (content >= 0 ? s.words[slot][tile][query[r]] : content == kFull ? ~0ull : 0) & seen;
        const uint64_t mine = bits >> (own + lane % 4 * 2);
#pragma unroll
        for (int i = 2 * r; i < 8 * kParts; i += i % 2 ? 3 : 1)
          word |= (uint32_t)(mine >> (i / 4 * 8 + i % 2) & 1) << i;
      }
    }
    // Two chains of products: each waits for the one before it.
    float x[8 * kParts], odd[8 * kParts];
#pragma unroll
    for (int i = 0; i < 8 * kParts; ++i) x[i] = odd[i] = 0;
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        uint32_t b[4];
        load_matrices(b, Ring::further(k, i) + j * kFar);
        float* sum = kParts == 1 && i % 2 ? odd : x;
        multiply_add<T>(sum + 8 * j, q[i], b[0], b[1]);
        multiply_add<T>(sum + 8 * j + 4, q[i], b[2], b[3]);
      }
#pragma unroll
    for (int i = 0; i < 8 * kParts; ++i) x[i] += odd[i];
    if constexpr (General) map_scores(x, call.map);
    if constexpr (General) {
      if (call.map.bias) {
        const int64_t first = (int64_t)(listed ? s.tile[e] : start + e) * kTile - view.col + own;
        if (call.map.bias_dtype == kFloat32)
          add_bias<float>(x, call.map, batch, at, (int)p.heads, first, word);
        else if (call.map.bias_dtype == kFloat16)
          add_bias<__half>(x, call.map, batch, at, (int)p.heads, first, word);
        else
          add_bias<__nv_bfloat16>(x, call.map, batch, at, (int)p.heads, first, word);
      }
    }
    if (!whole) apply_bits(x, word);
    float factor[2];
    if (softmax.update(x, call.scale, slack, factor)) scale_rows(o, factor);
    softmax.weigh<T>(x, call.scale);
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = pack<T>(x[8 * j + 2 * i], x[8 * j + 2 * i + 1]);
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        uint32_t b[4];
        load_transposed(b, Ring::further(v, i) + j * kFar);
        multiply_add<T>(o + 8 * i, a, b[0], b[1]);
        multiply_add<T>(o + 8 * i + 4, a, b[2], b[3]);
      }
    }
  };

  int slot = 0, phase = 0;
  for (int start = begin, n; start < end; start += n) {
    n = listed ? min(end - start, kListed) : end - start;
    if (listed) list_tiles(s, p, view, batch, start, start + n);
    if (producer) {
      produce<T, D, Bulk>(s, call, view, batch, kv_head, first_query, last_query - first_query + 1, start, n, slot,
                          phase);
    } else {
      for (int e = tile; e < n + tile; e += S::kTiles) {
        barrier_wait(&s.full[slot], phase);
        bool cleared = false;
        if (e < n)
          for (int at_key = 0; at_key < kKeys; at_key += 16 * kParts) compute(start, e, slot, at_key, cleared);
        if (Bulk && cleared) fence_async_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.empty[slot]);
        if (++slot == Stages) slot = 0, phase ^= 1;
      }
    }
  }

  launch_next_kernel();
  // The groups' results become one.
  __syncthreads();
  if (!producer) {
    const float l[2] = {quad_sum(softmax.l[0]), quad_sum(softmax.l[1])};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (at[r] < 0) continue;
      const int local = row_warp * 16 + lane / 4 + 8 * r;
      float* part = s.results.part[group][local] + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        *reinterpret_cast<float2*>(part + 8 * i) = make_float2(o[4 * i + 2 * r], o[4 * i + 2 * r + 1]);
      if (lane % 4 == 0) s.results.part_ml[group][local] = make_float2(softmax.m[r] * call.scale, l[r]);
    }
  }
  __syncthreads();
  // Others may send once every block has come here.
  if (clustered) {
    cluster_arrive();
    cluster_wait();
  }
  const int64_t base = (int64_t)batch * p.q_len * p.heads;
  for (int i = thread; i < rows * (D / 4); i += S::kAll) {
    const int local = i / (D / 4), column = i % (D / 4) * 4;
    float top, total;
    float4 sum = combine_parts<kGroups>(
        kGroups, top, total, [&](int g) { return s.results.part_ml[g][local]; },
        [&](int g) { return *reinterpret_cast<const float4*>(&s.results.part[g][local][column]); });
    if (p.splits == 1) {
      store_row<T, D>(call, first_row + local, first_head, batch, column, sum, top, total);
    } else if (clustered) {
      const int to = i % shares.blocks, place = split * shares.each + i / shares.blocks;
      send(&s.results.sent[place], &s.results.sent_ml[place], &s.received, to, sum, make_float2(top, total));
    } else {
      const int row = first_row + local, own_query = row / call.pack, head = first_head + row - own_query * call.pack;
      const int64_t own = (base + (int64_t)own_query * p.heads + head) * p.splits + split;
      *reinterpret_cast<float4*>(p.workspace + own * D + column) = sum;
      float2* part_ml = reinterpret_cast<float2*>(p.workspace + p.batch * p.q_len * p.heads * p.splits * D);
      if (column == 0) part_ml[own] = make_float2(top, total);
    }
  }
  if (!clustered || thread >= shares.of(split)) return;
  barrier_wait_cluster(&s.received, 0);
  for (int i = thread; i < shares.of(split); i += S::kAll) {
    const int item = i * shares.blocks + split;
    float top, total;
    const float4 sum = combine_parts<kMostInCluster>(
        shares.blocks, top, total, [&](int other) { return s.results.sent_ml[other * shares.each + i]; },
        [&](int other) { return s.results.sent[other * shares.each + i]; });
    store_row<T, D>(call, first_row + item / (D / 4), first_head, batch, item % (D / 4) * 4, sum, top, total);
  }
}

// Combines what the splits found, a block for each row of [B, Sq, H].
template <typename T, int D>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Call call) {
  constexpr int kWarps = kMergeThreads / 32;
  constexpr int kPairs = (D + 63) / 64;  // a lane's pairs of columns, 64 columns apart
  __shared__ float weights[kWarps][kMostSplits], parts[kWarps][D];
  const Problem& p = call.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, splits = (int)p.splits;
  const int64_t row = blockIdx.x;
  const int head = (int)(row % p.heads);
  const float* part = p.workspace + row * splits * D;
  const float2* ml =
      reinterpret_cast<const float2*>(p.workspace + p.batch * p.q_len * p.heads * splits * D) + row * splits;
  await_kernels_before();
  float top = -INFINITY, total = 0;
  for (int i = lane; i < splits; i += 32) top = fmaxf(top, ml[i].x);
#pragma unroll
  for (int far = 16; far > 0; far /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, far));
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
#pragma unroll 8
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
  if (threadIdx.x == 0) {
    const int64_t query = row / p.heads % p.q_len, batch = row / p.heads / p.q_len;
    p.lse[(batch * p.heads + head) * p.q_len + query] = top;
  }
  for (int i = threadIdx.x; i < D / 2; i += kMergeThreads) {
    float2 x = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x.x += parts[w][2 * i], x.y += parts[w][2 * i + 1];
    reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * D)[i] = pack<T>(x.x * factor, x.y * factor);
  }
}

template <typename T, int D, int RowWarps, bool General, bool Bulk, int Stages>
const char* launch(Call& call, cudaStream_t stream) {
  using S = Shared<T, D, RowWarps, Bulk, Stages>;
  constexpr int kBytes = (int)sizeof(S) + kAlignment;
  static Launcher launcher, merger;
  const Problem& p = call.p;
  const auto kernel = decode_kernel<T, D, RowWarps, General, Bulk, Stages>;
  cudaError_t error = launcher.prepare(kernel, p.device, kBytes);
  if (error == cudaSuccess) error = merger.prepare(merge_kernel<T, D>, p.device, 0);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  call.takes = (int)((p.q_len * call.pack + S::kRows - 1) / S::kRows);
  const dim3 grid((unsigned)p.splits, (unsigned)(call.takes * p.heads / call.pack), (unsigned)p.batch);
  const bool clustered = p.splits > 1 && p.splits <= kMostInCluster && launcher.is_hopper();
  error = launcher.launch(kernel, grid, S::kAll, kBytes, clustered ? (int)p.splits : 1, stream, call);
  if (error == cudaSuccess && p.splits > 1 && !clustered)
    error =
        merger.launch(merge_kernel<T, D>, dim3((unsigned)(p.batch * p.q_len * p.heads)), kMergeThreads, 0, 1, stream,
                      call);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__global__ void probe_kernel() {}

// Whether kernels of this library may use what Hopper brought.
bool is_hopper(int64_t device) {
  static Launcher probe;
  probe.prepare(probe_kernel, device, 0);
  return probe.is_hopper();
}

template <typename T, int D, int RowWarps, bool General>
const char* launch(Call& call, cudaStream_t stream) {
  constexpr int kDeep = D <= 64 ? 6 : 3;
  const Problem& p = call.p;
  if constexpr (D % 64 == 0) {
    int most = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)p.device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    constexpr int kNeeded = (int)sizeof(Shared<T, D, RowWarps, true, kDeep>) + kAlignment;
    if (most >= kNeeded && is_hopper(p.device)) {
      const Encode encode = find_encode();
      if (!encode) return kNoEncode;
      constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
      if (!make_map<T>(call.key, encode, p.key, p.k, D, p.kv_len, p.kv_heads, p.batch, kTile, kPromotion) ||
          !make_map<T>(call.value, encode, p.value, p.v, D, p.kv_len, p.kv_heads, p.batch, kTile, kPromotion))
        return kNoMap;
      return launch<T, D, RowWarps, General, true, kDeep>(call, stream);
    }
  }
  // Two stages fit into the 99 KB of the smallest multiprocessors up to head size 128.
  constexpr int kStages = D <= 64 ? 4 : 2;
  return launch<T, D, RowWarps, General, false, kStages>(call, stream);
}

template <typename T, int D>
const char* run(const Problem& p, cudaStream_t stream) {
  if (p.q_len > kQueries || p.splits > kMostSplits || p.kv_len > (kMostTiles - 1) * (int64_t)kTile)
    return "the decode kernel takes at most 16 queries, 256 splits and 1,000,000 keys";
  const int group = (int)(p.heads / p.kv_heads);
  Call call = {{}, {}, p, ScoreMap(p), (float)(p.scale * kLog2e), p.plan.pattern_head ? 1 : group, 0};
  // Running maxima are kept of unscaled scores: a scale must not make differences of them vanish.
  const bool general = p.softcap != 0 || p.bias || !(p.scale > 1e-30);
  if (general) call.scale = 1;
  const int64_t rows = p.q_len * call.pack;
  if (rows <= 16) return general ? launch<T, D, 1, true>(call, stream) : launch<T, D, 1, false>(call, stream);
  if (rows <= 32) return general ? launch<T, D, 2, true>(call, stream) : launch<T, D, 2, false>(call, stream);
  return general ? launch<T, D, 4, true>(call, stream) : launch<T, D, 4, false>(call, stream);
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::Problem* problem, void* stream) {
  return stof::run<STOF_DTYPE, STOF_HEAD_DIM>(*problem, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::Problem); }
