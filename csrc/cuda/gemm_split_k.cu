// Linear layers of few rows for Hopper (sm_90a), fp16 and bf16: product, bias, activation or gate, residual.
//
// Few rows make few tiles, and a tile's depth is a chain of steps that wait for memory. So the blocks of a
// cluster share the depth of a tile: each computes the partial sums of its steps, and sends of each block's
// share of the tile its own to that block (st.async), which adds them, always in the same order.
// Weights that no kernel in front writes are loaded before those have ended; behind them, what is left is to
// load x, a few products, and the exchange.
// Limits: rows of x and weight aligned to 16 bytes, out and residual to 4; lengths up to 2^31.
#include <cuda_runtime.h>

#include "activation.cuh"
#include "gemm.h"
#include "hopper_ptx.cuh"
#include "items.cuh"
#include "launch.cuh"
#include "maps.cuh"

namespace stof {
namespace {

constexpr int kDepth = 64, kMostStages = 8, kMostBytes = 227 << 10;

struct Call {
  CUtensorMap x, weight;
  const void *bias, *residual;
  void* out;
  int32_t* overflow;
  int64_t residual_row;
  int rows, columns, steps, split, stages, activation, constant;
  int share, shared_by;  // of a tile's units, a block's, and blocks that share it, as powers of two
};

// Groups: warpgroups, each with 64 rows of the tile. N: columns of its product.
template <typename T, int Groups, int N>
struct Shared {
  // A unit is 16 rows of 8 columns, of one warp.
  static constexpr int kRows = 64 * Groups, kWarps = 4 * Groups, kAcross = N / 8, kUnits = kWarps * kAcross;
  struct Stage {
    T x[kRows][kDepth];
    T weight[N * kDepth];
  };
  float4 sums[kUnits][32];
  uint64_t full[kMostStages], empty[kMostStages], arrived;

  // The stages come first.
  static __device__ __forceinline__ Stage* stages() {
    extern __shared__ unsigned char memory[];
    return reinterpret_cast<Stage*>(memory + (-shared_address(memory) & 1023));
  }
};

// What a block computes: of a tile, the steps [begin, begin + count), and in the end the units [first, first + own)
// out of 2^share of each block.
template <typename T, int Groups, int N, bool Gated>
struct Part {
  using S = Shared<T, Groups, N>;
  int rank, row, column, begin, count, first, own;

  __device__ __forceinline__ explicit Part(const Call& call) {
    rank = blockIdx.x;
    row = blockIdx.y * S::kRows;
    column = blockIdx.z * (Gated ? N / 2 : N);
    begin = call.steps * rank >> call.shared_by;
    count = (call.steps * (rank + 1) >> call.shared_by) - begin;
    first = rank << call.share;
    // Warps without a row send nothing.
    const int warps = min(S::kWarps, (call.rows - row + 15) / 16);
    own = max(0, min(1 << call.share, warps * S::kAcross - first));
  }
};

template <typename T, int Groups, int N, bool Gated, bool Transposed>
__device__ __forceinline__ void produce(const Call& call, Shared<T, Groups, N>& s,
                                        const Part<T, Groups, N, Gated>& part) {
  using S = Shared<T, Groups, N>;
  constexpr int kBytes = sizeof(typename S::Stage);
  typename S::Stage* stages = S::stages();
  auto load_weight = [&](int k, int at) {
    barrier_expect(&s.full[at], kBytes);
    const int depth = kDepth * (part.begin + k);
    T* to = stages[at].weight;
    if constexpr (Transposed) {
#pragma unroll
      for (int c = 0; c < N / 64; ++c)
        load_box(to + c * 64 * kDepth, &call.weight, &s.full[at], part.column + 64 * c, depth, 0, 0);
    } else if constexpr (Gated) {
      load_box(to, &call.weight, &s.full[at], depth, part.column, 0, 0);
      load_box(to + N / 2 * kDepth, &call.weight, &s.full[at], depth, call.columns + part.column, 0, 0);
    } else {
      load_box(to, &call.weight, &s.full[at], depth, part.column, 0, 0);
    }
  };
  const int ahead = call.constant ? min(call.stages, part.count) : 0;
#pragma unroll 1
  for (int k = 0; k < ahead; ++k) load_weight(k, k);
  await_kernels_before();
  int at = 0, parity = 1;
#pragma unroll 1
  for (int k = 0; k < part.count; ++k) {
    barrier_wait(&s.empty[at], parity);
    if (k >= ahead) load_weight(k, at);
    load_box(stages[at].x, &call.x, &s.full[at], kDepth * (part.begin + k), part.row, 0, 0);
    if (++at == call.stages) at = 0, parity ^= 1;
  }
}

// What is added to a unit: of its two rows.
struct Addends {
  uint32_t bias = 0, residual[2] = {};
};

// Where a warp's unit i lies, and what else belongs to it.
template <typename T, int Groups, int N, bool Gated>
struct Unit {
  using S = Shared<T, Groups, N>;
  static constexpr int kEach = Gated ? 2 : 1;  // a gate's is followed by what it gates
  int at, row, column;

