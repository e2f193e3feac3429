// The product of one panel with tokens whose values were rounded to 8 bits, a scale per 64 of them.
// It is asked for by name only: codes lie on a grid of 1/127 and values on one of 1/127 of the
// largest of their 64, so results are off by about a percent.
#pragma once

#if defined(__AVX512VNNI__)

#include <cmath>

#include "qlora_linear/panel_product.h"
#include "qlora_linear/panels.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

struct ByteProduct {
  // Sixty-four values of a token: 127 * scale * values[k], since codes are 127 times what they
  // stand for.
  struct X {
    int8_t values[kChunk];
    float scale;
    int32_t minus;  // what the codes' offset of 128 adds, to be taken off
  };
  static constexpr int64_t kPerChunk = 1;
  // The low halves of a row's four bytes, and the high ones.
  static constexpr int kOrder[8] = {1, 3, 5, 7, 0, 2, 4, 6};

  template <typename T>
  static void arrange(const T* from, X* to) {
    __m512 part[4], most = _mm512_setzero_ps();
    __mmask16 invalid = 0;
    for (int i = 0; i < 4; ++i) {
      part[i] = load16(from + 16 * i);
      const __m512 size = _mm512_abs_ps(part[i]);
      invalid |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
      most = _mm512_max_ps(most, size);
    }
    const float largest = _mm512_reduce_max_ps(most);
    // Below this the inverse is no number any more; such values count as zeros.
    const bool usable = !invalid && largest > 1e-30f;
    const __m512 inverse = _mm512_set1_ps(usable ? 127.0f / largest : 0.0f);
    __m512i bytes = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
    for (int i = 3; i >= 0; --i) {
      const __m512i whole =
          _mm512_maskz_cvtps_epi32(usable ? 0xffff : 0, _mm512_mul_ps(part[i], inverse));
      sum = _mm512_add_epi32(sum, whole);
      bytes = _mm512_alignr_epi64(bytes, bytes, 6);
      bytes = _mm512_inserti32x4(bytes, _mm512_cvtsepi32_epi8(whole), 0);
    }
    _mm512_storeu_si512(to->values, _mm512_permutexvar_epi8(byte_order(), bytes));
    // An infinity or NaN has no place on the grid: it makes every result of its token a NaN.
    to->scale = invalid ? NAN : usable ? largest * (1.0f / 127.0f / 127.0f) : 0.0f;
    to->minus = -128 * _mm512_reduce_add_epi32(sum);
  }

  template <int kTokens>
  static void run(const uint8_t* tiles, int64_t count, const X* x, float* sums) {
    constexpr int kChains = kTokens <= 4 ? 2 : 1;
    const __m512i table = code_table();
    __m512 totals[kTokens];
    for (int m = 0; m < kTokens; ++m) totals[m] = _mm512_loadu_ps(sums + m * kPanel);
    for (int64_t t = 0; t < count; ++t, tiles += kTile, x += kTokens) {
      __m512i parts[kTokens][kChains];
      for (int m = 0; m < kTokens; ++m) {
        parts[m][kChains - 1] = _mm512_setzero_si512();
        parts[m][0] = _mm512_set1_epi32(x[m].minus);
      }
      for (int64_t line = 0; line < kLines; ++line) {
        const uint8_t* at = tiles + kScaleBytes + line * kLine;
        fetch_ahead(at);
        const __m512i codes = _mm512_loadu_si512(at);
        const __m512i first = _mm512_permutexvar_epi8(codes, table);
        const __m512i last = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table);
#pragma GCC unroll 16
        for (int m = 0; m < kTokens; ++m) {
          const int8_t* values = x[m].values + 8 * line;
          __m512i& low = parts[m][0];
          low = _mm512_dpbusd_epi32(low, first, broadcast_bytes(values));
          __m512i& high = parts[m][kChains - 1];
          high = _mm512_dpbusd_epi32(high, last, broadcast_bytes(values + 4));
        }
      }
      const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(tiles));
      for (int m = 0; m < kTokens; ++m) {
        const __m512i whole =
            kChains == 1 ? parts[m][0] : _mm512_add_epi32(parts[m][0], parts[m][kChains - 1]);
        const __m512 sum = _mm512_cvtepi32_ps(whole);
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale));
        totals[m] = _mm512_fmadd_ps(sum, both, totals[m]);
      }
    }
    for (int m = 0; m < kTokens; ++m) _mm512_storeu_ps(sums + m * kPanel, totals[m]);
  }

 private:
  static __m512i byte_order() {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i / 8 * 8 + kOrder[i % 8]);
    return _mm512_load_si512(order);
  }

  // Four times the sixteen codes on a grid of 1/127, plus 128: a look-up reads six bits of its
  // byte, and the upper two do not matter.
  static __m512i code_table() {
    alignas(64) uint8_t codes[64];
    for (int i = 0; i < 64; ++i) {
      codes[i] = static_cast<uint8_t>(128 + std::nearbyint(127.0f * kNF4Code[i % 16]));
    }
    return _mm512_load_si512(codes);
  }
};

}  // namespace

}  // namespace collavo::qlora_linear

#endif
