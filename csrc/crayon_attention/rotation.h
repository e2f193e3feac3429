// The crayon row, the rotation and its transpose on one head of one token.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "crayon_attention/crayon_attention.h"

namespace collavo::crayon_attention {

namespace {

// What every instruction set calls a vector, and one value at a time for what is left of it.
struct Whole {
  using Value = Vec;
  static constexpr int64_t lanes = kLanes;
  template <typename T>
  static Value load(const T* from) {
    return collavo::load(from);
  }
  template <typename T>
  static void store(T* to, Value value) {
    collavo::store(to, value);
  }
  static Value add(Value a, Value b) { return collavo::add(a, b); }
  static Value subtract(Value a, Value b) { return collavo::subtract(a, b); }
  static Value multiply(Value a, Value b) { return collavo::multiply(a, b); }
};

struct Single {
  using Value = float;
  static constexpr int64_t lanes = 1;
  template <typename T>
  static Value load(const T* from) {
    return to_float(*from);
  }
  template <typename T>
  static void store(T* to, Value value) {
    from_float(value, to);
  }
  static Value add(Value a, Value b) { return a + b; }
  static Value subtract(Value a, Value b) { return a - b; }
  static Value multiply(Value a, Value b) { return a * b; }
};

// Calls step(Whole(), d) on whole vectors of [0, count) and step(Single(), d) on the rest.
template <typename Step>
inline void over_lanes(int64_t count, const Step& step) {
  int64_t d = 0;
  for (; d + Whole::lanes <= count; d += Whole::lanes) step(Whole(), d);
  for (; d < count; ++d) step(Single(), d);
}

// Where a head of a token starts.
template <typename T>
inline T* at(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + token * x.token_stride +
         head * x.head_stride;
}

// The row of a token's head in a table, or null.
template <typename T>
inline const T* row_of(const Problem& problem, const void* table, int64_t batch, int64_t token,
                       int64_t heads, int64_t head) {
  if (!table || !problem.row_index) return nullptr;
  const int64_t row = problem.row_index[batch * problem.length + token];
  return row < 0 ? nullptr : static_cast<const T*>(table) + (row * heads + head) * problem.head_dim;
}

// x plus y where y is not null, at offset d.
template <typename L, typename T, typename U>
inline typename L::Value load_sum(const T* x, const U* y, int64_t d) {
  const auto value = L::load(x + d);
  return y ? L::add(value, L::load(y + d)) : value;
}

// to = x + row, where row may be null; to may be x.
template <typename T, typename U>
inline void add_row(const T* x, const T* row, int64_t count, U* to) {
  over_lanes(count, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    L::store(to + d, load_sum<L>(x, row, d));
  });
}

// to = R (x + row), where row may be null; R of the token's position, or none. to may be x.
template <typename T, typename U>
inline void rotate(const Problem& problem, int64_t batch, int64_t token, const T* x, const T* row,
                   U* to) {
  if (!problem.cos) return add_row(x, row, problem.head_dim, to);
  const int64_t half = problem.head_dim / 2;
  const int64_t angle = batch * problem.angle_batch_stride + token * problem.head_dim;
  const float *cos = problem.cos + angle, *sin = problem.sin + angle;
  over_lanes(half, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    const int64_t e = half + d;
    const auto low = load_sum<L>(x, row, d), high = load_sum<L>(x, row, e);
    L::store(to + d,
             L::subtract(L::multiply(low, L::load(cos + d)), L::multiply(high, L::load(sin + d))));
    L::store(to + e,
             L::add(L::multiply(high, L::load(cos + e)), L::multiply(low, L::load(sin + e))));
  });
}

// x = R^T x in float32, or nothing where there is no rotation.
inline void unrotate(const Problem& problem, int64_t batch, int64_t token, float* x) {
  if (!problem.cos) return;
  const int64_t half = problem.head_dim / 2;
  const int64_t angle = batch * problem.angle_batch_stride + token * problem.head_dim;
  const float *cos = problem.cos + angle, *sin = problem.sin + angle;
  over_lanes(half, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    const int64_t e = half + d;
    const auto low = L::load(x + d), high = L::load(x + e);
    L::store(x + d,
             L::add(L::multiply(low, L::load(cos + d)), L::multiply(high, L::load(sin + e))));
    L::store(x + e,
             L::subtract(L::multiply(high, L::load(cos + e)), L::multiply(low, L::load(sin + d))));
  });
}

// to += x, to in float32.
template <typename T>
inline void accumulate(const T* x, int64_t count, float* to) {
  over_lanes(count, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    L::store(to + d, L::add(L::load(to + d), L::load(x + d)));
  });
}

// to = x, rounded to its type.
template <typename T, typename U>
inline void convert(const T* x, int64_t count, U* to) {
  over_lanes(count, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    L::store(to + d, L::load(x + d));
  });
}

}  // namespace

}  // namespace collavo::crayon_attention
