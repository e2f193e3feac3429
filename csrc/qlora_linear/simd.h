// Look-ups of NF4 codes in registers, for whatever instruction set the source is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "qlora_linear/nf4_code.h"
#include "qlora_linear/qlora_linear.h"

namespace collavo::qlora_linear {

namespace {

#if defined(__AVX512F__)

struct Decoder {
  Vec table = _mm512_load_ps(kNF4Code);

  // kLanes / 2 bytes to kLanes weights in their own order.
  Vec ordered(const uint8_t* bytes, Vec scale) const {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m512i wide = _mm512_cvtepu8_epi64(raw);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
    return _mm512_mul_ps(_mm512_permutexvar_ps(index, table), scale);
  }
};

#elif defined(__AVX2__)

struct Decoder {
  Vec lower = _mm256_load_ps(kNF4Code);
  Vec upper = _mm256_load_ps(kNF4Code + 8);

  // Bit 3 of an index chooses the half of the table.
  Vec find(__m256i index) const {
    const Vec choose = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index),
                            _mm256_permutevar8x32_ps(upper, index), choose);
  }

  Vec ordered(const uint8_t* bytes, Vec scale) const {
    int32_t four;
    std::memcpy(&four, bytes, sizeof(four));
    const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));
    return _mm256_mul_ps(find(index), scale);
  }
};

#else

struct Decoder {
  void split(const uint8_t* bytes, Vec scale, Vec* high, Vec* low) const {
    *high = kNF4Code[*bytes >> 4] * scale;
    *low = kNF4Code[*bytes & 15] * scale;
  }
};

#endif

// Asks for a line of memory; a hint, for any address.
inline void fetch(const void* line) {
#if defined(__AVX2__)
  _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1);
#else
  (void)line;
#endif
}

}  // namespace

}  // namespace collavo::qlora_linear
