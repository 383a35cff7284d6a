// What a mask's plans would come to, without making them: stof_hf/attention/model.py predicts times
// from it.
#pragma once

#include <algorithm>
#include <numeric>

#include "rows.h"

namespace stof {

// Of one head, on average over the patterns: items, what their steps cost (a full one costs 1), that
// of the longest, and steps that are loaded.
struct Work {
  double items, steps, longest, loads;

  void add(double cost, double loaded) {
    ++items;
    steps += cost;
    longest = std::max(longest, cost);
    loads += loaded;
  }
};

// Of the tile-wise kernel, whose items visit whole tiles, and of the layouts of granules.py: a row tile
// for a block of two heads, for a block whose halves divide its steps, and two row tiles for a block.
enum { kTiles, kHeads, kPaired, kRows, kLayouts };

// work: kLayouts of them.
inline void measure(const PlanRequest& p, Work* work) {
  std::fill(work, work + kLayouts, Work{});
  for (int64_t i = 0; i < p.patterns; ++i) {
    const int32_t* ptr = p.row_ptr + i * (p.tile_rows + 1);
    for (int64_t t = 0; t < p.tile_rows; ++t) {
      const int64_t visits =
          std::accumulate(p.run_len + ptr[t], p.run_len + ptr[t + 1], int64_t{0});
      work[kTiles].add((double)visits, (double)visits);
    }
  }
  const Team team = team_of(p.threads);
  Contents contents(p, team);
  const Rows rows(p, contents, team);
  std::vector<Run> room[2];
  const auto granules = [](int held) { return __builtin_popcount(held) / (double)kPerTile; };
  // Of what a half sees of a tile that is loaded in so many steps.
  const auto cost = [&](int32_t content, double loaded) {
    return step_cost(content) * (content == kEmpty ? loaded : granules(contents.held(content)));
  };
  struct Sum {
    double cost, loaded;
  };
  Sum last = {}, both = {};  // of the last tile, and of the last two that share a block
  int32_t at = 0;
  for (int32_t end : rows.ends) {
    const int32_t ordinary = at + (int32_t)p.tile_rows;
    const auto alone = [&](const Rows::Tile& tile) {
      if (!tile.follows) {
        last = {};
        for (const Run& run : rows.runs(tile, room[0])) {
          const double loaded = granules(contents.held(run.content));
          last.cost += run.len * cost(run.content, loaded);
          last.loaded += run.len * loaded;
        }
      }
      work[kHeads].add(last.cost, last.loaded);
      work[kPaired].add(divided_cost(last.cost), last.loaded);
      return last;
    };
    while (at < end) {
      const bool repeats = at + 1 < ordinary && rows.repeats(at, 2);
      const Rows::Tile& one = rows.tiles[at++];
      const Sum first = alone(one);
      if (at >= ordinary) {
        work[kRows].add(divided_cost(first.cost), first.loaded);
        continue;
      }
      const Rows::Tile& two = rows.tiles[at++];
      const Sum second = alone(two);
      if (repeats) {
        work[kRows].add(both.cost, both.loaded);
        continue;
      }
      if (!rows.alike(one, two)) {
        work[kRows].add(divided_cost(first.cost), first.loaded);
        work[kRows].add(divided_cost(second.cost), second.loaded);
        continue;
      }
      double each[2] = {}, loaded = 0;
      join(rows.runs(one, room[0]), rows.runs(two, room[1]),
           [&](int32_t begin, int32_t end, int32_t a, int32_t b) {
             const double n = end - begin, load = granules(contents.held(a) | contents.held(b));
             each[0] += n * cost(a, load), each[1] += n * cost(b, load), loaded += n * load;
           });
      both = {std::max(each[0], each[1]), loaded};
      work[kRows].add(both.cost, both.loaded);
    }
  }
  for (Work* one = work; one < work + kLayouts; ++one)
    one->items /= (double)p.patterns, one->steps /= (double)p.patterns, one->loads /= (double)p.patterns;
}

}  // namespace stof
