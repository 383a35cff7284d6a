// Arrays that a call of the host library made, kept until the caller, who now knows their size, has
// them copied into memory of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace stof {

class Result {
 public:
  virtual ~Result() = default;

  int64_t bytes() const { return bytes_; }

  void copy(char* to) const {
    for (const Array& x : arrays_)
      if (x.bytes) std::memcpy(to + x.offset, x.from, x.bytes);
  }

 protected:
  // Takes an array, which must not change from now on. Returns where it begins, in 4 bytes each.
  template <typename T>
  int64_t append(const std::vector<T>& array) {
    constexpr int64_t kAlignment = 128;  // a cache line of the GPU
    const int64_t offset = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    arrays_.push_back({array.data(), (int64_t)(array.size() * sizeof(T)), offset});
    bytes_ = offset + arrays_.back().bytes;
    return offset / 4;
  }

 private:
  struct Array {
    const void* from;
    int64_t bytes, offset;
  };
  std::vector<Array> arrays_;
  int64_t bytes_ = 0;
};

}  // namespace stof
