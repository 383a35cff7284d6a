// Row tiles: 64 query rows that are computed together, and the key tiles that they see.
//
// Rows that see far more keys than their neighbours (global tokens) are taken out of their tiles
// and gathered in tiles of their own. What a tile holds for rows that it no longer has does not
// matter.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "contents.h"

namespace stof {

struct Runs {
  const Run *first, *last;
  const Run* begin() const { return first; }
  const Run* end() const { return last; }
};

// Calls f(begin, end, what a holds, what b holds) for each stretch of key tiles that one of two lists
// of runs covers.
template <typename F>
void join(const Runs& one, const Runs& two, F f) {
  const Run *a = one.first, *a_end = one.last, *b = two.first, *b_end = two.last;
  int32_t at = 0;
  while (a != a_end || b != b_end) {
    const int32_t next_a = a != a_end ? std::max(a->col, at) : INT32_MAX;
    const int32_t next_b = b != b_end ? std::max(b->col, at) : INT32_MAX;
    const int32_t begin = std::min(next_a, next_b);
    const bool in_a = next_a == begin, in_b = next_b == begin;
    at = std::min(in_a ? a->end() : next_a, in_b ? b->end() : next_b);
    f(begin, at, in_a ? a->content : kEmpty, in_b ? b->content : kEmpty);
    if (in_a && a->end() == at) ++a;
    if (in_b && b->end() == at) ++b;
  }
}

class Rows {
 public:
  struct Tile {
    int32_t name;  // problem.h
    int64_t first, last;  // its runs: the mask's, and behind those what gathering rows makes
    bool follows;  // they are those of the tile before it, one key tile further on
  };

  std::vector<Tile> tiles;     // of all patterns, the ordinary ones of each in front
  std::vector<int32_t> ends;   // where each pattern's tiles end
  std::vector<int32_t> lists;  // [n][64]: rows of the tiles with a negative name, -1: none

  Rows(const PlanRequest& p, Contents& contents, const Team& team)
      : p_(p),
        contents_(contents),
        team_(team),
        given_(p.row_ptr[p.patterns * (p.tile_rows + 1) - 1]) {
    tiles.reserve(p.patterns * p.tile_rows);
    count_granules();
    for (int64_t i = 0; i < p.patterns; ++i) {
      find_followers(i);
      find_heavy(i);
      if (!heavy_rows_.empty())
        regroup(i);
      else
        for (int64_t t = 0; t < p.tile_rows; ++t) copy(i, t);
      ends.push_back((int32_t)tiles.size());
    }
    if (lists.empty()) lists.assign(kTile, -1);
  }

  // The runs of a tile, which may be put into `room`.
  Runs runs(const Tile& tile, std::vector<Run>& room) const {
    if (tile.first >= given_)
      return {made_.data() + (tile.first - given_), made_.data() + (tile.last - given_)};
    const int64_t count = tile.last - tile.first;
    if ((int64_t)room.size() < count) room.resize(2 * count);
    for (int64_t i = 0; i < count; ++i) room[i] = run(tile.first + i);
    return {room.data(), room.data() + count};
  }

  // Whether two tiles may share a block: only if one would not wait long for the other.
  bool alike(const Tile& one, const Tile& other) const {
    const int64_t a = visits(one), b = visits(other);
    return (double)std::abs(a - b) <= 0.3 * (double)(a + b) + 4;
  }

  // Whether `count` tiles from `at` on, one or two, hold what as many before them hold, `count` key tiles
  // further on. Two that do are alike.
  bool repeats(int32_t at, int32_t count) const {
    const Tile* tile = tiles.data() + at;
    return tile[0].follows && (count == 1 || (tile[-1].follows && tile[1].follows));
  }

  int64_t visits(const Tile& tile) const {
    int64_t sum = 0;
    if (tile.first < given_)
      for (int64_t i = tile.first; i < tile.last; ++i) sum += p_.run_len[i];
    else
      for (int64_t i = tile.first; i < tile.last; ++i) sum += made_[i - given_].len;
    return sum;
  }

 private:
  const int32_t* row_ptr(int64_t pattern) const {
    return p_.row_ptr + pattern * (p_.tile_rows + 1);
  }

  uint64_t in_range(int64_t tile) const { return low_bits(p_.q_len - tile * kTile); }

  // Which tile rows of a pattern hold what the one before holds, one key tile further on, as all but the
  // outermost of a band do: what was found out about one holds for the other.
  void find_followers(int64_t pattern) {
    const int32_t* ptr = row_ptr(pattern);
    follows_.assign(p_.tile_rows, false);
    // The last one may have fewer rows.
    const int64_t whole = p_.q_len / kTile;
    const double runs = (double)(ptr[p_.tile_rows] - *ptr) / (double)(p_.tile_rows + 1);
    in_parts(team_, whole, 10 + 0.5 * runs, [&](int64_t first, int64_t last) {
      for (int64_t t = std::max<int64_t>(first, 1); t < last; ++t) follows_[t] = follows(ptr + t);
    });
  }

