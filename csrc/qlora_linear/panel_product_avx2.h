// The product of panel_product.h in float32 for AVX2, which has no look-up of 32-bit numbers among
// sixteen: codes are looked up byte by byte.
#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)

#include "qlora_linear/panels.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

// A vector holds four columns of two rows, since that is what byte look-ups and two rounds of
// unpacking give. One or two tokens meet the codes in registers; for more a few tiles of half a
// panel are decoded into a buffer, and tokens run over it.
struct FloatProduct {
  using X = float;
  static constexpr int64_t kPerChunk = kChunk;
  static constexpr int kOrder[8] = {1, 3, 5, 7, 0, 2, 4, 6};

  template <typename T>
  static void arrange(const T* from, X* to) {
    arrange_floats(kOrder, from, to);
  }

  static constexpr int kTiles = 2;           // that the buffer holds
  static constexpr int kQuads = 2 * kLines;  // groups of four columns in a tile
  static constexpr int kHalf = kPanel / 2;   // rows
  static constexpr int kTile4 = 4 * kQuads;  // vectors of half a tile

  template <int kTokens>
  static void run(const uint8_t* tiles, int64_t count, const X* x, float* sums) {
    const Planes planes;
    if constexpr (kTokens <= 2) {
      // By runs, so that sums are added up at the same places in either order of the weight.
      for (int64_t first = 0; first < count; first += kRun) {
        const int64_t some = count - first < kRun ? count - first : kRun;
        const X* values = x + first * kTokens * kChunk;
        for (int half = 0; half < 2; ++half) {
          direct<kTokens>(planes, tiles + first * kTile, some, values, half, sums);
        }
      }
    } else {
      alignas(32) float buffer[kTiles * kTile4 * 8];
      for (int64_t first = 0; first < count; first += kTiles) {
        const int64_t some = count - first < kTiles ? count - first : kTiles;
        for (int half = 0; half < 2; ++half) {
          for (int64_t t = 0; t < some; ++t) {
            planes.decode(tiles + (first + t) * kTile, half, buffer + t * kTile4 * 8);
          }
          buffered<kTokens>(buffer, some, x + first * kTokens * kChunk, half, sums);
        }
      }
    }
  }

 private:
  // The codes as float32, cut into four tables of bytes.
  struct Planes {
    __m256i byte[4];

    Planes() {
      for (int b = 0; b < 4; ++b) {
        alignas(16) uint8_t bytes[16];
        for (int i = 0; i < 16; ++i) {
          bytes[i] = static_cast<uint8_t>(bits_of(kNF4Code[i]) >> (8 * b));
        }
        byte[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(bytes)));
      }
    }

    [[gnu::noinline]] void decode(const uint8_t* tile, int half, float* to) const {
      __m256 scale[4];
      scales(tile, half, scale);
      for (int64_t line = 0; line < kLines; ++line) {
#pragma GCC unroll 2
        for (int nibble = 0; nibble < 2; ++nibble, to += 32) {
          __m256 weights[4];
          look_up(index(tile, half, line, nibble), weights);
          for (int r = 0; r < 4; ++r) {
            _mm256_store_ps(to + 8 * r, _mm256_mul_ps(weights[r], scale[r]));
          }
        }
      }
    }

    // The scales of the two rows of each of four vectors.
    static void scales(const uint8_t* tile, int half, __m256 (&scale)[4]) {
      const __m256 all = _mm256_loadu_ps(reinterpret_cast<const float*>(tile) + half * kHalf);
      scale[0] = _mm256_shuffle_ps(all, all, 0x00);
      scale[1] = _mm256_shuffle_ps(all, all, 0x55);
      scale[2] = _mm256_shuffle_ps(all, all, 0xaa);
      scale[3] = _mm256_shuffle_ps(all, all, 0xff);
    }

