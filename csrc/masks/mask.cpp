// A SparseMask's arrays from a closed-form pattern: see stof_hf/masks/closed_form.py.
//
// For each tile row the leaves say which tiles they leave empty, fill or cut; where that does not
// settle what the pattern holds, words are combined, once for each combination. No tile is looked
// at that all of the pattern leaves empty or fills, and no pair of a query and a key by itself
// where a leaf knows more: the time goes with the number of runs.

#include <list>
#include <stdexcept>

#include "program.h"
#include "result.h"

namespace stof {

// Every field is 8 bytes wide, so that the caller packs it without padding.
struct MaskRequest {
  int64_t batch, q_len, kv_len, q_offset, kv_offset;
  int64_t length;  // of the program behind this
};

class Mask : public Result {
 public:
  Mask(const MaskRequest& p, const int64_t* code)
      : p_(p),
        tile_rows_(ceil_div(p.q_len, kTile)),
        tiles_((int32_t)ceil_div(p.kv_len, kTile)),
        program_(Keys{p.kv_offset, tiles_}, code, p.length) {
    for (int64_t b = 0; b < p.batch; ++b) build(b);
  }

  // Counts and then offsets, as stof_hf/masks/closed_form.py reads them.
  void describe(int64_t* info) {
    *info++ = (int64_t)row_ptr_.size() / (tile_rows_ + 1);
    *info++ = (int64_t)runs_.size();
    *info++ = found_.size();
    *info++ = blocks_;
    *info++ = append(pattern_id_);
    *info++ = append(row_ptr_);
    for (int32_t Run::*field : {&Run::col, &Run::len, &Run::bits}) {
      std::vector<int32_t>& out = fields_.emplace_back(runs_.size());
      for (size_t i = 0; i < runs_.size(); ++i) out[i] = runs_[i].*field;
      *info++ = append(out);
    }
    *info++ = append(found_.words());
    *info++ = bytes();
  }

 private:
  struct Run {
    Run(int32_t col, int32_t len, int32_t bits) : col(col), len(len), bits(bits) {}
    bool operator==(const Run& x) const { return col == x.col && len == x.len && bits == x.bits; }

    int32_t col, len, bits;
  };

  void build(int64_t batch) {
    const size_t first_ptr = row_ptr_.size(), first_run = runs_.size();
    const bool follows = program_.follows() && tiles_ > 2;
    for (int64_t t = 0; t < tile_rows_; ++t) {
      row_ptr_.push_back((int32_t)runs_.size());
      const int64_t first = p_.q_offset + t * kTile;
      rows_ = (int)std::min<int64_t>(kTile, p_.q_len - t * kTile);
      program_.open({batch, first, first + rows_ - 1}, tiles_);
      const auto run = [&](int32_t from, int32_t to) {
        program_.run(from, to, [&](int32_t from, int32_t to, int32_t id) { emit(from, to, id); });
      };
      if (follows && t > 0 && rows_ == kTile) {
        // All but the first tile, and the last where not all of its keys are there.
        const int32_t end = tiles_ - (p_.kv_len % kTile != 0);
        run(0, 1);
        const int32_t last = row_ptr_.back();
        for (int32_t i = row_ptr_[row_ptr_.size() - 2]; i < last; ++i) {
          const Run& before = runs_[i];
          const int32_t from = before.col + 1;
          if (from < end) append_tiles(from, std::min(from + before.len, end), before.bits);
        }
        run(end, tiles_);
      } else {
        run(0, tiles_);
      }
      if (runs_.size() > INT32_MAX) throw std::length_error("more runs than are counted");
    }
    row_ptr_.push_back((int32_t)runs_.size());
    pattern_id_.push_back(known(first_ptr, first_run));
  }

  // Appends tiles of words `id` to the tile row at hand.
  void emit(int32_t from, int32_t to, int32_t id) {
    const bool last = to == tiles_ && p_.kv_len % kTile;
    if (to - last > from) append_tiles(from, to - last, content(id, false));
    if (last) append_tiles(to - 1, to, content(id, true));
  }

