// Attention to a band of keys for Hopper (sm_90a): no mask, a causal one, or a window; head sizes 64
// and 128, fp16 and bf16.
//
// Tiling: a block has two consumer warpgroups, or three where the head size is 64, of 64 consecutive
// query rows of one head each, and a producer warp. A step is kKeys keys, one box of the copy engine per 64 columns. What a block
// streams follows from its rows alone, so there is no plan.
// Pipeline: blocks are persistent. The producer runs ahead, over item borders, through rings of keys
// and values that are released apart, and two buffers for queries. A consumer issues the scores of a
// step, then the weighted values of the step before, and computes the softmax while the tensor cores
// do the latter. Steps go from the last keys to the first: of a causal mask the diagonal comes first.
// Clusters: where heads share keys, two blocks may compute two such heads side by side. Each loads half
// of a step's keys and values for both, which halves what is read from L2.
// Rows: tiles end at the last 64 rows. Of a causal mask the tile that has fewer rows than the others
// sees the fewest keys then.
// Order: the longest items first within heads that L2 holds together; every other round of blocks is
// reversed, so that who had the longest item takes the shortest next.
// Tail: where all keys are seen and the last step has 16 at most, as the keys of an image and its class
// token have, what is computed of it is as narrow.
// Limits: rows aligned to 16 bytes; lengths below 2^29; value head size equal to head size.
#include <cuda_runtime.h>

#include "fragments.cuh"
#include "hopper_ptx.cuh"
#include "items.cuh"
#include "launch.cuh"
#include "maps.cuh"

