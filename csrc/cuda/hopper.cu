// Block-wise attention for Hopper (sm_90a), head sizes 64 and 128, fp16 and bf16.
//
// Tiling: a block has two consumer warpgroups of 64 query rows each ("halves") and one producer
// warp. The halves are two row tiles of one head, two heads that share their keys, or one row tile
// whose steps they divide (problem.h). A step is 64 keys: one box of the copy engine where they are
// consecutive, else 4 granules of 16 keys, gathered by a box each.
// Pipeline: blocks are persistent and take items in a fixed order. The producer runs ahead, over
// item borders, through a ring of key/value stages and two buffers for queries. A consumer issues
// the scores of a step, then the weighted values of the step before, and computes the softmax while
// the tensor cores do the latter. What a half does not see of a step it releases at once.
// Limits: rows aligned to 16 bytes; at most 2^31 query rows; value head size equal to head size.
#include <cuda_runtime.h>

#include "fragments.cuh"
#include "hopper_ptx.cuh"
#include "items.cuh"
#include "merge.cuh"
#include "maps.cuh"

namespace stof {
namespace {

struct Maps {
  CUtensorMap query, query_granule, query_row, key, key_granule, value, value_granule, out;
};

// What the consumers of a block need to know of an item.
struct Info {
  int batch, head, slot, steps, together, paired, stop;
  int tile[kHalves];
};

template <int D>
struct Config {
  static constexpr int kChunks = D / 64;  // of 64 columns: 128 bytes, what a swizzled row holds
  static constexpr int kStages = 4;
  static constexpr int kQueries = 2;  // buffers
  static constexpr int kBlocks = D == 64 ? 2 : 1;  // a multiprocessor
  // Whether a warpgroup computes its softmax while its own product runs: with four warpgroups on a
  // multiprocessor the others keep the tensor cores busy, and registers are short.
  static constexpr bool kOverlap = D == 128;
  // Whether queries are held in registers: each product would else read as many bytes of them from
  // shared memory as of the keys.
  static constexpr bool kHeld = D == 128;
  // Registers are handed from a producer warpgroup to the consumers (0: one producer warp, as is).
  static constexpr int kProducerRegisters = D == 128 ? 40 : 0, kConsumerRegisters = 232;
  static constexpr int kThreads = kConsumers + (kProducerRegisters ? 128 : 32);
};

template <typename T, int D>
struct Shared {
  using C = Config<D>;
  alignas(1024) T query[C::kQueries][kHalves][C::kChunks][kTile][64];
  alignas(1024) T key[C::kStages][C::kChunks][kTile][64];
  alignas(1024) T value[C::kStages][C::kChunks][kTile][64];
  alignas(128) uint32_t bits[C::kStages][kHalves][128];
  int content[C::kStages][kHalves];
  uint64_t valid[C::kStages];
  int rows[C::kQueries][kHalves][kTile];
  Info info[C::kQueries];
  float part_ml[2][kTile];
  uint64_t key_full[C::kStages], value_full[C::kStages], stage_empty[C::kStages];
  uint64_t query_full[C::kQueries], query_empty[C::kQueries];
};

template <typename T, int D, bool Valid>
__device__ void produce(const Maps& maps, const Arguments& a, Shared<T, D>& s, Item next) {
  using C = Config<D>;
  const int lane = threadIdx.x % 32;
  constexpr int kTileBytes = kTile * D * (int)sizeof(T);
  Ring<C::kStages> stage;
  Ring<C::kQueries> q;
  int entry = fetch_entry(a, blockIdx.x + gridDim.x);
  // Only what the plan holds was read so far: it was there before the kernel in front of this one.
  cudaGridDependencySynchronize();
  for (int at = blockIdx.x; at < a.n_queue; at += gridDim.x) {
    const Item now = next;
    next = fetch(a, entry);
    entry = fetch_entry(a, at + 2 * gridDim.x);
    const int4 x = now.x, y = now.y;
    if (x.x == kNone) continue;
    const int batch = now.batch, head = now.head;
    const int n_run = x.w, steps = n_run + y.y;
    const int4* list = reinterpret_cast<const int4*>(a.plan.steps) + 2ll * y.x;
    const bool paired = !a.two_heads && x.x == x.y;
    const int kv_head = a.group.divide(head);

    // The first steps of the list arrive while the queries are asked for.
    int4 granules = make_int4(0, 0, 0, 0), content = granules;
    uint64_t valid = ~0ull;
    auto load_list = [&](int first) {
      if (first + lane < y.y) {
        granules = __ldg(list + 2 * (first + lane));
        content = __ldg(list + 2 * (first + lane) + 1);
      }
    };
    load_list(0);
    const uint64_t* words = a.kv_valid + batch * a.valid_batch;
    // Each lane looks up one of the next 32 steps.
    auto load_valid = [&](int first) {
      const int step = first + lane;
      if (step < n_run) {
        valid = __ldg(words + x.z / kTile + step);
      } else if (step < steps) {
        const int4 g = __ldg(list + 2 * (step - n_run));
        valid = valid_granule(words, g.x) | valid_granule(words, g.y) << 16 | valid_granule(words, g.z) << 32 |
                valid_granule(words, g.w) << 48;
      }
    };

    barrier_wait(&s.query_empty[q.at], q.parity ^ 1);
    const int tiles[kHalves] = {x.x, a.two_heads ? x.x : x.y};
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
      for (int i = lane; i < kTile; i += 32) {
        int row = tiles[h] == kNone ? -1 : tiles[h] >= 0 ? tiles[h] * kTile + i
                                                         : __ldg(a.plan.rows + (-1 - tiles[h]) * kTile + i);
        s.rows[q.at][h][i] = row < a.q_len ? row : -1;
      }
    if (lane == 0)
      s.info[q.at] = {batch, head, y.z, steps, a.two_heads ? steps : paired ? 0 : n_run, paired, 0, {tiles[0], tiles[1]}};
    __syncwarp();
    const int queries = paired || tiles[1] == kNone ? 1 : 2;
    int bytes = 0;
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
      if (h < queries && tiles[h] >= 0) {
        bytes += kTileBytes;
      } else if (h < queries) {
#pragma unroll
        for (int i = 0; i < kTile; i += 32)
          bytes += __popc(__ballot_sync(~0u, s.rows[q.at][h][i + lane] >= 0)) * D * (int)sizeof(T);
      }
    if (lane == 0) barrier_expect(&s.query_full[q.at], bytes);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (h == queries) break;
      const int of = head + (a.two_heads ? h : 0);
      T(*to)[kTile][64] = s.query[q.at][h];
      if (tiles[h] >= 0) {
        if (lane < C::kChunks)
          load_box(to[lane], &maps.query, &s.query_full[q.at], 64 * lane, tiles[h] * kTile, of, batch);
        continue;
      }
      // Sixteen consecutive rows come as one box, others one by one.
#pragma unroll
      for (int i = 0; i < kTile; i += 32) {
        const int own = i + lane, row = s.rows[q.at][h][own], lead = s.rows[q.at][h][own & ~15];
        const unsigned sixteen = 0xffffu << (lane & 16);
        const bool fits = lead >= 0 && row == lead + (own & 15);
        const bool whole = (__ballot_sync(~0u, fits) & sixteen) == sixteen;
        if (row >= 0 && (!whole || lane % 16 == 0))
#pragma unroll
          for (int c = 0; c < C::kChunks; ++c)
            load_box(to[c][own], whole ? &maps.query_granule : &maps.query_row, &s.query_full[q.at], 64 * c, row, of,
                     batch);
      }
    }
    q.next();

    for (int i = 0; i < steps; ++i) {
      int g[4], c[2];
      bool whole = true;
      if (i < n_run) {
        g[0] = x.z + i * kTile;
        c[0] = c[1] = kFull;
      } else {
        const int at = (i - n_run) % 32;
        if (at == 0 && i > n_run) load_list(i - n_run);
        g[0] = __shfl_sync(~0u, granules.x, at), g[1] = __shfl_sync(~0u, granules.y, at);
        g[2] = __shfl_sync(~0u, granules.z, at), g[3] = __shfl_sync(~0u, granules.w, at);
        c[0] = __shfl_sync(~0u, content.x, at), c[1] = __shfl_sync(~0u, content.y, at);
        whole = g[1] == g[0] + 16 && g[2] == g[0] + 32 && g[3] == g[0] + 48;
      }
      uint64_t seen = ~0ull;
      if constexpr (Valid) {
        if (i % 32 == 0) load_valid(i);
        seen = __shfl_sync(~0u, valid, i % 32);
        if (seen == 0) c[0] = c[1] = kEmpty;
      }
      barrier_wait(&s.stage_empty[stage.at], stage.parity ^ 1);
      if (lane == 0) {
        // Keys that are all padding are not loaded; the consumers let them pass.
        const int bytes = seen ? kTileBytes : 0;
        if constexpr (Valid) s.valid[stage.at] = seen;
        uint64_t* full = &s.key_full[stage.at];
        s.content[stage.at][0] = c[0];
        s.content[stage.at][1] = c[1];
        const bool own = c[1] >= 0 && c[1] != c[0];
        barrier_expect(full, bytes + (c[0] >= 0 ? 512 : 0) + (own ? 512 : 0));
        if (c[0] >= 0) load_bytes(s.bits[stage.at][0], a.plan.bits + 128ll * c[0], 512, full);
        if (own) load_bytes(s.bits[stage.at][1], a.plan.bits + 128ll * c[1], 512, full);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          T(*to)[kTile][64] = part ? s.value[stage.at] : s.key[stage.at];
          const CUtensorMap* all = part ? &maps.value : &maps.key;
          const CUtensorMap* granule = part ? &maps.value_granule : &maps.key_granule;
          if (part) {
            full = &s.value_full[stage.at];
            barrier_expect(full, bytes);
          }
          if (!bytes) continue;
#pragma unroll
          for (int chunk = 0; chunk < C::kChunks; ++chunk) {
            if (whole) {
              load_box(to[chunk], all, full, 64 * chunk, g[0], kv_head, batch);
            } else {
#pragma unroll
              for (int j = 0; j < 4; ++j)
                load_box(to[chunk][j * kGranule], granule, full, 64 * chunk, g[j], kv_head, batch);
            }
          }
        }
      }
      __syncwarp();
      stage.next();
    }
  }
  barrier_wait(&s.query_empty[q.at], q.parity ^ 1);
  if (lane == 0) {
    s.info[q.at].stop = 1;
    barrier_arrive(&s.query_full[q.at]);
  }
}

