// The adapters' part of a product with a few tokens: hidden values A x, and B times them.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "common/parallel.h"
#include "qlora_linear/panels.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

// [tokens, slots], scaled and gated, as float32 and rounded to bfloat16; every adapter has an even
// number of slots, the last of which is 0 beside an odd rank.
struct Hidden {
  float* wide;
  BFloat16* narrow;
  int64_t slots;
};

inline int64_t slots_of(int64_t rank) {
  return round_up(rank, 2);
}

inline bool active(const ForwardArgs& args, int64_t index, int64_t token) {
  return !args.adapter_mask || (args.adapter_mask[token] >> index & 1);
}

// Where one vector's worth of elements, or fewer behind the last, meets another.
template <typename A, typename B>
inline constexpr int64_t kStepOf = kLanes;

template <typename A, typename B>
inline Vec step(Vec sums, const A* a, const B* b) {
  return fma(load(a), load(b), sums);
}

#if defined(__AVX512BF16__)
template <>
inline constexpr int64_t kStepOf<BFloat16, BFloat16> = 32;

inline Vec step(Vec sums, const BFloat16* a, const BFloat16* b) {
  return _mm512_dpbf16_ps(sums, load_pairs(a), load_pairs(b));
}
#endif

// Steps of a chain of additions (common/tile.h); with vectors each of the lanes has a chain.
constexpr int64_t kShrinkSteps = kLanes > 1 ? 64 : 16;

