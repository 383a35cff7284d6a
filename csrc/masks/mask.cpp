// A SparseMask's arrays from a closed-form pattern: see stof_hf/masks/closed_form.py.
//
// For each tile row the leaves say which tiles they leave empty, fill or cut; where that does not
// settle what the pattern holds, words are combined, once for each combination. No tile is looked
// at that all of the pattern leaves empty or fills, and no pair of a query and a key by itself
// where a leaf knows more: the time goes with the number of runs.
//
// Stretches of tile rows are built by themselves, by several threads where that pays, and put
// together in order, so that the arrays do not depend on the number of threads.

#include <memory>

#include "stretch.h"

namespace stof {

class Mask : public Result {
 public:
  Mask(const MaskRequest& p, const int64_t* code)
      : Result(p.threads), p_(p), tile_rows_(ceil_div(p.q_len, kTile)) {
    const Keys keys = {p.kv_offset, ceil_div(p.kv_len, kTile)};
    Program program(keys, code, p.length);
    const int64_t threads = team_.threads(program.cost(keys.tiles) * (double)(p.batch * tile_rows_));
    // Two a thread, so that one that is held up does not hold up all.
    const int64_t cuts = threads > 1 ? ceil_div(2 * threads, p.batch) : 1;
    each_ = std::max<int64_t>(ceil_div(tile_rows_, cuts), 1);
    per_batch_ = ceil_div(tile_rows_, each_);
    stretches_.resize(p.batch * per_batch_);
    const auto build = [&](Program& program, int64_t i) {
      const int64_t first = i % per_batch_ * each_;
      stretches_[i].build(p, program, i / per_batch_, first,
                          std::min(first + each_, tile_rows_));
    };
    const auto count = (int64_t)stretches_.size();
    if (threads <= 1) {
      for (int64_t i = 0; i < count; ++i) build(program, i);
    } else {
      std::atomic<int64_t> next{0};
      team_.run(threads, [&] {
        int64_t i = next++;
        if (i >= count) return;
        for (Program own(keys, code, p.length); i < count; i = next++) build(own, i);
      });
    }
    number();
    for (int64_t b = 0; b < p.batch; ++b) pattern_id_.push_back(known(b));
    row_ptr_.reserve(patterns_.size() * (tile_rows_ + 1));
    int64_t runs = 0;
    for (int64_t b : patterns_) {
      for (int64_t t = 0; t < tile_rows_; ++t) {
        row_ptr_.push_back((int32_t)runs);
        runs += row(b, t).count;
      }
      row_ptr_.push_back((int32_t)runs);
      if (runs > INT32_MAX) throw std::length_error("more runs than are counted");
    }
  }

  // Counts and then offsets, as stof_hf/masks/closed_form.py reads them.
  void describe(int64_t* info) {
    const int64_t runs = row_ptr_.back(), rows = (int64_t)patterns_.size() * tile_rows_;
    *info++ = (int64_t)patterns_.size();
    *info++ = runs;
    *info++ = (int64_t)words_.size();
    *info = 0;
    for (const Stretch& x : stretches_) *info += x.blocks;
    ++info;
    *info++ = append(pattern_id_);
    *info++ = append(row_ptr_);
    const double cost = 10 + 0.3 * (double)runs / (double)(rows + 1);
    for (std::vector<int32_t> Stretch::*field : {&Stretch::col, &Stretch::len, &Stretch::bits})
      *info++ = append(runs * sizeof(int32_t), rows, cost,
                       [this, field](char* to, int64_t first, int64_t last) {
                         write(field, (int32_t*)to, first, last);
                       });
    constexpr int64_t kBytes = kTile * sizeof(uint64_t);
    *info++ = append((int64_t)words_.size() * kBytes, (int64_t)words_.size(), 50,
                     [this](char* to, int64_t first, int64_t last) {
                       for (int64_t i = first; i < last; ++i)
                         std::memcpy(to + i * kBytes, words_[i], kBytes);
                     });
    *info++ = bytes();
  }

 private:
  const Stretch& stretch(int64_t batch, int64_t t) const {
    return stretches_[batch * per_batch_ + t / each_];
  }
  const Stretch::Row& row(int64_t batch, int64_t t) const {
    return stretch(batch, t).rows[t % each_];
  }