  // Whether the tile row that begins at *ptr does.
  bool follows(const int32_t* ptr) const {
    const int64_t before = ptr[-1], at = ptr[0], n = ptr[1] - at;
    if (n != at - before) return false;
    const size_t bytes = n * sizeof(int32_t);
    if (std::memcmp(p_.run_len + at, p_.run_len + before, bytes) != 0 ||
        std::memcmp(p_.run_bits + at, p_.run_bits + before, bytes) != 0)
      return false;
    int32_t other = 0;
    for (int64_t i = 0; i < n; ++i) other |= p_.run_col[at + i] ^ (p_.run_col[before + i] + 1);
    return other == 0;
  }

  // How many granules of each tile each row holds.
  void count_granules() {
    counts_.resize(p_.contents * kTile);
    in_parts(team_, p_.contents, 25, [&](int64_t first, int64_t last) {
      constexpr uint64_t kTop = 0x8000800080008000ull;
      const uint64_t* words = p_.words;
      uint8_t* __restrict counts = counts_.data();  // bytes might be anything: words, too
      for (int64_t i = first * kTile; i < last * kTile; ++i) {
        const uint64_t word = words[i];
        // The uppermost bit of each granule that is not empty, moved to its lowest.
        uint64_t some = (((word & ~kTop) + ~kTop) | word) & kTop;
        some >>= kGranule - 1;
        some += some >> 32;
        counts[i] = (uint8_t)((some + (some >> kGranule)) & 7);
      }
    });
  }

  // The rows of a pattern that see far more granules than a quarter of their tile's rows do, where
  // it saves more to gather them than their tiles cost.
  void find_heavy(int64_t pattern) {
    const int32_t* ptr = row_ptr(pattern);
    heavy_.assign(p_.tile_rows, 0);
    heavy_rows_.clear();
    int64_t runs = 0;
    for (int64_t t = 0; t < p_.tile_rows; ++t) runs += follows_[t] ? 0 : ptr[t + 1] - ptr[t];
    const double cost = 50 + 5 * (double)runs / (double)(p_.tile_rows + 1);
    in_parts(team_, p_.tile_rows, cost, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        heavy_[t] = t > first && follows_[t] ? heavy_[t - 1] : heavy_of(ptr, t);
    });
    int64_t saved = 0;
    for (int64_t t = 0; t < p_.tile_rows; ++t) {
      if (!heavy_[t]) continue;
      for (uint64_t left = heavy_[t]; left; left &= left - 1)
        heavy_rows_.push_back((int32_t)(t * kTile + __builtin_ctzll(left)));
      saved += saved_by(ptr[t], ptr[t + 1], heavy_[t]);
    }
    const int64_t columns = ceil_div(p_.kv_len, kTile);
    const int64_t spent = ceil_div((int64_t)heavy_rows_.size(), kTile) * columns * kPerTile;
    if ((double)saved <= 1.1 * (double)spent) heavy_rows_.clear();
  }

  // Which rows of a tile see far more granules than a quarter of them do.
  uint64_t heavy_of(const int32_t* ptr, int64_t t) const {
    int32_t seen[kTile] = {}, full = 0;
    for (int64_t i = ptr[t]; i < ptr[t + 1]; ++i) {
      if (p_.run_bits[i] == kFull) {
        full += p_.run_len[i] * kPerTile;
        continue;
      }
      const uint8_t* count = counts_.data() + (int64_t)p_.run_bits[i] * kTile;
      for (int r = 0; r < kTile; ++r) seen[r] += count[r];
    }
    const int rows = (int)std::min<int64_t>(kTile, p_.q_len - t * kTile);
    const auto far = [&](int32_t light) { return 2 * (light + full) + 8 - full; };
    int32_t least = INT32_MAX, most = 0;
    for (int r = 0; r < rows; ++r) {
      least = std::min(least, seen[r]);
      most = std::max(most, seen[r]);
    }
    if (most <= far(least)) return 0;
    int32_t sorted[kTile];
    std::copy(seen, seen + rows, sorted);
    std::nth_element(sorted, sorted + rows / 4, sorted + rows);
    const int32_t limit = far(sorted[rows / 4]);
    uint64_t heavy = 0;
    for (int r = 0; r < rows; ++r) heavy |= (uint64_t)(seen[r] > limit) << r;
    return heavy;
  }

