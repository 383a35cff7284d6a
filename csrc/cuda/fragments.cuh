// What the tensor-core kernels share: a warp's 16 rows of accumulators, from scores to stored rows.
//
// Lane l of a warp holds, at index 4 j + 2 r + c, the element of row l / 4 + 8 r and column
// 8 j + 2 (l % 4) + c, in mma's and wgmma's accumulators alike.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace stof {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Bit i of the word is that of accumulator i.
template <int N>
__device__ __forceinline__ void apply_bits(float (&s)[N], uint32_t word) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (!(word >> i & 1)) s[i] = -INFINITY;
}

// The 16 bits of kv_valid that belong to the granule of keys that begins at `key`.
__device__ __forceinline__ uint64_t valid_granule(const uint64_t* words, int key) {
  return __ldg(words + key / 64) >> key % 64 & 0xffff;
}

// Bits of a step's 64 keys as a word for apply_bits.
__device__ __forceinline__ uint32_t valid_fragment(uint64_t keys, int lane) {
  uint64_t x = keys >> lane % 4 * 2 & 0x0303030303030303;  // byte j: the lane's two keys of group j
  x |= x << 2;                                              // the same for both rows
  x = (x | x >> 4) & 0x00ff00ff00ff00ff;
  x = (x | x >> 8) & 0x0000ffff0000ffff;
  return (uint32_t)(x | x >> 16);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Maxima of scores, to base 2, may lag behind by this much, as FlashAttention 4's by 8: most steps then leave
// the output as it is. The largest weight of a row is no longer exactly 1, and is rounded: with 8, errors are
// up to 1.25 times those of exact maxima where a few keys dominate, with 2 up to 1.06.
constexpr float kSlack = 2;

// Running softmax of two rows a lane: m, the reference that scores are reduced by, follows the
// largest score only when that has grown by more than `slack`, kSlack / scale.
struct Softmax {
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};

  // Whether the output must be scaled by `factor` before this step's product is added.
  template <int N>
  __device__ __forceinline__ bool update(const float (&s)[N], float scale, float slack, float (&factor)[2]) {
    // Four chains a row: one alone would wait for its own result in every instruction.
    float chain[2][4];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float& x = chain[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
      x = i < 8 ? s[i] : fmaxf(x, s[i]);
    }
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      top[r] = quad_max(fmaxf(fmaxf(chain[r][0], chain[r][1]), fmaxf(chain[r][2], chain[r][3])));
    const bool grown = top[0] > m[0] + slack || top[1] > m[1] + slack;
    if (!__any_sync(~0u, grown)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = fmaxf(m[r], top[r]);
      factor[r] = m[r] == -INFINITY ? 0.f : exp2_fast((m[r] - next) * scale);
      l[r] *= factor[r];
      m[r] = next;
    }
    return true;
  }

  // Scores become the rounded weights, packed as the next product's first operand.
  template <typename T, int N>
  __device__ __forceinline__ void weigh(float (&s)[N], float scale) {
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = m[r] == -INFINITY ? 0.f : m[r] * scale;
    float chain[2][2] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int r = i / 2 % 2;
      s[i] = exp2_fast(fmaf(s[i], scale, -base[r]));
      chain[r][i % 2] += s[i];
    }
    l[0] += chain[0][0] + chain[0][1];
    l[1] += chain[1][0] + chain[1][1];
  }
};

// Leaves what one half of a block knows of rows `row` and `row` + 8 to the other, and takes it there.
template <int N>
__device__ __forceinline__ void leave(const Softmax& a, float (&part_ml)[2][N], int row) {
  if (threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    part_ml[0][row + 8 * r] = a.m[r];
    part_ml[1][row + 8 * r] = a.l[r];
  }
}
template <int N>
__device__ __forceinline__ Softmax take(const float (&part_ml)[2][N], int row) {
  Softmax a;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    a.m[r] = part_ml[0][row + 8 * r];
    a.l[r] = part_ml[1][row + 8 * r];
  }
  return a;
}

template <int N>
__device__ __forceinline__ void scale_rows(float (&o)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) o[i] *= factor[i / 2 % 2];
}

// Combines another part of the same rows' keys into (a, o); sums in a fixed order.
template <int N>
__device__ __forceinline__ void combine(Softmax& a, float (&o)[N], const Softmax& b, const float* part,
                                        int stride, float scale) {
  float keep[2], add[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float m = fmaxf(a.m[r], b.m[r]), base = m == -INFINITY ? 0.f : m;
    keep[r] = exp2_fast((a.m[r] - base) * scale);
    add[r] = exp2_fast((b.m[r] - base) * scale);
    a.l[r] = a.l[r] * keep[r] + b.l[r] * add[r];
    a.m[r] = m;
  }
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(part + i / 4 * stride);
    o[i] = o[i] * keep[0] + x.x * add[0];
    o[i + 1] = o[i + 1] * keep[0] + x.y * add[0];
    o[i + 2] = o[i + 2] * keep[1] + x.z * add[1];
    o[i + 3] = o[i + 3] * keep[1] + x.w * add[1];
  }
}

// Divides by the sums, a sink's weight included, and stores the logarithms of two rows a lane, from
// `first` on. row < 0, or no lse: not stored.
template <int N>
__device__ __forceinline__ void finish(const Softmax& a, float (&o)[N], const int (&row)[2], float scale,
                                       const float* sink, float* lse, int64_t first) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = a.l[r], top = a.m[r] * scale, mine = 1;
    if (sink) {
      const float logit = *sink * kLog2e, base = fmaxf(top, logit);
      mine = exp2_fast(top - base);
      total = total * mine + exp2_fast(logit - base);
      top = base;
    }
    factor[r] = total > 0 ? __fdividef(mine, total) : 0.f;
    if (lse && row[r] >= 0 && threadIdx.x % 4 == 0)
      lse[first + row[r]] = total > 0 ? (top + __log2f(total)) * kLn2 : -INFINITY;
  }
  scale_rows(o, factor);
}

// Stores the first `columns` of two rows a lane, 16 bytes at a time, which rows and columns must be
// multiples of: the four lanes of a quad exchange their columns first. row < 0: not stored.
template <typename T, int N>
__device__ __forceinline__ void store_rows(const float (&o)[N], const int (&row)[2], T* out, int64_t out_row,
                                           int columns = 2 * N) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
      uint32_t x[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && j + i < N / 4; ++i)
        x[i] = pack<T>(o[4 * (j + i) + 2 * r], o[4 * (j + i) + 2 * r + 1]);
      // A 4 x 4 transposition within the quad: lane i ends with all of column group j + i.
      uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
      (odd ? x[0] : x[1]) = a, (odd ? x[2] : x[3]) = b;
      a = __shfl_xor_sync(~0u, upper ? x[0] : x[2], 2), b = __shfl_xor_sync(~0u, upper ? x[1] : x[3], 2);
      (upper ? x[0] : x[2]) = a, (upper ? x[1] : x[3]) = b;
      if (row[r] >= 0 && 8 * (j + lane) < columns)
        *reinterpret_cast<uint4*>(out + row[r] * out_row + 8 * (j + lane)) = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

// The same, element by element: for rows of any alignment.
template <typename T, int N>
__device__ __forceinline__ void store_elements(const float (&o)[N], const int (&row)[2], T* out, int64_t out_row,
                                               int columns) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int r = i / 2 % 2, column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (row[r] >= 0 && column < columns) out[row[r] * out_row + column] = T(o[i]);
  }
}

}  // namespace stof
