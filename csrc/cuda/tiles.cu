// A SparseMask's arrays from elements that lie on the device: tiles of 64 x 64 booleans (or additive
// floats) as bits, each distinct partial tile once, and the runs of every tile row. See tiles.h.
//
// Tiling: a block packs 64 rows x 8 tiles. A warp reads 512 consecutive booleans of a row at once, 16
// bytes a lane; where rows are not aligned, columns not adjacent or elements wider than a byte, 32
// elements at once, by a vote. Each warp then looks at one tile, a row or two a lane.
//
// Pipeline: pack -> insert (a hash table of tiles, compared word by word: equal tiles meet in one
// slot, which keeps the first of them) -> count, number (distinct tiles in the order of their first
// appearance, so that equal masks get equal arrays) for each chunk of tiles; then rows (runs of each
// tile row, and a 128-bit hash of each pattern) -> scan (equal patterns, offsets) -> emit. What the
// host needs is also written to its own memory, where it fits.
//
// Limits: fewer than 2^31 tiles; a chunk's words, 512 bytes a tile, lie in the workspace.

#include <cuda_runtime.h>

#include <type_traits>

#include "tiles.h"

namespace stof {
namespace {

constexpr int kTile = 64, kStrip = 8, kThreads = 256, kScanThreads = 1024;
constexpr uint32_t kWarp = 0xffffffffu;
constexpr uint64_t kOnes = ~0ull;
// content of a tile: one of these, or the slot of a partial tile.
constexpr int32_t kFull = -1, kEmpty = -2, kPartial = -3;
// A slot: vacant, the number of a tile within the chunk at hand, or stored(index of found).
constexpr int32_t kVacant = -1;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t aligned(int64_t n) {
  return ceil_div(n, kArrayAlignment) * kArrayAlignment;
}

__device__ int32_t stored(int32_t index) { return -2 - index; }

struct State : TilesProblem {
  explicit State(const TilesProblem& p) : TilesProblem(p) {
    tile_rows = (uint32_t)ceil_div(q_len, kTile);
    tile_cols = (uint32_t)ceil_div(kv_len, kTile);
    char* const begin = static_cast<char*>(workspace);
    char* at = begin;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += ceil_div(count * (int64_t)sizeof(*array), 128) * 128;
    };
    take(words, chunk_tiles * kTile);
    take(table, slots);
    take(held, capacity);
    take(firsts, ceil_div(chunk_tiles, kThreads));
    take(row_runs, rows_of_all());
    take(row_end, rows_of_all());
    take(first_pattern, patterns);
    take(rank, patterns);
    take(distinct, 2);
    take(flags, 1);
    take(totals, kCounts);
    take(hashes, 2 * patterns);
    workspace_bytes = at - begin;
    if (!host) return;
    host_counts = static_cast<int64_t*>(host);
    host_out = reinterpret_cast<int32_t*>(host_counts + kCounts);
    host_words = reinterpret_cast<uint64_t*>(host_out + host_ints);
  }

  __host__ __device__ int64_t rows_of_all() const { return patterns * tile_rows; }

  __device__ void put(int64_t at, int32_t value) const {
    out[at] = value;
    if (at < host_ints) host_out[at] = value;
  }

  // kFull, kEmpty or an index of found.
  __device__ int32_t resolved(int32_t content) const {
    return content < 0 ? content : stored(table[content]);
  }

  // Tile of the mask that is tile i of the chunk.
  __device__ int32_t tile_of(int64_t i) const {
    return tiles ? tiles[i] : (int32_t)(first * tile_cols + i);
  }

