// Activations of accumulators, and pairs of elements as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fragments.cuh"
#include "gemm.h"

namespace stof {

// x / (1 + 2^u)
__device__ __forceinline__ float weigh(float x, float u) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1 + exp2_fast(u)));
  return x * y;
}

// x times the normal distribution's sum up to x, as a sigmoid: its logarithm's odds are a polynomial of x^2 times
// x, such that the result is off by at most 4e-5 of itself or 1e-8 (a fifth of what rounding to fp16 may add), and
// falls to zero beyond. Everything here takes power that the tensor cores lack, and erff twice as much.
__device__ __forceinline__ float gelu(float x) {
  const float t = x * x;
  float p = -2.906990426154721e-9f;
  p = fmaf(p, t, 2.511243906155869e-7f);
  p = fmaf(p, t, -8.538783731637523e-6f);
  p = fmaf(p, t, 1.2968208466190845e-4f);
  p = fmaf(p, t, 2.3993793001864105e-4f);
  p = fmaf(p, t, -0.10513465851545334f);
  p = fmaf(p, t, -2.302035093307495f);
  return weigh(x, x * p);
}

template <int A>
__device__ __forceinline__ float activate(float x) {
  if constexpr (A == kRelu) return x < 0 ? 0.f : x;
  if constexpr (A == kGelu) return gelu(x);
  // tanh(u) = 2 sigmoid(2 u) - 1
  if constexpr (A == kGeluTanh) return weigh(x, x * fmaf(x * x, -0.1029432396f, -2.302208198f));
  if constexpr (A == kQuickGelu) return weigh(x, -2.455466958f * x);
  if constexpr (A == kSilu) return weigh(x, -kLog2e * x);
  return x;
}

__device__ __forceinline__ float activate(int activation, float x) {
  switch (activation) {
    case kRelu: return activate<kRelu>(x);
    case kGelu: return activate<kGelu>(x);
    case kGeluTanh: return activate<kGeluTanh>(x);
    case kQuickGelu: return activate<kQuickGelu>(x);
    case kSilu: return activate<kSilu>(x);
  }
  return x;
}

template <typename T>
__device__ __forceinline__ float2 pair_of(uint32_t x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(x));
  else
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
}

}  // namespace stof
