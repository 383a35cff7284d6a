// Vectors of the widest float registers the build machine has, through the vector extensions of GCC
// and Clang, with intrinsics only where those generate worse code (blends by bit mask, rounding to
// a power of two, half precision).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace stof {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define STOF_BF16_DOT 1
#else
#define STOF_BF16_DOT 0
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

static inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline vf splat(float x) { return vf{} + x; }
static inline vi as_int(vf x) {
  vi y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
static inline vf as_float(vi x) {
  vf y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// The second operand wins where either is NaN, so a NaN in it survives.
static inline vf max_keep_nan(vf floor, vf x) { return floor > x ? floor : x; }

// x where bit `lane` of bits is set, minus infinity elsewhere.
static inline vf keep_lanes(uint32_t bits, vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_blend_ps((__mmask16)bits, _mm512_set1_ps(-kInf), (__m512)x);
#else
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = 1 << i;
  return ((vi{} + (int32_t)bits) & lane) != 0 ? x : splat(-kInf);
#endif
}

// exp(x) for x <= ~88; exactly 0 for x = -inf; NaN stays NaN. `Fine` gives the last bits of fp32
// (relative error 1e-7), otherwise 3e-6, which is far below the rounding of half-precision outputs.
template <bool Fine>
static inline vf vexp(vf x) {
  x = max_keep_nan(splat(-150.f), x);
  const vf t = x * 1.44269504f;
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)t, 0);
#else
  const vf magic = splat(12582912.f);
  const vf n = (t + magic) - magic;
#endif
  const vf f = t - n;
  vf p;
  if (Fine) {
    p = splat(0.00132647066f);
    p = p * f + 0.0096715109f;
    p = p * f + 0.0555073378f;
    p = p * f + 0.240222421f;
    p = p * f + 0.693146978f;
  } else {
    p = splat(0.0095828269f);
    p = p * f + 0.055906393f;
    p = p * f + 0.240240989f;
    p = p * f + 0.693124197f;
  }
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf bounded = max_keep_nan(splat(-126.f), n);
  const vi exponent = (as_int(bounded + magic) - as_int(magic)) << 23;
  const vf r = as_float(as_int(p) + exponent);
  return x < splat(-87.f) ? vf{} : r;
#endif
}

static inline vf vtanh(vf x) {
  const vf clipped = x > splat(20.f) ? splat(20.f) : (x < splat(-20.f) ? splat(-20.f) : x);
  return 1.f - 2.f / (vexp<true>(clipped + clipped) + 1.f);
}

static inline float hsum(vf x) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}

static inline float hmax(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = m > x[i] ? m : x[i];
  return m;
}

// One butterfly of a W x W transpose: swaps the off-diagonal step x step blocks of the pair of rows
// (a, b).
template <int Step, size_t... I>
static inline void swap_blocks(vf& a, vf& b, std::index_sequence<I...>) {
  const vf lo = __builtin_shufflevector(a, b, ((I & Step) ? (int)I - Step + W : (int)I)...);
  const vf hi = __builtin_shufflevector(a, b, ((I & Step) ? (int)I + W : (int)I + Step)...);
  a = lo;
  b = hi;
}

template <int Step>
static inline void transpose_step(vf (&r)[W]) {
  if constexpr (Step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & Step)) swap_blocks<Step>(r[i], r[i + Step], std::make_index_sequence<W>{});
    transpose_step<Step * 2>(r);
  }
}

static inline void transpose(vf (&r)[W]) { transpose_step<1>(r); }

static inline float widen(float x) { return x; }

static inline float widen(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline float widen(fp16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t u = magnitude << 13;
  float f;
  if (magnitude >= 0x7c00) {
    u |= 0x7f800000;
    std::memcpy(&f, &u, 4);
  } else {
    // Multiplying by 2^112 moves the exponent's bias and normalises subnormal numbers in one step.
    std::memcpy(&f, &u, 4);
    f *= 5.192296858534828e33f;
  }
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline void narrow(float x, float* out) { *out = x; }

static inline void narrow(float x, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
  out->bits = (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline void narrow(float x, fp16* out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  uint32_t h;
  if (u > 0x7f800000) {
    h = 0x7e00;
  } else if (u >= 0x477ff000) {
    h = 0x7c00;
  } else if (u < 0x38800000) {
    // Adding 0.5 lets the FPU round a subnormal half to its last bit.
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&h, &f, 4);
    h -= 0x3f000000;
  } else {
    h = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | h);
}

static inline vf load_wide(const float* p) { return load(p); }

static inline vf load_wide(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  vi x;
  for (int i = 0; i < W; ++i) x[i] = (int32_t)((uint32_t)p[i].bits << 16);
  return as_float(x);
#endif
}

static inline vf load_wide(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = widen(p[i]);
  return x;
#endif
}

// The first n < W elements, zeros behind them; reads nothing past them.
template <typename T>
static inline vf load_part(const T* p, int64_t n) {
  float x[W] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = widen(p[i]);
  return load(x);
}

template <typename T>
static inline void widen_row(const T* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load_wide(src + i));
  if (i < n) store(dst + i, load_part(src + i, n - i));
}

// 64 x 64 bits: bit c of word r becomes bit r of word c.
static inline void transpose_bits(uint64_t (&w)[64]) {
  uint64_t keep = 0x00000000ffffffffull;
#pragma GCC unroll 6
  for (int j = 32; j; j >>= 1, keep ^= keep << j) {
    for (int base = 0; base < 64; base += 2 * j) {
      for (int i = base; i < base + j; ++i) {
        const uint64_t t = ((w[i] >> j) ^ w[i + j]) & keep;
        w[i] ^= t << j;
        w[i + j] ^= t;
      }
    }
  }
}

}  // namespace stof
