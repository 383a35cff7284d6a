// Leaves of which some queries of a tile row see one stretch of keys, others another: chunks,
// packed documents.
#pragma once

#include <utility>

#include "leaf.h"

namespace stof {

// Queries [first_row, last_row) see the keys [first_key, last_key); absolute positions.
struct Span {
  int64_t first_row, last_row, first_key, last_key;
};

class Spans : public Leaf {
 public:
  using Leaf::Leaf;

  void words(const TileRow& row, int32_t tile, uint64_t* out) override {
    std::fill(out, out + kTile, 0);
    const int64_t key = key_of(tile);
    auto s = std::partition_point(spans_.begin(), spans_.end(),
                                  [&](const Span& x) { return x.last_key <= key; });
    for (; s != spans_.end() && s->first_key < key + kTile; ++s) {
      const uint64_t word = span(s->first_key - key, s->last_key - key);
      const int64_t end = s->last_row > row.last ? kTile : s->last_row - row.first;
      for (int64_t r = std::max<int64_t>(s->first_row - row.first, 0); r < end; ++r) out[r] |= word;
    }
  }

 protected:
  // Makes the segments.
  // apart: no two hold the same key. keyed: a span's queries see all of its keys.
  void push_spans(const TileRow& row, bool apart, bool keyed) {
    segments.clear();
    int32_t reached = 0;  // where the tiles of the spans in front end
    for (size_t i = 0; i < spans_.size(); ++i) {
      const Span& s = spans_[i];
      const int32_t end = tile_from(s.last_key);
      const int32_t next =
          i + 1 < spans_.size() ? tile_at(spans_[i + 1].first_key) : (int32_t)keys_.tiles;
      const int64_t rows = std::max<int64_t>(s.first_row - row.first, 0) * 128 +
                           (s.last_row > row.last ? kTile : s.last_row - row.first);
      const int32_t whole = apart ? std::min(tile_from(s.first_key), end) : end;
      const int32_t rest = std::max(tile_at(s.last_key), whole);
      push(tile_at(s.first_key), kNothing);
      while (begin() < end) {
        const int32_t tile = begin();
        if (tile >= whole && tile < rest) {
          push(rest, rows == kTile ? kEverything : kSome, rows << 14 | kTile);
          continue;
        }
        // What a tile holds of one span, which words of other tile rows may hold as well.
        const int64_t first = std::max<int64_t>(s.first_key - key_of(tile), 0);
        const int64_t last = std::min<int64_t>(s.last_key - key_of(tile), kTile);
        const bool alone = keyed && tile >= reached && tile < next;
        push(tile + 1, kSome, alone ? rows << 14 | first << 7 | last : kNoKey);
      }
      reached = std::max(reached, end);
    }
    close();
  }

  std::vector<Span> spans_;  // ascending, at both ends
};

// All queries see the keys of some ranges.
class KeyRanges : public Spans {
 public:
  KeyRanges(const Keys& keys, Ranges ranges) : Spans(keys), ranges_(ranges) {
    for (int64_t i = 0; i < ranges.count; ++i)
      spans_.push_back({INT64_MIN / 2, INT64_MAX / 2, ranges.begin(i), ranges.end(i)});
    push_spans({0, 0, kTile - 1}, true, true);
  }

  void open(const TileRow&) override {}

  void words(const TileRow&, int32_t tile, uint64_t* out) override {
    std::fill(out, out + kTile, ranges_.word(key_of(tile)));
  }

 private:
  Ranges ranges_;
};

// Queries see the keys of their own chunk of `size` tokens.
class Chunks : public Spans {
 public:
  Chunks(const Keys& keys, int64_t size) : Spans(keys), size_(size) {}

  void open(const TileRow& row) override {
    spans_.clear();
    for (int64_t at = row.first / size_ * size_; at <= row.last; at += size_)
      spans_.push_back({at, at + size_, at, at + size_});
    push_spans(row, true, true);
  }

 private:
  int64_t size_;
};

// Queries see the keys of their own document. ids [batch, n]: a negative one marks padding.
class Documents : public Spans {
 public:
  Documents(const Keys& keys, const int64_t* ids, int64_t batch, int64_t n)
      : Spans(keys), ids_(ids), batch_(batch), n_(n) {
    number(0);
  }

  double cost() const override {
    const double stretches = (double)stretches_.size();
    return mixed_ ? 40 * (double)keys_.tiles : 100 + 30 * stretches / (double)(documents_ + 1);
  }

