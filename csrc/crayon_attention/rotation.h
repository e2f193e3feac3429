// The rotation and its transpose on one head of one token, in registers of the instruction set.
//
// No product is fused with a sum, so every instruction set gives the same bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "crayon_attention/crayon_attention.h"

namespace collavo::crayon_attention {

namespace {

// One value at a time: the baseline, and the tail of the others.
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

#if defined(__AVX512F__)
struct Wide {
  using Value = __m512;
  static constexpr int64_t lanes = 16;
  template <typename T>
  static Value load(const T* from) {
    return load16(from);
  }
  template <typename T>
  static void store(T* to, Value value) {
    store16(to, value);
  }
  static Value add(Value a, Value b) { return _mm512_add_ps(a, b); }
  static Value subtract(Value a, Value b) { return _mm512_sub_ps(a, b); }
  static Value multiply(Value a, Value b) { return _mm512_mul_ps(a, b); }
};
#elif defined(__AVX2__)
struct Wide {
  using Value = __m256;
  static constexpr int64_t lanes = 8;
  template <typename T>
  static Value load(const T* from) {
    return load8(from);
  }
  template <typename T>
  static void store(T* to, Value value) {
    store8(to, value);
  }
  static Value add(Value a, Value b) { return _mm256_add_ps(a, b); }
  static Value subtract(Value a, Value b) { return _mm256_sub_ps(a, b); }
  static Value multiply(Value a, Value b) { return _mm256_mul_ps(a, b); }
};
#else
using Wide = Single;
#endif

// Calls step(Wide(), d) on whole registers of [0, count) and step(Single(), d) on the rest.
template <typename Step>
inline void over_lanes(int64_t count, const Step& step) {
  int64_t d = 0;
  for (; d + Wide::lanes <= count; d += Wide::lanes) step(Wide(), d);
  for (; d < count; ++d) step(Single(), d);
}

// x plus y where y is not null, at offset d.
template <typename Lanes, typename T>
inline typename Lanes::Value load_sum(const T* x, const T* y, int64_t d) {
  const auto value = Lanes::load(x + d);
  return y ? Lanes::add(value, Lanes::load(y + d)) : value;
}

// to = R (x + row), where row may be null.
template <typename T>
inline void rotate(const T* x, const T* row, const float* cos, const float* sin, int64_t half,
                   T* to) {
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

// x = R^T (x + extra) and sum += the same in float32; extra and sum may be null.
template <typename T>
inline void unrotate(T* x, const T* extra, const float* cos, const float* sin, int64_t half,
                     float* sum) {
  over_lanes(half, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    const int64_t e = half + d;
    const auto low = load_sum<L>(x, extra, d), high = load_sum<L>(x, extra, e);
    const auto first =
        L::add(L::multiply(low, L::load(cos + d)), L::multiply(high, L::load(sin + e)));
    const auto second =
        L::subtract(L::multiply(high, L::load(cos + e)), L::multiply(low, L::load(sin + d)));
    L::store(x + d, first);
    L::store(x + e, second);
    if (sum) {
      L::store(sum + d, L::add(L::load(sum + d), first));
      L::store(sum + e, L::add(L::load(sum + e), second));
    }
  });
}

// to = x + y; y may be null, and to may be x.
template <typename T>
inline void add(const T* x, const T* y, int64_t count, T* to) {
  over_lanes(count, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    L::store(to + d, load_sum<L>(x, y, d));
  });
}

// x = x + extra and sum += the same in float32; extra and sum may be null.
template <typename T>
inline void add_and_sum(T* x, const T* extra, int64_t count, float* sum) {
  over_lanes(count, [&](auto lanes, int64_t d) {
    using L = decltype(lanes);
    const auto value = load_sum<L>(x, extra, d);
    if (extra) L::store(x + d, value);
    if (sum) L::store(sum + d, L::add(L::load(sum + d), value));
  });
}

// Where a head of a token starts.
template <typename T>
inline T* at(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + token * x.token_stride +
         head * x.head_stride;
}

inline int64_t row_of(const Tokens& tokens, const Shape& shape, int64_t batch, int64_t token) {
  return tokens.row_index ? tokens.row_index[batch * shape.length + token] : -1;
}

inline int64_t angle_offset(const Tokens& tokens, const Shape& shape, int64_t batch,
                            int64_t token) {
  return batch * tokens.angle_batch_stride + token * shape.size;
}

}  // namespace

}  // namespace collavo::crayon_attention
