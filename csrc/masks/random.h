// Key blocks drawn at random, and elements of them.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "spans.h"

namespace stof {

// Each block of queries sees key blocks drawn at random; see stof_hf/masks/random_blocks.py.
class RandomBlocks : public Spans {
 public:
  // blocks: drawn for each block of queries. of: key blocks to draw from, or 0: those up to the
  // queries' own. fill: share of the elements, in units of 2^-24.
  RandomBlocks(const Keys& keys, int64_t blocks, int64_t size, uint64_t seed, uint64_t fill,
               int64_t of)
      : Spans(keys), blocks_(blocks), size_(size), seed_(seed), fill_(fill), of_(of) {}

  void open(const TileRow& row) override {
    spans_.clear();
    const int64_t first = row.first / size_, last = row.last / size_;
    for (int64_t block = first; block <= last; ++block) draw(block);
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.first_key < b.first_key; });
    const bool apart = first == last && fill_ == kWhole;
    if (apart) join();
    push_spans(row, apart, fill_ == kWhole);
  }

  void words(const TileRow& row, int32_t tile, uint64_t* out) override {
    Spans::words(row, tile, out);
    if (fill_ == kWhole) return;
    const auto key = (uint64_t)key_of(tile);
    const bool aligned = key % 8 == 0;
    for (int r = 0; r < kTile; ++r) {
      if (!out[r]) continue;
      const uint64_t of_row = draw_from((uint64_t)(row.first + r + 1) + seed_);
      if (out[r] == kAll && aligned) {
        out[r] = draw_word<true>(of_row, key, 0, kTile);
        continue;
      }
      const int begin = __builtin_ctzll(out[r]) & ~7, end = kTile - __builtin_clzll(out[r]);
      out[r] &= aligned ? draw_word<true>(of_row, key, begin, end)
                        : draw_word<false>(of_row, key, begin, end);
    }
  }

  double cost() const override {
    const auto size = (double)std::min(size_, keys_.tiles * kTile);
    const double draws = fill_ == kWhole ? 0 : 0.27 * kTile * size;
    const double each = draws + (fill_ == kWhole ? 50 : 150) * (size / kTile + 1);
    return 50 + (double)std::min(keys_.tiles, blocks_) * each;
  }

 private:
  static constexpr uint64_t kWhole = 1 << 24, kGamma = 0x9e3779b97f4a7c15ull;
  typedef uint64_t Lanes __attribute__((vector_size(64)));

  // splitmix64 (Steele, Lea and Flood, 2014), but for its first product.
  template <typename T>
  static inline T finish(T x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
  }
  static uint64_t draw_from(uint64_t x) { return finish(x * kGamma); }

  // Which of the keys that begin at `key` a row keeps, of columns [begin, end), in eights. aligned:
  // `key` is a multiple of 8. Then what a row draws from differs within an eight in 3 bits alone,
  // and one product serves all.
  template <bool aligned>
  __attribute__((always_inline)) uint64_t draw_word(uint64_t of_row, uint64_t key, int begin,
                                                    int end) const {
    const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const Lanes low = (lane ^ (of_row & 7)) * kGamma;
    Kept kept(fill_);
#pragma GCC unroll 8
    for (int c = begin; c < end; c += 8) {
      const Lanes first = aligned ? low + ((of_row ^ (key + c)) & ~7ull) * kGamma
                                  : (of_row ^ (lane + (key + c))) * kGamma;
      kept.add(finish(first) << 40, c);
    }
    return kept.word();
  }

  // Collects which lanes fall below a share of 2^24, given in the uppermost 24 bits.
#ifdef __AVX512F__
  class Kept {
   public:
    explicit Kept(uint64_t fill) : limit_(_mm512_set1_epi64((int64_t)(fill << 40))) {}
    void add(Lanes x, int c) {
      word_ |= (uint64_t)_mm512_cmplt_epu64_mask((__m512i)x, limit_) << c;
    }
    uint64_t word() const { return word_; }

   private:
    __m512i limit_;
    uint64_t word_ = 0;
  };
#else
  class Kept {
   public:
    explicit Kept(uint64_t fill) : limit_(fill << 40) {}
    void add(Lanes x, int c) {
      const Lanes bit = (Lanes{} + 1) << Lanes{0, 1, 2, 3, 4, 5, 6, 7};
      held_ |= (Lanes)(x < limit_) & bit << (uint64_t)c;
    }
    uint64_t word() const {
      uint64_t word = 0;
      for (int i = 0; i < 8; ++i) word |= held_[i];
      return word;
    }

   private:
    uint64_t limit_;
    Lanes held_ = {};
  };
#endif

  // Floyd's sampling without replacement (Bentley and Floyd, 1987).
  void draw(int64_t block) {
    const int64_t total = of_ ? of_ : block + 1;
    const uint64_t base = draw_from(draw_from((uint64_t)block + 1) + seed_);
    const size_t begin = spans_.size();
    for (int64_t i = 0; i < blocks_; ++i) {
      const int64_t top = total - blocks_ + i;
      if (top < 0) continue;
      const int64_t pick = (int64_t)((draw_from(base + (uint64_t)i) >> 1) % (uint64_t)(top + 1));
      const bool taken = std::any_of(spans_.begin() + begin, spans_.end(), [&](const Span& s) {
        return s.first_key == pick * size_;
      });
      const int64_t key = (taken ? top : pick) * size_, row = block * size_;
      spans_.push_back({row, row + size_, key, key + size_});
    }
  }

  void join() {
    size_t kept = 0;
    for (size_t i = 1; i < spans_.size(); ++i) {
      if (spans_[i].first_key == spans_[kept].last_key)
        spans_[kept].last_key = spans_[i].last_key;
      else
        spans_[++kept] = spans_[i];
    }
    spans_.resize(std::min(spans_.size(), kept + 1));
  }

  const int64_t blocks_, size_;
  const uint64_t seed_, fill_;
  const int64_t of_;
};

}  // namespace stof
