// Steps: the keys that a block of two halves of 64 rows streams, four granules at a time, and what
// each half sees of them in the order of the tensor cores' accumulators.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace stof {

struct Step {
  int32_t keys[kPerTile];
  int32_t content[2];
  int32_t reserved[2];
};

// Keys of a block that are computed together: a run of tiles that both halves see in full, and
// listed steps.
struct Part {
  int32_t run_col, run_len, first_step, steps;
  double cost;
  // Its steps are those from `made` on of the steps that were made, so many tiles further on.
  int32_t made, shift;
};

struct Block {
  int32_t names[2];
  bool divided;  // the halves divide the steps of one row tile between them
  int32_t first_part, parts;
};

class Steps {
 public:
  std::vector<Part> parts;

  Steps(const PlanRequest& p, const Contents& contents)
      : p_(p), contents_(contents), bits_of_(contents.size(), kUnknown) {}

  // The block of one row tile, or of two.
  Block block(const Rows& rows, const Rows::Tile& one, const Rows::Tile* two) {
    segments_.clear();
    const Runs runs = rows.runs(one, room_[0]);
    if (two)
      join(runs, rows.runs(*two, room_[1]), [&](int32_t begin, int32_t end, int32_t a, int32_t b) {
        segments_.emplace_back(begin, end, a, b);
      });
    else
      for (const Run& run : runs)
        segments_.emplace_back(run.col, run.end(), run.content, run.content);
    Block block = {{one.name, two ? two->name : one.name},
                   !two && (p_.tiles == 2 || p_.paired),
                   (int32_t)parts.size(),
                   0};
    const Segment* run = longest_run();
    const List& listed = list(run);
    add(block, run, &listed);
    for (const Segment& s : segments_)
      if (&s != run && is_far(s)) add(block, &s, nullptr);
    return block;
  }
  // The block of `count` tiles, one or two, that hold what those of `before` hold, `count` key tiles
  // further on.
  Block shifted(const Block& before, const Rows::Tile* tile, int32_t count) {
    Block block = before;
    block.names[0] = tile[0].name, block.names[1] = tile[count - 1].name;
    block.first_part = (int32_t)parts.size();
    for (int32_t i = 0; i < before.parts; ++i) {
      Part part = parts[before.first_part + i];
      if (part.run_len) part.run_col += count;
      part.shift += count;
      part.first_step = place(part.steps, part.made, part.shift);
      parts.push_back(part);
    }
    return block;
  }

  int64_t count() const { return placed_; }

  // Writes the steps [first, last), each where it belongs in `to`.
  void write(Step* to, int64_t first, int64_t last) const {
    auto piece = std::upper_bound(pieces_.begin(), pieces_.end(), first,
                                  [](int64_t at, const Piece& x) { return at < x.first; });
    for (--piece; first < last; ++piece) {
      const int64_t end = std::min(piece->first + piece->count, last);
      const Step* from = steps_.data() + piece->made - piece->first;
      for (; first < end; ++first) {
        to[first] = from[first];
        for (int32_t& key : to[first].keys) key += piece->shift * kTile;
      }
    }
  }

  // Contents of steps, of which there is one at least.
  int64_t contents() const { return std::max<int64_t>((int64_t)keys_.size() / kPerTile, 1); }

