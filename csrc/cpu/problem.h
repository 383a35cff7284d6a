// What a call of the kernels is given (the C ABI that stof_hf/attention/cpu.py packs), and which
// keys a tile of queries has to visit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace stof {

constexpr int kTile = 64;

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Strides3 {
  int64_t batch, head, row;
};

// Sizes and strides count elements. Every field is 8 bytes wide, so that the caller packs it
// without padding.
struct Problem {
  const void* query;
  const void* key;
  const void* value;
  void* out;                  // [B, Sq, H, Dv]
  float* lse;                 // [B, H, Sq]
  const float* bias;          // broadcast to [B, H, Sq, Sk] by strides of 0; or null
  const float* sinks;         // [H] or null
  const int32_t* pattern_id;  // [Bm, Hm] or null: every key is allowed
  const int32_t* row_ptr;     // [P, tile_rows + 1]
  const int32_t* run_col;
  const int32_t* run_len;
  const int32_t* run_bits;
  const uint64_t* tile_bits;  // [U, 64]
  const uint64_t* kv_valid;   // [B, ceil(Sk / 64)] or null
  void* parallel;             // GOMP_parallel of the OpenMP runtime that torch uses, or null
  Strides3 q, k, v;
  int64_t bias_batch, bias_head, bias_row, bias_col;
  int64_t pattern_batch, pattern_head;  // strides of pattern_id, 0 where it broadcasts
  int64_t patterns, tile_rows;
  int64_t valid_batch;
  int64_t row_start, col_start;
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  int64_t dtype, threads;
  double scale, softcap;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline uint64_t low_bits(int64_t n) {
  return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1;
}

// The tiles of 64 keys that one tile of up to 64 queries visits. Tiles are aligned to the key
// tensor; where a view begins inside a storage tile, a word is put together from the four storage
// tiles below it.
class TileRow {
 public:
  static constexpr int32_t kFull = -1, kEmpty = -2, kMixed = -3;
  struct Entry {
    int32_t tile, code;
  };

  void open(const Problem& p, int64_t b, int64_t h, int64_t first_row, int rows) {
    p_ = &p;
    rows_ = rows;
    tiles_ = ceil_div(p.kv_len, kTile);
    valid_ = p.kv_valid ? p.kv_valid + b * p.valid_batch : nullptr;
    entries_.clear();
    if (!p.pattern_id) {
      for (int64_t t = 0; t < tiles_; ++t) push(t, kFull);
      return;
    }
    const int64_t pattern = p.pattern_id[b * p.pattern_batch + h * p.pattern_head];
    const int64_t row = p.row_start + first_row;
    row_shift_ = (int)(row % kTile);
    col_shift_ = (int)(p.col_start % kTile);
    const int64_t tile_row = row / kTile, tile_col = p.col_start / kTile;
    const int32_t* ptr = p.row_ptr + pattern * (p.tile_rows + 1) + tile_row;
    if (row_shift_ == 0 && col_shift_ == 0) {
      for (int32_t r = ptr[0]; r < ptr[1]; ++r) {
        const int64_t begin = std::max<int64_t>(p.run_col[r] - tile_col, 0);
        const int64_t end =
            std::min<int64_t>((int64_t)p.run_col[r] + p.run_len[r] - tile_col, tiles_);
        for (int64_t t = begin; t < end; ++t) push(t, p.run_bits[r]);
      }
      return;
    }
    const bool two_rows = row_shift_ + rows > kTile && tile_row + 1 < p.tile_rows;
    for (int i = 0; i < 2; ++i) {
      codes_[i].assign(tiles_ + 1, kEmpty);
      if (i == 1 && !two_rows) continue;
      for (int32_t r = ptr[i]; r < ptr[i + 1]; ++r) {
        const int64_t begin = std::max<int64_t>(p.run_col[r] - tile_col, 0);
        const int64_t end =
            std::min<int64_t>((int64_t)p.run_col[r] + p.run_len[r] - tile_col, tiles_ + 1);
        for (int64_t t = begin; t < end; ++t) codes_[i][t] = p.run_bits[r];
      }
    }
    for (int64_t t = 0; t < tiles_; ++t) {
      const int next = col_shift_ ? 1 : 0;
      bool full = true, empty = true;
      for (int i = 0; i <= (row_shift_ + rows > kTile); ++i) {
        for (int j = 0; j <= next; ++j) {
          full &= codes_[i][t + j] == kFull;
          empty &= codes_[i][t + j] == kEmpty;
        }
      }
      if (!empty) push(t, full ? kFull : kMixed);
    }
  }

  const std::vector<Entry>& entries() const { return entries_; }

  // One word a query: which of the tile's keys it attends to. Returns false where all queries
  // attend to all 64 keys, and leaves the words alone.
  bool words(const Entry& e, uint64_t* out) const {
    const uint64_t keep = key_word(e.tile);
    if (e.code == kFull) {
      if (keep == ~0ull) return false;
      std::fill_n(out, rows_, keep);
    } else if (e.code == kMixed) {
      for (int r = 0; r < rows_; ++r) out[r] = mixed(e.tile, r) & keep;
    } else {
      const uint64_t* bits = p_->tile_bits + (int64_t)e.code * kTile;
      for (int r = 0; r < rows_; ++r) out[r] = bits[r] & keep;
    }
    return true;
  }

  // The same for one query of the tile row.
  uint64_t word(const Entry& e, int row) const {
    const uint64_t keep = key_word(e.tile);
    if (e.code == kFull) return keep;
    if (e.code == kMixed) return mixed(e.tile, row) & keep;
    return p_->tile_bits[(int64_t)e.code * kTile + row] & keep;
  }

 private:
  void push(int64_t tile, int32_t code) { entries_.push_back({(int32_t)tile, code}); }

  uint64_t key_word(int32_t tile) const {
    return low_bits(p_->kv_len - (int64_t)tile * kTile) & (valid_ ? valid_[tile] : ~0ull);
  }

  uint64_t stored(int tile_row, int64_t tile, int row) const {
    const int32_t code = codes_[tile_row][tile];
    return code == kEmpty ? 0 : code == kFull ? ~0ull : p_->tile_bits[(int64_t)code * kTile + row];
  }

  uint64_t mixed(int64_t tile, int row) const {
    const int r = row_shift_ + row, i = r / kTile;
    const uint64_t low = stored(i, tile, r % kTile) >> col_shift_;
    return col_shift_ ? low | stored(i, tile + 1, r % kTile) << (kTile - col_shift_) : low;
  }

  const Problem* p_ = nullptr;
  const uint64_t* valid_ = nullptr;
  int rows_ = 0, row_shift_ = 0, col_shift_ = 0;
  int64_t tiles_ = 0;
  std::vector<Entry> entries_;
  std::vector<int32_t> codes_[2];
};

}  // namespace stof