  void open(const TileRow& row) override {
    const int64_t of = batch_ == 1 ? 0 : row.batch;
    if (of != opened_) number(of);
    if (mixed_) return open_mixed(row);
    spans_.clear();
    auto s = std::upper_bound(stretches_.begin(), stretches_.end(), row.first);
    bool apart = true;
    for (--s; s + 1 < stretches_.end() && *s <= row.last; ++s) {
      if (ids_[opened_ * n_ + *s] < 0) continue;
      const size_t begin = spans_.size();
      int32_t other = (int32_t)(s - stretches_.begin());
      // All stretches of the document, from the first on.
      if (!first_.empty()) other = first_[numbers_[other]];
      for (; other >= 0; other = next_.empty() ? -1 : next_[other])
        spans_.push_back({s[0], s[1], stretches_[other], stretches_[other + 1]});
      // A document may come twice in a tile row.
      for (size_t i = 0; i < begin; ++i) apart &= spans_[i].first_key != spans_[begin].first_key;
    }
    if (!first_.empty())
      std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) {
        return a.first_key < b.first_key;
      });
    push_spans(row, apart, true);
  }

  void words(const TileRow& row, int32_t tile, uint64_t* out) override {
    if (!mixed_) return Spans::words(row, tile, out);
    uint64_t words[kTile + 1] = {};
    for (int c = 0; c < kTile; ++c) words[place_[number_of(key_of(tile) + c)]] |= 1ull << c;
    words[kTile] = 0;
    for (int r = 0; r < kTile; ++r) out[r] = words[place_[number_of(row.first + r)]];
  }

 private:
  // 0 stands for nobody's positions.
  int32_t number_of(int64_t position) const { return position < n_ ? numbers_[position] : 0; }

  // Finds the documents of a batch element, and whether one lies in several stretches.
  void number(int64_t of) {
    opened_ = of;
    placed_.clear();
    const int64_t* ids = ids_ + of * n_;
    stretches_.assign(1, 0);
    for (int64_t i = 1; i < n_; ++i)
      if (ids[i] != ids[i - 1]) stretches_.push_back(i);
    stretches_.push_back(n_);
    Slots known;
    std::vector<int64_t> documents;
    mixed_ = false;
    numbers_.clear();
    for (size_t s = 0; s + 1 < stretches_.size(); ++s) {
      const int64_t id = ids[stretches_[s]];
      int32_t at = -1;
      if (id >= 0) {
        const int32_t next = (int32_t)documents.size();
        at = known.find(mix((uint64_t)id), next, [&](int32_t i) { return documents[i] == id; });
        mixed_ |= at >= 0;
        if (at < 0) documents.push_back(id), at = next;
      }
      numbers_.push_back(at + 1);
    }
    documents_ = (int64_t)documents.size();
    first_.clear(), next_.clear();
    if (!mixed_) return;
    // Long stretches are seen as spans, which fill tiles; short ones by position.
    mixed_ = n_ < kTile * (int64_t)stretches_.size() / 2;
    if (!mixed_) {
      first_.assign(documents.size() + 1, -1);
      next_.assign(numbers_.size(), -1);
      for (int32_t s = (int32_t)numbers_.size(); s-- > 0;)
        next_[s] = std::exchange(first_[numbers_[s]], s);
      return;
    }
    std::vector<int32_t> numbers(n_);
    for (size_t s = 0; s + 1 < stretches_.size(); ++s)
      std::fill(numbers.begin() + stretches_[s], numbers.begin() + stretches_[s + 1], numbers_[s]);
    numbers_.swap(numbers);
    place_.assign(documents.size() + 1, kTile);
    held_.assign(keys_.tiles, 0);
    for (int64_t k = 0; k < keys_.tiles * kTile; ++k)
      held_[k / kTile] |= bit_of(number_of(keys_.offset + k));
  }

  // One of 64 bits for each document, by which most tiles that hold none of a row's are told.
  static uint64_t bit_of(int32_t number) { return number ? 1ull << (number & 63) : 0; }

  // Gives each document of the row a place among its words, for `words`.
  void open_mixed(const TileRow& row) {
    for (int32_t number : placed_) place_[number] = kTile;
    placed_.clear();
    segments.clear();
    uint64_t seen = 0;
    for (int64_t q = row.first; q <= row.last; ++q) {
      const int32_t number = number_of(q);
      if (number == 0 || place_[number] < kTile) continue;
      place_[number] = (int32_t)placed_.size();
      placed_.push_back(number);
      seen |= bit_of(number);
    }
    for (int32_t tile = 0; tile < keys_.tiles; ++tile)
      push(tile + 1, seen & held_[tile] ? kSome : kNothing);
  }

  const int64_t* ids_;
  const int64_t batch_, n_;
  int64_t opened_ = -1;
  std::vector<int64_t> stretches_;  // where each stretch of equal ids begins, and the end of all
  bool mixed_ = false;              // a document lies in several short stretches
  int64_t documents_ = 0;
  std::vector<int32_t> numbers_;  // of the document of each stretch; of each position where mixed
  // Where documents lie in several long stretches: the first of each, and that behind each.
  std::vector<int32_t> first_, next_;
  std::vector<uint64_t> held_;
  std::vector<int32_t> place_, placed_;
};

}  // namespace stof
