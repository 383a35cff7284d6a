// Items: what one thread block computes at a time; and the queue, which gives the items of all
// heads to the blocks so that they end together.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "blocks.h"

namespace stof {

struct Item {
  int32_t names[2], first_key, run, first_step, steps, slot, reserved;
};

struct Merge {
  int32_t name, slot, count, apart;
};

constexpr Item kNoItem = {{kNone, kNone}, kNone, kNone, kNone, kNone, kNone, kNone};

// Thread blocks that take items one after another: the next goes to whoever is free first. Time
// counts in ticks on a ring of buckets, each a list of those who are free then.
class Workers {
 public:
  Workers(int64_t count, double longest) : scale_((kTicks - 2) / longest), next_(count) {
    std::fill(head_, head_ + kTicks, -1);
    for (int64_t w = 0; w < count; ++w) append(0, (int32_t)w, (int32_t)w);
  }

  // Calls give(worker) for each of `count` items of the same cost.
  template <typename Give>
  void take(double cost, int64_t count, Give give) {
    const int ticks = std::max(1, (int)(cost * scale_ + 0.5));
    while (count > 0) {
      if (head_[now_] < 0) advance();
      const int32_t first = head_[now_];
      int32_t last = first;
      for (give(last); --count > 0 && next_[last] >= 0; give(last)) last = next_[last];
      head_[now_] = next_[last];
      if (head_[now_] < 0) used_[now_ / 64] &= ~(1ull << now_ % 64);
      append((now_ + ticks) % kTicks, first, last);
    }
  }

 private:
  static constexpr int kTicks = 4096;

  // Appends a list of workers to those who are free at `tick`.
  void append(int tick, int32_t first, int32_t last) {
    next_[last] = -1;
    if (head_[tick] < 0)
      head_[tick] = first;
    else
      next_[tail_[tick]] = first;
    tail_[tick] = last;
    used_[tick / 64] |= 1ull << tick % 64;
  }

  void advance() {
    int at = now_ / 64;
    uint64_t word = used_[at] & (kAll << now_ % 64);
    while (!word) {
      at = (at + 1) % (kTicks / 64);
      word = used_[at];
    }
    now_ = at * 64 + __builtin_ctzll(word);
  }

  double scale_;
  int now_ = 0;
  uint64_t used_[kTicks / 64] = {};
  std::vector<int32_t> next_;
  int32_t head_[kTicks], tail_[kTicks];
};

class Schedule {
 public:
  std::vector<Item> items;    // [patterns][n]
  std::vector<Merge> merges;  // [patterns][n]
  std::vector<int32_t> queue;
  int64_t slots = 0;  // of the pattern that has most

  // ends: where each pattern's blocks end.
  Schedule(const PlanRequest& p, const std::vector<Block>& blocks, const std::vector<Part>& parts,
           const std::vector<int32_t>& ends)
      : p_(p) {
    split(parts);
    std::vector<std::vector<Item>> items_of(ends.size());
    std::vector<std::vector<Merge>> merges_of(ends.size());
    for (size_t i = 0; i < ends.size(); ++i) {
      entries_.clear();
      int64_t slot = 0;
      for (int32_t at = i ? ends[i - 1] : 0; at < ends[i]; ++at)
        list(blocks[at], parts, slot, merges_of[i]);
      slots = std::max(slots, slot);
      sort(items_of[i]);
    }
    pad(items_of, kNoItem, items);
    pad(merges_of, {kNone, kNone, kNone, kNone}, merges);
    fill_queue();
  }

 private:
  struct Entry {
    double cost;
    Item item;
  };

  // Into how many pieces each part is split: none should outlast an even share by much, and parts
  // that stand out, a third of it, so that the others can fill up what they leave.
  void split(const std::vector<Part>& parts) {
    std::vector<double> costs;
    costs.reserve(parts.size());
    for (const Part& part : parts) costs.push_back(part.cost);
    const double sum = std::accumulate(costs.begin(), costs.end(), 0.0);
    const double share = std::max(sum * p_.copies / (p_.patterns * p_.workers), 8.0);
    const auto middle = costs.begin() + costs.size() / 2;
    std::nth_element(costs.begin(), middle, costs.end());
    const double usual =
        costs.size() % 2 ? *middle : (*middle + *std::max_element(costs.begin(), middle)) / 2;
    pieces_.reserve(parts.size());
    for (const Part& part : parts) {
      const double limit = part.cost > 3 * usual ? std::max(share / 3, 8.0) : share;
      const double pieces = std::max(2.0, std::rint(part.cost / limit));
      const bool pays = part.cost > std::max(limit, part.cost / pieces) + p_.merge_cost;
      pieces_.push_back(pays ? (int32_t)pieces : 1);
    }
  }

