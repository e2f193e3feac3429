// Products of one panel of the weight with a few tokens, for each instruction set:
//
//   sums[m][r] += sum over the tiles of code * scale * x[m]      16 rows r, kTokens tokens m
//
// A product has its own type for x (X, kPerChunk of them for 64 columns) and its own order of the
// eight values that meet a line (kOrder), so that a decoded vector and its values meet without a
// shuffle. Codes are looked up in registers; scales are float32 and are applied to the float32 sums
// of a tile.
#pragma once

#include <type_traits>

#include "qlora_linear/panel_product_avx2.h"
#include "qlora_linear/panels.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

constexpr int kMostTokens = 16;

// Sums of one token that run side by side: with few tokens a product would else wait for the last.
constexpr int chains(int tokens) {
  return tokens <= 2 ? 4 : tokens <= 5 ? 2 : 1;
}

#if defined(__AVX512F__)

// Twelve tiles are as far ahead as memory is away. Into the second level: the first one holds x.
inline void fetch_ahead(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line + 12 * kTile), _MM_HINT_T1);
}

template <int kTokens, int kChains>
inline void add_scaled(__m512 (&parts)[kTokens][kChains], const uint8_t* tile,
                       __m512 (&totals)[kTokens]) {
  const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(tile));
  for (int m = 0; m < kTokens; ++m) {
    __m512 sum = parts[m][0];
    for (int c = 1; c < kChains; ++c) sum = _mm512_add_ps(sum, parts[m][c]);
    totals[m] = _mm512_fmadd_ps(sum, scale, totals[m]);
  }
}

// What all products of float32 sums share: tiles and their scales. Product adds a line of codes.
template <typename Product, int kTokens>
inline void run_tiles(const uint8_t* tiles, int64_t count, const typename Product::X* x,
                      float* sums) {
  constexpr int kChains = chains(kTokens);
  const auto table = Product::table();
  __m512 totals[kTokens];
  for (int m = 0; m < kTokens; ++m) totals[m] = _mm512_loadu_ps(sums + m * kPanel);
  for (int64_t t = 0; t < count; ++t, tiles += kTile, x += kTokens * kChunk) {
    __m512 parts[kTokens][kChains];
    for (auto& of_token : parts) {
      for (__m512& part : of_token) part = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int64_t line = 0; line < kLines; ++line) {
      const uint8_t* codes = tiles + kScaleBytes + line * kLine;
      fetch_ahead(codes);
      Product::add_line(_mm512_loadu_si512(codes), table, x + line * 8, parts);
    }
    add_scaled<kTokens, kChains>(parts, tiles, totals);
  }
  for (int m = 0; m < kTokens; ++m) _mm512_storeu_ps(sums + m * kPanel, totals[m]);
}

#endif

#if defined(__AVX512BF16__)

// Pairs of bfloat16: exact products, float32 sums. Codes are rounded to bfloat16, as a dense
// weight would be.
struct PairProduct {
  using X = BFloat16;
  static constexpr int64_t kPerChunk = kChunk;
  // A 16-bit lane holds elements 1, 0, 3, 2 of its row's line in the low half of the dword, from
  // the low bits up, and 5, 4, 7, 6 in the high half.
  static constexpr int kOrder[8] = {1, 5, 0, 4, 3, 7, 2, 6};

