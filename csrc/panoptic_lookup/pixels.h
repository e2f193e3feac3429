// How the pixels of a map are read: segment ids as int32, or COCO's colours, id = R + 256 G +
// 65536 B in three bytes. The kernel is written once for both and sees ids only; no copy of the map
// in ids is made of colours. No read goes beyond the pixels that are asked for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace collavo::panoptic_lookup {

// Internal linkage: sources compiled for several instruction sets must not share this code.
namespace {

constexpr int64_t kMostPixels = 64;  // of a line, a bit each

inline uint64_t first_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// Lines of `count` pixels, 1 to 64, at `stride` bytes from each other.
struct Patch {
  const uint8_t* pixels;
  int64_t stride;
  int64_t lines;
  int64_t count;
};

// Bit k is set where pixel k of a line has the first, or the second of two ids.
struct Pair {
  uint64_t first;
  uint64_t second;
};

// What is particular to int32 ids.
struct Ids {
  static constexpr int64_t kBytes = 4;

  static int32_t at(const uint8_t* line, int64_t x) {
    int32_t id;
    std::memcpy(&id, line + kBytes * x, sizeof id);
    return id;
  }

#if defined(__AVX512F__)
  static constexpr int64_t kStep = 64;  // bytes of whole pixels in a vector

  static __m512i load(const uint8_t* pixels, __mmask16 inside) {
    return _mm512_maskz_loadu_epi32(inside, pixels);
  }

  static __m512i repeat(int32_t id) { return _mm512_set1_epi32(id); }
#elif defined(__AVX2__)
  static constexpr int64_t kLanes = 8;

  static uint64_t equal_lanes(const uint8_t* pixels, int32_t id) {
    const __m256i ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels));
    const __m256i same = _mm256_cmpeq_epi32(ids, _mm256_set1_epi32(id));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same)));
  }
#else
  static constexpr int64_t kLanes = 1;

  static uint64_t equal_lanes(const uint8_t* pixel, int32_t id) { return at(pixel, 0) == id; }
#endif
};

// What is particular to colours.
struct Colours {
  static constexpr int64_t kBytes = 3;

  static int32_t at(const uint8_t* line, int64_t x) {
    const uint8_t* pixel = line + kBytes * x;
    return pixel[0] | pixel[1] << 8 | pixel[2] << 16;
  }

#if defined(__AVX512F__)
  static constexpr int64_t kStep = 63;  // so that every vector begins with red

  static __m512i load(const uint8_t* pixels, __mmask16 inside) {
    // Three bytes into every four: byte 4 k + c is byte 3 k + c, and 4 k + 3 is 0.
    const __m512i spread =
        _mm512_set_epi8(0, 47, 46, 45, 0, 44, 43, 42, 0, 41, 40, 39, 0, 38, 37, 36,  //
                        0, 35, 34, 33, 0, 32, 31, 30, 0, 29, 28, 27, 0, 26, 25, 24,  //
                        0, 23, 22, 21, 0, 20, 19, 18, 0, 17, 16, 15, 0, 14, 13, 12,  //
                        0, 11, 10, 9, 0, 8, 7, 6, 0, 5, 4, 3, 0, 2, 1, 0);
    const __mmask64 own = first_bits(kBytes * __builtin_popcount(inside));
    const __m512i bytes = _mm512_maskz_loadu_epi8(own, pixels);
    return _mm512_maskz_permutexvar_epi8(0x7777777777777777, spread, bytes);
  }

  static __m512i repeat(int32_t id) {
    const __m512i order = _mm512_set_epi8(0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0,  //
                                          2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2,  //
                                          1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1,  //
                                          0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0);
    return _mm512_permutexvar_epi8(order, _mm512_set1_epi32(id));
  }
#elif defined(__AVX2__)
  static constexpr int64_t kLanes = 8;

  static uint64_t equal_lanes(const uint8_t* pixels, int32_t id) {
    // 24 bytes as two overlapping loads; each half spreads its twelve over sixteen.
    const auto load = [&](int from) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels + from));
    };
    const __m256i spread =
        _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                         4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    const __m256i ids = _mm256_shuffle_epi8(_mm256_set_m128i(load(8), load(0)), spread);
    const __m256i same = _mm256_cmpeq_epi32(ids, _mm256_set1_epi32(id));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same)));
  }
#else
  static constexpr int64_t kLanes = 1;

  static uint64_t equal_lanes(const uint8_t* pixel, int32_t id) { return at(pixel, 0) == id; }
#endif
};

#if defined(__AVX512F__)

