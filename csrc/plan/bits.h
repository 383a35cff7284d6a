// What a half sees of the four granules of a step, in the order of the tensor cores' accumulators.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace stof {

inline uint64_t pair(int32_t a, int32_t b) { return (uint64_t)(uint32_t)a << 32 | (uint32_t)b; }

class Bits {
 public:
  explicit Bits(const Contents& contents) : contents_(contents) {}

  int32_t size() const { return (int32_t)codes_.size() / kPerTile; }

  // What the granules of one hold: kFull, kEmpty, or a tile's index * 4 + which of its granules.
  const int32_t* operator[](int64_t i) const { return codes_.data() + i * kPerTile; }

  // kFull, kEmpty or the index of the bits of four granules, made where they are new.
  int32_t content(const int32_t* codes) {
    bool full = true, empty = true;
    for (int g = 0; g < kPerTile; ++g) full &= codes[g] == kFull, empty &= codes[g] == kEmpty;
    if (full) return kFull;
    if (empty) return kEmpty;
    const int32_t next = size();
    const uint64_t hash = fold(pair(codes[0], codes[1]), pair(codes[2], codes[3]));
    const int32_t found = by_.find(
        hash, next, [&](int32_t i) { return std::equal(codes, codes + kPerTile, (*this)[i]); });
    if (found >= 0) return found;
    codes_.insert(codes_.end(), codes, codes + kPerTile);
    return next;
  }

  // The bits of a content: 64 rows in the order that csrc/cuda/problem.h gives.
  void write(int64_t index, uint32_t* out) const {
    const int32_t* codes = (*this)[index];
    uint64_t words[kTile] = {};
    for (int g = 0; g < kPerTile && size() > 0; ++g) {
      if (codes[g] == kEmpty) continue;
      const uint64_t* from = codes[g] == kFull ? nullptr : contents_[codes[g] / kPerTile];
      const int shift = codes[g] % kPerTile * kGranule;
      for (int r = 0; r < kTile; ++r)
        words[r] |= (from ? from[r] >> shift & 0xffff : 0xffff) << g * kGranule;
    }
    uint32_t of_lane[4][kTile];
    for (int lane = 0; lane < 4; ++lane)
      for (int r = 0; r < kTile; ++r) of_lane[lane][r] = nibbles(words[r] >> 2 * lane);
    for (int row = 0; row < kTile; row += 16)
      for (int r = row; r < row + 8; ++r)
        for (int lane = 0; lane < 4; ++lane)
          *out++ = of_lane[lane][r] | of_lane[lane][r + 8] << 2;
  }

 private:
  // The lowest two bits of each byte, put together as the lowest two of each four.
  static uint32_t nibbles(uint64_t x) {
    x &= 0x0303030303030303ull;
    x = (x | x >> 4) & 0x00ff00ff00ff00ffull;
    x = (x | x >> 8) & 0x0000ffff0000ffffull;
    return (uint32_t)(x | x >> 16);
  }

  const Contents& contents_;
  std::vector<int32_t> codes_;
  Slots by_;
};

}  // namespace stof
