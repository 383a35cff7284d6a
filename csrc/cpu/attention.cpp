// softmax(Q K^T) V under a SparseMask on the CPU: fp32, bf16, fp16, any head size, any strides
// whose last is 1.
//
// A work item is a tile of 64 queries of one head. Threads take items from one counter, the
// costliest first, so that the rows of global tokens, which see every key, neither come last nor
// alone: an item with more than 1/64 of all work is split over its keys, and whoever finishes its
// last part adds the parts up. The split depends on the mask alone, so results do not depend on the
// number of threads. Nothing here knows of torch.

#include <atomic>
#include <exception>
#include <utility>

#include "../team.h"
#include "kernels.h"

namespace stof {

struct Item {
  int32_t batch, head, tile;
  int32_t part, parts;
  int32_t split;  // index into Plan::splits, -1 where the item is whole
};

struct Split {
  int64_t first_slot;
  std::atomic<int32_t> left;
};

struct Plan {
  std::vector<Item> items;
  std::unique_ptr<Split[]> splits;
  std::unique_ptr<float[]> slots;
  int64_t work = 0;
};

// Tiles of keys that the query tile t of a pattern visits; for unaligned views, those of the
// storage row it begins in.
static int64_t count_tiles(const Problem& p, int64_t pattern, int64_t t) {
  const int64_t tiles = ceil_div(p.kv_len, kTile);
  if (!p.pattern_id) return tiles;
  const int64_t first = p.col_start / kTile;
  const int32_t* ptr = p.row_ptr + pattern * (p.tile_rows + 1) + (p.row_start + t * kTile) / kTile;
  int64_t count = 0;
  for (int32_t r = ptr[0]; r < ptr[1]; ++r)
    count += std::max<int64_t>(
        0, std::min<int64_t>((int64_t)p.run_col[r] + p.run_len[r] - first, tiles) -
               std::max<int64_t>(p.run_col[r] - first, 0));
  return count;
}

static int64_t slot_floats(int64_t value_pad) { return kTile * (value_pad + 2); }

static Plan make_plan(const Problem& p, int64_t value_pad) {
  constexpr int64_t kWhole = 32;  // tiles an item may have without being split, whatever its share
  const int64_t query_tiles = ceil_div(p.q_len, kTile);
  std::vector<int64_t> cost(p.patterns * query_tiles);
  for (int64_t i = 0; i < p.patterns; ++i)
    for (int64_t t = 0; t < query_tiles; ++t) cost[i * query_tiles + t] = count_tiles(p, i, t);

  Plan plan;
  std::vector<Item> items;
  items.reserve(p.batch * p.heads * query_tiles);
  const auto pattern_of = [&](int64_t b, int64_t h) -> int64_t {
    return p.pattern_id ? p.pattern_id[b * p.pattern_batch + h * p.pattern_head] : 0;
  };
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t t = 0; t < query_tiles; ++t)
        plan.work += cost[pattern_of(b, h) * query_tiles + t];
  const int64_t limit = std::max(kWhole, plan.work / 64);

  // Items of similar cost stay in order, so that neighbours share the keys of a head in cache.
  int64_t class_count[65] = {};
  std::vector<uint8_t> classes;
  classes.reserve(items.capacity());
  int64_t slots = 0;
  std::vector<std::pair<int64_t, int32_t>> splits;  // first slot, parts
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t pattern = pattern_of(b, h);
      for (int64_t t = 0; t < query_tiles; ++t) {
        const int64_t tiles = cost[pattern * query_tiles + t];
        const int64_t parts = std::max<int64_t>(1, ceil_div(tiles, limit));
        const uint8_t bucket = (uint8_t)__builtin_clzll((uint64_t)(tiles / parts) | 1);
        for (int64_t part = 0; part < parts; ++part) {
          items.push_back({(int32_t)b, (int32_t)h, (int32_t)t, (int32_t)part, (int32_t)parts,
                           parts > 1 ? (int32_t)splits.size() : -1});
          classes.push_back(bucket);
          ++class_count[bucket + 1];
        }
        if (parts > 1) {
          splits.push_back({slots, (int32_t)parts});
          slots += parts;
        }
      }
    }
  }
  for (int i = 0; i < 64; ++i) class_count[i + 1] += class_count[i];
  plan.items.resize(items.size());
  for (size_t i = 0; i < items.size(); ++i) plan.items[class_count[classes[i]]++] = items[i];
  plan.splits.reset(new Split[splits.size()]);
  plan.slots.reset(new float[slots * slot_floats(value_pad)]);
  for (size_t i = 0; i < splits.size(); ++i) {
    plan.splits[i].first_slot = splits[i].first;
    plan.splits[i].left = splits[i].second;
  }
  return plan;
}