namespace stof {
namespace {

template <int D, int Groups, int Cluster>
struct Config {
  static constexpr int kDim = D;
  static constexpr int kCluster = Cluster;  // blocks that share keys
  static constexpr int kChunks = D / 64;  // of 64 columns: 128 bytes, what a swizzled row holds
  static constexpr int kGroups = Groups;
  static constexpr int kKeys = 128;
  static constexpr int kTail = 16;  // keys, at most, of a last step that is computed by itself
  static constexpr int kBoxKeys = kKeys / kCluster;
  static constexpr int kStages = D == 64 ? 4 : 2;
  static constexpr int kQueries = 2;  // buffers, handed back an item later
  static constexpr bool kTurns = kGroups == 3;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  // Registers are handed from the producer's warpgroup to the consumers.
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 24, kConsumerRegisters = kGroups == 3 ? 160 : 240;
};

template <typename T, typename C>
struct Shared {
  alignas(1024) T query[C::kQueries][C::kGroups][C::kChunks][64][64];
  alignas(1024) T key[C::kStages][C::kChunks][C::kKeys][64];
  alignas(1024) T value[C::kStages][C::kChunks][C::kKeys][64];
  uint64_t key_full[C::kStages], key_empty[C::kStages], value_full[C::kStages], value_empty[C::kStages];
  uint64_t query_full[C::kQueries], query_empty[C::kQueries];
};

struct Maps {
  CUtensorMap query, key, value, out;
};

struct Band {
  const float* sinks;
  float* lse;
  Divisor section, together, last_together, heads, group;
  int n_items, n_sections, n_heads, q_len, kv_len;
  int lower, upper;  // query i sees keys i + lower .. i + upper
  float scale;       // of the scores, whose exponentials are to base 2
  bool tail;         // everybody sees all keys, and the last step has few
};

// A tile of query rows of a head, from `row` on: a multiple of 64, which may be negative.
struct Tile {
  int row, batch, head;
};

template <typename C>
__device__ __forceinline__ Tile locate(const Band& a, int item) {
  const int section = a.section.divide(item);
  item -= section * a.section.by;
  const bool last = section == a.n_sections - 1;
  const int row = last ? a.last_together.divide(item) : a.together.divide(item);
  const int copy = section * a.together.by + item - row * (last ? a.last_together.by : a.together.by);
  Tile t;
  t.row = (a.q_len + 63) / 64 * 64 - (row + 1) * C::kRows;
  t.batch = a.heads.divide(copy);
  t.head = (copy - t.batch * a.heads.by) * C::kCluster + blockIdx.x % C::kCluster;
  return t;
}

// Steps [first, end) hold all keys that rows row .. row + n - 1 see.
struct Range {
  int first, end;
};

template <int Keys>
__device__ __forceinline__ Range steps_of(const Band& a, int row, int n) {
  const int last = min(row + n, a.q_len) - 1;
  Range range;
  range.first = max(0, max(0, row) + a.lower) / Keys;
  range.end = max(range.first, (max(0, min(a.kv_len, last + a.upper + 1)) + Keys - 1) / Keys);
  if (last < 0) range.end = range.first;
  return range;
}

// The items of a block, or of those of a cluster: round r of n takes items r n to (r + 1) n - 1, every
// other round in reverse. f(tile) for each.
template <typename C, typename F>
__device__ __forceinline__ void for_items(const Band& a, F f) {
  const int n = gridDim.x / C::kCluster, own = blockIdx.x / C::kCluster;
  for (int first = 0, round = 0; first < a.n_items; first += n, ++round) {
    const int item = first + (round % 2 ? n - 1 - own : own);
    if (item < a.n_items) f(locate<C>(a, item));
  }
}

template <typename T, typename C>
__device__ void produce(const Maps& maps, const Band& a, Shared<T, C>& s) {
  constexpr int kStepBytes = C::kKeys * C::kDim * (int)sizeof(T), kGroupBytes = 64 * C::kDim * (int)sizeof(T);
  const int rank = blockIdx.x % C::kCluster;
  Ring<C::kStages> keys, values;
  Ring<C::kQueries> q;
  cudaGridDependencySynchronize();
  // This block's part of a step of keys or values.
  auto load_step = [&](T (&to)[C::kChunks][C::kKeys][64], const CUtensorMap* map, uint64_t* full, int step, int kv_head,
                       int batch) {
    barrier_expect(full, kStepBytes);
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      T* box = to[c][rank * C::kBoxKeys];
      const int key = step * C::kKeys + rank * C::kBoxKeys;
      if (C::kCluster == 1)
        load_box(box, map, full, 64 * c, key, kv_head, batch);
      else
        load_box_to_all(box, map, full, 64 * c, key, kv_head, batch, (1 << C::kCluster) - 1);
    }
  };
  for_items<C>(a, [&](const Tile& t) {
    const int row = t.row, kv_head = a.group.divide(t.head), passed = max(0, -row / 64);
    barrier_wait(&s.query_empty[q.at], q.parity ^ 1);
    barrier_expect(&s.query_full[q.at], (C::kGroups - passed) * kGroupBytes);
    for (int g = passed; g < C::kGroups; ++g)
#pragma unroll
      for (int c = 0; c < C::kChunks; ++c)
        load_box(s.query[q.at][g][c], &maps.query, &s.query_full[q.at], 64 * c, row + 64 * g, t.head, t.batch);
    q.next();
    const Range range = steps_of<C::kKeys>(a, row, C::kRows);
    // The values of a step follow the keys of the next, in the order in which they are needed.
    for (int j = range.end - 1; j >= range.first - 1; --j) {
      if (j >= range.first) {
        barrier_wait(&s.key_empty[keys.at], keys.parity ^ 1);
        load_step(s.key[keys.at], &maps.key, &s.key_full[keys.at], j, kv_head, t.batch);
        keys.next();
      }
      if (j + 1 < range.end) {
        barrier_wait(&s.value_empty[values.at], values.parity ^ 1);
        load_step(s.value[values.at], &maps.value, &s.value_full[values.at], j + 1, kv_head, t.batch);
        values.next();
      }
    }
  });
  // The other block's threads arrive here, too: this one's memory must be there until they have.
  if constexpr (C::kCluster > 1) {
    for (int i = 0; i < C::kStages; ++i, keys.next(), values.next()) {
      barrier_wait(&s.key_empty[keys.at], keys.parity ^ 1);
      barrier_wait(&s.value_empty[values.at], values.parity ^ 1);
    }
  }
}

template <typename T, typename C>
__device__ void consume(const Maps& maps, const Band& a, Shared<T, C>& s) {
  constexpr int D = C::kDim;
  constexpr int kChunkBytes = C::kKeys * 64 * (int)sizeof(T), kQueryChunkBytes = 64 * 64 * (int)sizeof(T);
  const int group = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int own_row = thread / 32 * 16 + lane / 4;
  const float scale = a.scale, slack = kSlack / scale;
  Ring<C::kStages> keys, values;
  Ring<C::kQueries> q;
  auto release = [&](uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
    if (C::kCluster == 2 && lane == 1) barrier_arrive_at(barrier, blockIdx.x % 2 ^ 1);
  };

  // Three groups take turns at issuing products, so that one's softmax runs while the tensor cores work
  // for another. Group 0 begins. Two groups do so by themselves.
  constexpr int kTurn = 1;
  const int turn = kTurn + group, next_turn = kTurn + (group + 1 == C::kGroups ? 0 : group + 1);
  if (C::kTurns && group == C::kGroups - 1) named_barrier_arrive(kTurn, 256);

  // The buffer of queries that the last results are stored from: it is handed back beside products.
  int stored = -1;
  auto hand_back = [&]() {
    if (stored >= 0 && lane == 0) {
      wait_boxes_read();
      barrier_arrive(&s.query_empty[stored]);
    }
    __syncwarp();
    stored = -1;
  };

  for_items<C>(a, [&](const Tile& t) {
    const int block_row = t.row, first_row = block_row + 64 * group;
    const Range all = steps_of<C::kKeys>(a, block_row, C::kRows), own = steps_of<C::kKeys>(a, first_row, 64);
    // Steps that every group computes, and none as its first.
    const Range least = steps_of<C::kKeys>(a, block_row, 64),
                most = steps_of<C::kKeys>(a, block_row + 64 * (C::kGroups - 1), 64);
    const bool turned = least.end > least.first && most.end > most.first;
    const int turns_end = uniform(turned ? least.end - 1 - a.tail : 0), turns_first = uniform(most.first);
    // Steps [full_first, full_end) are seen by all rows of the group.
    const int full_end = uniform(max(0, min(a.kv_len, first_row + a.upper + 1)) / C::kKeys);
    const int full_first = uniform((max(0, first_row + 63 + a.lower) + C::kKeys - 1) / C::kKeys);
    const int own_first = uniform(own.first), own_end = uniform(own.end);
    const int row[2] = {first_row + own_row, first_row + own_row + 8};

    barrier_wait(&s.query_full[q.at], q.parity);
    const uint64_t queries = tile_descriptor(s.query[q.at][group], 0);
    auto skip = [&](int n) {
#pragma unroll 1
      for (; n > 0; --n) {
        barrier_wait(&s.key_full[keys.at], keys.parity);
        release(&s.key_empty[keys.at]);
        keys.next();
        barrier_wait(&s.value_full[values.at], values.parity);
        release(&s.value_empty[values.at]);
        values.next();
      }
    };
    float scores[C::kKeys / 2], o[D / 2];
    uint32_t weights[C::kKeys / 4];
    auto issue_scores = [&]() {
      const uint64_t tile = tile_descriptor(s.key[keys.at], 0);
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
        product_ss<T>(scores, queries + ((i / 4 * kQueryChunkBytes + i % 4 * 32) >> 4),
                      tile + ((i / 4 * kChunkBytes + i % 4 * 32) >> 4), i > 0);
      wgmma_commit();
    };
    auto issue_values = [&]() {
      const uint64_t tile = tile_descriptor(s.value[values.at], kChunkBytes);
#pragma unroll
      for (int i = 0; i < C::kKeys / 16; ++i)
        product_rs<T, D>(o, weights + 4 * i, tile + (i * 16 * 128 >> 4));
      wgmma_commit();
    };
    auto mask = [&](int step) {
      const int key = step * C::kKeys + lane % 4 * 2;
      if (step >= full_end) {
#pragma unroll
        for (int i = 0; i < C::kKeys / 2; ++i)
          if (i / 4 * 8 + i % 2 > min(a.kv_len - 1, row[i / 2 % 2] + a.upper) - key) scores[i] = -INFINITY;
      }
      if (step < full_first) {
#pragma unroll
        for (int i = 0; i < C::kKeys / 2; ++i)
          if (i / 4 * 8 + i % 2 < row[i / 2 % 2] + a.lower - key) scores[i] = -INFINITY;
      }
    };
    auto pack_weights = [&]() {
#pragma unroll
      for (int i = 0; i < C::kKeys / 4; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    };

    Softmax softmax;
    float factor[2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    auto compute_tail = [&](int step) {
      float few[C::kTail / 2];
      barrier_wait(&s.key_full[keys.at], keys.parity);
      wgmma_fence();
      const uint64_t tile = tile_descriptor(s.key[keys.at], 0);
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
        product_ss<T>(few, queries + ((i / 4 * kQueryChunkBytes + i % 4 * 32) >> 4),
                      tile + ((i / 4 * kChunkBytes + i % 4 * 32) >> 4), i > 0);
      wgmma_commit();
      hand_back();
      wgmma_wait<0>();
      pin(few);
      release(&s.key_empty[keys.at]);
      keys.next();
      const int last = a.kv_len - 1 - step * C::kKeys - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < C::kTail / 2; ++i)
        if (i / 4 * 8 + i % 2 > last) few[i] = -INFINITY;
      softmax.update(few, scale, slack, factor);
      softmax.weigh<T>(few, scale);
#pragma unroll
      for (int i = 0; i < C::kTail / 4; ++i) weights[i] = pack<T>(few[2 * i], few[2 * i + 1]);
      barrier_wait(&s.value_full[values.at], values.parity);
      pin(o);
      wgmma_fence();
      product_rs<T, D>(o, weights, tile_descriptor(s.value[values.at], kChunkBytes));
      wgmma_commit();
      wgmma_wait<0>();
      pin(o);
      release(&s.value_empty[values.at]);
      values.next();
    };
    if (own_end > own_first) {
      skip(all.end - own_end);
      int step = own_end - 1;
      if (a.tail) compute_tail(step--);
      barrier_wait(&s.key_full[keys.at], keys.parity);
      wgmma_fence();
      issue_scores();
      hand_back();
      wgmma_wait<0>();
      pin(scores);
      release(&s.key_empty[keys.at]);
      keys.next();
      mask(step);
      const bool rescale = softmax.update(scores, scale, slack, factor);
      if (a.tail && rescale) scale_rows(o, factor);
      softmax.weigh<T>(scores, scale);
      pack_weights();
      if (step > own_first) barrier_wait(&s.key_full[keys.at], keys.parity);
      while (--step >= own_first) {
        const bool turns = C::kTurns && step < turns_end && step >= turns_first;
        barrier_wait(&s.value_full[values.at], values.parity);
        if (turns) named_barrier(turn, 256);
        pin(o);
        wgmma_fence();
        issue_scores();
        issue_values();
        if (turns) named_barrier_arrive(next_turn, 256);
        wgmma_wait<1>();
        pin(scores);
        release(&s.key_empty[keys.at]);
        keys.next();
        mask(step);
        const bool rescale = softmax.update(scores, scale, slack, factor);
        softmax.weigh<T>(scores, scale);
        // The assembler moves a wait for products to the front of its basic block, in front of the
        // exponentials that are to run beside them. This loop ends that block.
        pin(scores);
        if (step > own_first) barrier_wait(&s.key_full[keys.at], keys.parity);
        wgmma_wait<0>();
        pin(o);
        release(&s.value_empty[values.at]);
        values.next();
        if (rescale) scale_rows(o, factor);
        pack_weights();
      }
      barrier_wait(&s.value_full[values.at], values.parity);
      pin(o);
      wgmma_fence();
      issue_values();
      wgmma_wait<0>();
      pin(o);
      release(&s.value_empty[values.at]);
      values.next();
      skip(own_first - all.first);
    } else {
      hand_back();
      skip(all.end - all.first);
    }

    softmax.l[0] = quad_sum(softmax.l[0]);
    softmax.l[1] = quad_sum(softmax.l[1]);
    if (first_row >= 0) {
      const int stored[2] = {row[0] < a.q_len ? row[0] : -1, row[1] < a.q_len ? row[1] : -1};
      const int64_t pair = (int64_t)t.batch * a.n_heads + t.head;
      finish(softmax, o, stored, scale, a.sinks ? a.sinks + t.head : nullptr, a.lse, pair * a.q_len);
      // The warp's own query rows are no longer needed: its results take their place.
      const int first = thread / 32 * 16;
      write_rows<T>(s.query[q.at][group], first, o);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int c = 0; c < C::kChunks; ++c)
          store_box(&maps.out, s.query[q.at][group][c][first], 64 * c, first_row + first, t.head, t.batch);
      }
    }
    stored = q.at;
    q.next();
  });
  hand_back();
  if (C::kTurns && group == 0) named_barrier(kTurn, 256);
}

