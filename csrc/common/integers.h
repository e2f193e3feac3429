// Arithmetic on counts. Everything may be called in device code too.
#pragma once

#include <cstdint>

namespace collavo {

// Internal linkage: sources compiled for several instruction sets must not share this code.
namespace {

// How many units cover the count.
constexpr int64_t ceil_divide(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit;
}

constexpr int64_t round_up(int64_t count, int64_t unit) {
  return ceil_divide(count, unit) * unit;
}

}  // namespace

}  // namespace collavo
