// The two attention kernels: one for tiles of queries, one for single queries.
//
// Tiles. Queries lie in the lanes of a vector: Q is packed as Q^T once, S^T = K Q^T and O^T += V^T
// P^T take K and V as scalars broadcast straight from memory. So K and V need no packing and no
// stride of theirs matters, the softmax statistics need no horizontal operation, and a block of
// keys may be any list of keys: only keys that some query of the sub-tile attends to are put on the
// list, which is what makes thin stripes and band edges cheap. Where the machine multiplies pairs
// of bf16 (vdpbf16ps), Q^T and P^T are packed in pairs and V rows are interleaved two by two. Sums
// are fp32. A sub-tile holds two vectors of queries, or one where a tile has few.
//
// Rows. One query against its own keys, with the head dimension in the lanes: for decode, and for
// exactness: 0 * inf and 0 * NaN in the tile kernel spoil a query through keys that only its
// neighbours attend to, so rows that come out not finite are computed again here, where masked keys
// are never read.
#pragma once

#include <cmath>
#include <memory>
#include <new>

#include "problem.h"
#include "simd.h"

namespace stof {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStep = 8;  // keys, or value columns, whose sums are held in registers at once
#else
constexpr int kStep = 6;
#endif
constexpr int kVectors = 2;
constexpr int kBlock = 64;  // a block is computed once it holds this many keys
constexpr int kBlockMax = 2 * kBlock + kStep;

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

class Buffer {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      data_.reset();
      data_.reset(
          static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64))));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// Kept by each thread between calls: a fresh allocation would cost page faults at every call.
struct Scratch {
  Buffer query, out, scores, key, value, rows;
  TileRow tile_row;
};

// Unnormalised result of one query over some of its keys.
struct RowState {
  float max = -kInf, sum = 0;
};

// The queries of a tile that one pass of the tile kernel holds in its lanes, and the keys listed
// for their next block.
struct SubTile {
  int rows = 0;
  int64_t first_row = 0;
  float* query;
  float* out;
  vf max[kVectors], sum[kVectors];
  int count = 0;
  bool masked = false;
  int32_t keys[kBlockMax];
  uint32_t lanes[kBlockMax];
};

template <typename T, bool Dot>
class Worker {
  static constexpr bool kFine = sizeof(T) == 4;

 public:
  Worker(const Problem& p, Scratch& scratch)
      : p_(p), scratch_(scratch), value_pad_(round_up(p.value_dim, W)) {}

  // Attention of up to 64 queries over a part of their tiles. acc [rows, value_pad] and state
  // [rows] are unnormalised.
  void tile(int64_t b, int64_t h, int64_t first_row, int rows, int64_t part, int64_t parts,
            float* acc, RowState* state) {
    TileRow& tile_row = scratch_.tile_row;
    tile_row.open(p_, b, h, first_row, rows);
    const int64_t n = tile_row.entries().size();
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    if (rows <= std::max(1, W / 8)) {
      for (int r = 0; r < rows; ++r)
        state[r] = row(b, h, first_row, r, begin, end, acc + r * value_pad_);
    } else if (rows <= W) {
      sub_tiles<1>(b, h, first_row, rows, begin, end, acc, state);
    } else {
      sub_tiles<kVectors>(b, h, first_row, rows, begin, end, acc, state);
    }
  }

  // Adds the sink, divides, and stores one query's result.
  void finish(int64_t b, int64_t h, int64_t first_row, int r, RowState state, float* acc) {
    if (!finite(acc)) {
      scratch_.tile_row.open(p_, b, h, first_row,
                             (int)std::min<int64_t>(kTile, p_.q_len - first_row));
      state = row(b, h, first_row, r, 0, scratch_.tile_row.entries().size(), acc);
    }
    float weight = 1;
    if (p_.sinks) {
      const float sink = p_.sinks[h], top = std::max(state.max, sink);
      if (top > -kInf) {
        weight = std::exp(state.max - top);
        state.sum = state.sum * weight + std::exp(sink - top);
        state.max = top;
      }
    }
    const bool none = state.sum == 0;
    const float inverse = none ? 0 : weight / state.sum;
    const int64_t i = first_row + r;
    T* out = static_cast<T*>(p_.out) + ((b * p_.q_len + i) * p_.heads + h) * p_.value_dim;
    for (int64_t d = 0; d < p_.value_dim; ++d) narrow(acc[d] * inverse, out + d);
    p_.lse[(b * p_.heads + h) * p_.q_len + i] = none ? -kInf : state.max + std::log(state.sum);
  }

