// What may happen to scores between the product and the softmax: scale, softcap, bias, padding; a
// warp's 16 rows in the order of fragments.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fragments.cuh"
#include "items.cuh"

namespace stof {

// From products to scores to base 2: outer * s, or outer * tanh(inner * ln(2) / 2 * s) where there is
// a softcap; then a bias.
struct ScoreMap {
  const void* bias;
  int64_t bias_batch, bias_head, bias_row, bias_col;
  int bias_dtype, capped;
  float inner, outer;

  __host__ explicit ScoreMap(const Problem& p)
      : bias(p.bias),
        bias_batch(p.bias_batch),
        bias_head(p.bias_head),
        bias_row(p.bias_row),
        bias_col(p.bias_col),
        bias_dtype((int)p.bias_dtype),
        capped(p.softcap > 0),
        inner(p.softcap > 0 ? (float)(2 * p.scale / p.softcap * kLog2e) : 0.f),
        outer((float)((p.softcap > 0 ? p.softcap : p.scale) * kLog2e)) {}
};

// tanh(x ln(2) / 2). tanh.approx is good to 11 bits only; here the error is about 2^-22.
__device__ __forceinline__ float tanh_base2(float x) { return 1.f - __fdividef(2.f, 1.f + exp2_fast(x)); }

template <int N>
__device__ __forceinline__ void map_scores(float (&s)[N], const ScoreMap& map) {
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = map.outer * (map.capped ? tanh_base2(map.inner * s[i]) : s[i]);
}

// Adds the bias of what the bits show. bias: of the batch element and head; rows[r] < 0: no row;
// keys: of each 16 columns the first key.
template <typename B, int N>
__device__ __forceinline__ void add_bias(float (&s)[N], const ScoreMap& map, const B* bias, const int (&rows)[2],
                                         const int* keys, uint32_t bits) {
  const int column = threadIdx.x % 4 * 2;
  const B* row[2] = {bias + rows[0] * map.bias_row, bias + rows[1] * map.bias_row};
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
    const int64_t at = (keys[j / 2] + j % 2 * 8 + column) * map.bias_col;
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) {
      const int r = i / 2 % 2;
      if (rows[r] >= 0 && (bits >> i & 1)) s[i] += kLog2e * (float)row[r][at + i % 2 * map.bias_col];
    }
  }
}

template <int N>
__device__ __forceinline__ void add_bias(float (&s)[N], const ScoreMap& map, int batch, int head,
                                         const int (&rows)[2], const int* keys, uint32_t bits) {
  const int64_t at = batch * map.bias_batch + head * map.bias_head;
  if (map.bias_dtype == kFloat32)
    add_bias(s, map, static_cast<const float*>(map.bias) + at, rows, keys, bits);
  else if (map.bias_dtype == kFloat16)
    add_bias(s, map, static_cast<const __half*>(map.bias) + at, rows, keys, bits);
  else
    add_bias(s, map, static_cast<const __nv_bfloat16*>(map.bias) + at, rows, keys, bits);
}

// The bits of kv_valid of granule g of a step. words[g]: the one that it lies in; keys[g]: its first key.
__device__ __forceinline__ uint32_t valid_granule(const uint16_t (&words)[4][4], const int* keys, int g) {
  return words[g][keys[g] / kGranule % 4];
}

// Whether any of a step's keys is no padding.
__device__ __forceinline__ bool any_valid(const uint16_t (&words)[4][4], const int* keys) {
  return valid_granule(words, keys, 0) | valid_granule(words, keys, 1) | valid_granule(words, keys, 2) |
         valid_granule(words, keys, 3);
}

// Which of a step's keys are no padding, as a word for apply_bits.
__device__ __forceinline__ uint32_t valid_fragment(const uint16_t (&words)[4][4], const int* keys, int lane) {
  uint32_t all = 0;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    // The lane's keys of two groups of 8, the same for both rows.
    uint32_t x = valid_granule(words, keys, g) >> lane % 4 * 2 & 0x0303;
    x |= x << 2;
    all |= ((x | x >> 4) & 0xff) << 8 * g;
  }
  return all;
}

}  // namespace stof