template <typename T, int D, bool Valid>
__device__ void consume(const Maps& maps, const Arguments& a, Shared<T, D>& s) {
  using C = Config<D>;
  constexpr int kChunkBytes = kTile * 64 * (int)sizeof(T);
  const int half = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int own_row = thread / 32 * 16 + lane / 4;
  const float scale = a.scale, slack = kSlack / scale;
  Ring<C::kStages> stage;
  Ring<C::kQueries> q;
  auto release = [&](int at) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.stage_empty[at]);
  };

  // The halves take turns at issuing the products of steps that both compute, so that one's softmax
  // runs while the tensor cores work for the other. Half 0 begins.
  constexpr int kTurn = 3;
  if (C::kOverlap && half == 1) named_barrier_arrive(kTurn, kConsumers);

  for (;; q.next()) {
    barrier_wait(&s.query_full[q.at], q.parity);
    const Info& shared = s.info[q.at];
    if (uniform(shared.stop)) {
      if (C::kOverlap && half == 0) named_barrier(kTurn, kConsumers);
      return;
    }
    const int steps = uniform(shared.steps), together = uniform(shared.together);
    const int paired = uniform(shared.paired);
    const int tile = uniform(shared.tile[half]);
    const bool active = tile != kNone;
    const uint64_t queries = tile_descriptor(s.query[q.at][paired ? 0 : half], 0);
    int step = -1, content = kFull;
    Ring<C::kStages> ahead = stage;

    // Moves to the next step that this half computes, and waits for its keys. At most `most` steps that
    // it does not compute are let pass: while it holds a stage, the ring has no room for more.
    auto advance = [&](int most) {
      while (step + 1 < steps) {
        barrier_wait(&s.key_full[ahead.at], ahead.parity);
        const int seen = uniform(s.content[ahead.at][half]);
        const bool own = active && !(paired && (step + 1) % 2 != half) && seen != kEmpty;
        if (!own && most-- == 0) return false;
        ++step;
        content = seen;
        stage = ahead;
        ahead.next();
        if (own) return true;
        release(stage.at);
      }
      return false;
    };
    float scores[32], o[D / 2];
    uint32_t held[C::kHeld ? D / 16 : 1][4];
    if constexpr (C::kHeld) {
      const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
        load_matrices(held[i],
                      &s.query[q.at][paired ? 0 : half][i / 4][row][((i % 4 * 2 + lane / 16) ^ (row % 8)) * 8]);
    }
    auto issue_scores = [&]() {
      const uint64_t keys = tile_descriptor(s.key[stage.at], 0);
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        const int offset = (i / 4 * kChunkBytes + i % 4 * 32) >> 4;
        if constexpr (C::kHeld)
          product_rs<T>(scores, held[i], keys + offset, i > 0);
        else
          product_ss<T>(scores, queries + offset, keys + offset, i > 0);
      }
      wgmma_commit();
    };
    uint32_t weights[16];
    auto await_values = [&](const Ring<C::kStages>& of) { barrier_wait(&s.value_full[of.at], of.parity); };
    auto issue_values = [&](const Ring<C::kStages>& of) {
      const uint64_t values = tile_descriptor(s.value[of.at], kChunkBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        product_rs<T, D>(o, weights + 4 * i, values + (i * kGranule * 128 >> 4));
      wgmma_commit();
    };
    auto mask = [&]() {
      uint32_t word = ~0u;
      if (content != kFull) word = s.bits[stage.at][content == s.content[stage.at][0] ? 0 : half][thread];
      if constexpr (Valid) word &= valid_fragment(s.valid[stage.at], lane);
      if (Valid || content != kFull) apply_bits(scores, word);
    };
    auto pack_weights = [&]() {
#pragma unroll
      for (int i = 0; i < 16; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    };

    Softmax softmax;
    float factor[2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    if constexpr (C::kOverlap) {
      while (advance(steps)) {
        wgmma_fence();
        issue_scores();
        wgmma_wait<0>();
        pin(scores);
        mask();
        if (softmax.update(scores, scale, slack, factor)) scale_rows(o, factor);
        softmax.weigh<T>(scores, scale);
        pack_weights();
        Ring<C::kStages> pending = stage;
        while (advance(C::kStages - 2)) {
          await_values(pending);
          if (step < together) named_barrier(kTurn + half, kConsumers);
          pin(o);
          wgmma_fence();
          issue_scores();
          issue_values(pending);
          if (step < together) named_barrier_arrive(kTurn + 1 - half, kConsumers);
          wgmma_wait<1>();
          pin(scores);
          mask();
          const bool rescale = softmax.update(scores, scale, slack, factor);
          softmax.weigh<T>(scores, scale);
          wgmma_wait<0>();
          pin(o);
          release(pending.at);
          if (rescale) scale_rows(o, factor);
          pack_weights();
          pending = stage;
        }
        await_values(pending);
        pin(o);
        wgmma_fence();
        issue_values(pending);
        wgmma_wait<0>();
        pin(o);
        release(pending.at);
      }
    } else {
      while (advance(steps)) {
        wgmma_fence();
        issue_scores();
        wgmma_wait<0>();
        pin(scores);
        mask();
        if (softmax.update(scores, scale, slack, factor)) scale_rows(o, factor);
        softmax.weigh<T>(scores, scale);
        pack_weights();
        await_values(stage);
        pin(o);
        wgmma_fence();
        issue_values(stage);
        wgmma_wait<0>();
        pin(o);
        release(stage.at);
      }
    }
    stage = ahead;

    const int row[2] = {s.rows[q.at][half][own_row], s.rows[q.at][half][own_row + 8]};
    softmax.l[0] = quad_sum(softmax.l[0]);
    softmax.l[1] = quad_sum(softmax.l[1]);
    if (paired) {
      float4* part = reinterpret_cast<float4*>(s.query[q.at]) + thread;
      named_barrier(1, kConsumers);
      if (half == 1) {
#pragma unroll
        for (int i = 0; i < D / 2; i += 4) part[i / 4 * 128] = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
        leave(softmax, s.part_ml, own_row);
      }
      named_barrier(1, kConsumers);
      if (half == 0) {
        const Softmax other = take(s.part_ml, own_row);
        combine(softmax, o, other, reinterpret_cast<const float*>(part), 4 * 128, scale);
        named_barrier(2, 128);
      }
      fence_async_proxy();
    }
    const int batch = uniform(shared.batch), slot = uniform(shared.slot);
    const int head = uniform(shared.head) + (a.two_heads ? half : 0);
    const int64_t pair = (int64_t)batch * a.heads + head;
    // Half 0 has the result of both where they share a row tile.
    const bool stores = active && !(paired && half == 1);
    if (stores && slot >= 0) {
      store_piece<D>(a, pair, slot + (a.two_heads || paired ? 0 : half), o, softmax);
    } else if (stores) {
      finish(softmax, o, row, scale, a.sinks ? a.sinks + head : nullptr, a.lse, pair * a.q_len);
      if (tile >= 0) {
        // The warp's own query rows are no longer needed: its results take their place.
        const int first = thread / 32 * 16;
        write_rows<T>(s.query[q.at][half], first, o);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
#pragma unroll
          for (int c = 0; c < C::kChunks; ++c)
            store_box(&maps.out, s.query[q.at][half][c][first], 64 * c, tile * kTile + first, head, batch);
          wait_boxes_read();
        }
      } else {
        T* out = static_cast<T*>(a.out) + ((int64_t)batch * a.q_len * a.heads + head) * D;
        store_rows<T>(o, row, out, (int64_t)a.heads * D);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.query_empty[q.at]);
  }
}

template <typename T, int D, bool Valid>
__global__ void __launch_bounds__(Config<D>::kThreads, Config<D>::kBlocks)
    block_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char memory[];
  // The start of dynamic shared memory is not aligned by itself.
  auto& s = *reinterpret_cast<Shared<T, D>*>(memory + (-shared_address(memory) & 1023));
  using C = Config<D>;
  const int warp = uniform(threadIdx.x / 32);
  Item first;
  if (warp == kConsumers / 32) first = fetch(a, fetch_entry(a, blockIdx.x));
  if (threadIdx.x == 0) {
    prefetch_map(&maps.query);
    prefetch_map(&maps.key);
    prefetch_map(&maps.value);
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(&s.key_full[i], 1);
      barrier_init(&s.value_full[i], 1);
      barrier_init(&s.stage_empty[i], 4 * kHalves);
    }
    for (int i = 0; i < C::kQueries; ++i) {
      barrier_init(&s.query_full[i], 1);
      barrier_init(&s.query_empty[i], 4 * kHalves);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp >= kConsumers / 32) {
    if constexpr (C::kProducerRegisters > 0) registers_down<C::kProducerRegisters>();
    if (warp == kConsumers / 32) produce<T, D, Valid>(maps, a, s, first);
  } else {
    if constexpr (C::kProducerRegisters > 0) registers_up<C::kConsumerRegisters>();
    consume<T, D, Valid>(maps, a, s);
  }
}

