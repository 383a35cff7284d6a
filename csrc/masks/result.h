// Arrays that a call of the host library made, kept until the caller, who now knows their size, has
// them written into memory of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "../team.h"

namespace stof {

// How a request names its threads; see Team.
struct Threads {
  void* parallel;
  int64_t count, grain;
};

inline Team team_of(const Threads& x) { return {x.parallel, x.count, x.grain}; }

class Result {
 public:
  explicit Result(const Threads& x) : team_(team_of(x)) {}
  virtual ~Result() = default;

  int64_t bytes() const { return bytes_; }

  void copy(char* to) const {
    double cost = 0;
    for (const Array& x : arrays_) cost += x.cost * (double)x.units;
    const int64_t threads = team_.threads(cost);
    std::vector<Piece> pieces;
    for (const Array& x : arrays_) {
      // So many pieces that nobody waits long for the last one.
      const auto share = (int64_t)(4 * (double)threads * x.cost * (double)x.units / (cost + 1));
      const int64_t n = threads > 1 ? 1 + share : 1;
      for (int64_t i = 0; i < n; ++i)
        pieces.push_back({&x, x.units * i / n, x.units * (i + 1) / n});
    }
    team_.each((int64_t)pieces.size(), threads, [&](int64_t i) {
      const Piece& piece = pieces[i];
      if (piece.last > piece.first)
        piece.array->write(to + piece.array->offset, piece.first, piece.last);
    });
  }

 protected:
  // Writes units [first, last) of an array to their places in it.
  using Write = std::function<void(char* array, int64_t first, int64_t last)>;

  // Takes an array of so many bytes, written in units of about `cost` ns each. Returns where it
  // begins, in 4 bytes each.
  int64_t append(int64_t bytes, int64_t units, double cost, Write write) {
    constexpr int64_t kAlignment = 128;  // a cache line of the GPU
    const int64_t offset = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    arrays_.push_back({offset, units, cost, std::move(write)});
    bytes_ = offset + bytes;
    return offset / 4;
  }

  // Takes an array, which must not change from now on.
  template <typename T>
  int64_t append(const std::vector<T>& array) {
    const int64_t bytes = (int64_t)(array.size() * sizeof(T));
    return append(bytes, bytes, 0.1, [from = (const char*)array.data()](char* to, int64_t first,
                                                                       int64_t last) {
      std::memcpy(to + first, from + first, last - first);
    });
  }

  const Team team_;

 private:
  struct Array {
    int64_t offset, units;
    double cost;
    Write write;
  };
  struct Piece {
    const Array* array;
    int64_t first, last;
  };
  std::vector<Array> arrays_;
  int64_t bytes_ = 0;
};

}  // namespace stof