// hidden[m, slot + r] = gate * scaling * (A x) for kRows rows of A and kTokens tokens: enough sums
// side by side that none waits for itself, and what is loaded serves several.
template <int kRows, int kTokens, typename A, typename X>
void shrink_tile(const ForwardArgs& args, int64_t index, const A* a, const X* x, int64_t token,
                 int64_t slot, const Hidden& hidden) {
  const int64_t columns = args.weight.columns;
  Vec sums[kRows][kTokens];
  for (auto& of_row : sums) {
    for (Vec& each : of_row) each = zeros();
  }
  // Columns are a multiple of 64.
  for (int64_t k = 0; k < columns;) {
    Vec part[kRows][kTokens] = {};
    const int64_t end = std::min(columns, k + kShrinkSteps * kStepOf<A, X>);
    for (; k < end; k += kStepOf<A, X>) {
      for (int r = 0; r < kRows; ++r) {
        // The rows that come next. Behind the last one it is a hint that comes to nothing.
        fetch(a + (kRows + r) * columns + k);
        for (int m = 0; m < kTokens; ++m) {
          part[r][m] = step(part[r][m], a + r * columns + k, x + (token + m) * columns + k);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int m = 0; m < kTokens; ++m) sums[r][m] = add(sums[r][m], part[r][m]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < kTokens; ++m) {
      float value = sum(sums[r][m]);
      value = active(args, index, token + m) ? args.adapters[index].scaling * value : 0.0f;
      const int64_t at = (token + m) * hidden.slots + slot + r;
      hidden.wide[at] = value;
      from_float(value, hidden.narrow + at);
    }
  }
}

template <int kRows, typename A, typename X>
void shrink_rows(const ForwardArgs& args, int64_t index, const A* a, const X* x, int64_t slot,
                 const Hidden& hidden) {
  int64_t m = 0;
  for (; m + 4 <= args.tokens; m += 4) {
    shrink_tile<kRows, 4>(args, index, a, x, m, slot, hidden);
  }
  for (; m < args.tokens; ++m) shrink_tile<kRows, 1>(args, index, a, x, m, slot, hidden);
}

template <typename X>
void shrink(const ForwardArgs& args, const X* x, const Hidden& hidden) {
  const int64_t columns = args.weight.columns;
  const int64_t grain = std::max<int64_t>(1, 65536 / (4 * columns * args.tokens));
  int64_t first = 0;
  for (int64_t index = 0; index < args.num_adapters; ++index) {
    const Adapter& adapter = args.adapters[index];
    if (adapter.rank % 2) {
      for (int64_t m = 0; m < args.tokens; ++m) {
        const int64_t last = m * hidden.slots + first + adapter.rank;
        hidden.wide[last] = 0.0f;
        hidden.narrow[last] = BFloat16{0};
      }
    }
    with_type(adapter.dtype, adapter.a, [&](const auto* a) {
      parallel_for(ceil_divide(adapter.rank, 4), grain, [&](int64_t begin, int64_t end) {
        const int64_t stop = std::min<int64_t>(4 * end, adapter.rank);
        int64_t r = 4 * begin;
        for (; r + 4 <= stop; r += 4) {
          shrink_rows<4>(args, index, a + r * columns, x, first + r, hidden);
        }
        for (; r < stop; ++r) {
          shrink_rows<1>(args, index, a + r * columns, x, first + r, hidden);
        }
      });
    });
    first += slots_of(adapter.rank);
  }
}

// How B meets hidden values: a lane of a vector holds kPer neighbours of a row of B.
template <typename B>
struct Expansion {
  static constexpr int64_t kPer = 1;
  using Values = float;
  static const Values* values(const Hidden& hidden) { return hidden.wide; }
  static Vec row(const B* from) { return load(from); }
  static Vec add(Vec sums, Vec rows, const Values* value) {
    return fma(rows, broadcast(*value), sums);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Expansion<BFloat16> {
  static constexpr int64_t kPer = 2;
  using Values = BFloat16;
  static const Values* values(const Hidden& hidden) { return hidden.narrow; }
  static Vec row(const BFloat16* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); }
  static Vec add(Vec sums, Vec rows, const Values* pair) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(rows), broadcast_pair(pair));
  }
};
#endif

// The first `used` vectors of a square times their values; kSome of them at a time, whose sums do
// not wait for each other.
template <typename B, int64_t kSome>
inline Vec add_square(Vec sums, const Vec (&square)[kLanes],
                      const typename Expansion<B>::Values* value, int64_t used) {
  using E = Expansion<B>;
  constexpr int64_t kChains = kSome >= 4 ? 4 : 1;
  Vec parts[kChains];
  for (Vec& part : parts) part = zeros();
  for (int64_t first = 0; first < used; first += kSome) {
    for (int64_t i = 0; i < kSome; ++i) {
      parts[i % kChains] =
          E::add(parts[i % kChains], square[first + i], value + (first + i) * E::kPer);
    }
  }
  for (const Vec& part : parts) sums = add(sums, part);
  return sums;
}

// Ranks that are a sum of their own before they meet what is there, and tokens at once.
constexpr int64_t kMostRanks = 64, kMostExpanded = 64;

// sums[m][r] += B[row + r] . hidden[token + m] over ranks [begin, end), for the rows of a panel. A
// square of B is transposed once, so that rows are lanes, and serves all tokens.
template <typename B>
void expand_ranks(const ForwardArgs& args, int64_t index, const B* b, int64_t row, int64_t begin,
                  int64_t end, int64_t token, int64_t tokens, int64_t slot, const Hidden& hidden,
                  float* sums) {
  const int64_t rank = args.adapters[index].rank, rows = args.weight.rows;
  using E = Expansion<B>;
  constexpr int64_t kWidth = E::kPer * kLanes;
  alignas(64) float parts[kMostExpanded * kLanes];
  for (int64_t r = 0; r < kPanel; r += kLanes) {
    for (int64_t first = begin; first < end; first += kWidth) {
      const int64_t some = std::min(kWidth, end - first);
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        // Rows behind the matrix repeat its last one.
        const B* from = b + std::min(row + r + i, rows - 1) * rank + first;
        if (some == kWidth) {
          square[i] = E::row(from);
        } else {
          B padded[kWidth] = {};
          std::copy(from, from + some, padded);
          square[i] = E::row(padded);
        }
      }
      transpose(square);
      const int64_t used = ceil_divide(some, E::kPer);
      for (int64_t m = 0; m < tokens; ++m) {
        const auto* value = E::values(hidden) + (token + m) * hidden.slots + slot + first;
        // An idle adapter is nothing to a token, whatever its values are.
        if (!active(args, index, token + m)) continue;
        float* part = parts + m * kLanes;
        const Vec before = first == begin ? zeros() : load(part);
        if (used == kLanes) {
          store(part, add_square<B, kLanes>(before, square, value, used));
        } else if (kLanes >= 8 && used % 4 == 0) {
          store(part, add_square<B, kLanes / 2 < 4 ? 1 : 4>(before, square, value, used));
        } else {
          store(part, add_square<B, 1>(before, square, value, used));
        }
      }
    }
    for (int64_t m = 0; m < tokens; ++m) {
      if (!active(args, index, token + m)) continue;
      float* to = sums + m * kPanel + r;
      store(to, add(load(to), load(parts + m * kLanes)));
    }
  }
}

// sums[m][r] += B[row + r] . hidden[m] for the rows of a panel, all tokens and adapters.
inline void expand(const ForwardArgs& args, int64_t row, const Hidden& hidden, float* sums) {
  int64_t slot = 0;
  for (int64_t index = 0; index < args.num_adapters; ++index) {
    const Adapter& adapter = args.adapters[index];
    with_type(adapter.dtype, adapter.b, [&](const auto* b) {
      for (int64_t first = 0; first < adapter.rank; first += kMostRanks) {
        const int64_t end = std::min(adapter.rank, first + kMostRanks);
        for (int64_t m = 0; m < args.tokens; m += kMostExpanded) {
          expand_ranks(args, index, b, row, first, end, m, std::min(kMostExpanded, args.tokens - m),
                       slot, hidden, sums + m * kPanel);
        }
      }
    });
    slot += slots_of(adapter.rank);
  }
}

}  // namespace

}  // namespace collavo::qlora_linear
