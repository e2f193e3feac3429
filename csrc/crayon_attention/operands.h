// Tokens packed as the operands of product.h. A slab is kLanes tokens, [kLanes][width]
// values of the tensors' dtype; width is the head dim padded with zeros.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/integers.h"
#include "crayon_attention/product.h"
#include "crayon_attention/rotation.h"

namespace collavo::crayon_attention {

namespace {

// Head dims are padded to this, which whole tiles and vectors of every instruction set divide.
constexpr int64_t kWidthUnit = 16;

// Keys that are taken together; a multiple of kRows, and of every slab.
constexpr int64_t kKeyBlock = 128;

template <typename T>
inline void clear(T* to, int64_t count) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
inline void copy(const T* from, int64_t count, T* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// A square of the slab with tokens in lanes: vector i holds value d + i of every token.
template <typename T>
inline void transpose_square(const T* slab, int64_t width, int64_t d, Vec (&square)[kLanes]) {
  for (int64_t i = 0; i < kLanes; ++i) square[i] = load(slab + i * width + d);
  transpose(square);
}

// Left operand with a row per token: [kLanes][width].
template <typename P, typename T>
inline void pack_left(const T* slab, int64_t width, typename P::Element* to) {
  convert(slab, kLanes * width, to);
}

// Left operand with a row per value: [width][stride], the slab's tokens side by side in a row.
template <typename P, typename T>
inline void pack_left_transposed(const T* slab, int64_t width, typename P::Element* to,
                                 int64_t stride) {
  Vec square[kLanes];
  for (int64_t d = 0; d < width; d += kLanes) {
    transpose_square(slab, width, d, square);
    for (int64_t i = 0; i < kLanes; ++i) P::put_left(to + (d + i) * stride, square[i]);
  }
}

// Right operand with a lane per value, k the tokens: [kLanes / kDepth][width][kDepth].
template <typename P, typename T>
inline void pack_right(const T* slab, int64_t width, typename P::Element* to) {
  constexpr int64_t kDepth = P::kDepth;
  for (int64_t i = 0; i < kLanes; i += kDepth) {
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec k[kDepth];
      for (int64_t j = 0; j < kDepth; ++j) k[j] = load(slab + (i + j) * width + d);
      P::put(to + i * width + d * kDepth, k);
    }
  }
}

// Right operand with a lane per token, k the values: [width / kDepth][lanes][kDepth]; `to` is where
// the slab's lanes start.
template <typename P, typename T>
inline void pack_right_transposed(const T* slab, int64_t width, typename P::Element* to,
                                  int64_t lanes) {
  constexpr int64_t kDepth = P::kDepth;
  Vec square[kLanes];
  for (int64_t d = 0; d < width; d += kLanes) {
    transpose_square(slab, width, d, square);
    for (int64_t i = 0; i < kLanes; i += kDepth) {
      Vec k[kDepth];
      for (int64_t j = 0; j < kDepth; ++j) k[j] = square[i + j];
      P::put(to + (d + i) * lanes, k);
    }
  }
}

// Multiply-adds that make another thread worth its start.
constexpr int64_t kGrain = 1 << 20;

// How many threads a call's products keep busy, of those there are.
inline int64_t workers_for(const Problem& problem, int64_t items, int64_t threads) {
  const int64_t products = problem.batch * problem.q_heads * problem.length * problem.length;
  return std::max<int64_t>(
      1, std::min(std::min(threads, items), products * problem.head_dim / kGrain));
}

// The valid tokens of a sample: [first, end). Kernels count positions from the first.
struct Span {
  int64_t first, end;
  int64_t length() const { return end - first; }
};

inline Span span_of(const Problem& problem, int64_t batch) {
  if (!problem.key_range) return {0, problem.length};
  return {problem.key_range[2 * batch], problem.key_range[2 * batch + 1]};
}

inline int64_t width_of(const Problem& problem) {
  return round_up(problem.head_dim, kWidthUnit);
}

// Which keys of a span a query sees; both are positions in the span.
struct Sight {
  int64_t length;
  bool causal;
  int64_t window;

  Sight(const Problem& problem, const Span& span)
      : length(span.length()), causal(problem.causal), window(problem.window) {}

  int64_t first(int64_t query) const { return std::max<int64_t>(0, query - window + 1); }
  int64_t end(int64_t query) const {
    return causal ? std::min(length, query + 1) : std::min(length, query + window);
  }
  // The queries that see a key.
  int64_t first_query(int64_t key) const {
    return causal ? key : std::max<int64_t>(0, key - window + 1);
  }
  int64_t end_query(int64_t key) const { return std::min(length, key + window); }
};

// A negative scale's sign goes into the queries: then a larger product is a larger score.
inline void negate(float* x, int64_t count) {
  for (int64_t d = 0; d < count; ++d) x[d] = -x[d];
}

// From products to the exponents of two. Never zero: hidden scores are minus infinity.
inline float exponent_scale(float scale) {
  const float magnitude = (scale < 0 ? -scale : scale) * 1.44269504f;
  return magnitude > 1e-30f ? magnitude : 1e-30f;
}

// The token at a position: the span's tokens come first, those around it after them.
inline int64_t token_of(const Span& span, int64_t position) {
  if (position < span.length()) return span.first + position;
  const int64_t around = position - span.length();
  return around < span.first ? around : around - span.first + span.end;
}

// A slab of one head's tokens as they are; tokens behind the span and values behind the head
// dim are zeros, which the caller has put there once.
template <typename T>
inline void token_slab(const Problem& problem, const Heads& x, const Span& span, int64_t batch,
                       int64_t head, int64_t position, T* slab) {
  const int64_t width = width_of(problem);
  for (int64_t i = 0; i < kLanes; ++i, ++position, slab += width) {
    if (position >= span.length()) {
      clear(slab, width);
    } else {
      copy(at<const T>(x, batch, span.first + position, head), problem.head_dim, slab);
    }
  }
}

// The same of queries, with their rows and rotated, in float32: packing rounds them. raw is a slab
// for the tokens as they are: copied first, all of them are on the way at once.
template <typename T>
inline void query_slab(const Problem& problem, const Heads& q, const void* table, const Span& span,
                       int64_t batch, int64_t head, int64_t position, T* raw, float* slab) {
  token_slab(problem, q, span, batch, head, position, raw);
  const int64_t width = width_of(problem);
  const int64_t count = std::max<int64_t>(0, std::min(kLanes, span.length() - position));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = span.first + position + i;
    const T* row = row_of<T>(problem, table, batch, token, problem.q_heads, head);
    rotate(problem, batch, token, raw + i * width, row, slab + i * width);
    if (problem.softmax_scale < 0) negate(slab + i * width, problem.head_dim);
  }
  clear(slab + count * width, (kLanes - count) * width);
}

}  // namespace

}  // namespace collavo::crayon_attention
