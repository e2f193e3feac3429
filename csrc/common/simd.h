// One name for each vector operation the kernels need, for whatever instruction set the source is
// compiled for. Baseline is plain float, one lane. maximum(a, b) is b where a is not a number.
// transpose(v) makes lane j of vector i lane i of vector j; it is inlined by force, since the
// vectors of a call would go through memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace collavo {

namespace {

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;
using Vec = __m512;

inline Vec broadcast(float value) {
  return _mm512_set1_ps(value);
}
inline float sum(Vec a) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec maximum(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
[[gnu::always_inline]] inline void transpose(Vec (&v)[kLanes]) {
  Vec pairs[kLanes], fours[kLanes];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + 2 + j]);
      fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // Quarters of four rows each: a 4 x 4 transposition of quarters, in two steps.
  for (int j = 0; j < 4; ++j) {
    const Vec a = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
    const Vec b = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
    const Vec d = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    v[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
template <typename T>
inline Vec load(const T* from) {
  return load16(from);
}
template <typename T>
inline void store(T* to, Vec values) {
  store16(to, values);
}

// Four bytes, whatever they mean, in every lane.
inline __m512i broadcast_bytes(const void* four) {
  int32_t bits;
  std::memcpy(&bits, four, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

#if defined(__AVX512BF16__)

inline __m512bh load_pairs(const void* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}
inline __m512bh broadcast_pair(const void* pair) {
  return reinterpret_cast<__m512bh>(broadcast_bytes(pair));
}

// Two vectors of float32 as pairs: value i of each, rounded to bfloat16, the first one low.
inline __m512i round_pairs(__m512 low, __m512 high) {
  alignas(64) static constexpr uint16_t kZip[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kZip), both);
}

#endif

#elif defined(__AVX2__)

constexpr int64_t kLanes = 8;
using Vec = __m256;

inline Vec broadcast(float value) {
  return _mm256_set1_ps(value);
}
inline float sum(Vec a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vec maximum(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
[[gnu::always_inline]] inline void transpose(Vec (&v)[kLanes]) {
  Vec fours[kLanes];
  for (int i = 0; i < 8; i += 4) {
    const Vec a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const Vec c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]),
              d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    fours[i] = _mm256_shuffle_ps(a, c, 0x44);
    fours[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    fours[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    fours[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
    v[4 + j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
  }
}
template <typename T>
inline Vec load(const T* from) {
  return load8(from);
}
template <typename T>
inline void store(T* to, Vec values) {
  store8(to, values);
}

#else

constexpr int64_t kLanes = 1;
using Vec = float;

inline Vec broadcast(float value) {
  return value;
}
inline float sum(Vec a) {
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
inline Vec maximum(Vec a, Vec b) {
  return a > b ? a : b;
}
inline void transpose(Vec (&)[kLanes]) {}
template <typename T>
inline Vec load(const T* from) {
  return to_float(*from);
}
template <typename T>
inline void store(T* to, Vec values) {
  from_float(values, to);
}

#endif

// The compiler's own operators: they take vectors as they take numbers.
inline Vec zeros() {
  return Vec{};
}
inline Vec add(Vec a, Vec b) {
  return a + b;
}
inline Vec subtract(Vec a, Vec b) {
  return a - b;
}
inline Vec multiply(Vec a, Vec b) {
  return a * b;
}

}  // namespace

}  // namespace collavo