  // Gives the partial tiles of all stretches their numbers, in the order in which they appear.
  void number() {
    int64_t total = 0;
    for (const Stretch& x : stretches_) total += x.found.size();
    words_.reserve(total);
    Slots known(stretches_.size() > 1 ? total : 0);
    for (Stretch& x : stretches_) {
      x.numbers.resize(x.found.size());
      for (int32_t i = 0; i < x.found.size(); ++i) {
        const uint64_t* words = x.found[i];
        const auto next = (int32_t)words_.size();
        const int32_t found =
            stretches_.size() == 1 ? -1 : known.find(x.found.hash(i), next, [&](int32_t j) {
              return std::memcmp(words_[j], words, sizeof(uint64_t) * kTile) == 0;
            });
        x.numbers[i] = found < 0 ? next : found;
        if (found < 0) words_.push_back(words);
      }
    }
  }

  // The number of a batch element's pattern: that of an earlier one where they are equal.
  int32_t known(int64_t batch) {
    const auto same = [&](int64_t other) {
      for (int64_t t = 0; t < tile_rows_; ++t) {
        const Stretch &a = stretch(batch, t), &b = stretch(other, t);
        const Stretch::Row &x = row(batch, t), &y = row(other, t);
        if (x.count != y.count) return false;
        for (int32_t i = 0; i < x.count; ++i) {
          const int32_t one = x.first + i, two = y.first + i;
          if (a.col[one] + x.shift != b.col[two] + y.shift || a.len[one] != b.len[two] ||
              a.number(a.bits[one]) != b.number(b.bits[two]))
            return false;
        }
      }
      return true;
    };
    const auto found =
        (int32_t)(std::find_if(patterns_.begin(), patterns_.end(), same) - patterns_.begin());
    if (found == (int32_t)patterns_.size()) patterns_.push_back(batch);
    return found;
  }

  // A field of the runs of some tile rows, which count through all patterns.
  void write(std::vector<int32_t> Stretch::*field, int32_t* to, int64_t first, int64_t last) const {
    while (first < last) {
      const int64_t pattern = first / tile_rows_, t = first % tile_rows_;
      const Stretch& x = stretch(patterns_[pattern], t);
      const Stretch::Row* row = &x.rows[t % each_];
      const auto left = (int64_t)(x.rows.data() + x.rows.size() - row);
      const Stretch::Row* end = row + std::min(last - first, left);
      int32_t* out = to + row_ptr_[pattern * (tile_rows_ + 1) + t];
      first += end - row;
      while (row < end) {
        const int32_t begin = row->first, shift = row->shift;
        int32_t until = begin;
        // Rows whose runs follow each other are written as one.
        do until += row->count;
        while (++row < end && row->first == until && row->shift == shift);
        const int32_t *from = (x.*field).data() + begin, *stop = (x.*field).data() + until;
        if (field == &Stretch::bits && stretches_.size() > 1)
          out = std::transform(from, stop, out, [&](int32_t bits) { return x.number(bits); });
        else if (field == &Stretch::col)
          out = std::transform(from, stop, out, [&](int32_t col) { return col + shift; });
        else
          out = std::copy(from, stop, out);
      }
    }
  }

  const MaskRequest& p_;
  const int64_t tile_rows_;
  int64_t each_, per_batch_;  // tile rows of a stretch, stretches of a batch element
  std::vector<Stretch> stretches_;
  std::vector<const uint64_t*> words_;  // of each partial tile
  std::vector<int64_t> patterns_;       // the first batch element that has each
  std::vector<int32_t> pattern_id_, row_ptr_;
};

}  // namespace stof

extern "C" __attribute__((visibility("default"))) void* stof_mask(const int64_t* request,
                                                                  int64_t* info) {
  try {
    const auto& p = *reinterpret_cast<const stof::MaskRequest*>(request);
    auto mask = std::make_unique<stof::Mask>(p, request + sizeof(p) / sizeof(int64_t));
    mask->describe(info);
    return static_cast<stof::Result*>(mask.release());
  } catch (...) {
    return nullptr;
  }
}

// Returns false where memory ran out.
extern "C" __attribute__((visibility("default"))) bool stof_take(stof::Result* result, char* to) {
  const std::unique_ptr<stof::Result> owned(result);
  try {
    if (to) result->copy(to);
    return true;
  } catch (...) {
    return false;
  }
}
