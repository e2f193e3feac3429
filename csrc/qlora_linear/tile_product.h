// Products of many tokens with a strip of 32 outputs, from a block of the weight that was decoded
// once: pairs of bfloat16 with the processor's dot products, float32 sums.
//
//   left   [tokens][kLeftStride] values, pairs of the sum side by side
//   right  [pairs][32 outputs] pairs
//   sums   [tokens][32] float32
#pragma once

#if defined(__AVX512BF16__)

#include <algorithm>
#include <array>
#include <utility>

#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

constexpr int64_t kStrip = 32;       // outputs
constexpr int64_t kTileTokens = 12;  // 24 registers of sums

inline __m512bh pairs_of(const void* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}

template <int kTokens>
void tile_product(const BFloat16* left, const uint32_t* right, int64_t pairs, bool first,
                  float* sums) {
  __m512 tile[kTokens][2];
#pragma GCC unroll 12
  for (int m = 0; m < kTokens; ++m) {
    for (int half = 0; half < 2; ++half) {
      tile[m][half] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m * kStrip + 16 * half);
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh low = pairs_of(right + p * kStrip), high = pairs_of(right + p * kStrip + 16);
#pragma GCC unroll 12
    for (int m = 0; m < kTokens; ++m) {
      int32_t bits;
      std::memcpy(&bits, left + m * kLeftStride + 2 * p, sizeof(bits));
      const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
      tile[m][0] = _mm512_dpbf16_ps(tile[m][0], low, pair);
      tile[m][1] = _mm512_dpbf16_ps(tile[m][1], high, pair);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kTokens; ++m) {
    _mm512_storeu_ps(sums + m * kStrip, tile[m][0]);
    _mm512_storeu_ps(sums + m * kStrip + 16, tile[m][1]);
  }
}

using TileProduct = void (*)(const BFloat16*, const uint32_t*, int64_t, bool, float*);

template <size_t... kIndex>
constexpr std::array<TileProduct, sizeof...(kIndex)> tile_products(std::index_sequence<kIndex...>) {
  return {tile_product<kIndex + 1>...};
}

inline void strip_product(const BFloat16* left, const uint32_t* right, int64_t pairs, bool first,
                          int64_t tokens, float* sums) {
  static constexpr auto kProducts = tile_products(std::make_index_sequence<kTileTokens>());
  for (int64_t m = 0; m < tokens; m += kTileTokens) {
    const int64_t some = std::min(kTileTokens, tokens - m);
    kProducts[some - 1](left + m * kLeftStride, right, pairs, first, sums + m * kStrip);
  }
}

}  // namespace

}  // namespace collavo::qlora_linear

#endif
