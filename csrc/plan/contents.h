// Tiles of a plan, and what is known of their granules.
#pragma once

#include <vector>

#include "plan.h"

namespace stof {

// The mask's tiles and those that gathering rows makes, with what is known of their granules: bit g
// of `held` and `whole` says that granule g holds something, or everything.
class Contents {
 public:
  Contents(const PlanRequest& p, const Team& team)
      : base_(p.words), bases_((int32_t)p.contents), held_(bases_), whole_(bases_) {
    in_parts(team, bases_, 25, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) note(base_ + i * kTile, held_[i], whole_[i]);
    });
  }

  const uint64_t* operator[](int32_t i) const {
    return i < bases_ ? base_ + (int64_t)i * kTile : more_[i - bases_];
  }

  int32_t size() const { return bases_ + more_.size(); }

  int held(int32_t i) const { return i == kFull ? 15 : i == kEmpty ? 0 : held_[i]; }
  int whole(int32_t i) const { return i == kFull ? 15 : i == kEmpty ? 0 : whole_[i]; }

  // A tile of which only the rows matter whose word in `rows` is all ones (else zero): kFull,
  // kEmpty or an index.
  int32_t add(const uint64_t* words, const uint64_t (&rows)[kTile]) {
    uint64_t any = 0, all = kAll;
    for (int r = 0; r < kTile; ++r) {
      any |= words[r] & rows[r];
      all &= words[r] | ~rows[r];
    }
    if (all == kAll) return kFull;
    if (any == 0) return kEmpty;
    uint64_t other = 0;
    for (int g = 0; g < kPerTile; ++g) {
      const uint64_t granule = 0xffffull << kGranule * g;
      if ((all & granule) == granule) other |= granule;
    }
    uint64_t copy[kTile];
    for (int r = 0; r < kTile; ++r) copy[r] = (words[r] & rows[r]) | (other & ~rows[r]);
    const int32_t known = more_.size(), index = more_.add(copy);
    if (index == known) {
      held_.emplace_back(), whole_.emplace_back();
      note(copy, held_.back(), whole_.back());
    }
    return bases_ + index;
  }

 private:
  static void note(const uint64_t* words, uint8_t& held, uint8_t& whole) {
    uint64_t any = 0, all = kAll;
    for (int r = 0; r < kTile; ++r) {
      any |= words[r];
      all &= words[r];
    }
    int some = 0, every = 0;
    for (int g = 0; g < kPerTile; ++g) {
      some |= ((any >> kGranule * g & 0xffff) != 0) << g;
      every |= ((all >> kGranule * g & 0xffff) == 0xffff) << g;
    }
    held = (uint8_t)some;
    whole = (uint8_t)every;
  }

  const uint64_t* base_;
  int32_t bases_;
  TileSet more_;
  std::vector<uint8_t> held_, whole_;
};

}  // namespace stof