  // Granules that the runs hold for these rows alone.
  int64_t saved_by(int64_t first, int64_t last, uint64_t heavy) const {
    uint64_t rows[kTile];
    spread(~heavy, rows);
    int64_t saved = 0, before = 0;
    int32_t content = kEmpty;
    for (int64_t i = first; i < last; ++i) {
      if (p_.run_bits[i] == kFull) continue;
      if (p_.run_bits[i] != content) {
        content = p_.run_bits[i];
        const uint64_t* words = p_.words + (int64_t)content * kTile;
        uint64_t with = 0, without = 0;
        for (int r = 0; r < kTile; ++r) {
          with |= words[r];
          without |= words[r] & rows[r];
        }
        before = 0;
        for (int g = 0; g < kPerTile; ++g) {
          const uint64_t granule = 0xffffull << kGranule * g;
          before += (with & granule) && !(without & granule);
        }
      }
      saved += before;
    }
    return saved;
  }

  void begin(int32_t name) {
    const int64_t at = given_ + (int64_t)made_.size();
    tiles.push_back({name, at, at, false});
  }

  // Appends to the last tile's runs, in order; full ones that touch become one.
  void append(Run run) {
    Tile& tile = tiles.back();
    if (run.content == kEmpty) return;
    if (run.content == kFull && tile.last > tile.first && made_.back().content == kFull &&
        made_.back().end() == run.col) {
      made_.back().len += run.len;
      return;
    }
    made_.push_back(run);
    ++tile.last;
  }

  Run run(int64_t i) const { return {p_.run_col[i], p_.run_len[i], p_.run_bits[i]}; }

  void copy(int64_t pattern, int64_t t) {
    const int32_t* ptr = row_ptr(pattern) + t;
    tiles.push_back({(int32_t)t, ptr[0], ptr[1], follows_[t] && heavy_rows_.empty()});
  }

  // A word of ones for each bit that is set, of zeros for each other.
  static void spread(uint64_t bits, uint64_t (&words)[kTile]) {
    for (int r = 0; r < kTile; ++r) words[r] = -(bits >> r & 1);
  }

  int32_t new_name() const { return -1 - (int32_t)(lists.size() / kTile); }

  void regroup(int64_t pattern) {
    const int32_t* ptr = row_ptr(pattern);
    for (int64_t t = 0; t < p_.tile_rows; ++t) {
      if (!heavy_[t]) {
        copy(pattern, t);
        continue;
      }
      uint64_t kept[kTile];
      spread(in_range(t) & ~heavy_[t], kept);
      begin(new_name());
      for (int r = 0; r < kTile; ++r) lists.push_back(kept[r] ? (int32_t)(t * kTile + r) : -1);
      // Neighbours often hold the same.
      int32_t content = kEmpty, without = kEmpty;
      for (int64_t i = ptr[t]; i < ptr[t + 1]; ++i) {
        Run one = run(i);
        if (one.content != kFull) {
          if (one.content != content) {
            content = one.content;
            without = contents_.add(p_.words + (int64_t)content * kTile, kept);
          }
          one.content = without;
        }
        append(one);
      }
    }
    for (size_t at = 0; at < heavy_rows_.size(); at += kTile)
      gather(ptr, heavy_rows_.data() + at, (int)std::min<size_t>(kTile, heavy_rows_.size() - at));
  }

  void gather(const int32_t* ptr, const int32_t* rows, int count) {
    const int64_t columns = ceil_div(p_.kv_len, kTile);
    gathered_.assign(columns * kTile, 0);
    for (int first = 0, last; first < count; first = last) {
      const int64_t t = rows[first] / kTile;
      for (last = first; last < count && rows[last] / kTile == t;) ++last;
      for (int64_t i = ptr[t]; i < ptr[t + 1]; ++i) {
        const int64_t bits = p_.run_bits[i];
        uint64_t words[kTile];
        for (int lane = first; lane < last; ++lane)
          words[lane] = bits == kFull ? kAll : p_.words[bits * kTile + rows[lane] % kTile];
        for (int64_t c = p_.run_col[i]; c < p_.run_col[i] + p_.run_len[i]; ++c)
          std::copy(words + first, words + last, gathered_.data() + c * kTile + first);
      }
    }
    begin(new_name());
    for (int lane = 0; lane < kTile; ++lane) lists.push_back(lane < count ? rows[lane] : -1);
    uint64_t used[kTile];
    spread(low_bits(count), used);
    for (int64_t c = 0; c < columns; ++c)
      append({(int32_t)c, 1, contents_.add(gathered_.data() + c * kTile, used)});
  }

  const PlanRequest& p_;
  Contents& contents_;
  const Team& team_;
  const int64_t given_;    // runs of the mask
  std::vector<Run> made_;  // those of tiles that gathering rows makes
  std::vector<uint8_t> counts_;
  std::vector<uint8_t> follows_;
  std::vector<uint64_t> heavy_;  // rows of each tile, as bits
  std::vector<int32_t> heavy_rows_;
  std::vector<uint64_t> gathered_;
};

}  // namespace stof
