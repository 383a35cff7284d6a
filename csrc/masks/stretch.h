// Some tile rows of a mask, built by themselves.
#pragma once

#include <stdexcept>

#include "program.h"
#include "result.h"

namespace stof {

// Every field is 8 bytes wide, so that the caller packs it without padding.
struct MaskRequest {
  int64_t batch, q_len, kv_len, q_offset, kv_offset;
  Threads threads;
  int64_t length;  // of the program behind this
};

class Stretch {
 public:
  // Its runs, which begin `shift` tiles further on than they say.
  struct Row {
    int32_t first, count, shift;
  };

  std::vector<int32_t> col, len, bits;  // of the runs
  std::vector<Row> rows;
  TileSet found;              // partial tiles, in the order in which they first appear
  std::vector<int32_t> held;  // blocks of 16 x 16 of each that hold a pair
  int64_t blocks = 0;         // of all rows
  std::vector<int32_t> numbers;  // of `found` in the mask, which Mask gives

  int32_t number(int32_t bits) const { return bits < 0 ? bits : numbers[bits]; }

  // Builds the tile rows [first, last) of a batch element.
  void build(const MaskRequest& p, Program& program, int64_t batch, int64_t first, int64_t last) {
    Builder(p, program, *this).build(batch, first, last);
  }

 private:
  static constexpr int kBlock = 16;

  class Builder {
   public:
    Builder(const MaskRequest& p, Program& program, Stretch& out)
        : p_(p), tiles_((int32_t)ceil_div(p.kv_len, kTile)), program_(program), out_(out) {}

    void build(int64_t batch, int64_t first, int64_t last) {
      // All but the first tile, and the last where not all of its keys are there.
      const int32_t end = tiles_ - (p_.kv_len % kTile != 0);
      const bool follows = program_.follows() && tiles_ > 2;
      out_.rows.reserve(last - first);
      for (std::vector<int32_t>* field : {&out_.col, &out_.len, &out_.bits})
        field->reserve(8 * (last - first));
      for (int64_t t = first; t < last; ++t) {
        const int64_t query = p_.q_offset + t * kTile;
        rows_ = (int)std::min<int64_t>(kTile, p_.q_len - t * kTile);
        const TileRow row = {batch, query, query + rows_ - 1};
        const int64_t blocks = out_.blocks;
        begin_ = out_.col.size();
        if (follows && t > first && rows_ == kTile) {
          follow(row, end);
        } else {
          program_.open(row, tiles_);
          run(0, tiles_);
          out_.rows.push_back({(int32_t)begin_, count(), 0});
        }
        if (out_.col.size() > INT32_MAX) throw std::length_error("more runs than are counted");
        blocks_ = out_.blocks - blocks;
      }
    }

   private:
    int32_t count() const { return (int32_t)(out_.col.size() - begin_); }

    void run(int32_t from, int32_t to) {
      program_.run(from, to, [&](int32_t from, int32_t to, int32_t id) { emit(from, to, id); });
    }

    // A tile row that holds what the one before holds, one tile further on, but for its outermost
    // tiles.
    void follow(const TileRow& row, int32_t end) {
      const Row before = out_.rows.back();
      const auto col = [&](int32_t i) { return out_.col[before.first + i] + before.shift + 1; };
      const auto len = [&](int32_t i) { return out_.len[before.first + i]; };
      const auto bits = [&](int32_t i) { return out_.bits[before.first + i]; };
      program_.open_at(row, 0, tiles_);
      run(0, 1);
      int32_t at_end = kEmpty;
      if (end < tiles_) {
        program_.open_at(row, end, tiles_);
        program_.run(end, tiles_,
                     [&](int32_t, int32_t, int32_t id) { at_end = content(id, true); });
      }
      const int32_t n = before.count;
      const bool reaches = n > 0 && col(n - 1) + len(n - 1) > end;
      if (count() == 0 && !reaches && at_end == kEmpty) {
        out_.blocks += blocks_;
        out_.rows.push_back({before.first, before.count, before.shift + 1});
        return;
      }
      constexpr int32_t kFew = 8;
      if (n <= kFew) {
        for (int32_t i = 0; i < n; ++i)
          if (col(i) < end) append_tiles(col(i), std::min(col(i) + len(i), end), bits(i));
      } else {
        copy(before, end);
      }
      append_tiles(end, tiles_, at_end);
      out_.rows.push_back({(int32_t)begin_, count(), 0});
    }

