// A tile of a matrix product with float32 sums, all of which stay in registers:
//
//   sums[r][lane] (+)= sum over k of left[r][k] * right[k][lane]
//
//   left   [rows][k], the k of a row side by side
//   right  [k / kDepth][lanes][kDepth]
//
// A factor type says what the operands hold and how many k one instruction takes (kDepth). How many
// rows and vectors fill the registers is the caller's choice.
//
// An addition rounds what was summed before it, so a chain of n terms errs as n, and as the root of
// n beside what it adds up to. Chains are kChain steps long, start from zero and are added up.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace collavo {

namespace {

// Float32 values, one k at a time.
struct Floats {
  using Element = float;
  static constexpr int64_t kDepth = 1;
  static constexpr int64_t kChain = 16;
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

// bfloat16 values, two neighbouring k at a time by the processor's dot products.
struct Pairs {
  using Element = BFloat16;
  static constexpr int64_t kDepth = 2;
  // One chain, which goes on from call to call: sums become bfloat16 and have digits to spare.
  static constexpr int64_t kChain = 0;
  using Factor = __m512bh;

  static Factor left(const BFloat16* at) { return broadcast_pair(at); }
  static Factor right(const BFloat16* at) { return load_pairs(at); }
  static Vec step(Factor left, Factor right, Vec sum) { return _mm512_dpbf16_ps(sum, right, left); }

  static void put(BFloat16* to, const Vec (&k)[2]) {
    _mm512_storeu_si512(to, round_pairs(k[0], k[1]));
  }
  static void put_left(BFloat16* to, Vec k) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(k)));
  }
};

#endif

// One tile of kRows rows and kVectors vectors. Strides are in elements; right_stride from one step
// of kDepth to the next. The first product of a sum needs no zeros there.
template <typename P, int64_t kRows, int64_t kVectors>
inline void tile_product(const typename P::Element* left, int64_t left_stride,
                         const typename P::Element* right, int64_t right_stride, int64_t steps,
                         bool first, float* sums, int64_t sums_stride) {
  constexpr bool kCut = P::kChain > 0;
  do {
    Vec part[kRows][kVectors];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) {
        part[r][v] = kCut || first ? zeros() : load(sums + r * sums_stride + v * kLanes);
      }
    }
    const int64_t chain = kCut && steps > P::kChain ? P::kChain : steps;
    for (int64_t s = 0; s < chain; ++s, left += P::kDepth, right += right_stride) {
      typename P::Factor factors[kVectors];
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) factors[v] = P::right(right + v * kLanes * P::kDepth);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        const typename P::Factor value = P::left(left + r * left_stride);
#pragma GCC unroll 16
        for (int64_t v = 0; v < kVectors; ++v) part[r][v] = P::step(value, factors[v], part[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) {
        float* at = sums + r * sums_stride + v * kLanes;
        store(at, kCut && !first ? add(load(at), part[r][v]) : part[r][v]);
      }
    }
    first = false;
    steps -= chain;
  } while (steps > 0);
}

}  // namespace

}  // namespace collavo
