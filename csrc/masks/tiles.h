// Tiles of 64 queries x 64 keys as 64 words, one a query; and sets of distinct ones.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace stof {

constexpr int kTile = 64;
// What a tile holds: all of its pairs, none of them, or else an index of words.
constexpr int32_t kFull = -1, kEmpty = -2;
constexpr uint64_t kAll = ~0ull;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lowest n bits.
inline uint64_t low_bits(int64_t n) { return n >= 64 ? kAll : n <= 0 ? 0 : (1ull << n) - 1; }

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}

inline uint64_t fold(uint64_t a, uint64_t b) {
  const auto product =
      (unsigned __int128)(a ^ 0xd6e8feb86659fd93ull) * (b ^ 0x9e3779b97f4a7c15ull);
  return (uint64_t)product ^ (uint64_t)(product >> 64);
}

// Open addressing over entries that lie elsewhere: slots hold an index, or -1.
class Slots {
 public:
  // entries: how many to make room for.
  explicit Slots(int64_t entries = 0) {
    while ((int64_t)slots_.size() < 2 * entries) grow();
  }

  // The index of an entry with this hash for which same(index) holds, or -1 after `next` has been
  // put in its place.
  template <typename Same>
  int32_t find(uint64_t hash, int32_t next, Same same) {
    if (2 * (count_ + 1) > (int64_t)slots_.size()) grow();
    for (uint64_t at = hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
      Slot& slot = slots_[at];
      if (slot.index < 0) {
        slot = {hash, next};
        ++count_;
        return -1;
      }
      if (slot.hash == hash && same(slot.index)) return slot.index;
    }
  }

 private:
  struct Slot {
    uint64_t hash;
    int32_t index;
  };

  void grow() {
    std::vector<Slot> old(slots_.empty() ? 64 : 4 * slots_.size(), Slot{0, -1});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.index < 0) continue;
      uint64_t at = slot.hash & (slots_.size() - 1);
      while (slots_[at].index >= 0) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = slot;
    }
  }

  std::vector<Slot> slots_;
  int64_t count_ = 0;
};

// Distinct tiles, in the order in which they were first added.
class TileSet {
 public:
  int32_t add(const uint64_t* words) {
    uint64_t hash[4] = {};
    for (int i = 0; i < kTile; i += 8)
      for (int j = 0; j < 4; ++j)
        hash[j] = fold(hash[j] ^ words[i + 2 * j], words[i + 2 * j + 1]);
    const uint64_t all = fold(hash[0] ^ hash[1], fold(hash[2], hash[3]));
    const int32_t found = slots_.find(all, size(), [&](int32_t i) {
      return std::memcmp((*this)[i], words, sizeof(uint64_t) * kTile) == 0;
    });
    if (found >= 0) return found;
    if (size() % kShelf == 0) shelves_.emplace_back(new uint64_t[kShelf * kTile]);
    hashes_.push_back(all);
    const int32_t last = size() - 1;
    std::memcpy(shelves_.back().get() + last % kShelf * kTile, words, sizeof(uint64_t) * kTile);
    return last;
  }

  const uint64_t* operator[](int32_t i) const {
    return shelves_[i / kShelf].get() + i % kShelf * kTile;
  }
  int32_t size() const { return (int32_t)hashes_.size(); }
  uint64_t hash(int32_t i) const { return hashes_[i]; }

 private:
  static constexpr int32_t kShelf = 16;  // tiles that lie together: they never move

  std::vector<std::unique_ptr<uint64_t[]>> shelves_;
  std::vector<uint64_t> hashes_;
  Slots slots_;
};

}  // namespace stof