  uint32_t tile_rows, tile_cols;  // divisions by 64 bits are slow
  uint64_t* words;  // of the chunk's partial tiles
  int32_t* table;
  int32_t* held;  // 16 x 16 blocks of each distinct tile that hold a pair
  int32_t *firsts, *row_runs, *row_end, *first_pattern, *rank;
  int32_t* distinct;  // before this chunk and after it, by turns
  int32_t* flags;
  unsigned long long* totals;
  unsigned long long* hashes;
  int64_t* host_counts = nullptr;
  int32_t* host_out = nullptr;
  uint64_t* host_words = nullptr;
};

__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

template <typename T>
__device__ T warp_sum(T x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

// What an element says, as bits: kForbids, kAdds (an additive mask's value that is not 0).
constexpr int kForbids = 1, kAdds = 2;

struct Bool {
  using Raw = uint8_t;
  static constexpr bool kAdditive = false;
  static __device__ int meaning(Raw x) { return x ? 0 : kForbids; }
};

// IEEE floats by their bits: those from minus infinity to -kLimit forbid.
template <typename T, T kLimit, T kInfinity>
struct Float {
  using Raw = T;
  static constexpr bool kAdditive = true;
  static __device__ int meaning(Raw x) {
    constexpr T kSign = T(1) << (8 * sizeof(T) - 1);
    const T size = x & (kSign - 1);
    if ((x & kSign) && size >= kLimit && size <= kInfinity) return kForbids;
    return size ? kAdds : 0;
  }
};
using Half = Float<uint16_t, 0x77ff, 0x7c00>;
using Bfloat16 = Float<uint16_t, 0x7eff, 0x7f80>;
using Single = Float<uint32_t, 0x7effffff, 0x7f800000>;
using Double = Float<uint64_t, 0x7fdfffffffffffff, 0x7ff0000000000000>;

// Four bytes as four bits, set where a byte is not 0.
__device__ uint32_t four_bits(uint32_t x) {
  x = ((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7) & 0x01010101u;
  return (x * 0x01020408u) >> 24;
}

__device__ uint16_t sixteen_bits(const uint4& x) {
  return (uint16_t)(four_bits(x.x) | four_bits(x.y) << 4 | four_bits(x.z) << 8 |
                    four_bits(x.w) << 12);
}

using Words = uint64_t[kStrip][kTile + 1];  // no two tiles in the same banks

// 64 x 512 booleans from `at` on, of which rows x cols exist; rows are 16-byte aligned.
__device__ void pack_wide(const uint8_t* at, int64_t row_stride, int rows, int64_t cols,
                          Words& words) {
  constexpr int kRows = kTile / (kThreads / 32);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kRows;
  const int64_t left = cols - 16 * lane;
  uint4 bytes[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    bytes[i] = make_uint4(0, 0, 0, 0);
    const uint8_t* from = at + (row + i) * row_stride + 16 * lane;
    if (row + i < rows && left >= 16) bytes[i] = *reinterpret_cast<const uint4*>(from);
  }
  const auto place = [&](int i) -> uint16_t& {
    return reinterpret_cast<uint16_t*>(&words[lane / 4][row + i])[lane % 4];
  };
#pragma unroll
  for (int i = 0; i < kRows; ++i) place(i) = sixteen_bits(bytes[i]);
  if (left <= 0 || left >= 16) return;
#pragma unroll 1
  for (int i = 0; i < kRows && row + i < rows; ++i) {
    const uint8_t* from = at + (row + i) * row_stride + 16 * lane;
    uint32_t bits = 0;
#pragma unroll 1
    for (int j = 0; j < left; ++j) bits |= (uint32_t)(from[j] != 0) << j;
    place(i) = (uint16_t)bits;
  }
}

// Same for any elements and strides.
template <typename Element>
__device__ void pack_any(const typename Element::Raw* at, int64_t row_stride, int64_t col_stride,
                         int rows, int64_t cols, Words& words, int32_t* flags) {
  constexpr int kRows = kTile / (kThreads / 32), kLoads = kStrip * kTile / 32;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kRows;
  int seen = 0;
  for (int i = row; i < row + kRows; ++i) {
    typename Element::Raw value[kLoads] = {};
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t col = 32 * j + lane;
      if (i < rows && col < cols) value[j] = at[i * row_stride + col * col_stride];
    }
    uint32_t mine = 0;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const bool inside = i < rows && 32 * j + lane < cols;
      const int meaning = inside ? Element::meaning(value[j]) : 0;
      seen |= meaning;
      const uint32_t allowed = __ballot_sync(kWarp, inside && !(meaning & kForbids));
      if (lane == j) mine = allowed;
    }
    if (lane < kLoads) reinterpret_cast<uint32_t*>(&words[lane / 2][i])[lane % 2] = mine;
  }
  if (!Element::kAdditive) return;
  const int all = (__ballot_sync(kWarp, seen & kForbids) ? kForbids : 0) |
                  (__ballot_sync(kWarp, seen & kAdds) ? kAdds : 0);
  if (lane == 0 && all) atomicOr(flags, all);
}

template <typename Element, bool kWide>
__global__ void __launch_bounds__(kThreads) pack_kernel(State s) {
  __shared__ Words words;
  const uint32_t across = (uint32_t)ceil_div(s.source_cols, kTile);
  const uint32_t strips = (across + kStrip - 1) / kStrip, heads = (uint32_t)s.heads;
  const uint32_t row = blockIdx.x / strips, of_source = (uint32_t)ceil_div(s.source_rows, kTile);
  const uint32_t pattern = ((uint32_t)s.first + row) / of_source;
  const int64_t strip = blockIdx.x % strips;
  const int64_t top = (int64_t)(((uint32_t)s.first + row) % of_source) * kTile;
  const auto* at = static_cast<const typename Element::Raw*>(s.source) +
                   pattern / heads * s.batch_stride + pattern % heads * s.head_stride +
                   top * s.row_stride + strip * kStrip * kTile * s.col_stride;
  const int rows = (int)min((int64_t)kTile, s.source_rows - top);
  const int64_t cols = s.source_cols - strip * kStrip * kTile;
  if constexpr (kWide)
    pack_wide(at, s.row_stride, rows, cols, words);
  else
    pack_any<Element>(at, s.row_stride, s.col_stride, rows, cols, words, s.flags);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t col = strip * kStrip + warp;
  if (col >= across) return;
  const int64_t i = (int64_t)row * across + col;
  const int32_t tile = s.tile_of(i);
  if (tile < 0) return;
  const int64_t used = s.q_len - (int64_t)((uint32_t)tile / s.tile_cols % s.tile_rows) * kTile;
  const int64_t keys = s.kv_len - (int64_t)((uint32_t)tile % s.tile_cols) * kTile;
  const uint64_t inside = keys >= kTile ? kOnes : (1ull << keys) - 1;
  const uint64_t one = lane < used ? words[warp][lane] & inside : 0;
  const uint64_t two = lane + 32 < used ? words[warp][lane + 32] & inside : 0;
  const bool full = (one == kOnes || lane >= used) && (two == kOnes || lane + 32 >= used);
  const bool all = __ballot_sync(kWarp, full) == kWarp;
  const bool any = __ballot_sync(kWarp, (one | two) != 0) != 0;
  const int32_t content = all ? kFull : any ? kPartial : kEmpty;
  if (lane == 0) s.content[tile] = content;
  if (content != kPartial) return;
  s.words[i * kTile + lane] = one;
  s.words[i * kTile + lane + 32] = two;
}

// One warp a tile.
__global__ void __launch_bounds__(kThreads) insert_kernel(State s, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t tile = i < count ? s.tile_of(i) : -1;
  if (tile < 0 || s.content[tile] != kPartial) return;
  const uint64_t one = s.words[i * kTile + lane], two = s.words[i * kTile + lane + 32];
  const uint64_t hash = warp_sum(mix(one + (lane + 1) * 0x9e3779b97f4a7c15ull) +
                                 mix(two + (lane + 33) * 0x9e3779b97f4a7c15ull));
  int64_t slot = (int64_t)(mix(hash) & (uint64_t)(s.slots - 1));
  for (;; slot = (slot + 1) & (s.slots - 1)) {
    int32_t other = kVacant;
    if (lane == 0) {
      other = *(volatile int32_t*)&s.table[slot];
      if (other == kVacant) other = atomicCAS(&s.table[slot], kVacant, (int32_t)i);
    }
    other = __shfl_sync(kWarp, other, 0);
    if (other == kVacant) break;
    const bool known = other < 0;
    // What did not fit into found is compared to nothing; the caller then starts again.
    if (known && stored(other) >= s.capacity) continue;
    const uint64_t* words = known ? s.found + (int64_t)stored(other) * kTile
                                  : s.words + (int64_t)other * kTile;
    const bool equal = words[lane] == one && words[lane + 32] == two;
    if (__ballot_sync(kWarp, equal) != kWarp) continue;
    if (lane == 0 && other > (int32_t)i) atomicMin(&s.table[slot], (int32_t)i);
    break;
  }
  if (lane == 0) s.content[tile] = (int32_t)slot;
}

// The slot of tile i of the chunk if the tile is the first of its kind, else -1.
__device__ int32_t slot_of_first(const State& s, int64_t i, int64_t count) {
  const int32_t tile = i < count ? s.tile_of(i) : -1;
  const int32_t slot = tile < 0 ? -1 : s.content[tile];
  return slot >= 0 && s.table[slot] == (int32_t)i ? slot : -1;
}

__global__ void __launch_bounds__(kThreads) count_kernel(State s, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  const int found = __syncthreads_count(slot_of_first(s, i, count) >= 0);
  if (threadIdx.x == 0) s.firsts[blockIdx.x] = found;
}

// How many 16 x 16 blocks of a tile hold a pair, of which a lane has rows lane and lane + 32.
__device__ int occupied(uint64_t one, uint64_t two) {
  for (int step = 8; step; step /= 2) {
    one |= __shfl_xor_sync(kWarp, one, step);
    two |= __shfl_xor_sync(kWarp, two, step);
  }
  int blocks = 0;
  for (int i = 0; i < kTile; i += 16) blocks += ((one >> i) & 0xffff) != 0;
  for (int i = 0; i < kTile; i += 16) blocks += ((two >> i) & 0xffff) != 0;
  return __shfl_sync(kWarp, blocks, 0) + __shfl_sync(kWarp, blocks, 16);
}

__global__ void __launch_bounds__(kThreads) number_kernel(State s, int64_t count) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int32_t before[kWarps], inside[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  const int32_t slot = slot_of_first(s, i, count);
  const uint32_t firsts = __ballot_sync(kWarp, slot >= 0);
  int32_t sum = 0;
  for (int64_t j = threadIdx.x; j < blockIdx.x; j += kThreads) sum += s.firsts[j];
  sum = warp_sum(sum);
  if (lane == 0) {
    before[warp] = sum;
    inside[warp] = __popc(firsts);
  }
  __syncthreads();
  int32_t index = s.distinct[s.chunk % 2], total = 0;
  for (int w = 0; w < kWarps; ++w) {
    index += before[w] + (w < warp ? inside[w] : 0);
    total += before[w] + inside[w];
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0)
    s.distinct[(s.chunk + 1) % 2] = s.distinct[s.chunk % 2] + total;
  if (slot >= 0) s.table[slot] = stored(index + __popc(firsts & ((1u << lane) - 1)));
  for (uint32_t rest = firsts; rest; rest &= rest - 1, ++index) {
    const uint64_t* words = s.words + (i - lane + __ffs((int)rest) - 1) * kTile;
    const uint64_t one = words[lane], two = words[lane + 32];
    const int blocks = occupied(one, two);
    const int64_t at = (int64_t)index * kTile + lane;
    if (index < s.capacity) {
      s.found[at] = one;
      s.found[at + 32] = two;
      if (lane == 0) s.held[index] = blocks;
    }
  }
}

__device__ bool begins_run(int32_t content, int32_t before) {
  return content != kEmpty && !(content == kFull && before == kFull);
}

// One warp a tile row.
__global__ void __launch_bounds__(kThreads) rows_kernel(State s) {
  const int64_t row = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (row >= s.rows_of_all()) return;
  const int lane = threadIdx.x % 32;
  const int64_t pattern = (uint32_t)row / s.tile_rows, top = (uint32_t)row % s.tile_rows;
  const int32_t* content = s.content + row * s.tile_cols;
  const int of_full = (int)(ceil_div(min((int64_t)kTile, s.q_len - top * kTile), 16) * 4);
  int32_t runs = 0;
  unsigned long long blocks = 0, one = 0, two = 0;
#pragma unroll 4
  for (int64_t col = lane; col < s.tile_cols; col += 32) {
    const int32_t raw = content[col], here = s.resolved(raw);
    runs += begins_run(raw, col ? content[col - 1] : kEmpty);
    if (here == kEmpty) continue;
    blocks += here == kFull ? of_full : here < s.capacity ? s.held[here] : 0;
    const uint64_t key = (uint64_t)(top * s.tile_cols + col) << 32 | (uint32_t)here;
    one += mix(key + 0x9e3779b97f4a7c15ull);
    two += mix(~key * 0xd6e8feb86659fd93ull);
  }
  runs = warp_sum(runs);
  blocks = warp_sum(blocks);
  one = warp_sum(one);
  two = warp_sum(two);
  if (lane) return;
  s.row_runs[row] = runs;
  atomicAdd(&s.totals[kOccupied], blocks);
  atomicAdd(&s.hashes[2 * pattern], one);
  atomicAdd(&s.hashes[2 * pattern + 1], two);
}

// The sum of x over the threads before this one; `total` gets the sum over all.
__device__ int32_t sum_before(int32_t x, int32_t& total) {
  __shared__ int32_t sums[kScanThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t lower = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += lower;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  const int32_t of_warp = sums[lane];
  const int32_t lower = warp_sum(lane < warp ? of_warp : 0);
  total = warp_sum(of_warp);
  __syncthreads();
  return lower + sum - x;
}

// One block: equal patterns, where each tile row's runs go, and the counts.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(State s) {
  for (int64_t p = threadIdx.x; p < s.patterns; p += kScanThreads) {
    int64_t same = 0;
    while (s.hashes[2 * same] != s.hashes[2 * p] || s.hashes[2 * same + 1] != s.hashes[2 * p + 1])
      ++same;
    s.first_pattern[p] = (int32_t)same;
  }
  __syncthreads();
  int32_t patterns = 0, runs = 0, total = 0;
  for (int64_t p = threadIdx.x; p - threadIdx.x < s.patterns; p += kScanThreads) {
    const bool kept = p < s.patterns && s.first_pattern[p] == p;
    const int32_t before = sum_before(kept, total);
    if (kept) s.rank[p] = patterns + before;
    patterns += total;
  }
  __syncthreads();
  for (int64_t p = threadIdx.x; p < s.patterns; p += kScanThreads)
    s.put(p, s.rank[s.first_pattern[p]]);
  const int64_t row_ptr = aligned(s.patterns), rows = s.rows_of_all();
  for (int64_t row = threadIdx.x; row - threadIdx.x < rows; row += kScanThreads) {
    const int64_t p = row / s.tile_rows, top = row % s.tile_rows;
    const bool kept = row < rows && s.first_pattern[p] == p;
    const int32_t here = kept ? s.row_runs[row] : 0, before = runs + sum_before(here, total);
    runs += total;
    if (row < rows) s.row_end[row] = kept ? before + here : -1;
    if (!kept) continue;
    const int64_t at = row_ptr + s.rank[p] * (s.tile_rows + 1) + top;
    s.put(at, before);
    if (top == s.tile_rows - 1) s.put(at + 1, before + here);
  }
  if (threadIdx.x) return;
  s.totals[kRuns] = runs;
  s.totals[kPatterns] = patterns;
  s.totals[kDistinct] = s.distinct[s.chunk % 2];
  s.totals[kFlags] = *s.flags;
  s.totals[kWanted] = s.wanted ? *s.wanted : 0;
  for (int i = 0; i < kCounts; ++i) s.host_counts[i] = (int64_t)s.totals[i];
}

// One warp a tile row, from its end to its beginning: a run's length is known where it begins.
__global__ void __launch_bounds__(kThreads) emit_kernel(State s) {
  const int64_t tiles = (int64_t)s.totals[kDistinct], step = (int64_t)gridDim.x * kThreads;
  if (tiles <= min(s.host_tiles, s.capacity))
    for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < tiles * kTile; i += step)
      s.host_words[i] = s.found[i];

