// Products of many tokens with a strip of 32 outputs, from a slice of the weight that was decoded
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

#include "common/tile.h"
#include "qlora_linear/qlora_linear.h"

namespace collavo::qlora_linear {

namespace {

constexpr int64_t kStrip = 32;       // outputs
constexpr int64_t kTileTokens = 12;  // 24 registers of sums

template <int64_t kTokens>
void strip_tile(const BFloat16* left, const uint32_t* right, int64_t pairs, bool first,
                float* sums) {
  tile_product<Pairs, kTokens, kStrip / kLanes>(left, kLeftStride,
                                                reinterpret_cast<const BFloat16*>(right),
                                                2 * kStrip, pairs, first, sums, kStrip);
}

using StripTile = void (*)(const BFloat16*, const uint32_t*, int64_t, bool, float*);

template <size_t... kIndex>
constexpr std::array<StripTile, sizeof...(kIndex)> strip_tiles(std::index_sequence<kIndex...>) {
  return {strip_tile<kIndex + 1>...};
}

inline void strip_product(const BFloat16* left, const uint32_t* right, int64_t pairs, bool first,
                          int64_t tokens, float* sums) {
  static constexpr auto kTiles = strip_tiles(std::make_index_sequence<kTileTokens>());
  for (int64_t m = 0; m < tokens; m += kTileTokens) {
    const int64_t some = std::min(kTileTokens, tokens - m);
    kTiles[some - 1](left + m * kLeftStride, right, pairs, first, sums + m * kStrip);
  }
}

}  // namespace

}  // namespace collavo::qlora_linear

#endif