  // Appends a block's items to entries_, and what combines them.
  void list(const Block& block, const std::vector<Part>& parts, int64_t& slot,
            std::vector<Merge>& merges_of) {
    const int32_t last = block.first_part + block.parts;
    const int32_t total =
        std::accumulate(pieces_.begin() + block.first_part, pieces_.begin() + last, 0);
    // A piece of two row tiles takes two slots.
    const bool two = block.names[0] != block.names[1];
    if (total > 1)
      for (int h = 0; h <= two; ++h)
        merges_of.push_back({block.names[h], (int32_t)slot + h, total, 1 + two});
    const int32_t other = p_.tiles == 2 || p_.paired ? block.names[1] : kNone;
    for (int32_t at = block.first_part; at < last; ++at) {
      const Part& part = parts[at];
      const int64_t n = pieces_[at];
      for (int64_t i = 0; i < n; ++i) {
        const int32_t run = (int32_t)(part.run_len * i / n), step = (int32_t)(part.steps * i / n);
        const Item item = {{block.names[0], other},
                           (part.run_col + run) * kTile,
                           (int32_t)(part.run_len * (i + 1) / n) - run,
                           part.first_step + step,
                           (int32_t)(part.steps * (i + 1) / n) - step,
                           total > 1 ? (int32_t)slot : -1,
                           0};
        entries_.push_back({part.cost / n, item});
        if (total > 1) slot += 1 + two;
      }
    }
  }

  // The items of a pattern, heaviest first.
  void sort(std::vector<Item>& out) {
    std::stable_sort(entries_.begin(), entries_.end(),
                     [](const Entry& a, const Entry& b) { return a.cost > b.cost; });
    if (costs_.size() < entries_.size()) costs_.resize(entries_.size());
    out.reserve(entries_.size());
    for (size_t i = 0; i < entries_.size(); ++i) {
      costs_[i] = std::max(costs_[i], entries_[i].cost);
      out.push_back(entries_[i].item);
    }
  }

  template <typename T>
  static void pad(const std::vector<std::vector<T>>& lists, const T& none, std::vector<T>& out) {
    size_t most = 0;
    for (const auto& one : lists) most = std::max(most, one.size());
    out.reserve(lists.size() * most);
    for (const auto& one : lists) {
      out.insert(out.end(), one.begin(), one.end());
      out.resize(out.size() + most - one.size(), none);
    }
  }

  // Block w takes entries w, w + workers, ... Copies run in groups, heaviest items first; the items
  // of a group that are far heavier than most run before the group in front of it, so that none
  // starts last. Without a queue no block takes two.
  void fill_queue() {
    const int64_t total = (int64_t)costs_.size() * p_.copies;
    if (total <= p_.workers) return;
    if (total > INT32_MAX) throw std::length_error("more items than the kernels count");
    const double limit = 1.5 * (costs_[costs_.size() / 2] + costs_[(costs_.size() - 1) / 2]);
    const int64_t heavy =
        std::find_if(costs_.begin(), costs_.end(), [&](double c) { return c <= limit; }) -
        costs_.begin();
    Workers workers(p_.workers, costs_[0]);
    std::vector<int32_t> taken(p_.workers);
    queue.reserve((total / p_.workers + 4) * p_.workers);
    const auto give = [&](int64_t group, int64_t first, int64_t last) {
      const int64_t copy = group * p_.together;
      const int64_t count = std::min(p_.together, p_.copies - copy);
      for (int64_t item = first; item < last; ++item) {
        int64_t entry = item * p_.copies + copy;
        workers.take(costs_[item], count, [&](int32_t worker) {
          const int64_t at = taken[worker]++ * p_.workers + worker;
          if (at >= (int64_t)queue.size()) queue.resize(queue.size() + p_.workers, -1);
          queue[at] = (int32_t)entry++;
        });
      }
    };
    const int64_t groups = ceil_div(p_.copies, p_.together);
    give(0, 0, heavy);
    for (int64_t g = 0; g < groups; ++g) {
      if (g + 1 < groups) give(g + 1, 0, heavy);
      give(g, heavy, (int64_t)costs_.size());
    }
  }

  const PlanRequest& p_;
  std::vector<int32_t> pieces_;  // of each part
  std::vector<Entry> entries_;
  std::vector<double> costs_;  // of item i, of the pattern where it is highest
};

}  // namespace stof
