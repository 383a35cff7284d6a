// Blocks: row tiles that a thread block computes together, and the parts of their keys.
//
// Steps are made for stretches of blocks, by several threads where that pays, and put together in
// order, so that the plan does not depend on the number of threads. For a block that repeats the
// one before, one key tile further on, none are made: they are written from those of that one.
#pragma once

#include "steps.h"

namespace stof {

// Keys of a block that are computed together: a run of tiles that both halves see in full, and
// listed steps.
struct Part {
  int32_t run_col, run_len, first_step, steps;
  double cost;
  int32_t maker, list;  // the listed steps are this list of a maker's, or none with -1,
  int32_t shift;        // so many tiles further on
};

struct Block {
  int32_t names[2];
  bool divided;  // the halves divide the steps of one row tile between them
  int32_t first_part, parts;
};

// Makes the parts of blocks that repeat none.
class Maker {
 public:
  Steps steps;
  std::vector<Block> blocks;
  std::vector<Part> parts;
  std::vector<int32_t> places;    // of the lists in the plan, as far as they have one
  std::vector<int32_t> contents;  // which contents of the plan those of `steps` are, if not the same

  Maker(const PlanRequest& p, const Contents& contents, int32_t number)
      : steps(contents), p_(p), number_(number) {}

  void reserve(int64_t count) {
    blocks.reserve(count), parts.reserve(count), places.reserve(count);
  }

  // The block of one row tile, or of two.
  void make(const Rows& rows, const Rows::Tile* tile, int32_t count) {
    segments_.clear();
    const Runs runs = rows.runs(tile[0], room_[0]);
    if (count == 2)
      join(runs, rows.runs(tile[1], room_[1]),
           [&](int32_t begin, int32_t end, int32_t a, int32_t b) {
             segments_.emplace_back(begin, end, a, b);
           });
    else
      for (const Run& run : runs)
        segments_.emplace_back(run.col, run.end(), run.content, run.content);
    blocks.push_back({{tile[0].name, tile[count - 1].name},
                      count == 1 && (p_.tiles == 2 || p_.paired),
                      (int32_t)parts.size(),
                      0});
    const Segment* run = longest_run();
    add(run, steps.list(segments_, [&](const Segment& s) { return &s != run && !is_far(s); }));
    for (const Segment& s : segments_)
      if (&s != run && is_far(s)) add(&s, -1);
  }

 private:
  // Tiles of a second run that are better computed apart, and combined, than listed one by one:
  // lists as long as the sequence for each row of a long one would be larger than all else.
  static constexpr int32_t kFar = 128;

  static bool is_far(const Segment& s) { return s.full() && s.length() >= kFar; }

  // The longest segment that both halves see in full, or null.
  const Segment* longest_run() const {
    const Segment* best = nullptr;
    for (const Segment& s : segments_)
      if (s.full() && (!best || s.length() >= best->length())) best = &s;
    return best;
  }

  // Adds a part to the last block: a run, a list, or both.
  void add(const Segment* run, int32_t list) {
    Part part = {};
    double cost = 0;
    if (run) {
      part.run_col = run->begin;
      cost = part.run_len = run->length();
    }
    part.maker = number_, part.list = list;
    if (list >= 0) {
      const Steps::List& listed = steps.lists[list];
      part.steps = listed.steps;
      cost += std::max(listed.cost[0], listed.cost[1]);
    }
    part.cost = (blocks.back().divided ? divided_cost(cost) : cost) + p_.item_cost;
    parts.push_back(part);
    ++blocks.back().parts;
  }

  const PlanRequest& p_;
  const int32_t number_;
  std::vector<Segment> segments_;
  std::vector<Run> room_[2];
};

class Blocks {
 public:
  std::vector<Block> blocks;
  std::vector<Part> parts;
  std::vector<int32_t> ends;  // where each pattern's blocks end

  Blocks(const PlanRequest& p, const Rows& rows, const Contents& contents, const Team& team)
      : bits_(contents) {
    const double cost = divide(p, rows);
    const int64_t threads = team.threads(cost), count = (int64_t)made_.size();
    const int64_t makers = threads > 1 ? std::min(4 * threads, count) : 1;
    makers_.reserve(makers);
    for (int64_t i = 0; i < makers; ++i) makers_.emplace_back(p, contents, (int32_t)i);
    team.each(makers, threads, [&](int64_t i) {
      makers_[i].reserve(count / makers + 1);
      for (int64_t at = count * i / makers; at < count * (i + 1) / makers; ++at) {
        const Task& task = tasks_[made_[at]];
        makers_[i].make(rows, rows.tiles.data() + task.tile, task.count);
      }
    });
    blocks.reserve(tasks_.size());
    parts.reserve(tasks_.size());
    auto maker = makers_.begin();
    size_t next = 0;
    for (const Task& task : tasks_) {
      if (task.repeats) {
        shift(rows.tiles.data() + task.tile, task.count);
        continue;
      }
      for (; next == maker->blocks.size(); next = 0) ++maker;
      append(*maker, maker->blocks[next++]);
    }
  }

  int64_t steps() const { return placed_; }

  // Writes the steps [first, last), each where it belongs in `to`.
  void write_steps(Step* to, int64_t first, int64_t last) const {
    auto piece = std::upper_bound(pieces_.begin(), pieces_.end(), first,
                                  [](int64_t at, const Piece& x) { return at < x.first; });
    for (--piece; first < last; ++piece) {
      const int64_t end = std::min(piece->first + piece->count, last);
      const Maker& maker = makers_[piece->maker];
      const Step* from = maker.steps.steps.data() + piece->made - piece->first;
      for (; first < end; ++first) {
        to[first] = from[first];
        for (int32_t& key : to[first].keys) key += piece->shift * kTile;
        if (maker.contents.empty()) continue;
        for (int32_t& content : to[first].content)
          if (content >= 0) content = maker.contents[content];
      }
    }
  }