template <typename T, int D>
const char* run(const Problem& p, cudaStream_t stream) {
  const Encode encode = find_encode();
  if (!encode) return kNoEncode;
  Maps maps;
  const Strides3 out = {p.q_len * p.heads * D, D, p.heads * D};
  const bool fits = make_map<T>(maps.query, encode, p.query, p.q, D, p.q_len, p.heads, p.batch, kTile) &&
                    make_map<T>(maps.query_granule, encode, p.query, p.q, D, p.q_len, p.heads, p.batch, kGranule) &&
                    make_map<T>(maps.query_row, encode, p.query, p.q, D, p.q_len, p.heads, p.batch, 1) &&
                    make_map<T>(maps.key, encode, p.key, p.k, D, p.kv_len, p.kv_heads, p.batch, kTile) &&
                    make_map<T>(maps.key_granule, encode, p.key, p.k, D, p.kv_len, p.kv_heads, p.batch, kGranule) &&
                    make_map<T>(maps.value, encode, p.value, p.v, D, p.kv_len, p.kv_heads, p.batch, kTile) &&
                    make_map<T>(maps.value_granule, encode, p.value, p.v, D, p.kv_len, p.kv_heads, p.batch, kGranule) &&
                    make_map<T>(maps.out, encode, p.out, out, D, p.q_len, p.heads, p.batch, 16);
  if (!fits) return kNoMap;
  const Arguments a(p, p.scale * kLog2e);
  constexpr int kBytes = (int)sizeof(Shared<T, D>) + 1024;
  static Launcher launchers[2], merger;
  Launcher& launcher = launchers[p.kv_valid != nullptr];
  const auto kernel = p.kv_valid ? block_kernel<T, D, true> : block_kernel<T, D, false>;
  cudaError_t error = launcher.prepare(kernel, p.device, kBytes);
  if (error == cudaSuccess)
    error = launcher.launch(kernel, dim3((unsigned)p.grid), Config<D>::kThreads, kBytes, 1, stream, maps, a);
  if (error != cudaSuccess || p.plan.slots == 0) return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  error = merger.prepare(merge_kernel<T, D>, p.device, 0);
  if (error == cudaSuccess)
    error = merger.launch(merge_kernel<T, D>, dim3((unsigned)(p.batch * p.heads), (unsigned)p.plan.n_merges), 128, 0, 1,
                          stream, a);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::Problem* problem, void* stream) {
  return stof::run<STOF_DTYPE, STOF_HEAD_DIM>(*problem, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::Problem); }
