// Linear layers for Hopper (sm_90a), fp16 and bf16: product, bias, activation or gate, residual, in one kernel.
//
// Tiling: a tile is 128 rows of x times 128 or 192 rows of the weight, all of a warpgroup's; gated, half of
// those rows gate and half are gated, so that a thread holds both. Two blocks form a cluster: their tiles
// lie one below the other, and each loads half of the weights for both.
// Pipeline: blocks are persistent. One warp loads; two warpgroups take tiles in turn, so that the tensor
// cores multiply for one while the other computes its activation, rounds and stores (ping-pong, as in
// CUTLASS). A warpgroup gives the turn away once its last product is issued.
// Instructions: what is behind a product is unrolled over the accumulators, 20 to 60 KB. There is a kernel for each
// activation: the beginning of a kernel's code seems to be fetched ahead. In a kernel of all activations, tiles waited
// 10 us for what lay 100 KB behind it wherever other kernels had run in between (docs/performance.md).
// Limits: rows of x, weight and out aligned to 16 bytes; lengths up to 2^31.
#include <cuda_runtime.h>

#include "activation.cuh"
#include "gemm.h"
#include "hopper_ptx.cuh"
#include "items.cuh"
#include "launch.cuh"
#include "maps.cuh"

namespace stof {
namespace {

constexpr int kCluster = 2, kRows = 128, kDepth = 64;  // of a tile, and of a step
constexpr int kGroups = 2, kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kTurn = 1;  // the named barrier of the first warpgroup's turn
constexpr int kBox = 32;  // columns that are stored at a time

struct Call {
  CUtensorMap x, weight, out;
  const void *bias, *residual;
  int64_t residual_row;
  int rows, columns, steps, tiles, across, group, pairs;
};

template <typename T, int N>
struct Shared {
  static constexpr int kStages = N == 192 ? 5 : 6;
  T x[kStages][kRows][kDepth];
  T weight[kStages][N][kDepth];
  T out[kGroups][2][64][kBox];
  uint64_t full[kStages], empty[kStages];
};

// Where a cluster's tile lies: the first row of the pair of row tiles, and the column of tiles.
struct Place {
  int row, column;

  __device__ __forceinline__ Place(const Call& call, int tile) {
    const int width = call.group * call.across, first = tile / width * call.group, rest = tile % width;
    const int height = min(call.pairs - first, call.group);
    row = (first + rest % height) * kCluster * kRows;
    column = rest / height;
  }
};

// Puts a warp's 16 rows of 32 columns, in pairs, where the copy engine takes them from, swizzled by 64 bytes.
template <typename T>
__device__ __forceinline__ void write_box(T (*to)[kBox], const uint32_t (&y)[kBox / 4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kBox / 16; ++j)
    store_matrices(&to[lane % 16][((j * 2 + lane / 16) ^ (lane / 2 % 4)) * 8], y[4 * j], y[4 * j + 1], y[4 * j + 2],
                   y[4 * j + 3]);
}

// Stores a warp's part of a tile: rows from `row` on of both halves, columns of out from `column` on.
template <typename T, int N, bool Gated, int A>
__device__ __forceinline__ void store(const Call& call, T (&buffers)[2][64][kBox], const float (&acc)[2][N / 2],
                                      int row, int column) {
  const int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16;
  constexpr int kBoxes = (Gated ? N / 2 : N) / kBox;
  // Pairs of columns 8 j + 2 (l % 4), and of them the rows l / 4 and l / 4 + 8.
  uint32_t bias[kBox / 8], residual[2][kBox / 8];
  auto load_bias = [&](int c) {
#pragma unroll
    for (int j = 0; j < kBox / 8; ++j) {
      const int at = column + kBox * c + 8 * j + lane % 4 * 2;
      bias[j] = call.bias && at < call.columns ? __ldg(static_cast<const uint32_t*>(call.bias) + at / 2) : 0;
    }
  };
  // That of the next box is on its way while one is computed.
  auto load_residual = [&](int c, int h) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = row + 64 * h + first + lane / 4 + 8 * r;
      const T* from = static_cast<const T*>(call.residual) + own * call.residual_row;
#pragma unroll
      for (int j = 0; j < kBox / 8; ++j) {
        const int at = column + kBox * c + 8 * j + lane % 4 * 2;
        if (own < call.rows && at < call.columns) residual[r][j] = *reinterpret_cast<const uint32_t*>(from + at);
      }
    }
  };
  if (!Gated && call.residual) load_residual(0, 0);
#pragma unroll
  for (int c = 0; c < kBoxes; ++c) {
    if constexpr (!Gated) load_bias(c);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t y[kBox / 4];
#pragma unroll
      for (int i = 0; i < kBox / 2; i += 2) {
        const float *x = acc[h] + kBox / 2 * c + i, *up = x + N / 4;
        float2 z;
        if constexpr (Gated) {
          z = make_float2(activate<A>(x[0]) * up[0], activate<A>(x[1]) * up[1]);
        } else {
          const float2 add = pair_of<T>(bias[i / 4]);
          z = make_float2(activate<A>(x[0] + add.x), activate<A>(x[1] + add.y));
          if (call.residual) {
            const float2 more = pair_of<T>(residual[i / 2 % 2][i / 4]);
            z.x += more.x, z.y += more.y;
          }
        }
        y[i / 2] = pack<T>(z.x, z.y);
      }
      if (!Gated && call.residual && (h == 0 || c + 1 < kBoxes)) load_residual(c + h, 1 - h);
      T(*to)[kBox] = buffers[h] + first;
      write_box<T>(to, y);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        store_box(&call.out, to, column + kBox * c, row + 64 * h + first, 0, 0);
        // The other buffer is written next.
        wait_boxes_read<1>();
      }
      __syncwarp();
    }
  }
}