    static __m256i index(const uint8_t* tile, int half, int64_t line, int nibble) {
      const uint8_t* codes = tile + kScaleBytes + line * kLine + half * kLine / 2;
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      return _mm256_and_si256(nibble ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
    }

    void look_up(__m256i index, __m256 (&weights)[4]) const {
      const __m256i b0 = _mm256_shuffle_epi8(byte[0], index);
      const __m256i b1 = _mm256_shuffle_epi8(byte[1], index);
      const __m256i b2 = _mm256_shuffle_epi8(byte[2], index);
      const __m256i b3 = _mm256_shuffle_epi8(byte[3], index);
      const __m256i low_first = _mm256_unpacklo_epi8(b0, b1);
      const __m256i low_last = _mm256_unpackhi_epi8(b0, b1);
      const __m256i high_first = _mm256_unpacklo_epi8(b2, b3);
      const __m256i high_last = _mm256_unpackhi_epi8(b2, b3);
      weights[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_first, high_first));
      weights[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_first, high_first));
      weights[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_last, high_last));
      weights[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_last, high_last));
    }
  };

  static __m256 four(const X* x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }

  template <int kTokens>
  static void direct(const Planes& planes, const uint8_t* tiles, int64_t count, const X* x,
                     int half, float* sums) {
    __m256 totals[kTokens][4];
    for (auto& of_token : totals) {
      for (__m256& total : of_token) total = _mm256_setzero_ps();
    }
    for (int64_t t = 0; t < count; ++t, tiles += kTile, x += kTokens * kChunk) {
      __m256 parts[kTokens][4], scale[4];
      for (auto& of_token : parts) {
        for (__m256& part : of_token) part = _mm256_setzero_ps();
      }
      for (int64_t line = 0; line < kLines; ++line) {
#pragma GCC unroll 2
        for (int nibble = 0; nibble < 2; ++nibble) {
          __m256 weights[4];
          planes.look_up(Planes::index(tiles, half, line, nibble), weights);
          for (int m = 0; m < kTokens; ++m) {
            const __m256 values = four(x + m * kChunk + line * 8 + nibble * 4);
            for (int r = 0; r < 4; ++r) {
              parts[m][r] = _mm256_fmadd_ps(weights[r], values, parts[m][r]);
            }
          }
        }
      }
      Planes::scales(tiles, half, scale);
      for (int m = 0; m < kTokens; ++m) {
        for (int r = 0; r < 4; ++r) {
          totals[m][r] = _mm256_fmadd_ps(parts[m][r], scale[r], totals[m][r]);
        }
      }
    }
    for (int m = 0; m < kTokens; ++m) add_halves(totals[m], sums + m * kPanel + half * kHalf);
  }

  // The four columns of every row added up, and all rows of half a panel side by side.
  static void add_halves(const __m256 (&parts)[4], float* to) {
    const __m256 first = _mm256_hadd_ps(parts[0], parts[1]);
    const __m256 last = _mm256_hadd_ps(parts[2], parts[3]);
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_hadd_ps(first, last)));
  }

  // Tokens by threes, the last four by twos: so many sums fill the registers.
  template <int kTokens, int kFirst = 0>
  static void buffered(const float* buffer, int64_t tiles, const X* x, int half, float* sums) {
    constexpr int kLeft = kTokens - kFirst;
    constexpr int kSome = kLeft == 4 || kLeft == 2 ? 2 : kLeft >= 3 ? 3 : 1;
    add<kTokens, kSome>(buffer, tiles, x, kFirst, half, sums);
    if constexpr (kLeft > kSome) {
      buffered<kTokens, kFirst + kSome>(buffer, tiles, x, half, sums);
    }
  }

  // sums of tokens m to m + kSome - 1 and of half a panel.
  template <int kTokens, int kSome>
  [[gnu::noinline]] static void add(const float* buffer, int64_t tiles, const X* x, int m, int half,
                                    float* sums) {
    __m256 parts[kSome][4];
    for (auto& of_token : parts) {
      for (__m256& part : of_token) part = _mm256_setzero_ps();
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const X* values = x + (t * kTokens + m) * kChunk;
      for (int q = 0; q < kQuads; ++q, buffer += 32) {
        __m256 fours[kSome];
        for (int i = 0; i < kSome; ++i) fours[i] = four(values + i * kChunk + 4 * q);
        for (int r = 0; r < 4; ++r) {
          const __m256 weight = _mm256_load_ps(buffer + 8 * r);
          for (int i = 0; i < kSome; ++i) {
            parts[i][r] = _mm256_fmadd_ps(weight, fours[i], parts[i][r]);
          }
        }
      }
    }
    for (int i = 0; i < kSome; ++i) {
      add_halves(parts[i], sums + (m + i) * kPanel + half * kHalf);
    }
  }
};

}  // namespace

}  // namespace collavo::qlora_linear

#endif