  void append_tiles(int32_t from, int32_t to, int32_t content) {
    if (content == kEmpty) return;
    if (content == kFull) {
      blocks_ += (to - from) * ceil_div(rows_, kBlock) * (kTile / kBlock);
      const bool touches = (int64_t)runs_.size() > row_ptr_.back() &&
                           runs_.back().bits == kFull &&
                           runs_.back().col + runs_.back().len == from;
      if (touches)
        runs_.back().len += to - from;
      else
        runs_.emplace_back(from, to - from, kFull);
      return;
    }
    blocks_ += (int64_t)(to - from) * held_[content];
    for (int32_t tile = from; tile < to; ++tile) runs_.emplace_back(tile, 1, content);
  }

  // What a tile of these words holds within the mask: kFull, kEmpty or an index of found_.
  int32_t content(int32_t id, bool last) {
    constexpr int32_t kUnknown = -3;
    const bool ragged = rows_ < kTile;
    std::vector<int32_t>& known = contents_[2 * ragged + last];
    if (id >= (int32_t)known.size()) known.resize(program_.size(), kUnknown);
    if (known[id] != kUnknown) return known[id];
    const uint64_t keys = last ? low_bits(p_.kv_len - (int64_t)(tiles_ - 1) * kTile) : kAll;
    uint64_t words[kTile] = {}, any = 0, all = kAll;
    for (int r = 0; r < rows_; ++r) {
      words[r] = program_.words(id)[r] & keys;
      any |= words[r];
      all &= words[r];
    }
    if (all == kAll) return known[id] = kFull;
    if (any == 0) return known[id] = kEmpty;
    known[id] = found_.add(words);
    if (known[id] == (int32_t)held_.size()) held_.push_back(count_blocks(words));
    return known[id];
  }

  // How many blocks of 16 x 16 hold a pair.
  static int32_t count_blocks(const uint64_t* words) {
    int32_t count = 0;
    for (int r = 0; r < kTile; r += kBlock) {
      uint64_t any = 0;
      for (int i = 0; i < kBlock; ++i) any |= words[r + i];
      for (; any; any >>= kBlock) count += (any & 0xffff) != 0;
    }
    return count;
  }

  // The number of the last pattern built, which is dropped where an earlier one is equal.
  int32_t known(size_t first_ptr, size_t first_run) {
    const int64_t rows = tile_rows_ + 1, last = (int64_t)first_ptr / rows;
    for (int64_t i = 0; i < last; ++i) {
      const int32_t *a = row_ptr_.data() + i * rows, *b = row_ptr_.data() + first_ptr;
      const bool equal =
          std::equal(a, a + rows, b, [&](int32_t x, int32_t y) { return x - *a == y - *b; }) &&
          std::equal(runs_.begin() + first_run, runs_.end(), runs_.begin() + *a);
      if (!equal) continue;
      row_ptr_.resize(first_ptr);
      runs_.erase(runs_.begin() + first_run, runs_.end());
      return (int32_t)i;
    }
    return (int32_t)last;
  }

  static constexpr int kBlock = 16;

  const MaskRequest& p_;
  const int64_t tile_rows_;
  const int32_t tiles_;
  Program program_;
  int rows_ = 0;  // of the tile row at hand
  // By id, of tiles in whole rows or the last one, and in whole columns or the last one.
  std::vector<int32_t> contents_[4];
  TileSet found_;
  std::vector<int32_t> held_;  // blocks of each of found_
  int64_t blocks_ = 0;
  std::vector<int32_t> pattern_id_, row_ptr_;
  std::vector<Run> runs_;
  std::list<std::vector<int32_t>> fields_;
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

extern "C" __attribute__((visibility("default"))) void stof_take(stof::Result* result, char* to) {
  if (to) result->copy(to);
  delete result;
}