template <typename T, int N, bool Gated, bool Transposed>
__device__ __forceinline__ void produce(const Call& call, Shared<T, N>& s, int rank, int cluster, int clusters) {
  using S = Shared<T, N>;
  Ring<S::kStages> stage;
  for (int tile = cluster; tile < call.tiles; tile += clusters) {
    const Place place(call, tile);
    const int row = place.row + rank * kRows;
    const int of = Gated ? place.column * (N / 2) + rank * call.columns : place.column * N + rank * (N / 2);
    for (int k = 0; k < call.steps; ++k, stage.next()) {
      barrier_wait(&s.empty[stage.at], stage.parity ^ 1);
      barrier_expect(&s.full[stage.at], (kRows + N) * kDepth * (int)sizeof(T));
      load_box(s.x[stage.at], &call.x, &s.full[stage.at], kDepth * k, row, 0, 0);
      if constexpr (Transposed) {
        // Chunks of 64 columns, of which each block loads half of the rows.
        T* to = s.weight[stage.at][0] + rank * (kDepth / 2 * 64);
#pragma unroll
        for (int c = 0; c < N / 64; ++c)
          load_box_to_all(to + c * kDepth * 64, &call.weight, &s.full[stage.at], place.column * N + 64 * c,
                          kDepth * k + rank * (kDepth / 2), 0, 0, (1 << kCluster) - 1);
      } else {
        load_box_to_all(s.weight[stage.at] + rank * (N / 2), &call.weight, &s.full[stage.at], kDepth * k, of, 0, 0,
                        (1 << kCluster) - 1);
      }
    }
  }
}

template <typename T, int N, bool Gated, bool Transposed, int A>
__device__ __forceinline__ void consume(const Call& call, Shared<T, N>& s, int rank, int cluster, int clusters) {
  using S = Shared<T, N>;
  const int group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
  auto release = [&](int at) {
    // Both blocks write to a stage.
    if (lane < kCluster) barrier_arrive_at(&s.empty[at], lane);
  };
  // The first warpgroup begins.
  if (group == 1) named_barrier_arrive(kTurn, kConsumers);
  const int rounds = (call.tiles - cluster + clusters - 1) / clusters;
  Ring<S::kStages> stage;
  auto skip = [&] {
    const int at = stage.at + call.steps;
    stage.parity ^= at / S::kStages & 1;
    stage.at = at % S::kStages;
  };
  if (group == 1) skip();
  float acc[2][N / 2];
  for (int round = group; round < rounds; round += kGroups, skip()) {
    named_barrier(kTurn + group, kConsumers);
    int before = 0;
    for (int k = 0; k < call.steps; ++k) {
      barrier_wait(&s.full[stage.at], stage.parity);
      wgmma_fence();
      const uint64_t x = tile_descriptor(s.x[stage.at], 0);
      const uint64_t weight = tile_descriptor(s.weight[stage.at], Transposed ? 64 * kDepth * (int)sizeof(T) : 0);
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          product_ss<T, Transposed>(acc[h], x + (h * 64 * 128 + i * 32 >> 4),
                                    weight + (i * (Transposed ? 2048 : 32) >> 4), k + i > 0);
      wgmma_commit();
      if (k > 0) {
        wgmma_wait<1>();
        release(before);
      }
      before = stage.at;
      stage.next();
    }
    named_barrier_arrive(kTurn + 1 - group, kConsumers);
    wgmma_wait<0>();
    release(before);
    pin(acc[0]);
    pin(acc[1]);
    const Place place(call, cluster + round * clusters);
    const int row = place.row + rank * kRows, column = place.column * (Gated ? N / 2 : N);
    store<T, N, Gated, A>(call, s.out[group], acc, row, column);
  }
  // What was given away last is taken.
  if (group == rounds % kGroups) named_barrier(kTurn + group, kConsumers);
  if (lane == 0) wait_boxes_read<0>();
}