    // Appends the runs of the tile row before, of which there are several, one tile further on and
    // up to `end`.
    void copy(const Row& before, int32_t end) {
      const auto at = [&](const std::vector<int32_t>& field, int32_t i) {
        return field[before.first + i];
      };
      const int32_t shift = before.shift + 1;
      int32_t n = before.count;
      int64_t blocks = blocks_;
      for (; at(out_.col, n - 1) + shift >= end; --n)
        blocks -= blocks_of(at(out_.bits, n - 1), at(out_.len, n - 1));
      // The first alone, for it may touch the first tile.
      const int32_t col = at(out_.col, 0) + shift, len = at(out_.len, 0), bits = at(out_.bits, 0);
      blocks -= blocks_of(bits, len);
      append_tiles(col, col + len, bits);
      const size_t size = out_.col.size();
      for (std::vector<int32_t>* field : {&out_.col, &out_.len, &out_.bits}) {
        field->resize(size + n - 1);
        std::copy_n(field->begin() + before.first + 1, n - 1, field->begin() + size);
      }
      for (size_t i = size; i < out_.col.size(); ++i) out_.col[i] += shift;
      const int32_t beyond = std::max(out_.col.back() + out_.len.back() - end, 0);
      out_.len.back() -= beyond;
      out_.blocks += blocks - (beyond ? blocks_of(kFull, beyond) : 0);
    }

    // Appends tiles of words `id` to the tile row at hand.
    void emit(int32_t from, int32_t to, int32_t id) {
      const bool last = to == tiles_ && p_.kv_len % kTile;
      if (to - last > from) append_tiles(from, to - last, content(id, false));
      if (last) append_tiles(to - 1, to, content(id, true));
    }

    void append_tiles(int32_t from, int32_t to, int32_t content) {
      if (content == kEmpty) return;
      out_.blocks += blocks_of(content, to - from);
      if (content != kFull) {
        for (int32_t tile = from; tile < to; ++tile) push(tile, 1, content);
      } else if (count() > 0 && out_.bits.back() == kFull &&
                 out_.col.back() + out_.len.back() == from) {
        out_.len.back() += to - from;
      } else {
        push(from, to - from, kFull);
      }
    }

    void push(int32_t col, int32_t len, int32_t bits) {
      out_.col.push_back(col);
      out_.len.push_back(len);
      out_.bits.push_back(bits);
    }

    // Blocks of so many tiles of the tile row at hand that hold a pair.
    int64_t blocks_of(int32_t content, int64_t tiles) const {
      return tiles * (content == kFull ? ceil_div(rows_, kBlock) * (kTile / kBlock)
                                       : out_.held[content]);
    }

    // What a tile of these words holds within the mask: kFull, kEmpty or an index of found.
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
      known[id] = out_.found.add(words);
      if (known[id] == (int32_t)out_.held.size()) out_.held.push_back(count_blocks(words));
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

    const MaskRequest& p_;
    const int32_t tiles_;
    Program& program_;
    Stretch& out_;
    int rows_ = 0;         // of the tile row at hand
    size_t begin_ = 0;     // of its runs
    int64_t blocks_ = 0;   // of the one before
    // By id, of tiles in whole rows or the last one, and in whole columns or the last one.
    std::vector<int32_t> contents_[4];
  };
};

}  // namespace stof
