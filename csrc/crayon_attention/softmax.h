// Weights from products: powers of two, hidden keys, and the running softmax of a block of queries.
// Queries are lanes and keys are rows, [keys][kQueryBlock], so nothing is summed across a vector.
#pragma once

#include <algorithm>
#include <cmath>

#include "crayon_attention/operands.h"

namespace collavo::crayon_attention {

namespace {

// The fraction's power is a polynomial with the least largest relative error on [0, 1) of all that
// are 1 at 0: 3e-6 where bfloat16 rounds it next, 1e-8 for float32 weights.
struct RoughPower {
  static constexpr float kTerms[] = {0x1.62d6c6p-1f, 0x1.ee2452p-3f, 0x1.abf868p-5f,
                                     0x1.b7f732p-7f};
};

struct FinePower {
  static constexpr float kTerms[] = {0x1.62e42cp-1f, 0x1.ebfd58p-3f,  0x1.c68912p-5f,
                                     0x1.3d0ba8p-7f, 0x1.46d50cp-10f, 0x1.c54620p-13f};
};

template <typename Power>
inline Vec fraction_power(Vec x) {
  constexpr int kCount = sizeof(Power::kTerms) / sizeof(float);
  Vec sum = broadcast(Power::kTerms[kCount - 1]);
#pragma GCC unroll 8
  for (int i = kCount - 2; i >= 0; --i) sum = fma(sum, x, broadcast(Power::kTerms[i]));
  return fma(sum, x, broadcast(1.0f));
}

// 2^x for x up to about 0; 0 for minus infinity; NaN stays NaN.
#if defined(__AVX512F__)
template <typename Power>
inline Vec power_of_two(Vec x) {
  const Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(fraction_power<Power>(fraction), x);
}
#elif defined(__AVX2__)
template <typename Power>
inline Vec power_of_two(Vec x) {
  const Vec small = _mm256_cmp_ps(x, broadcast(-126.0f), _CMP_LT_OQ);
  const Vec whole = _mm256_floor_ps(_mm256_max_ps(broadcast(-126.0f), x));
  const Vec power = fraction_power<Power>(subtract(x, whole));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(power), exponent);
  return _mm256_andnot_ps(small, _mm256_castsi256_ps(scaled));
}
#else
template <typename Power>
inline Vec power_of_two(Vec x) {
  return __builtin_exp2f(x);
}
#endif

template <typename P>
using PowerOf = std::conditional_t<P::kDepth == 2, RoughPower, FinePower>;

// The keys [first, end) of a block of queries at [position, position + count), and which of them
// all of its queries see.
struct Reach {
  int64_t first, end, all_first, all_end;

  Reach(const Sight& sight, int64_t position, int64_t count) {
    const int64_t last = position + count - 1;
    first = sight.first(position);
    end = sight.end(last);
    all_first = sight.first(last);
    all_end = sight.end(position);
  }

  // Those within a block of keys, from whole tile to whole tile.
  int64_t first_key(int64_t block) const {
    return std::max(first / kRows * kRows, block * kKeyBlock);
  }
  int64_t end_key(int64_t block) const {
    return std::min(round_up(end, kRows), (block + 1) * kKeyBlock);
  }
};

// Minus infinity where a query does not see the key; scores are those of [first, end).
inline void hide(const Sight& sight, const Reach& reach, int64_t position, int64_t lanes,
                 int64_t first, int64_t end, float* scores) {
  for (int64_t key = first; key < end; ++key, scores += kQueryBlock) {
    if (key >= reach.all_first && key < reach.all_end) continue;
    const bool inside = key < sight.length;
    const int64_t seen_first = inside ? sight.first_query(key) - position : lanes;
    const int64_t seen_end = inside ? sight.end_query(key) - position : lanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (lane < seen_first || lane >= seen_end) scores[lane] = -INFINITY;
    }
  }
}

// What a block of queries carries from key block to key block, a value per query: the largest
// product so far and the sum of weights relative to it. The lowest that there is times the scale is
// finite, and so is its distance from any finite product.
struct Running {
  alignas(64) float top[kQueryBlock];
  alignas(64) float total[kQueryBlock];

  explicit Running(float scale) {
    const float lowest = -3e38f / (scale > 1 ? scale : 1.0f);
    for (int64_t lane = 0; lane < kQueryBlock; ++lane) {
      top[lane] = lowest;
      total[lane] = 0;
    }
  }
};

// Folds a block's products into the running softmax: weights is the block's right operand, shrink
// the factor on what was summed before. Returns whether any factor differs from 1.
template <typename P, int64_t kCount>
inline bool fold_vectors(const float* scores, int64_t keys, float scale, float* top, float* total,
                         typename P::Element* weights, float* shrink) {
  using Power = PowerOf<P>;
  constexpr int64_t kDepth = P::kDepth;
  Vec highest[kCount], sums[kCount];
  for (int64_t v = 0; v < kCount; ++v) highest[v] = load(top + v * kLanes);
  for (int64_t r = 0; r < keys; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kCount; ++v) {
      highest[v] = maximum(load(scores + r * kQueryBlock + v * kLanes), highest[v]);
    }
  }
  const Vec factor = broadcast(scale);
  for (int64_t v = 0; v < kCount; ++v) {
    const Vec before = load(top + v * kLanes);
    const Vec power = power_of_two<Power>(multiply(subtract(before, highest[v]), factor));
    store(shrink + v * kLanes, power);
    store(top + v * kLanes, highest[v]);
    sums[v] = zeros();
  }
  for (int64_t r = 0; r < keys; r += kDepth) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kCount; ++v) {
      Vec pair[kDepth];
#pragma GCC unroll 2
      for (int64_t j = 0; j < kDepth; ++j) {
        // The difference first: the largest product's weight is 1 however large it is.
        const Vec below = subtract(load(scores + (r + j) * kQueryBlock + v * kLanes), highest[v]);
        pair[j] = power_of_two<Power>(multiply(below, factor));
        sums[v] = add(sums[v], pair[j]);
      }
      P::put(weights + r * kQueryBlock + v * kLanes * kDepth, pair);
    }
  }
  bool changed = false;
  // A block's weights are a sum of their own: over all keys the chain would lose digits.
  for (int64_t v = 0; v < kCount; ++v) {
    float* at = total + v * kLanes;
    store(at, fma(load(at), load(shrink + v * kLanes), sums[v]));
  }
  for (int64_t lane = 0; lane < kCount * kLanes; ++lane) changed |= shrink[lane] != 1.0f;
  return changed;
}

// Multiplies every row of [rows][kQueryBlock] by a factor per lane.
inline void shrink_rows(const float* shrink, int64_t lanes, int64_t rows, float* x) {
  over_vectors(lanes, [&](int64_t lane, auto count) {
    constexpr int64_t kCount = decltype(count)::value;
    Vec factor[kCount];
    for (int64_t v = 0; v < kCount; ++v) factor[v] = load(shrink + lane + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < kCount; ++v) {
        float* at = x + r * kQueryBlock + lane + v * kLanes;
        store(at, multiply(load(at), factor[v]));
      }
    }
  });
}

}  // namespace

}  // namespace collavo::crayon_attention
