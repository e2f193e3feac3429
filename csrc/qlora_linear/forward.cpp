// A few tokens: decode the weight in registers, with adapters, table and bias in the same pass.
#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

constexpr int64_t kChunk = 64;  // elements that share a scale for certain

// x as float32 in its own order, and in the order in which Decoder::split gives weights.
struct Tokens {
  const float* plain;
  const float* split;
  const float* hidden;  // [tokens, total_rank], scaled and gated
  int64_t count, columns, total_rank;
};

template <typename T>
Vec dot_into(Vec sums, const T* a, const float* b, int64_t n, float* rest) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = fma(load(a + i), load(b + i), sums);
  for (; i < n; ++i) *rest += to_float(a[i]) * b[i];
  return sums;
}

// hidden[m, r] = gate * scaling * (A x), all adapters side by side.
template <typename T>
void shrink(const ForwardArgs& args, const Tokens& tokens, int64_t index, const T* a, int64_t first,
            float* hidden) {
  const Adapter& adapter = args.adapters[index];
  const int64_t columns = tokens.columns;
  parallel_for(
      adapter.rank, std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t m = 0; m < tokens.count; ++m) {
            float rest = 0.0f;
            const float* x = tokens.plain + m * columns;
            const float value = sum(dot_into(zeros(), a + r * columns, x, columns, &rest)) + rest;
            const bool active = !args.adapter_mask || (args.adapter_mask[m] >> index & 1);
            hidden[m * tokens.total_rank + first + r] = active ? adapter.scaling * value : 0.0f;
          }
        }
      });
}

// Called for the rows that come next: a row is too short for the processor to foresee the following
// one. An address behind the last row is only a hint that comes to nothing.
inline void fetch(const uint8_t* line) {
#if defined(__AVX2__)
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
#else
  (void)line;
#endif
}

// sums[r][m] += weight[row + r] . x[token + m]
template <int kRows, int kTokens>
void dot_weight(const NF4& weight, const Scales& scales, const Tokens& tokens, int64_t row,
                int64_t token, Vec (&sums)[kRows][kTokens]) {
  const Decoder decoder;
  const int64_t columns = tokens.columns;
  const float* x = tokens.split + token * columns;
  for (int64_t k = 0; k < columns; k += kChunk) {
    Vec scale[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t element = (row + r) * columns + k;
      scale[r] = broadcast(scales.at(element));
      fetch(weight.packed + (element + kRows * columns) / 2);
    }
    for (int64_t i = k; i < k + kChunk; i += 2 * kLanes) {
      for (int r = 0; r < kRows; ++r) {
        Vec high, low;
        decoder.split(weight.packed + ((row + r) * columns + i) / 2, scale[r], &high, &low);
        for (int m = 0; m < kTokens; ++m) {
          sums[r][m] = fma(high, load(x + m * columns + i), sums[r][m]);
          sums[r][m] = fma(low, load(x + m * columns + i + kLanes), sums[r][m]);
        }
      }
    }
  }
}

#if defined(__AVX512BF16__)

constexpr int64_t kPair = 2 * kChunk;  // elements of one 64-byte line of codes

// x as bfloat16 in the order in which four look-ups per line of codes give weights, and zeros up
// to a whole line.
void prepare_lines(const BFloat16* x, int64_t count, int64_t columns, BFloat16* lines) {
  // A 16-bit lane holds elements 1, 0, 3, 2 of its four, from the low bits up.
  constexpr int64_t kOrder[4] = {1, 0, 3, 2};
  const int64_t padded = (columns + kPair - 1) / kPair * kPair;
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t k = 0; k < padded; k += kPair) {
      BFloat16* to = lines + m * padded + k;
      for (int64_t part = 0; part < 4; ++part) {
        for (int64_t lane = 0; lane < 32; ++lane) {
          const int64_t from = k + 4 * lane + kOrder[part];
          to[32 * part + lane] = from < columns ? x[m * columns + from] : BFloat16{0};
        }
      }
    }
  }
}

__m512bh as_bfloat16(__m512i bits) {
  return reinterpret_cast<__m512bh>(bits);
}

// The same sums with the processor's bfloat16 products: exact products, float32 sums; the codes
// are rounded to bfloat16 as a dense weight would be, scales are float32.
template <int kRows, int kTokens>
void dot_lines(const NF4& weight, const Scales& scales, const BFloat16* lines, int64_t row,
               int64_t token, Vec (&sums)[kRows][kTokens]) {
  alignas(64) BFloat16 codes[32];
  for (int i = 0; i < 32; ++i) from_float(kCode[i % 16], codes + i);
  // Twice the sixteen codes: a look-up reads five bits of its lane, and the fifth does not matter.
  const __m512i table = _mm512_load_si512(codes);
  const int64_t columns = weight.columns, padded = (columns + kPair - 1) / kPair * kPair;
  for (int64_t k = 0; k < columns; k += kPair) {
    const bool whole = k + kPair <= columns;
    for (int r = 0; r < kRows; ++r) {
      const int64_t element = (row + r) * columns + k;
      const __m512i packed =
          _mm512_maskz_loadu_epi32(whole ? 0xffff : 0x00ff, weight.packed + element / 2);
      fetch(weight.packed + (element + kRows * columns) / 2);
      const Vec scale = _mm512_mask_blend_ps(0xff00, broadcast(scales.at(element)),
                                             broadcast(whole ? scales.at(element + kChunk) : 0.0f));
      const __m512bh w0 = as_bfloat16(_mm512_permutexvar_epi16(packed, table));
      const __m512bh w1 =
          as_bfloat16(_mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table));
      const __m512bh w2 =
          as_bfloat16(_mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table));
      const __m512bh w3 =
          as_bfloat16(_mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table));
      for (int m = 0; m < kTokens; ++m) {
        const BFloat16* x = lines + (token + m) * padded + k;
        Vec part = _mm512_dpbf16_ps(zeros(), w0, as_bfloat16(_mm512_loadu_si512(x)));
        part = _mm512_dpbf16_ps(part, w1, as_bfloat16(_mm512_loadu_si512(x + 32)));
        part = _mm512_dpbf16_ps(part, w2, as_bfloat16(_mm512_loadu_si512(x + 64)));
        part = _mm512_dpbf16_ps(part, w3, as_bfloat16(_mm512_loadu_si512(x + 96)));
        sums[r][m] = fma(part, scale, sums[r][m]);
      }
    }
  }
}