template <typename Pixels, int kLoads>
inline void match_lines(const Patch& patch, int32_t a, int32_t b, Pair* bits) {
  const __m512i first = _mm512_set1_epi32(a), second = _mm512_set1_epi32(b);
  const auto rest = static_cast<__mmask16>(first_bits(patch.count - 16 * (kLoads - 1)));
  for (int64_t y = 0; y < patch.lines; ++y) {
    const uint8_t* line = patch.pixels + y * patch.stride;
    uint64_t found = 0, others = 0;
    for (int k = 0; k < kLoads; ++k) {
      const __mmask16 inside = k + 1 < kLoads ? static_cast<__mmask16>(0xFFFF) : rest;
      const __m512i ids = Pixels::load(line + 16 * k * Pixels::kBytes, inside);
      found |= uint64_t{_mm512_mask_cmpeq_epi32_mask(inside, ids, first)} << 16 * k;
      others |= uint64_t{_mm512_mask_cmpeq_epi32_mask(inside, ids, second)} << 16 * k;
    }
    bits[y] = {found, others & ~found};
  }
}

// Whether the lines repeat one pixel, in so many loads of Pixels::kStep bytes, the last one
// shorter.
template <typename Pixels, int kLoads>
inline bool lines_repeat(const Patch& patch) {
  constexpr int64_t kStep = Pixels::kStep;
  const __m512i wanted = Pixels::repeat(Pixels::at(patch.pixels, 0));
  const int64_t last = Pixels::kBytes * patch.count - (kLoads - 1) * kStep;
  const __mmask64 whole = first_bits(kStep), rest = first_bits(last);
  __m512i differ = _mm512_setzero_si512();
  const auto add = [&](__m512i found) {
    differ = _mm512_ternarylogic_epi32(differ, found, wanted, 0xF6);  // differ | found ^ wanted
  };
  for (int64_t y = 0; y < patch.lines; ++y) {
    const uint8_t* line = patch.pixels + y * patch.stride;
    for (int k = 0; k + 1 < kLoads; ++k, line += kStep) {
      add(kStep == 64 ? _mm512_loadu_si512(line) : _mm512_mask_loadu_epi8(wanted, whole, line));
    }
    add(_mm512_mask_loadu_epi8(wanted, rest, line));
  }
  return _mm512_test_epi32_mask(differ, differ) == 0;
}

#else

// Joins the bits of kLanes pixels at a time; the last lanes of a line overlap those before.
template <typename Pixels>
inline uint64_t equal_in_line(const uint8_t* line, int64_t count, int32_t id) {
  uint64_t bits = 0;
  if (count < Pixels::kLanes) {
    for (int64_t x = 0; x < count; ++x) bits |= uint64_t{Pixels::at(line, x) == id} << x;
    return bits;
  }
  for (int64_t x = 0; x < count; x += Pixels::kLanes) {
    const int64_t from = x + Pixels::kLanes <= count ? x : count - Pixels::kLanes;
    bits |= Pixels::equal_lanes(line + Pixels::kBytes * from, id) << from;
  }
  return bits;
}

#endif

// Finds the pixels with the ids a and b, a pair of words for every line; if b is a, none has b.
template <typename Pixels>
inline void match(const Patch& patch, int32_t a, int32_t b, Pair* bits) {
#if defined(__AVX512F__)
  if (patch.count <= 16) return match_lines<Pixels, 1>(patch, a, b, bits);
  if (patch.count <= 32) return match_lines<Pixels, 2>(patch, a, b, bits);
  if (patch.count <= 48) return match_lines<Pixels, 3>(patch, a, b, bits);
  match_lines<Pixels, 4>(patch, a, b, bits);
#else
  for (int64_t y = 0; y < patch.lines; ++y) {
    const uint8_t* line = patch.pixels + y * patch.stride;
    const uint64_t found = equal_in_line<Pixels>(line, patch.count, a);
    bits[y] = {found, equal_in_line<Pixels>(line, patch.count, b) & ~found};
  }
#endif
}

// Whether all pixels have one id.
template <typename Pixels>
inline bool uniform(const Patch& patch) {
  const int64_t bytes = Pixels::kBytes * patch.count;
#if defined(__AVX512F__)
  if (bytes <= Pixels::kStep) return lines_repeat<Pixels, 1>(patch);
  if (bytes <= 2 * Pixels::kStep) return lines_repeat<Pixels, 2>(patch);
  if (bytes <= 3 * Pixels::kStep) return lines_repeat<Pixels, 3>(patch);
  return lines_repeat<Pixels, 4>(patch);
#else
  // The first line is compared with itself, moved by a pixel, and every other one with it.
  const auto same = [&](const uint8_t* pixels, int64_t count) {
    return std::memcmp(patch.pixels, pixels, static_cast<size_t>(count)) == 0;
  };
  if (!same(patch.pixels + Pixels::kBytes, bytes - Pixels::kBytes)) return false;
  for (int64_t y = 1; y < patch.lines; ++y) {
    if (!same(patch.pixels + y * patch.stride, bytes)) return false;
  }
  return true;
#endif
}

}  // namespace

}  // namespace collavo::panoptic_lookup
