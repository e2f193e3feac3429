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
#include <cstring>
#include <type_traits>

#include "common/simd.h"

namespace collavo::crayon_attention {

namespace {

// Keys and vectors of a tile, whose sums stay in registers: as many as keep the multipliers busy.
#if defined(__AVX512F__)
constexpr int64_t kRows = 8, kVectors = 2;
#elif defined(__AVX2__)
constexpr int64_t kRows = 4, kVectors = 3;
#else
constexpr int64_t kRows = 4, kVectors = 8;
#endif

// Queries that are attended together, one in a lane.
constexpr int64_t kQueryBlock = kVectors * kLanes;

struct Floats {
  using Element = float;
  static constexpr int64_t kDepth = 1;
  using Factor = Vec;

  static Factor left(const float* at) { return broadcast(*at); }
  static Factor right(const float* at) {
    Factor value = load(at);
#if defined(__AVX2__) && !defined(__AVX512F__)
    // In a register of its own: GCC would load it again for every row.
    __asm__("" : "+v"(value));
#endif
    return value;
  }
  static Vec step(Factor left, Factor right, Vec sum) { return fma(left, right, sum); }

  // A vector of each k to the right operand; a vector of k to a row of the left one.
  static void put(float* to, const Vec (&k)[1]) { store(to, k[0]); }
  static void put_left(float* to, Vec k) { store(to, k); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = BFloat16;
  static constexpr int64_t kDepth = 2;
  using Factor = __m512bh;

  static Factor left(const BFloat16* at) {
    int32_t bits;
    std::memcpy(&bits, at, sizeof(bits));
    return reinterpret_cast<Factor>(_mm512_set1_epi32(bits));
  }
  static Factor right(const BFloat16* at) {
    return reinterpret_cast<Factor>(_mm512_loadu_si512(at));
  }
  static Vec step(Factor left, Factor right, Vec sum) { return _mm512_dpbf16_ps(sum, right, left); }

  static void put(BFloat16* to, const Vec (&k)[2]) {
    _mm512_storeu_si512(to, round_pairs(k[0], k[1]));
  }
  static void put_left(BFloat16* to, Vec k) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(k)));
  }
};

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

// One tile of kRows rows and kCount vectors. Strides are in elements; right_stride from one step to
// the next. The first product of a sum needs no zeros there.
template <typename P, int64_t kCount>
inline void tile(const typename P::Element* left, int64_t left_stride,
                 const typename P::Element* right, int64_t right_stride, int64_t steps, bool first,
                 float* sums, int64_t sums_stride) {
  Vec part[kRows][kCount];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kCount; ++v) {
      part[r][v] = first ? zeros() : load(sums + r * sums_stride + v * kLanes);
    }
  }
  for (int64_t s = 0; s < steps; ++s, left += P::kDepth, right += right_stride) {
    typename P::Factor factors[kCount];
#pragma GCC unroll 16
    for (int64_t v = 0; v < kCount; ++v) factors[v] = P::right(right + v * kLanes * P::kDepth);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      const typename P::Factor value = P::left(left + r * left_stride);
#pragma GCC unroll 16
      for (int64_t v = 0; v < kCount; ++v) part[r][v] = P::step(value, factors[v], part[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kCount; ++v) store(sums + r * sums_stride + v * kLanes, part[r][v]);
  }
}

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
      tile<P, decltype(count)::value>(left + r * left_stride, left_stride, right + lane * P::kDepth,
                                      kQueryBlock * P::kDepth, terms / P::kDepth, first,
                                      sums + r * kQueryBlock + lane, kQueryBlock);
    }
  });
}

}  // namespace

}  // namespace collavo::crayon_attention