  // Writes the bits of the contents [first, last), 128 words each.
  void write_bits(uint32_t* to, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ++i) write_bits(i, to + i * 2 * kTile);
  }

 private:
  static constexpr int32_t kUnknown = -3;
  // Tiles of a second run that are better computed apart, and combined, than listed one by one:
  // lists as long as the sequence for each row of a long one would be larger than all else.
  static constexpr int32_t kFar = 128;

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

  struct Granule {
    Granule(int32_t key, int32_t one, int32_t two) : key(key), code{one, two} {}

    int32_t key, code[2];
  };

  // Steps that lie together as they were made, or so many tiles further on.
  struct Piece {
    int64_t first, count, made;
    int32_t shift;
  };

  // The steps of one list of segments, which other blocks may share.
  struct List {
    size_t first_segment, segments;
    int32_t first_step, steps, made;
    double cost[2];  // of each half
  };

  static uint64_t pair(int32_t a, int32_t b) { return (uint64_t)(uint32_t)a << 32 | (uint32_t)b; }

  // The longest segment that both halves see in full, or null.
  const Segment* longest_run() const {
    const Segment* best = nullptr;
    for (const Segment& s : segments_)
      if (s.full() && (!best || s.length() >= best->length())) best = &s;
    return best;
  }

  // Adds a part: a run, listed steps, or both.
  void add(Block& block, const Segment* run, const List* list) {
    Part part = {};
    double cost = 0;
    if (run) {
      part.run_col = run->begin;
      cost = part.run_len = run->length();
    }
    if (list) {
      part.first_step = list->first_step;
      part.steps = list->steps;
      part.made = list->made;
      cost += std::max(list->cost[0], list->cost[1]);
    }
    part.cost = (block.divided ? divided_cost(cost) : cost) + p_.item_cost;
    parts.push_back(part);
    ++block.parts;
  }

  // Gives steps a place, and returns it.
  int32_t place(int32_t count, int32_t made, int32_t shift) {
    const auto first = (int32_t)placed_;
    if (count == 0) return first;
    placed_ += count;
    if (!pieces_.empty()) {
      Piece& last = pieces_.back();
      if (last.shift == shift && last.made + last.count == made) {
        last.count += count;
        return first;
      }
    }
    pieces_.push_back({first, count, made, shift});
    return first;
  }

  static bool is_far(const Segment& s) { return s.full() && s.length() >= kFar; }

  // The steps of all segments but the run and those that are computed apart.
  const List& list(const Segment* run) {
    const size_t first = known_.size();
    uint64_t hash = 0;
    for (const Segment& s : segments_) {
      if (&s == run || is_far(s)) continue;
      known_.push_back(s);
      hash = fold(hash ^ pair(s.begin, s.end), pair(s.content[0], s.content[1]));
    }
    const size_t count = known_.size() - first;
    const int32_t found = lists_by_.find(mix(hash), (int32_t)lists_.size(), [&](int32_t i) {
      return lists_[i].segments == count &&
             std::equal(known_.begin() + first, known_.end(),
                        known_.begin() + lists_[i].first_segment);
    });
    if (found >= 0) {
      known_.erase(known_.begin() + first, known_.end());
      return lists_[found];
    }
    lists_.push_back({first, count, (int32_t)placed_, 0, (int32_t)steps_.size(), {}});
    pack(lists_.back());
    return lists_.back();
  }

  // Granules that one half sees come in front, those of both, then those of the other: each half
  // sees a dense stretch. Whole tiles of a kind stay together, which the copy engine is quicker at.
  void pack(List& list) {
    for (int i = 0; i < 3; ++i) tiles_[i].clear(), granules_[i].clear();
    for (size_t i = 0; i < list.segments; ++i) {
      const Segment& s = known_[list.first_segment + i];
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
      size_t made = steps_.size(), tiles = 0;
      for (const Segment& s : tiles_[kind]) tiles += s.length();
      if (tiles) steps_.resize(made + tiles);
      for (const Segment& s : tiles_[kind]) {
        const int32_t content[2] = {tile(s.content[0]), tile(s.content[1])};
        for (int32_t key = s.begin * kTile; key < s.end * kTile; key += kTile) {
          Step& step = steps_[made++];
          for (int g = 0; g < kPerTile; ++g) step.keys[g] = key + g * kGranule;
          finish(step, content, cost);
        }
      }
      if (kind) end += granules_[kind].size();
      for (; at < end; at += kPerTile) push_granules(at, cost);
    }
    std::copy(cost, cost + 2, list.cost);
    list.steps = (int32_t)steps_.size() - list.made;
    place(list.steps, list.made, 0);
  }

  void push_granules(size_t at, double (&cost)[2]) {
    const int used = (int)std::min<size_t>(kPerTile, granules_[0].size() - at);
    const Granule* from = granules_[0].data() + at;
    steps_.emplace_back();
    int32_t codes[2][kPerTile];
    for (int g = 0; g < kPerTile; ++g) {
      // An unused granule repeats the step's first, whose bits it does not have.
      steps_.back().keys[g] = from[g < used ? g : 0].key;
      for (int h = 0; h < 2; ++h) codes[h][g] = g < used ? from[g].code[h] : kEmpty;
    }
    const int32_t one = content(codes[0]);
    const bool same = std::equal(codes[0], codes[0] + kPerTile, codes[1]);
    const int32_t held[2] = {one, same ? one : content(codes[1])};
    finish(steps_.back(), held, cost);
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
      bits_of_[index] = content(codes);
    }
    return bits_of_[index];
  }

  // kFull, kEmpty or the index of the bits of four granules, made where they are new.
  int32_t content(const int32_t (&codes)[kPerTile]) {
    bool full = true, empty = true;
    for (int32_t code : codes) full &= code == kFull, empty &= code == kEmpty;
    if (full) return kFull;
    if (empty) return kEmpty;
    const int32_t next = (int32_t)keys_.size() / kPerTile;
    const uint64_t hash = fold(pair(codes[0], codes[1]), pair(codes[2], codes[3]));
    const int32_t found = contents_by_.find(hash, next, [&](int32_t i) {
      return std::equal(codes, codes + kPerTile, keys_.data() + (int64_t)i * kPerTile);
    });
    if (found >= 0) return found;
    keys_.insert(keys_.end(), codes, codes + kPerTile);
    return next;
  }

  // The bits of a content: 64 rows in the order that csrc/cuda/problem.h gives.
  void write_bits(int64_t index, uint32_t* out) const {
    const int32_t* codes = keys_.data() + index * kPerTile;
    uint64_t words[kTile] = {};
    for (int g = 0; g < kPerTile && !keys_.empty(); ++g) {
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

  // The lowest two bits of each byte, put together as the lowest two of each four.
  static uint32_t nibbles(uint64_t x) {
    x &= 0x0303030303030303ull;
    x = (x | x >> 4) & 0x00ff00ff00ff00ffull;
    x = (x | x >> 8) & 0x0000ffff0000ffffull;
    return (uint32_t)(x | x >> 16);
  }

  const PlanRequest& p_;
  const Contents& contents_;
  std::vector<Segment> segments_, tiles_[3];
  std::vector<Granule> granules_[3];
  std::vector<Segment> known_;
  std::vector<List> lists_;
  Slots lists_by_;
  std::vector<Run> room_[2];
  std::vector<Step> steps_;  // as they were made
  std::vector<Piece> pieces_;  // of them, in the order of the plan
  int64_t placed_ = 0;         // steps of the plan
  std::vector<int32_t> keys_;  // of each content, [n][4]
  Slots contents_by_;
  std::vector<int32_t> bits_of_;  // of each tile
};

}  // namespace stof