  __device__ __forceinline__ Unit(const Part<T, Groups, N, Gated>& part, int i) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    at = (warp + i * S::kWarps) * kEach;
    row = part.row + (part.first + at) / S::kAcross * 16 + lane / 4;
    column = part.column + (part.first + at) % S::kAcross / kEach * 8 + lane % 4 * 2;
  }

  __device__ __forceinline__ Addends load(const Call& call, const Part<T, Groups, N, Gated>& part) const {
    Addends found;
    if (Gated || at >= part.own || column >= call.columns) return found;
    if (call.bias) found.bias = __ldg(static_cast<const uint32_t*>(call.bias) + column / 2);
    if (call.residual) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const T* from = static_cast<const T*>(call.residual) + (row + 8 * r) * call.residual_row + column;
        if (row + 8 * r < call.rows) found.residual[r] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
    return found;
  }
};

// Adds what the blocks sent, and stores this block's units of the tile. Code that runs once is paid for when it is
// fetched: hence nothing here is unrolled.
template <typename T, int Groups, int N, bool Gated>
__device__ __forceinline__ void finish(const Call& call, Shared<T, Groups, N>& s,
                                       const Part<T, Groups, N, Gated>& part, [[maybe_unused]] Addends add) {
  using S = Shared<T, Groups, N>;
  const int lane = threadIdx.x % 32;
  auto act = [&](float x) { return activate(call.activation, x); };
  auto sum = [&](int unit) {
    float4 x = s.sums[unit][lane];
#pragma unroll 1
    for (int block = 1; block < call.split; ++block) {
      const float4 y = s.sums[(block << call.share) + unit][lane];
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    return x;
  };
  if (call.split == 1)
    named_barrier(1, 32 * S::kWarps);
  else
    barrier_wait_cluster(&s.arrived, 0);
  bool infinite = false;
#pragma unroll 1
  for (int i = 0;; ++i) {
    const Unit<T, Groups, N, Gated> unit(part, i);
    if (unit.at >= part.own) break;
    float4 x = sum(unit.at);
    if constexpr (Gated) {
      const float4 up = sum(unit.at + 1);
      x = make_float4(act(x.x) * up.x, act(x.y) * up.y, act(x.z) * up.z, act(x.w) * up.w);
    } else {
      if (i > 0) add = unit.load(call, part);
      const float2 bias = pair_of<T>(add.bias), top = pair_of<T>(add.residual[0]), low = pair_of<T>(add.residual[1]);
      x = make_float4(act(x.x + bias.x) + top.x, act(x.y + bias.y) + top.y, act(x.z + bias.x) + low.x,
                      act(x.w + bias.y) + low.y);
    }
    if (unit.column >= call.columns) continue;
    const uint32_t y[2] = {pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = unit.row + 8 * r;
      if (row >= call.rows) continue;
      *reinterpret_cast<uint32_t*>(static_cast<T*>(call.out) + (int64_t)row * call.columns + unit.column) = y[r];
      const float2 z = pair_of<T>(y[r]);
      infinite |= isinf(z.x) || isinf(z.y);
    }
  }
  if (call.overflow) {
    infinite = __any_sync(~0u, infinite);
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (lane == 0) call.overflow[block * S::kWarps + threadIdx.x / 32] = infinite;
  }
}

template <typename T, int Groups, int N, bool Gated, bool Transposed>
__device__ __forceinline__ void consume(const Call& call, Shared<T, Groups, N>& s,
                                        const Part<T, Groups, N, Gated>& part) {
  using S = Shared<T, Groups, N>;
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  typename S::Stage* stages = S::stages();
  await_kernels_before();
  const Addends add = Unit<T, Groups, N, Gated>(part, 0).load(call, part);
  float acc[N / 2];
  int at = 0, parity = 0, before = 0;
#pragma unroll 1
  for (int k = 0; k < part.count; ++k) {
    barrier_wait(&s.full[at], parity);
    wgmma_fence();
    const uint64_t x = tile_descriptor(stages[at].x[warp / 4 * 64], 0);
    const uint64_t weight = tile_descriptor(stages[at].weight, Transposed ? 64 * kDepth * (int)sizeof(T) : 0);
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i)
      product_ss<T, Transposed>(acc, x + (i * 32 >> 4), weight + (i * (Transposed ? 2048 : 32) >> 4), k + i > 0);
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(&s.empty[before]);
    }
    before = at;
    if (++at == call.stages) at = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  pin(acc);
  // The barriers of all blocks are ready.
  if (call.split > 1) cluster_wait();
  if (part.row + 16 * warp < call.rows) {
#pragma unroll
    for (int q = 0; q < S::kAcross; ++q) {
      // A gate's unit is followed by what it gates.
      const int j = Gated ? q % 2 * (S::kAcross / 2) + q / 2 : q, unit = warp * S::kAcross + q;
      const int to = unit >> call.share;
      float4* place = &s.sums[part.first + unit - (to << call.share)][lane];
      const float4 sum = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
      if (call.split == 1)
        *place = sum;
      else
        send(place, &s.arrived, to, sum);
    }
  }
  finish<T, Groups, N, Gated>(call, s, part, add);
}

template <typename T, int Groups, int N, bool Gated, bool Transposed>
__global__ void __launch_bounds__(128 * Groups + 32, 2) gemm_kernel(const __grid_constant__ Call call) {
  using S = Shared<T, Groups, N>;
  S& s = *reinterpret_cast<S*>(S::stages() + call.stages);
  const Part<T, Groups, N, Gated> part(call);
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) {
    prefetch_map(&call.x);
    prefetch_map(&call.weight);
    for (int i = 0; i < call.stages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], S::kWarps);
    }
    barrier_init(&s.arrived, 1);
    fence_barrier_init();
    barrier_expect(&s.arrived, part.own * call.split * (int)sizeof(s.sums[0]));
  }
  launch_next_kernel();
  __syncthreads();
  if (call.split > 1) cluster_arrive();
  if (warp < S::kWarps) {
    consume<T, Groups, N, Gated, Transposed>(call, s, part);
  } else {
    if (threadIdx.x % 32 == 0) produce<T, Groups, N, Gated, Transposed>(call, s, part);
    __syncwarp();
    if (call.split > 1) cluster_wait();
  }
}

