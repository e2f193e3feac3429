// float32, bfloat16 and float16: storage types, scalar conversions, and vector loads and stores
// that convert. Arithmetic is always float32. Rounding is to nearest even, as torch rounds, and the
// same in every instruction set; subnormals are kept; a NaN stays a NaN.
//
// Everything with code is in an anonymous namespace: each instruction set has its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace collavo {

// The codes Python passes (collavo_kernels._native.DTYPE_CODES).
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// For every type:
//   to_float(value), from_float(value, &out)      one value, rounded to out's type
//   load8(pointer), store8(pointer, values)       eight values as float32, with AVX2
//   load16(pointer), store16(pointer, values)     sixteen values as float32, with AVX-512
// Pointers of any alignment.

// float32.
inline float to_float(float value) {
  return value;
}

inline void from_float(float value, float* out) {
  *out = value;
}

#if defined(__AVX2__)
inline __m256 load8(const float* from) {
  return _mm256_loadu_ps(from);
}

inline void store8(float* to, __m256 values) {
  _mm256_storeu_ps(to, values);
}
#endif

#if defined(__AVX512F__)
inline __m512 load16(const float* from) {
  return _mm512_loadu_ps(from);
}

inline void store16(float* to, __m512 values) {
  _mm512_storeu_ps(to, values);
}
#endif

// bfloat16: the upper half of a float32.
inline float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>((nan ? bits | 0x00400000u : rounded) >> 16);
}

#if defined(__AVX2__)
inline __m256 load8(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void store8(BFloat16* to, __m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#endif

#if defined(__AVX512F__)
inline __m512 load16(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store16(BFloat16* to, __m512 values) {
#if defined(__AVX512BF16__)
  // The processor's own conversion rounds alike but for subnormals, which it flushes.
  constexpr int kSubnormal = 0x20;
  if (_mm512_fpclass_ps_mask(values, kSubnormal) == 0) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    return;
  }
#endif
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}
#endif

// float16.
inline float to_float(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return float_from_bits(sign | 0x70000000u | magnitude);
  // 2^112 moves the exponent's bias from 15 to 127, and is exact for subnormals too.
  return float_from_bits(sign | bits_of(float_from_bits(magnitude) * 0x1p112f));
#endif
}

inline void from_float(float value, Float16* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the last subnormal bit
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

#if defined(__AVX2__)
inline __m256 load8(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store8(Float16* to, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

#if defined(__AVX512F__)
inline __m512 load16(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void store16(Float16* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

// Calls function(pointer of the dtype's type).
template <typename Function>
inline void with_type(DType dtype, const void* pointer, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(static_cast<const float*>(pointer));
    case DType::bfloat16:
      return function(static_cast<const BFloat16*>(pointer));
    case DType::float16:
      return function(static_cast<const Float16*>(pointer));
  }
}

}  // namespace

}  // namespace collavo
