// Which attention probabilities dropout keeps, one byte each; see stof_hf/attention/dropout.py.
//
// Threads take rows. Of a row, the words of up to 16 times 32 keys are made side by side, in plain
// loops over arrays that compilers turn into vectors.

#include <cstdint>
#include <exception>

#include "../team.h"

namespace {

constexpr int kSide = 16;  // words side by side
constexpr int kRounds = 7;

// Philox 4x32 on kSide counters that differ in their first word: c[i][j] is word i of counter j.
void philox(uint64_t seed, uint32_t (&c)[4][kSide]) {
  uint32_t first = (uint32_t)seed, second = (uint32_t)(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int j = 0; j < kSide; ++j) {
      const uint64_t a = (uint64_t)c[0][j] * 0xD2511F53u, b = (uint64_t)c[2][j] * 0xCD9E8D57u;
      c[0][j] = (uint32_t)(b >> 32) ^ c[1][j] ^ first;
      c[2][j] = (uint32_t)(a >> 32) ^ c[3][j] ^ second;
      c[1][j] = (uint32_t)b;
      c[3][j] = (uint32_t)a;
    }
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
}

struct Kept {
  uint64_t seed, threshold;
  const int64_t *copies, *rows, *words;
  int64_t n_rows, n_words;
  uint8_t* out;  // [copies, rows, 32 * words]

  void row(int64_t i) const {
    const uint32_t copy = (uint32_t)copies[i / n_rows], query = (uint32_t)rows[i % n_rows];
    uint8_t* to = out + i * n_words * 32;
    for (int64_t begin = 0; begin < n_words; begin += kSide) {
      const int count = (int)std::min<int64_t>(kSide, n_words - begin);
      uint32_t kept[kSide];
      for (int j = 0; j < kSide; ++j) kept[j] = ~0u;
      for (uint32_t call = 0; call < 4; ++call) {
        uint32_t c[4][kSide];
        for (int j = 0; j < kSide; ++j) {
          c[0][j] = (uint32_t)words[begin + std::min(j, count - 1)];
          c[1][j] = query;
          c[2][j] = copy;
          c[3][j] = call;
        }
        philox(seed, c);
        for (int bit = 0; bit < 4; ++bit) {
          if (threshold >> (4 * call + bit) & 1)
            for (int j = 0; j < kSide; ++j) kept[j] &= c[bit][j];
          else
            for (int j = 0; j < kSide; ++j) kept[j] |= c[bit][j];
        }
      }
      for (int j = 0; j < count; ++j)
        for (int lane = 0; lane < 32; ++lane) to[32 * j + lane] = kept[j] >> lane & 1;
      to += 32 * kSide;
    }
  }
};

}  // namespace

// Returns 0, or 1 where memory ran out.
extern "C" __attribute__((visibility("default"))) int stof_dropout_kept(
    uint64_t seed, uint64_t threshold, const int64_t* copies, int64_t n_copies,
    const int64_t* rows, int64_t n_rows, const int64_t* words, int64_t n_words, uint8_t* out,
    void* parallel, int64_t threads) {
  constexpr int64_t kGrain = 1 << 10;  // words, of some 100 ns each, that are worth a thread
  constexpr int64_t kRows = 16;        // that a thread takes at a time
  const Kept kept{seed, threshold, copies, rows, words, n_rows, n_words, out};
  const int64_t total = n_copies * n_rows;
  const stof::Team team(parallel, threads, kGrain);
  const int64_t wanted = team.threads((double)total * n_words);
  try {
    team.each((total + kRows - 1) / kRows, wanted, [&](int64_t part) {
      for (int64_t i = part * kRows; i < std::min(total, (part + 1) * kRows); ++i) kept.row(i);
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