template <typename T, int Groups, int N, bool Gated, bool Transposed>
const char* launch(const GemmProblem& p, cudaStream_t stream) {
  using S = Shared<T, Groups, N>;
  const Encode encode = find_encode();
  if (!encode) return kNoEncode;
  const Strides3 x = {0, 0, p.x_row}, weight = {0, 0, p.weight_row};
  Call call = {};
  const int64_t weight_rows = Gated ? 2 * p.columns : p.columns;
  const bool mapped =
      make_map<T>(call.x, encode, p.x, x, p.depth, p.rows, 1, 1, S::kRows) &&
      (Transposed ? make_map<T>(call.weight, encode, p.weight, weight, p.columns, p.depth, 1, 1, kDepth)
                  : make_map<T>(call.weight, encode, p.weight, weight, p.depth, weight_rows, 1, 1, Gated ? N / 2 : N));
  if (!mapped) return kNoMap;
  constexpr int kWide = Gated ? N / 2 : N;
  call.bias = p.bias;
  call.residual = p.residual;
  call.out = p.out;
  call.overflow = p.overflow;
  call.residual_row = p.residual_row;
  call.rows = (int)p.rows;
  call.columns = (int)p.columns;
  call.steps = (int)((p.depth + kDepth - 1) / kDepth);
  call.split = (int)p.split;
  call.activation = (int)p.activation;
  call.constant = (int)p.constant;
  if (p.split != 1 && p.split != 2 && p.split != 4 && p.split != 8) return "split must be 1, 2, 4 or 8";
  while (1 << call.shared_by < p.split) ++call.shared_by;
  while (S::kUnits >> call.share > p.split) ++call.share;
  if (p.split > call.steps) return "there are fewer steps than blocks that are to share them";
  const int most = (int)((call.steps + p.split - 1) / p.split);
  call.stages = (int)(p.stages < most ? p.stages : most);
  const int64_t bytes = call.stages * sizeof(typename S::Stage) + sizeof(S) + 1024;
  if (call.stages < 1 || p.stages > kMostStages || bytes > kMostBytes) return "so many stages do not fit";
  const dim3 grid((unsigned)p.split, (unsigned)((p.rows + S::kRows - 1) / S::kRows),
                  (unsigned)((p.columns + kWide - 1) / kWide));
  if (grid.y > 65535 || grid.z > 65535) return "rows or columns are more than a grid has blocks";
  static Launcher launcher;
  const auto kernel = gemm_kernel<T, Groups, N, Gated, Transposed>;
  cudaError_t error = launcher.prepare(kernel, p.device, kMostBytes);
  if (error == cudaSuccess)
    error = launcher.launch(kernel, grid, 128 * Groups + 32, (int)bytes, call.split, stream, call);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int Groups, int N>
const char* run(const GemmProblem& p, cudaStream_t stream) {
  if (!p.gated)
    return p.transposed ? launch<T, Groups, N, false, true>(p, stream) : launch<T, Groups, N, false, false>(p, stream);
  return p.transposed ? kNotTransposed : launch<T, Groups, N, true, false>(p, stream);
}

template <typename T>
const char* run(const GemmProblem& p, cudaStream_t stream) {
  if (p.block_m == 64 && p.block_n == 64) return run<T, 1, 64>(p, stream);
  if (p.block_m == 64 && p.block_n == 128) return run<T, 1, 128>(p, stream);
  if (p.block_m == 128 && p.block_n == 64) return run<T, 2, 64>(p, stream);
  if (p.block_m == 128 && p.block_n == 128) return run<T, 2, 128>(p, stream);
  return "block_m and block_n must be 64 or 128";
}

}  // namespace
}  // namespace stof

extern "C" const char* stof_run(const stof::GemmProblem* problem, void* stream) {
  return stof::run<STOF_DTYPE>(*problem, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t stof_problem_bytes() { return sizeof(stof::GemmProblem); }