template <int kRows, int kTokens>
void dot_weight(const NF4& weight, const Scales& scales, const Tokens& tokens, int64_t row,
                int64_t token, Vec (&sums)[kRows][kTokens], const BFloat16*) {
  const auto* lines = reinterpret_cast<const BFloat16*>(tokens.split);
  dot_lines<kRows, kTokens>(weight, scales, lines, row, token, sums);
}

void prepare_split(const BFloat16* x, int64_t count, int64_t columns, const float*, float* split) {
  prepare_lines(x, count, columns, reinterpret_cast<BFloat16*>(split));
}

#endif

template <int kRows, int kTokens>
void dot_weight(const NF4& weight, const Scales& scales, const Tokens& tokens, int64_t row,
                int64_t token, Vec (&sums)[kRows][kTokens], const void*) {
  dot_weight<kRows, kTokens>(weight, scales, tokens, row, token, sums);
}

void prepare_split(const void*, int64_t count, int64_t columns, const float* plain, float* split) {
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t k = 0; k < columns; k += 2 * kLanes) {
      const float* from = plain + m * columns + k;
      float* to = split + m * columns + k;
      for (int64_t i = 0; i < kLanes; ++i) {
        to[i] = from[2 * i];
        to[kLanes + i] = from[2 * i + 1];
      }
    }
  }
}

template <typename T>
void finish(const ForwardArgs& args, const Tokens& tokens, int64_t row, int64_t token, Vec sums,
            T* out) {
  float rest = 0.0f;
  const float* hidden = tokens.hidden + token * tokens.total_rank;
  for (int64_t i = 0; i < args.num_adapters; ++i) {
    const Adapter& adapter = args.adapters[i];
    with_type(adapter.dtype, adapter.b, [&](const auto* b) {
      sums = dot_into(sums, b + row * adapter.rank, hidden, adapter.rank, &rest);
    });
    hidden += adapter.rank;
  }
  float value = sum(sums) + rest;
  if (args.row_table && args.row_index[token] >= 0) {
    value += args.row_table[args.row_index[token] * args.weight.rows + row];
  }
  if (args.bias) value += args.bias[row];
  from_float(value, out + token * args.weight.rows + row);
}

template <int kRows, int kTokens, typename T>
void tile(const ForwardArgs& args, const Scales& scales, const Tokens& tokens, int64_t row,
          int64_t token, T* out) {
  Vec sums[kRows][kTokens];
  for (auto& line : sums) {
    for (Vec& each : line) each = zeros();
  }
  dot_weight<kRows, kTokens>(args.weight, scales, tokens, row, token, sums, out);
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < kTokens; ++m) finish(args, tokens, row + r, token + m, sums[r][m], out);
  }
}

template <int kRows, typename T>
void row_group(const ForwardArgs& args, const Scales& scales, const Tokens& tokens, int64_t row,
               T* out) {
  int64_t m = 0;
  for (; m + 4 <= tokens.count; m += 4) tile<kRows, 4>(args, scales, tokens, row, m, out);
  if (m + 2 <= tokens.count) {
    tile<kRows, 2>(args, scales, tokens, row, m, out);
    m += 2;
  }
  if (m < tokens.count) tile<kRows, 1>(args, scales, tokens, row, m, out);
}

template <typename T>
void forward_typed(const ForwardArgs& args, const T* x, T* out) {
  const int64_t columns = args.weight.columns, rows = args.weight.rows;
  int64_t total_rank = 0;
  for (int64_t i = 0; i < args.num_adapters; ++i) total_rank += args.adapters[i].rank;
  float* plain = args.scratch;
  float* split = plain + args.tokens * columns;
  float* hidden = split + args.tokens * ((columns + 127) / 128 * 128);
  for (int64_t i = 0; i < args.tokens * columns; ++i) plain[i] = to_float(x[i]);
  prepare_split(x, args.tokens, columns, plain, split);
  const Tokens tokens{plain, split, hidden, args.tokens, columns, total_rank};
  int64_t first = 0;
  for (int64_t i = 0; i < args.num_adapters; ++i) {
    with_type(args.adapters[i].dtype, args.adapters[i].a,
              [&](const auto* a) { shrink(args, tokens, i, a, first, hidden); });
    first += args.adapters[i].rank;
  }
  const Scales scales(args.weight);
  constexpr int64_t kGroup = 4;
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  const int64_t grain = std::max<int64_t>(1, 65536 / (kGroup * columns));
  parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t row = g * kGroup;
      if (row + kGroup <= rows) {
        row_group<kGroup>(args, scales, tokens, row, out);
      } else {
        for (int64_t r = row; r < rows; ++r) row_group<1>(args, scales, tokens, r, out);
      }
    }
  });
}

}  // namespace

namespace COLLAVO_ISA {

void forward(const ForwardArgs& args) {
  with_type(args.dtype, args.x, [&](const auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    forward_typed(args, x, static_cast<T*>(args.out));
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear
