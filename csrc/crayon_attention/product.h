// Products of packed operands with float32 sums:
//
//   sums[r][lane] (+)= sum over k of left[r][k] * right[k][lane]
//
//   left   [rows][k], the k of a row side by side
//   right  [k / kDepth][lanes][kDepth]
//
// A product type says what its operands hold and how many k one instruction takes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/tile.h"

namespace collavo::crayon_attention {

namespace {

// Rows and vectors of a tile, whose sums stay in registers: as many as keep the multipliers busy.
#if defined(__AVX512F__)
constexpr int64_t kRows = 8, kVectors = 2;
#elif defined(__AVX2__)
constexpr int64_t kRows = 4, kVectors = 3;
#else
constexpr int64_t kRows = 4, kVectors = 8;
#endif

// Queries that are attended together, one in a lane.
constexpr int64_t kQueryBlock = kVectors * kLanes;

#if defined(__AVX512BF16__)
// bfloat16 values meet in dot products of pairs; everything else in float32.
template <typename T>
using ProductOf = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Floats>;
#else
template <typename T>
using ProductOf = Floats;
#endif

// What a pointer points to.
template <typename Pointer>
using Value = std::remove_const_t<std::remove_pointer_t<Pointer>>;

// Calls function(vector, std::integral_constant of how many) for the vectors of `lanes` lanes, a
// tile's worth at a time and what is left one by one.
template <typename Function>
inline void over_vectors(int64_t lanes, const Function& function) {
  int64_t lane = 0;
  for (; lane + kQueryBlock <= lanes; lane += kQueryBlock) {
    function(lane, std::integral_constant<int64_t, kVectors>());
  }
  for (; lane < lanes; lane += kLanes) function(lane, std::integral_constant<int64_t, 1>());
}

// A block of queries: all rows (a multiple of kRows), of its kQueryBlock lanes the first (a
// multiple of kLanes).
template <typename P>
inline void product(const typename P::Element* left, int64_t left_stride, int64_t rows,
                    const typename P::Element* right, int64_t lanes, int64_t terms, bool first,
                    float* sums) {
  over_vectors(lanes, [&](int64_t lane, auto count) {
    for (int64_t r = 0; r < rows; r += kRows) {
      tile_product<P, kRows, decltype(count)::value>(
          left + r * left_stride, left_stride, right + lane * P::kDepth, kQueryBlock * P::kDepth,
          terms / P::kDepth, first, sums + r * kQueryBlock + lane, kQueryBlock);
    }
  });
}

}  // namespace

}  // namespace collavo::crayon_attention
