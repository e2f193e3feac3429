// Pieces of one scratch buffer, handed out one behind the other. Without a buffer it only counts,
// so the code that takes the pieces also says how many bytes they need.
#pragma once

#include <cstdint>

namespace collavo {

namespace {

class Arena {
 public:
  // The buffer may start anywhere; pieces start at cache lines.
  explicit Arena(void* buffer) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer);
    start_ = (address + kLine - 1) / kLine * kLine;
  }

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(start_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    return piece;
  }

  // Bytes that a buffer needs for what was taken so far.
  int64_t bytes() const { return used_ + kLine; }

 private:
  static constexpr int64_t kLine = 64;
  uintptr_t start_;
  int64_t used_ = 0;
};

}  // namespace

}  // namespace collavo