template <typename T, typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    band_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Band a) {
  extern __shared__ unsigned char memory[];
  // The start of dynamic shared memory is not aligned by itself.
  auto& s = *reinterpret_cast<Shared<T, C>*>(memory + (-shared_address(memory) & 1023));
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) {
    prefetch_map(&maps.query);
    prefetch_map(&maps.key);
    prefetch_map(&maps.value);
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(&s.key_full[i], 1);
      barrier_init(&s.value_full[i], 1);
      barrier_init(&s.key_empty[i], 4 * C::kGroups * C::kCluster);
      barrier_init(&s.value_empty[i], 4 * C::kGroups * C::kCluster);
    }
    for (int i = 0; i < C::kQueries; ++i) {
      barrier_init(&s.query_full[i], 1);
      barrier_init(&s.query_empty[i], 4 * C::kGroups);
    }
    fence_barrier_init();
  }
  if (C::kCluster == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  if (warp >= 4 * C::kGroups) {
    registers_down<C::kProducerRegisters>();
    if (threadIdx.x == 128 * C::kGroups) produce(maps, a, s);
  } else {
    registers_up<C::kConsumerRegisters>();
    consume(maps, a, s);
  }
}

template <typename T, typename C>
const char* run(const Problem& p, cudaStream_t stream) {
  constexpr int D = C::kDim;
  const Encode encode = find_encode();
  if (!encode) return kNoEncode;
  Maps maps;
  const Strides3 out = {p.q_len * p.heads * D, D, p.heads * D};
  const bool fits = make_map<T>(maps.query, encode, p.query, p.q, D, p.q_len, p.heads, p.batch, 64) &&
                    make_map<T>(maps.key, encode, p.key, p.k, D, p.kv_len, p.kv_heads, p.batch, C::kBoxKeys) &&
                    make_map<T>(maps.value, encode, p.value, p.v, D, p.kv_len, p.kv_heads, p.batch, C::kBoxKeys) &&
                    make_map<T>(maps.out, encode, p.out, out, D, p.q_len, p.heads, p.batch, 16);
  if (!fits) return kNoMap;
  const int tiles = (int)((p.q_len + C::kRows - 1) / C::kRows), copies = (int)(p.batch * p.heads) / C::kCluster;
  const int together = max(1, (int)p.together / C::kCluster), sections = (copies + together - 1) / together;
  const Band a = {p.sinks,
                  p.lse,
                  Divisor(together * tiles),
                  Divisor(together),
                  Divisor(copies - (sections - 1) * together),
                  Divisor(p.heads / C::kCluster),
                  Divisor(p.heads / p.kv_heads),
                  copies * tiles,
                  sections,
                  (int)p.heads,
                  (int)p.q_len,
                  (int)p.kv_len,
                  (int)(p.offset - p.left),
                  (int)(p.offset + p.right),
                  (float)(p.scale * kLog2e),
                  p.offset - p.left <= 1 - p.q_len && p.offset + p.right >= p.kv_len - 1 && p.kv_len > C::kKeys &&
                      p.kv_len % C::kKeys != 0 && p.kv_len % C::kKeys <= C::kTail};
  constexpr int kBytes = (int)sizeof(Shared<T, C>) + 1024;
  static Launcher launcher;
  const auto kernel = band_kernel<T, C>;
  cudaError_t error = launcher.prepare(kernel, p.device, kBytes);
  const int64_t most = p.grid / C::kCluster;
  const dim3 grid((unsigned)(C::kCluster * (most < copies * tiles ? most : copies * tiles)));
  if (error == cudaSuccess) error = launcher.launch(kernel, grid, C::kThreads, kBytes, C::kCluster, stream, maps, a);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::Problem* problem, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
#if STOF_HEAD_DIM == 64
  if (problem->rows == 192) return stof::run<STOF_DTYPE, stof::Config<STOF_HEAD_DIM, 3, 1>>(*problem, on);
#else
  if (problem->two_heads) return stof::run<STOF_DTYPE, stof::Config<STOF_HEAD_DIM, 2, 2>>(*problem, on);
#endif
  return stof::run<STOF_DTYPE, stof::Config<STOF_HEAD_DIM, 2, 1>>(*problem, on);
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::Problem); }