 private:
  const T* query_row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(p_.query) + b * p_.q.batch + h * p_.q.head + i * p_.q.row;
  }
  int64_t kv_head(int64_t h) const { return h / (p_.heads / p_.kv_heads); }
  const T* keys(int64_t b, int64_t h) const {
    return static_cast<const T*>(p_.key) + b * p_.k.batch + kv_head(h) * p_.k.head;
  }
  const T* values(int64_t b, int64_t h) const {
    return static_cast<const T*>(p_.value) + b * p_.v.batch + kv_head(h) * p_.v.head;
  }

  bool finite(const float* acc) const {
    vf sum{};
    for (int64_t d = 0; d < value_pad_; d += W) sum += load(acc + d) * 0.f;
    return hsum(sum) == 0;
  }

  template <int NV>
  void sub_tiles(int64_t b, int64_t h, int64_t first_row, int rows, int64_t begin, int64_t end,
                 float* acc, RowState* state) {
    constexpr int R = NV * W;
    constexpr int kSubs = NV == 1 ? 1 : kTile / R;
    SubTile subs[kSubs];
    const int64_t query_floats = round_up(p_.head_dim, W) * R, out_floats = value_pad_ * R;
    float* query = scratch_.query.get(query_floats * kSubs);
    float* out = scratch_.out.get(out_floats * kSubs);
    const int live = (int)ceil_div(rows, R);
    for (int s = 0; s < live; ++s) {
      SubTile& sub = subs[s];
      sub.rows = std::min(R, rows - s * R);
      sub.first_row = first_row + s * R;
      sub.query = query + s * query_floats;
      sub.out = out + s * out_floats;
      std::fill_n(sub.out, out_floats, 0.f);
      for (int i = 0; i < NV; ++i) {
        sub.max[i] = splat(-kInf);
        sub.sum[i] = vf{};
      }
      pack_query<NV>(sub, b, h);
    }
    const TileRow& tile_row = scratch_.tile_row;
    for (int64_t e = begin; e < end; ++e) {
      const TileRow::Entry entry = tile_row.entries()[e];
      uint64_t words[kTile];
      const bool partial = tile_row.words(entry, words);
      if (partial) std::fill(words + rows, words + kTile, 0);
      uint64_t some[kSubs], every[kSubs];
      bool equal_rows = true;
      for (int s = 0; s < live; ++s) {
        some[s] = partial ? 0 : ~0ull;
        every[s] = ~0ull;
        if (!partial) continue;
        for (int r = s * R; r < s * R + subs[s].rows; ++r) {
          some[s] |= words[r];
          every[s] &= words[r];
        }
        equal_rows &= some[s] == every[s];
      }
      if (!equal_rows) transpose_bits(words);
      for (int s = 0; s < live; ++s) {
        list_keys(subs[s], entry.tile * kTile, some[s], every[s], words, s * R);
        if (subs[s].count >= kBlock) block<NV>(subs[s], b, h);
      }
    }
    for (int s = 0; s < live; ++s) {
      SubTile& sub = subs[s];
      if (sub.count) block<NV>(sub, b, h);
      unpack<NV>(sub, acc + (int64_t)s * R * value_pad_, state + s * R);
    }
  }

  // Appends the keys of one tile that some query of the sub-tile attends to. Word c of columns,
  // from bit `shift` on, says which queries attend to key c; it is read only where they differ.
  static void list_keys(SubTile& sub, int32_t base, uint64_t some, uint64_t every,
                        const uint64_t* columns, int shift) {
    int count = sub.count;
    if (every == ~0ull) {
      for (int c = 0; c < kTile; ++c) {
        sub.keys[count + c] = base + c;
        sub.lanes[count + c] = ~0u;
      }
      count += kTile;
    } else if (some == every) {
      for (; some; some &= some - 1, ++count) {
        sub.keys[count] = base + __builtin_ctzll(some);
        sub.lanes[count] = ~0u;
      }
    } else {
      for (; some; some &= some - 1, ++count) {
        const int c = __builtin_ctzll(some);
        sub.keys[count] = base + c;
        sub.lanes[count] = (uint32_t)(columns[c] >> shift);
      }
      sub.masked = true;
    }
    sub.count = count;
  }

  // Q^T [head_dim, R]; with Dot each lane holds two neighbouring elements of the head dimension.
  template <int NV>
  void pack_query(SubTile& sub, int64_t b, int64_t h) {
    constexpr int R = NV * W;
    const int64_t depth = Dot ? p_.head_dim / 2 : p_.head_dim;
    for (int i = 0; i < NV; ++i) {
      for (int64_t d = 0; d < depth; d += W) {
        vf block[W];
        for (int r = 0; r < W; ++r) {
          const int lane = i * W + r;
          if (lane >= sub.rows) {
            block[r] = vf{};
          } else if (Dot) {
            const float* q =
                reinterpret_cast<const float*>(query_row(b, h, sub.first_row + lane)) + d;
            block[r] = depth - d >= W ? load(q) : load_part(q, depth - d);
          } else {
            const T* q = query_row(b, h, sub.first_row + lane) + d;
            block[r] = depth - d >= W ? load_wide(q) : load_part(q, depth - d);
          }
        }
        transpose(block);
        for (int r = 0; r < W; ++r) store(sub.query + (d + r) * R + i * W, block[r]);
      }
    }
  }

  template <int NV>
  void unpack(const SubTile& sub, float* acc, RowState* state) const {
    constexpr int R = NV * W;
    for (int i = 0; i < NV; ++i) {
      const int live = std::min(W, sub.rows - i * W);
      for (int64_t d = 0; d < value_pad_ && live > 0; d += W) {
        vf block[W];
        for (int r = 0; r < W; ++r) block[r] = load(sub.out + (d + r) * R + i * W);
        transpose(block);
        for (int r = 0; r < live; ++r) store(acc + (i * W + r) * value_pad_ + d, block[r]);
      }
      for (int r = 0; r < live; ++r) state[i * W + r] = {sub.max[i][r], sub.sum[i][r]};
    }
  }

  // Online softmax over the keys on the sub-tile's list, which it empties.
  template <int NV>
  void block(SubTile& sub, int64_t b, int64_t h) {
    constexpr int R = NV * W;
    const int count = sub.count, padded = (int)round_up(count, kStep);
    for (int j = count; j < padded; ++j) {
      sub.keys[j] = sub.keys[count - 1];
      sub.lanes[j] = 0;
    }
    const bool masked = sub.masked || padded != count;
    sub.count = 0;
    sub.masked = false;

    const float* rows[kBlockMax];
    float* scores = scratch_.scores.get((int64_t)kBlockMax * R);
    gather(keys(b, h), p_.k.row, p_.head_dim, sub.keys, padded, scratch_.key, rows);
    const float scale = (float)p_.scale;
    const int64_t depth = Dot ? p_.head_dim / 2 : p_.head_dim;
    for (int j = 0; j < padded; j += kStep)
      dot_keys<NV>(sub.query, rows + j, depth, scale, scores + j * R);
    if (p_.softcap > 0) {
      const float cap = (float)p_.softcap;
      for (int j = 0; j < padded * NV; ++j)
        store(scores + j * W, cap * vtanh(load(scores + j * W) * (1 / cap)));
    }
    if (p_.bias) add_bias<R>(sub, b, h, count, scores);

    vf rescale[NV];
    softmax<NV>(sub, masked, count, padded, scores, rescale);

    if constexpr (Dot) {
      interleave_values(values(b, h), sub.keys, (count + 1) / 2, rows);
      weigh_values<NV>(scores, rows, (count + 1) / 2, rescale, sub.out);
    } else {
      gather(values(b, h), p_.v.row, p_.value_dim, sub.keys, count, scratch_.value, rows);
      weigh_values<NV>(scores, rows, count, rescale, sub.out);
    }
  }

  // Pointers to the listed rows, as fp32, or as pairs of bf16 with Dot; other types are widened
  // into the buffer.
  void gather(const T* base, int64_t stride, int64_t width, const int32_t* index, int count,
              Buffer& buffer, const float** rows) {
    if constexpr (Dot || sizeof(T) == 4) {
      for (int j = 0; j < count; ++j)
        rows[j] = reinterpret_cast<const float*>(base + index[j] * stride);
    } else {
      const int64_t pad = round_up(width, W);
      float* wide = buffer.get(kBlockMax * pad);
      for (int j = 0; j < count; ++j) {
        widen_row(base + index[j] * stride, wide + j * pad, width);
        rows[j] = wide + j * pad;
      }
    }
  }

  template <int NV>
  static inline void dot_keys(const float* query, const float* const* keys, int64_t depth,
                              float scale, float* scores) {
    constexpr int R = NV * W;
    vf acc[kStep][NV] = {};
    const float* key[kStep];
    for (int j = 0; j < kStep; ++j) key[j] = keys[j];
    for (int64_t d = 0; d < depth; ++d) {
      vf q[NV];
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) q[i] = load(query + d * R + i * W);
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) {
        const vf k = broadcast(key[j] + d);
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i) multiply_add(acc[j][i], q[i], k);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kStep; ++j)
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) store(scores + j * R + i * W, acc[j][i] * scale);
  }

  static inline vf broadcast(const float* p) {
    // Through an integer: the bits of a pair of bf16 may be those of a signalling NaN.
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return as_float(vi{} + x);
  }

  static inline void multiply_add(vf& acc, vf a, vf b) {
#if STOF_BF16_DOT
    if constexpr (Dot) {
      acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
      return;
    }
#endif
    acc += a * b;
  }

  template <int R>
  void add_bias(const SubTile& sub, int64_t b, int64_t h, int count, float* scores) const {
    const float* bias =
        p_.bias + b * p_.bias_batch + h * p_.bias_head + sub.first_row * p_.bias_row;
    for (int r = 0; r < sub.rows; ++r)
      for (int j = 0; j < count; ++j)
        scores[j * R + r] += bias[r * p_.bias_row + sub.keys[j] * p_.bias_col];
  }

  // Scores to weights relative to the new running maximum; with Dot, to pairs of bf16 (two keys a
  // lane).
  template <int NV>
  void softmax(SubTile& sub, bool masked, int count, int padded, float* scores, vf* rescale) const {
    constexpr int R = NV * W;
    for (int i = 0; i < NV; ++i) {
      vf top = sub.max[i];
      if (masked) {
        for (int j = 0; j < padded; ++j) {
          float* s = scores + j * R + i * W;
          const vf x = keep_lanes(sub.lanes[j] >> (i * W), load(s));
          store(s, x);
          top = max_keep_nan(top, x);
        }
      } else {
        for (int j = 0; j < count; ++j) top = max_keep_nan(top, load(scores + j * R + i * W));
      }
      const vf base = top == splat(-kInf) ? vf{} : top;
      rescale[i] = vexp<kFine>(sub.max[i] - base);
      vf sum = sub.sum[i] * rescale[i];
      if constexpr (Dot) {
        for (int j = 0; j < count; j += 2) {
          const vf even = vexp<kFine>(load(scores + j * R + i * W) - base);
          const vf odd = vexp<kFine>(load(scores + (j + 1) * R + i * W) - base);
          sum += even + odd;
          // In place: pair j / 2 lies at or before row j of the scores.
          store(scores + j / 2 * R + i * W, pack_pair(even, odd));
        }
      } else {
        for (int j = 0; j < count; ++j) {
          const vf weight = vexp<kFine>(load(scores + j * R + i * W) - base);
          sum += weight;
          store(scores + j * R + i * W, weight);
        }
      }
      sub.max[i] = top;
      sub.sum[i] = sum;
    }
  }

  static inline vf pack_pair(vf even, vf odd) {
    // Round half up: weights are finite and not negative, so no carry can reach the sign.
    const vi half = vi{} + 0x8000;
    return as_float(((as_int(even) + half) >> 16) | ((as_int(odd) + half) & (int32_t)0xffff0000));
  }

  // rows[j]: [value_dim] pairs of bf16 from the keys 2 j and 2 j + 1.
  void interleave_values(const T* base, const int32_t* index, int pairs, const float** rows) {
    float* packed = scratch_.value.get(kBlockMax / 2 * value_pad_);
    for (int j = 0; j < pairs; ++j) {
      const T* even = base + index[2 * j] * p_.v.row;
      const T* odd = base + index[2 * j + 1] * p_.v.row;
      float* out = packed + j * value_pad_;
      int64_t d = 0;
#if STOF_BF16_DOT
      for (; d + W <= p_.value_dim; d += W) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + d)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + d)));
        store(out + d, (vf)_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
#endif
      for (; d < p_.value_dim; ++d) {
        uint16_t pair[2];
        std::memcpy(&pair[0], even + d, 2);
        std::memcpy(&pair[1], odd + d, 2);
        std::memcpy(out + d, pair, 4);
      }
      rows[j] = out;
    }
  }

  // O^T = O^T * rescale + V^T P^T, kStep value columns at a time.
  template <int NV>
  void weigh_values(const float* weights, const float* const* rows, int count, const vf* rescale,
                    float* out) const {
    constexpr int R = NV * W;
    int64_t d = 0;
    for (; d + kStep <= p_.value_dim; d += kStep)
      weigh_columns<NV, kStep>(weights, rows, d, count, rescale, out + d * R);
    for (; d + 2 <= p_.value_dim; d += 2)
      weigh_columns<NV, 2>(weights, rows, d, count, rescale, out + d * R);
    if (d < p_.value_dim) weigh_columns<NV, 1>(weights, rows, d, count, rescale, out + d * R);
  }

  template <int NV, int Columns>
  static inline void weigh_columns(const float* weights, const float* const* rows, int64_t d,
                                   int count, const vf* rescale, float* out) {
    constexpr int R = NV * W;
    vf acc[Columns][NV];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) acc[c][i] = load(out + c * R + i * W) * rescale[i];
    for (int j = 0; j < count; ++j) {
      const float* v = rows[j] + d;
      vf w[NV];
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) w[i] = load(weights + j * R + i * W);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) {
        const vf value = broadcast(v + c);
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i) multiply_add(acc[c][i], w[i], value);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) store(out + c * R + i * W, acc[c][i]);
  }

  // Query first_row + r against its own keys among the tiles [begin, end).
  RowState row(int64_t b, int64_t h, int64_t first_row, int r, int64_t begin, int64_t end,
               float* acc) {
    const int64_t query_pad = round_up(p_.head_dim, W);
    float* query = scratch_.query.get(query_pad);
    widen_row(query_row(b, h, first_row + r), query, p_.head_dim);
    std::fill_n(acc, value_pad_, 0.f);
    RowState state;
    int32_t index[kBlockMax];
    int count = 0;
    for (int64_t e = begin; e < end; ++e) {
      const TileRow::Entry entry = scratch_.tile_row.entries()[e];
      for (uint64_t word = scratch_.tile_row.word(entry, r); word; word &= word - 1)
        index[count++] = entry.tile * kTile + __builtin_ctzll(word);
      if (count >= kBlock || (e + 1 == end && count)) {
        row_block(query, b, h, first_row + r, index, count, state, acc);
        count = 0;
      }
    }
    return state;
  }

  void row_block(const float* query, int64_t b, int64_t h, int64_t i, const int32_t* index,
                 int count, RowState& state, float* acc) {
    float weights[kBlockMax + W];
    const T* key_base = keys(b, h);
    const int64_t width = p_.head_dim, whole = width - width % W;
    for (int j = 0; j < count; j += W) {
      vf sum[W];
      for (int x = 0; x < W; ++x) {
        const T* k = key_base + index[std::min(j + x, count - 1)] * p_.k.row;
        vf dot{};
        for (int64_t d = 0; d < whole; d += W) dot += load(query + d) * load_wide(k + d);
        if (whole < width) dot += load(query + whole) * load_part(k + whole, width - whole);
        sum[x] = dot;
      }
      transpose(sum);
      vf score{};
      for (int x = 0; x < W; ++x) score += sum[x];
      score *= (float)p_.scale;
      if (p_.softcap > 0) score = (float)p_.softcap * vtanh(score * (1 / (float)p_.softcap));
      store(weights + j, score);
    }
    if (p_.bias) {
      const float* bias = p_.bias + b * p_.bias_batch + h * p_.bias_head + i * p_.bias_row;
      for (int j = 0; j < count; ++j) weights[j] += bias[index[j] * p_.bias_col];
    }
    for (int64_t j = count; j < round_up(count, W); ++j) weights[j] = -kInf;

    float top = state.max;
    for (int j = 0; j < count; j += W) top = std::max(top, hmax(load(weights + j)));
    const float base = top == -kInf ? 0 : top;
    const float rescale = std::exp(state.max - base);
    vf sum{};
    for (int j = 0; j < count; j += W) {
      const vf weight = vexp<kFine>(load(weights + j) - base);
      sum += weight;
      store(weights + j, weight);
    }
    state = {top, state.sum * rescale + hsum(sum)};

    const T* value_base = values(b, h);
    constexpr int kColumns = 4;
    for (int64_t d = 0; d < p_.value_dim; d += kColumns * W) {
      const int64_t vectors = std::min<int64_t>(kColumns, (p_.value_dim - d) / W);
      const int64_t rest = vectors < kColumns ? p_.value_dim - d - vectors * W : 0;
      vf out[kColumns + 1];
      for (int c = 0; c <= kColumns; ++c)
        out[c] = d + c * W < value_pad_ ? load(acc + d + c * W) * rescale : vf{};
      for (int j = 0; j < count; ++j) {
        const T* v = value_base + index[j] * p_.v.row + d;
        if (vectors == kColumns) {
          for (int c = 0; c < kColumns; ++c) out[c] += weights[j] * load_wide(v + c * W);
        } else {
          for (int c = 0; c < vectors; ++c) out[c] += weights[j] * load_wide(v + c * W);
          if (rest) out[vectors] += weights[j] * load_part(v + vectors * W, rest);
        }
      }
      for (int c = 0; c < vectors + (rest > 0); ++c) store(acc + d + c * W, out[c]);
    }
  }

  const Problem& p_;
  Scratch& scratch_;
  const int64_t value_pad_;
};

}  // namespace stof