  const int64_t row = (int64_t)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (row >= s.rows_of_all() || s.row_end[row] < 0) return;
  const int lane = threadIdx.x % 32;
  const int32_t* content = s.content + row * s.tile_cols;
  const int64_t stored_runs = aligned((int64_t)s.totals[kRuns]);
  const int64_t run_col =
      aligned(s.patterns) + aligned((int64_t)s.totals[kPatterns] * (s.tile_rows + 1));
  int64_t end = s.row_end[row], stop = s.tile_cols;
  for (int64_t base = (int64_t)(s.tile_cols - 1) / 32 * 32; base >= 0; base -= 32) {
    const int64_t col = base + lane;
    const int32_t here = col < s.tile_cols ? s.resolved(content[col]) : kEmpty;
    const bool full = here == kFull;
    const bool begins =
        col < s.tile_cols && begins_run(here, col ? content[col - 1] : kEmpty);
    const uint32_t breaks = __ballot_sync(kWarp, !full), starts = __ballot_sync(kWarp, begins);
    if (begins) {
      const uint32_t behind = breaks >> lane;
      const int64_t until = !full ? col + 1 : behind ? col + __ffs((int)behind) - 1 : stop;
      const int64_t at = run_col + end - __popc(starts >> lane);
      s.put(at, (int32_t)col);
      s.put(at + stored_runs, (int32_t)(until - col));
      s.put(at + 2 * stored_runs, here);
    }
    end -= __popc(starts);
    if (breaks) stop = base + __ffs((int)breaks) - 1;
  }
}

