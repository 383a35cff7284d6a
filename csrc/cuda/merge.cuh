// Combines what was computed of a row tile in pieces: fp32 partial results in the workspace, for each
// piece [D / 8][128 threads][4] in the order of the accumulators, then m and l of each row.
#pragma once

#include <cuda_runtime.h>

#include "fragments.cuh"
#include "items.cuh"
#include "launch.cuh"

namespace stof {

// Stores the piece `slot` of a head's rows; `pair` counts heads of all batch elements. Thread of 128 by thread.
template <int D>
__device__ __forceinline__ void store_piece(const Arguments& a, int64_t pair, int slot, const float (&o)[D / 2],
                                            const Softmax& softmax) {
  const int thread = threadIdx.x % 128, lane = thread % 32, own_row = thread / 32 * 16 + lane / 4;
  float* part = a.part + (pair * a.plan.slots + slot) * (kTile * (D + 2));
#pragma unroll
  for (int i = 0; i < D / 2; i += 4)
    reinterpret_cast<float4*>(part)[i / 4 * 128 + thread] = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
  if (lane % 4 == 0)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      part[kTile * D + own_row + 8 * r] = softmax.m[r];
      part[kTile * D + kTile + own_row + 8 * r] = softmax.l[r];
    }
}

// One process loads many libraries: each has a merge_kernel of its own.
namespace {

template <typename T, int D>
__global__ void __launch_bounds__(128) merge_kernel(const __grid_constant__ Arguments a) {
  const int thread = threadIdx.x, lane = thread % 32, own_row = thread / 32 * 16 + lane / 4;
  const int head = blockIdx.x % a.heads, batch = blockIdx.x / a.heads;
  const int pattern =
      a.plan.pattern_id ? a.plan.pattern_id[batch * a.plan.pattern_batch + head * a.plan.pattern_head] : 0;
  const int4 merge =
      reinterpret_cast<const int4*>(a.plan.merges)[(int64_t)pattern * a.plan.n_merges + blockIdx.y];
  if (merge.x == kNone) return;
  int row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = own_row + 8 * r;
    row[r] = merge.x >= 0 ? merge.x * kTile + i : a.plan.rows[(-1 - merge.x) * kTile + i];
    if (row[r] >= a.q_len) row[r] = -1;
  }
  Softmax total;
  float o[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0;
  await_kernels_before();
  for (int i = 0; i < merge.z; ++i) {
    const float* part =
        a.part + ((int64_t)blockIdx.x * a.plan.slots + merge.y + i * merge.w) * (kTile * (D + 2));
    Softmax piece;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      piece.m[r] = part[kTile * D + own_row + 8 * r];
      piece.l[r] = part[kTile * D + kTile + own_row + 8 * r];
    }
    combine(total, o, piece, part + 4 * thread, 4 * 128, a.scale);
  }
  finish(total, o, row, a.scale, a.sinks ? a.sinks + head : nullptr, a.lse,
         (int64_t)blockIdx.x * a.q_len);
  T* out = static_cast<T*>(a.out) + ((int64_t)batch * a.q_len * a.heads + head) * a.value_dim;
  const int64_t out_row = (int64_t)a.heads * a.value_dim;
  if (a.value_dim % 8 == 0)
    store_rows<T>(o, row, out, out_row, a.value_dim);
  else
    store_elements<T>(o, row, out, out_row, a.value_dim);
}

}  // namespace
}  // namespace stof
