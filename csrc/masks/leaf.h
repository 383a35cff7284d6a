// What a closed-form pattern is made of: leaves, which know for each tile row which key tiles they
// leave empty, fill or cut, and the words of those that they cut.
#pragma once

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace stof {

// Keys [key_offset, key_offset + 64 * tiles) in absolute positions.
struct Keys {
  int64_t offset, tiles;
};

// Queries [first, last] of a tile row, absolute positions, of one batch element.
struct TileRow {
  int64_t batch, first, last;
};

// One bit each, so that those of several patterns can be put together.
enum State : uint8_t { kNothing = 1, kSome = 2, kEverything = 4 };

// Tiles up to `end` of which a leaf sees the same.
struct Segment {
  Segment(int32_t end, State state, int64_t key) : end(end), state(state), key(key) {}

  int32_t end;
  State state;
  int64_t key;  // equal keys of a leaf mean equal words; kNoKey: nothing is known
  int32_t id = -1;  // of the words in the program's set, -1 before they are there
};

constexpr int64_t kNoKey = INT64_MIN;

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Bits [begin, end) of a word.
inline uint64_t span(int64_t begin, int64_t end) { return low_bits(end) & ~low_bits(begin); }

class Leaf {
 public:
  explicit Leaf(const Keys& keys) : keys_(keys) {}
  virtual ~Leaf() = default;

  // Makes the segments of a tile row, from the first tile to the last.
  virtual void open(const TileRow& row) = 0;

  // Makes a segment that holds for a tile, whatever it says of others.
  virtual void open_at(const TileRow& row, int32_t) { open(row); }

  // What a tile row takes, in ns.
  virtual double cost() const { return 50; }

  // The words of a tile. Rows beyond the last query and keys beyond the last one do not matter.
  virtual void words(const TileRow& row, int32_t tile, uint64_t* out) = 0;

  std::vector<Segment> segments;

 protected:
  int64_t key_of(int32_t tile) const { return keys_.offset + (int64_t)tile * kTile; }

  int32_t clamp(int64_t tile) const {
    return (int32_t)std::min(std::max<int64_t>(tile, 0), keys_.tiles);
  }
  // First tile that ends behind a key, and first that does not begin in front of it.
  int32_t tile_at(int64_t key) const { return clamp(floor_div(key - keys_.offset, kTile)); }
  int32_t tile_from(int64_t key) const { return clamp(-floor_div(keys_.offset - key, kTile)); }

  int32_t begin() const { return segments.empty() ? 0 : segments.back().end; }

  void push(int32_t end, State state, int64_t key = kNoKey) {
    if (end > begin()) segments.emplace_back(end, state, key);
  }

  void close() { push((int32_t)keys_.tiles, kNothing); }

  const Keys keys_;
};

// Keys q + low <= k <= q + high.
class Band : public Leaf {
 public:
  Band(const Keys& keys, int64_t low, int64_t high) : Leaf(keys), low_(low), high_(high) {}

  void open(const TileRow& row) override {
    segments.clear();
    const int32_t first = tile_at(row.first + low_), end = tile_from(row.last + high_ + 1);
    const int32_t full = std::min(tile_from(row.last + low_), end);
    push(first, kNothing);
    push_each(full, row);
    push(std::max(tile_at(row.first + high_ + 1), full), kEverything);
    push_each(end, row);
    close();
  }

  void open_at(const TileRow& row, int32_t tile) override {
    const int32_t end = tile_from(row.last + high_ + 1);
    const int32_t full = std::min(tile_from(row.last + low_), end);
    const bool outside = tile < tile_at(row.first + low_) || tile >= end;
    const bool inside = tile >= full && tile < tile_at(row.first + high_ + 1);
    put(row, tile, outside ? kNothing : inside ? kEverything : kSome);
  }

  void words(const TileRow& row, int32_t tile, uint64_t* out) override {
    const int64_t at = row.first - key_of(tile);
    for (int r = 0; r < kTile; ++r) out[r] = span(at + r + low_, at + r + high_ + 1);
  }

 protected:
  void push_each(int32_t end, const TileRow& row) {
    for (int32_t tile = begin(); tile < end; ++tile)
      push(tile + 1, kSome, row.first - key_of(tile));
  }

  void put(const TileRow& row, int32_t tile, State state) {
    segments.clear();
    push((int32_t)keys_.tiles, state, row.first - key_of(tile));
  }

  int64_t low_, high_;
};

// The keys of a band whose distance from the query is a multiple of `step`.
class Dilated : public Band {
 public:
  Dilated(const Keys& keys, int64_t reach, int64_t step) : Band(keys, -reach, reach), step_(step) {
    for (int64_t c = 0; c < kTile; c += step) comb_ |= 1ull << c;
  }

  void open(const TileRow& row) override {
    segments.clear();
    push(tile_at(row.first + low_), kNothing);
    push_each(tile_from(row.last + high_ + 1), row);
    close();
  }

  void open_at(const TileRow& row, int32_t tile) override {
    const bool held = tile >= tile_at(row.first + low_) && tile < tile_from(row.last + high_ + 1);
    put(row, tile, held ? kSome : kNothing);
  }

  double cost() const override {
    return 50 + 10 * (double)std::min(keys_.tiles, (high_ - low_) / kTile);
  }

  void words(const TileRow& row, int32_t tile, uint64_t* out) override {
    Band::words(row, tile, out);
    const int64_t at = row.first - key_of(tile);
    int64_t phase = at - floor_div(at, step_) * step_;
    for (int r = 0; r < kTile; ++r) {
      out[r] &= phase < kTile ? comb_ << phase : 0;
      if (++phase == step_) phase = 0;
    }
  }

 private:
  int64_t step_;
  uint64_t comb_ = 0;  // every step-th bit from the first on
};

// Half-open ranges of positions, ascending and apart.
struct Ranges {
  const int64_t* at;
  int64_t count;
  int64_t begin(int64_t i) const { return at[2 * i]; }
  int64_t end(int64_t i) const { return at[2 * i + 1]; }

  // Which of 64 positions from `first` on they hold.
  uint64_t word(int64_t first) const {
    int64_t i = 0;
    for (int64_t step = count; step > 0; step /= 2)
      while (i + step <= count && end(i + step - 1) <= first) i += step;
    uint64_t word = 0;
    for (; i < count && begin(i) < first + kTile; ++i)
      word |= span(begin(i) - first, end(i) - first);
    return word;
  }
};

// The queries of some ranges see all keys.
class QueryRanges : public Leaf {
 public:
  QueryRanges(const Keys& keys, Ranges ranges) : Leaf(keys), ranges_(ranges) {}

  void open(const TileRow& row) override {
    segments.clear();
    const uint64_t rows = ranges_.word(row.first), all = low_bits(row.last - row.first + 1);
    push((int32_t)keys_.tiles,
         (rows & all) == 0 ? kNothing : (rows & all) == all ? kEverything : kSome);
  }

  void words(const TileRow& row, int32_t, uint64_t* out) override {
    const uint64_t rows = ranges_.word(row.first);
    for (int r = 0; r < kTile; ++r) out[r] = -(rows >> r & 1);
  }

 private:
  Ranges ranges_;
};

}  // namespace stof