template <typename... P>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, void* stream, P... args) {
  void* list[] = {&args...};
  return cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3(threads), list, 0,
                          static_cast<cudaStream_t>(stream));
}

template <typename Element>
cudaError_t pack(const State& s, int64_t blocks, bool wide, void* stream) {
  if constexpr (!Element::kAdditive)
    if (wide) return launch(pack_kernel<Element, true>, blocks, kThreads, stream, s);
  return launch(pack_kernel<Element, false>, blocks, kThreads, stream, s);
}

cudaError_t add(const State& s, void* stream) {
  const int64_t across = ceil_div(s.source_cols, kTile);
  const int64_t count = s.rows * across, blocks = s.rows * ceil_div(across, kStrip);
  const bool wide = s.col_stride == 1 && ((reinterpret_cast<uintptr_t>(s.source) | s.row_stride |
                                           s.batch_stride | s.head_stride) % 16 == 0);
  cudaError_t error = cudaErrorInvalidValue;
  switch (s.type) {
    case kBool: error = pack<Bool>(s, blocks, wide, stream); break;
    case kHalf: error = pack<Half>(s, blocks, wide, stream); break;
    case kBfloat16: error = pack<Bfloat16>(s, blocks, wide, stream); break;
    case kFloat: error = pack<Single>(s, blocks, wide, stream); break;
    case kDouble: error = pack<Double>(s, blocks, wide, stream); break;
  }
  const int64_t warps = ceil_div(count, kThreads / 32), threads = ceil_div(count, kThreads);
  if (!error) error = launch(insert_kernel, warps, kThreads, stream, s, count);
  if (!error) error = launch(count_kernel, threads, kThreads, stream, s, count);
  if (!error) error = launch(number_kernel, threads, kThreads, stream, s, count);
  return error;
}

