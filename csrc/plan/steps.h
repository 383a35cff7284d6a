// Steps: the keys that a block of two halves of 64 rows streams, four granules at a time, and what
// each half sees of them in the order of the tensor cores' accumulators.
#pragma once

#include <algorithm>
#include <vector>

#include "bits.h"
#include "rows.h"

namespace stof {

struct Step {
  int32_t keys[kPerTile];
  int32_t content[2];
  int32_t reserved[2];
};

// Key tiles of which each half sees the same.
struct Segment {
  Segment(int32_t begin, int32_t end, int32_t one, int32_t two)
      : begin(begin), end(end), content{one, two} {}

  int32_t begin, end, content[2];
  bool full() const { return content[0] == kFull && content[1] == kFull; }
  int32_t length() const { return end - begin; }
  bool operator==(const Segment& x) const {
    return begin == x.begin && end == x.end && content[0] == x.content[0] &&
           content[1] == x.content[1];
  }
};

// Makes lists of steps, each once.
class Steps {
 public:
  // The steps of one list of segments, which blocks may share.
  struct List {
    uint64_t hash;
    size_t first_segment, segments;
    int32_t made, steps;              // which of `steps`
    int32_t first_content, contents;  // which of `bits` they are the first to have
    double cost[2];                   // of each half
  };

  std::vector<List> lists;
  std::vector<Step> steps;
  Bits bits;

  explicit Steps(const Contents& contents)
      : bits(contents), contents_(contents), bits_of_(contents.size(), kUnknown) {}

  // The number of the list of those segments that listed(s) holds for.
  template <typename Listed>
  int32_t list(const std::vector<Segment>& segments, Listed listed) {
    const size_t first = listed_.size();
    uint64_t hash = 0;
    for (const Segment& s : segments) {
      if (!listed(s)) continue;
      listed_.push_back(s);
      hash = fold(hash ^ pair(s.begin, s.end), pair(s.content[0], s.content[1]));
    }
    List list = {mix(hash), first, listed_.size() - first, (int32_t)steps.size(), 0, bits.size(), 0,
                 {}};
    const auto next = (int32_t)lists.size();
    const int32_t found = lists_by_.find(list.hash, next,
                                         [&](int32_t i) { return same(list, *this, lists[i]); });
    if (found >= 0) {
      listed_.erase(listed_.begin() + first, listed_.end());
      return found;
    }
    pack(list);
    lists.push_back(list);
    return next;
  }

  // Whether a list is that of other steps.
  bool same(const List& list, const Steps& other, const List& its) const {
    const auto at = listed_.begin() + list.first_segment;
    return list.segments == its.segments &&
           std::equal(at, at + list.segments, other.listed_.begin() + its.first_segment);
  }

 private:
  static constexpr int32_t kUnknown = -3;

  struct Granule {
    Granule(int32_t key, int32_t one, int32_t two) : key(key), code{one, two} {}

    int32_t key, code[2];
  };

  // Granules that one half sees come in front, those of both, then those of the other: each half
  // sees a dense stretch. Whole tiles of a kind stay together, which the copy engine is quicker at.
  void pack(List& list) {
    for (int i = 0; i < 3; ++i) tiles_[i].clear(), granules_[i].clear();
    for (size_t i = 0; i < list.segments; ++i) {
      const Segment& s = listed_[list.first_segment + i];
      const int held[2] = {contents_.held(s.content[0]), contents_.held(s.content[1])};
      const int only[3] = {held[0] & ~held[1], held[0] & held[1], held[1] & ~held[0]};
      if (only[1] == 15) {
        tiles_[1].push_back(s);
        continue;
      }
      for (int kind = 0; kind < 3; ++kind) {
        if (only[kind] == 15) tiles_[kind].push_back(s);
        if (only[kind] == 15 || only[kind] == 0) continue;
        for (int32_t tile = s.begin; tile < s.end; ++tile)
          for (int left = only[kind]; left; left &= left - 1) {
            const int g = __builtin_ctz(left);
            granules_[kind].emplace_back(tile * kTile + g * kGranule, code(s.content[0], g),
                                         code(s.content[1], g));
          }
      }
    }
    size_t end = granules_[0].size(), at = 0;
    double cost[2] = {};
    for (int i = 1; i < 3; ++i)
      granules_[0].insert(granules_[0].end(), granules_[i].begin(), granules_[i].end());
    for (int kind = 0; kind < 3; ++kind) {
      size_t made = steps.size(), tiles = 0;
      for (const Segment& s : tiles_[kind]) tiles += s.length();
      if (tiles) steps.resize(made + tiles);
      for (const Segment& s : tiles_[kind]) {
        const int32_t content[2] = {tile(s.content[0]), tile(s.content[1])};
        for (int32_t key = s.begin * kTile; key < s.end * kTile; key += kTile) {
          Step& step = steps[made++];
          for (int g = 0; g < kPerTile; ++g) step.keys[g] = key + g * kGranule;
          finish(step, content, cost);
        }
      }
      if (kind) end += granules_[kind].size();
      for (; at < end; at += kPerTile) push_granules(at, cost);
    }
    std::copy(cost, cost + 2, list.cost);
    list.steps = (int32_t)steps.size() - list.made;
    list.contents = bits.size() - list.first_content;
  }

  void push_granules(size_t at, double (&cost)[2]) {
    const int used = (int)std::min<size_t>(kPerTile, granules_[0].size() - at);
    const Granule* from = granules_[0].data() + at;
    steps.emplace_back();
    int32_t codes[2][kPerTile];
    for (int g = 0; g < kPerTile; ++g) {
      // An unused granule repeats the step's first, whose bits it does not have.
      steps.back().keys[g] = from[g < used ? g : 0].key;
      for (int h = 0; h < 2; ++h) codes[h][g] = g < used ? from[g].code[h] : kEmpty;
    }
    const int32_t one = bits.content(codes[0]);
    const bool same = std::equal(codes[0], codes[0] + kPerTile, codes[1]);
    const int32_t held[2] = {one, same ? one : bits.content(codes[1])};
    finish(steps.back(), held, cost);
  }

  static void finish(Step& step, const int32_t (&content)[2], double (&cost)[2]) {
    for (int h = 0; h < 2; ++h) {
      cost[h] += step_cost(content[h]);
      step.content[h] = content[h];
    }
  }

  // What a granule of a tile holds: kFull, kEmpty or which one it is.
  int32_t code(int32_t content, int g) const {
    return !(contents_.held(content) >> g & 1)  ? kEmpty
           : contents_.whole(content) >> g & 1 ? kFull
                                               : content * kPerTile + g;
  }

  // `content` of the four granules of a tile.
  int32_t tile(int32_t index) {
    if (index < 0) return index;
    if (bits_of_[index] == kUnknown) {
      const int32_t codes[] = {code(index, 0), code(index, 1), code(index, 2), code(index, 3)};
      bits_of_[index] = bits.content(codes);
    }
    return bits_of_[index];
  }

  const Contents& contents_;
  std::vector<Segment> tiles_[3];
  std::vector<Granule> granules_[3];
  std::vector<Segment> listed_;
  Slots lists_by_;
  std::vector<int32_t> bits_of_;  // of each tile
};

}  // namespace stof