template <typename T, int N, bool Gated, bool Transposed, int A>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Call call) {
  using S = Shared<T, N>;
  extern __shared__ unsigned char memory[];
  // The start of dynamic shared memory is not aligned by itself.
  S& s = *reinterpret_cast<S*>(memory + (-shared_address(memory) & 1023));
  const int warp = uniform(threadIdx.x / 32), rank = blockIdx.x % kCluster;
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  if (threadIdx.x == 0) {
    prefetch_map(&call.x);
    prefetch_map(&call.weight);
    prefetch_map(&call.out);
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 4 * kCluster);
    }
    fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  await_kernels_before();
  if (warp >= kConsumers / 32) {
    registers_down<kProducerRegisters>();
    if (warp == kConsumers / 32 && threadIdx.x % 32 == 0)
      produce<T, N, Gated, Transposed>(call, s, rank, cluster, clusters);
    __syncwarp();
  } else {
    registers_up<kConsumerRegisters>();
    consume<T, N, Gated, Transposed, A>(call, s, rank, cluster, clusters);
    __syncwarp();
  }
  // The other block may still write here.
  cluster_arrive();
  cluster_wait();
}

template <typename T, int N, bool Gated, bool Transposed, int A>
const char* launch(const GemmProblem& p, cudaStream_t stream) {
  const Encode encode = find_encode();
  if (!encode) return kNoEncode;
  const Strides3 x = {0, 0, p.x_row}, weight = {0, 0, p.weight_row}, out = {0, 0, p.columns};
  Call call = {};
  const int64_t weight_rows = Gated ? 2 * p.columns : p.columns;
  if (!make_map<T>(call.x, encode, p.x, x, p.depth, p.rows, 1, 1, kRows) ||
      !(Transposed ? make_map<T>(call.weight, encode, p.weight, weight, p.columns, p.depth, 1, 1, kDepth / kCluster)
                   : make_map<T>(call.weight, encode, p.weight, weight, p.depth, weight_rows, 1, 1, N / kCluster)) ||
      !make_map<T, kBox>(call.out, encode, p.out, out, p.columns, p.rows, 1, 1, 16))
    return kNoMap;
  constexpr int kWide = Gated ? N / 2 : N;
  call.bias = p.bias;
  call.residual = p.residual;
  call.residual_row = p.residual_row;
  call.rows = (int)p.rows;
  call.columns = (int)p.columns;
  call.steps = (int)((p.depth + kDepth - 1) / kDepth);
  call.across = (int)((p.columns + kWide - 1) / kWide);
  call.pairs = (int)((p.rows + kCluster * kRows - 1) / (kCluster * kRows));
  call.tiles = call.across * call.pairs;
  call.group = (int)p.group;
  constexpr int kBytes = (int)sizeof(Shared<T, N>) + 1024;
  static Launcher launcher;
  const auto kernel = gemm_kernel<T, N, Gated, Transposed, A>;
  cudaError_t error = launcher.prepare(kernel, p.device, kBytes);
  int processors = 0;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, (int)p.device);
  if (error == cudaSuccess) {
    const int clusters = call.tiles < processors / kCluster ? call.tiles : processors / kCluster;
    error = launcher.launch(kernel, dim3((unsigned)(clusters * kCluster)), kThreads, kBytes, kCluster, stream, call);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int N, bool Gated, bool Transposed>
const char* run(const GemmProblem& p, cudaStream_t stream) {
  switch (p.activation) {
    case kNoActivation: return launch<T, N, Gated, Transposed, kNoActivation>(p, stream);
    case kRelu: return launch<T, N, Gated, Transposed, kRelu>(p, stream);
    case kGelu: return launch<T, N, Gated, Transposed, kGelu>(p, stream);
    case kGeluTanh: return launch<T, N, Gated, Transposed, kGeluTanh>(p, stream);
    case kQuickGelu: return launch<T, N, Gated, Transposed, kQuickGelu>(p, stream);
    case kSilu: return launch<T, N, Gated, Transposed, kSilu>(p, stream);
  }
  return "there is no such activation";
}

template <typename T, int N>
const char* run(const GemmProblem& p, cudaStream_t stream) {
  if (!p.gated) return p.transposed ? run<T, N, false, true>(p, stream) : run<T, N, false, false>(p, stream);
  return p.transposed ? kNotTransposed : run<T, N, true, false>(p, stream);
}

template <typename T>
const char* run(const GemmProblem& p, cudaStream_t stream) {
  if (p.block_n == 128) return run<T, 128>(p, stream);
  if (p.block_n == 192) return run<T, 192>(p, stream);
  return "block_n must be 128 or 192";
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::GemmProblem* problem, void* stream) {
  return stof::run<STOF_DTYPE>(*problem, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::GemmProblem); }