cudaError_t clear(void* memory, int value, int64_t bytes, void* stream) {
  return cudaMemsetAsync(memory, value, (size_t)bytes, static_cast<cudaStream_t>(stream));
}

cudaError_t begin(const State& s, void* stream) {
  cudaError_t error = clear(s.table, 0xff, s.slots * 4, stream);
  if (!error) error = clear(s.distinct, 0, 2 * sizeof(*s.distinct), stream);
  if (!error) error = clear(s.flags, 0, sizeof(*s.flags), stream);
  return error;
}

cudaError_t finish(const State& s, void* stream) {
  const int64_t rows = ceil_div(s.rows_of_all(), kThreads / 32);
  cudaError_t error = clear(s.totals, 0, kCounts * sizeof(*s.totals), stream);
  if (!error) error = clear(s.hashes, 0, 2 * s.patterns * (int64_t)sizeof(*s.hashes), stream);
  if (!error) error = launch(rows_kernel, rows, kThreads, stream, s);
  if (!error) error = launch(scan_kernel, 1, kScanThreads, stream, s);
  if (!error) error = launch(emit_kernel, rows, kThreads, stream, s);
  return error;
}

cudaError_t run(TilesProblem& p, void* stream) {
  if (p.stage == kMeasure) {
    p.workspace_bytes = State(p).workspace_bytes;
    return cudaSuccess;
  }
  TilesProblem mapped = p;
  if (p.host) {
    const cudaError_t error = cudaHostGetDevicePointer(&mapped.host, p.host, 0);
    if (error) return error;
  }
  const State state(mapped);
  switch (p.stage) {
    case kBegin: return begin(state, stream);
    case kAdd: return add(state, stream);
    case kFinish: return finish(state, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(stof::TilesProblem* problem, void* stream) {
  const cudaError_t error = stof::run(*problem, stream);
  return error ? cudaGetErrorString(error) : nullptr;
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::TilesProblem); }