  // Contents of steps, of which there is one at least.
  int64_t contents() const { return std::max(bits().size(), 1); }

  // Writes the bits of the contents [first, last), 128 words each.
  void write_bits(uint32_t* to, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ++i) bits().write(i, to + i * 2 * kTile);
  }

 private:
  // One row tile or two that follow each other.
  struct Task {
    int32_t tile, count;
    bool repeats;  // what the task before holds
  };
  // Steps that lie together as they were made, or so many tiles further on.
  struct Piece {
    int64_t first, count, made;
    int32_t maker, shift;
  };

  // Divides the row tiles between blocks. Returns about what it takes to make them, in ns.
  double divide(const PlanRequest& p, const Rows& rows) {
    int64_t runs = 0;
    const auto push = [&](int32_t tile, int32_t count) {
      made_.push_back((int32_t)tasks_.size());
      tasks_.push_back({tile, count, false});
      for (int32_t i = tile; i < tile + count; ++i) runs += rows.tiles[i].last - rows.tiles[i].first;
    };
    tasks_.reserve(rows.tiles.size());
    int32_t at = 0;
    for (int32_t end : rows.ends) {
      const int32_t ordinary = at + (int32_t)p.tile_rows;
      for (int32_t count; at < end; at += count) {
        count = p.tiles == 2 && at + 1 < ordinary ? 2 : 1;
        // A single tile behind pairs of them has no block to repeat.
        if (!tasks_.empty() && tasks_.back().count == count && rows.repeats(at, count))
          tasks_.push_back({at, count, true});
        else if (count == 1 || rows.alike(rows.tiles[at], rows.tiles[at + 1]))
          push(at, count);
        else
          push(at, 1), push(at + 1, 1);
      }
      ends.push_back((int32_t)tasks_.size());
    }
    const double bits = 50 * (double)std::min(p.contents, runs);
    return 100 * (double)made_.size() + 10 * (double)runs + bits;
  }

  // Appends a block that a maker has made.
  void append(Maker& maker, Block block) {
    const Part* from = maker.parts.data() + block.first_part;
    block.first_part = (int32_t)parts.size();
    for (int32_t i = 0; i < block.parts; ++i) {
      parts.push_back(from[i]);
      if (from[i].list >= 0) parts.back().first_step = place(maker, from[i].list);
    }
    blocks.push_back(block);
  }

  // Appends a block of `count` tiles that hold what those of the last one hold, `count` key tiles
  // further on.
  void shift(const Rows::Tile* tile, int32_t count) {
    Block block = blocks.back();
    const int32_t before = block.first_part;
    block.names[0] = tile[0].name, block.names[1] = tile[count - 1].name;
    block.first_part = (int32_t)parts.size();
    for (int32_t i = 0; i < block.parts; ++i) {
      Part part = parts[before + i];
      if (part.run_len) part.run_col += count;
      part.shift += count;
      if (part.list >= 0) part.first_step = place(part.maker, part.list, part.shift);
      parts.push_back(part);
    }
    blocks.push_back(block);
  }

  // Where in the plan a list of a maker lies, which others may have made before.
  int32_t place(Maker& maker, int32_t number) {
    if (number < (int32_t)maker.places.size()) return maker.places[number];
    const Steps::List& list = maker.steps.lists[number];
    const auto own = (int32_t)(&maker - makers_.data());
    int32_t found = -1;
    if (makers_.size() > 1) {
      for (int32_t i = 0; i < list.contents; ++i)
        maker.contents.push_back(bits_.content(maker.steps.bits[list.first_content + i]));
      found = lists_by_.find(list.hash, (int32_t)lists_.size(), [&](int32_t i) {
        const Maker& other = makers_[lists_[i].first];
        return maker.steps.same(list, other.steps, other.steps.lists[lists_[i].second]);
      });
      if (found < 0) lists_.emplace_back(own, number);
    }
    const int32_t at = found < 0 ? place(own, number, 0)
                                 : makers_[lists_[found].first].places[lists_[found].second];
    maker.places.push_back(at);
    return at;
  }

  // Gives steps a place of their own.
  int32_t place(int32_t maker, int32_t number, int32_t shift) {
    const Steps::List& list = makers_[maker].steps.lists[number];
    const auto first = (int32_t)placed_;
    if (list.steps == 0) return first;
    placed_ += list.steps;
    if (!pieces_.empty()) {
      Piece& last = pieces_.back();
      if (last.maker == maker && last.shift == shift && last.made + last.count == list.made) {
        last.count += list.steps;
        return first;
      }
    }
    pieces_.push_back({first, list.steps, list.made, maker, shift});
    return first;
  }

  const Bits& bits() const { return makers_.size() > 1 ? bits_ : makers_[0].steps.bits; }

  std::vector<Task> tasks_;
  std::vector<int32_t> made_;  // those that repeat none
  std::vector<Maker> makers_;
  Bits bits_;                                       // of all makers, where they are several
  std::vector<std::pair<int32_t, int32_t>> lists_;  // maker and number of each, likewise
  Slots lists_by_;
  std::vector<Piece> pieces_;  // in the order of the plan
  int64_t placed_ = 0;         // steps of the plan
};

}  // namespace stof