// Adds the parts of a split item into the first one.
static void merge(float* slot, int64_t parts, int rows, int64_t value_pad) {
  RowState* total = reinterpret_cast<RowState*>(slot + kTile * value_pad);
  for (int r = 0; r < rows; ++r) {
    float top = -kInf;
    for (int64_t i = 0; i < parts; ++i) {
      const float* part = slot + i * slot_floats(value_pad);
      top = std::max(top, reinterpret_cast<const RowState*>(part + kTile * value_pad)[r].max);
    }
    const float base = top == -kInf ? 0 : top;
    RowState state{top, 0};
    float* acc = slot + r * value_pad;
    for (int64_t i = 0; i < parts; ++i) {
      const float* part = slot + i * slot_floats(value_pad);
      const RowState& other = reinterpret_cast<const RowState*>(part + kTile * value_pad)[r];
      const float weight = std::exp(other.max - base);
      state.sum += other.sum * weight;
      for (int64_t d = 0; d < value_pad; ++d)
        acc[d] = (i ? acc[d] : 0) + part[r * value_pad + d] * weight;
    }
    total[r] = state;
  }
}

template <typename T, bool Dot>
class Job {
 public:
  explicit Job(const Problem& p)
      : p_(p), value_pad_(round_up(p.value_dim, W)), plan_(make_plan(p, value_pad_)) {}

  void run() {
    // Below this many multiply-adds (tens of microseconds) waking a thread costs more than it
    // brings.
    constexpr int64_t kGrain = 1 << 20;
    const int64_t work =
        plan_.work * std::min<int64_t>(p_.q_len, kTile) * kTile * (p_.head_dim + p_.value_dim);
    const Team team(p_.parallel, p_.threads, kGrain);
    const int64_t threads = std::min(team.threads((double)(work + kGrain)),
                                     (int64_t)plan_.items.size());
    team.run(threads, [this] { take_items(); });
  }

 private:
  void take_items() {
    static thread_local Scratch scratch;
    Worker<T, Dot> worker(p_, scratch);
    for (;;) {
      const size_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= plan_.items.size()) return;
      const Item& item = plan_.items[i];
      const int64_t first_row = (int64_t)item.tile * kTile;
      const int rows = (int)std::min<int64_t>(kTile, p_.q_len - first_row);
      float* acc;
      if (item.split < 0) {
        acc = scratch.rows.get(slot_floats(value_pad_));
      } else {
        acc = plan_.slots.get() +
              (plan_.splits[item.split].first_slot + item.part) * slot_floats(value_pad_);
      }
      RowState* state = reinterpret_cast<RowState*>(acc + kTile * value_pad_);
      worker.tile(item.batch, item.head, first_row, rows, item.part, item.parts, acc, state);
      if (item.split >= 0) {
        Split& split = plan_.splits[item.split];
        if (split.left.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
        acc = plan_.slots.get() + split.first_slot * slot_floats(value_pad_);
        state = reinterpret_cast<RowState*>(acc + kTile * value_pad_);
        merge(acc, item.parts, rows, value_pad_);
      }
      for (int r = 0; r < rows; ++r)
        worker.finish(item.batch, item.head, first_row, r, state[r], acc + r * value_pad_);
    }
  }

  const Problem& p_;
  const int64_t value_pad_;
  Plan plan_;
  std::atomic<size_t> next_{0};
};

template <typename T, bool Dot = false>
static void run(const Problem& p) {
  Job<T, Dot>(p).run();
}

}  // namespace stof

// Returns 0, or 1 where memory ran out.
extern "C" __attribute__((visibility("default"))) int stof_attention_forward(
    const stof::Problem* problem) {
  using namespace stof;
  const Problem& p = *problem;
  try {
    if (p.dtype == kFloat32)
      run<float>(p);
    else if (p.dtype == kFloat16)
      run<fp16>(p);
#if STOF_BF16_DOT
    else if (p.head_dim % 2 == 0)
      run<bf16, true>(p);
#endif
    else
      run<bf16>(p);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