  static void arrange(const X* from, X* to) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 8 * 8 + kOrder[i % 8]);
    const __m512i index = _mm512_load_si512(order);
    for (int64_t i = 0; i < kChunk; i += 32) {
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(index, _mm512_loadu_si512(from + i)));
    }
  }

  template <int kTokens>
  static void run(const uint8_t* tiles, int64_t count, const X* x, float* sums) {
    run_tiles<PairProduct, kTokens>(tiles, count, x, sums);
  }

  // Twice the sixteen codes: a look-up reads five bits of its lane, and the fifth does not matter.
  static __m512i table() {
    alignas(64) BFloat16 codes[32];
    for (int i = 0; i < 32; ++i) from_float(kNF4Code[i % 16], codes + i);
    return _mm512_load_si512(codes);
  }

  template <int kTokens, int kChains>
  static inline void add_line(__m512i codes, __m512i table, const X* x,
                              __m512 (&parts)[kTokens][kChains]) {
    const __m512bh weights[4] = {look_up(codes, table), look_up(_mm512_srli_epi16(codes, 4), table),
                                 look_up(_mm512_srli_epi16(codes, 8), table),
                                 look_up(_mm512_srli_epi16(codes, 12), table)};
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < kTokens; ++m) {
        parts[m][s % kChains] = _mm512_dpbf16_ps(parts[m][s % kChains], weights[s],
                                                 broadcast_pair(x + m * kChunk + 2 * s));
      }
    }
  }

 private:
  static __m512bh look_up(__m512i codes, __m512i table) {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes, table));
  }
};

#endif

#if defined(__AVX512F__)

struct FloatProduct {
  using X = float;
  static constexpr int64_t kPerChunk = kChunk;
  static constexpr int kOrder[8] = {1, 0, 3, 2, 5, 4, 7, 6};

  template <typename T>
  static void arrange(const T* from, X* to) {
    arrange_floats(kOrder, from, to);
  }

  template <int kTokens>
  static void run(const uint8_t* tiles, int64_t count, const X* x, float* sums) {
    run_tiles<FloatProduct, kTokens>(tiles, count, x, sums);
  }

  static __m512 table() { return _mm512_load_ps(kNF4Code); }

  template <int kTokens, int kChains>
  static inline void add_line(__m512i codes, __m512 table, const X* x,
                              __m512 (&parts)[kTokens][kChains]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, codes = _mm512_srli_epi32(codes, 4)) {
      // The permutation reads the low four bits of an index.
      const __m512 weight = _mm512_permutexvar_ps(codes, table);
#pragma GCC unroll 16
      for (int m = 0; m < kTokens; ++m) {
        const __m512 value = _mm512_set1_ps(x[m * kChunk + i]);
        parts[m][i % kChains] = _mm512_fmadd_ps(weight, value, parts[m][i % kChains]);
      }
    }
  }
};

#elif !defined(__AVX2__)

struct FloatProduct {
  using X = float;
  static constexpr int64_t kPerChunk = kChunk;
  static constexpr int kOrder[8] = {1, 0, 3, 2, 5, 4, 7, 6};

  template <typename T>
  static void arrange(const T* from, X* to) {
    arrange_floats(kOrder, from, to);
  }

  template <int kTokens>
  static void run(const uint8_t* tiles, int64_t count, const X* x, float* sums) {
    for (int64_t t = 0; t < count; ++t, tiles += kTile, x += kTokens * kChunk) {
      for (int64_t r = 0; r < kPanel; ++r) {
        float scale, weights[kChunk];
        std::memcpy(&scale, tiles + r * sizeof(float), sizeof(scale));
        for (int64_t i = 0; i < kChunk; ++i) {
          const uint8_t pair = tiles[kScaleBytes + i / 8 * kLine + 4 * r + i % 8 / 2];
          weights[i] = kNF4Code[i % 2 ? pair >> 4 : pair & 15] * scale;
        }
        for (int64_t m = 0; m < kTokens; ++m) {
          float parts[4] = {};
          for (int64_t i = 0; i < kChunk; i += 4) {
            for (int64_t c = 0; c < 4; ++c) parts[c] += weights[i + c] * x[m * kChunk + i + c];
          }
          sums[m * kPanel + r] += (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
      }
    }
  }
};

#endif

#if defined(__AVX512BF16__)
template <typename T>
using ProductOf = std::conditional_t<std::is_same_v<T, BFloat16>, PairProduct, FloatProduct>;
#else
template <typename T>
using ProductOf = FloatProduct;
#endif

}  // namespace

}  // namespace collavo::qlora_linear
