// Many tokens in bfloat16: a strip of the weight is decoded once for all of them, and the adapters
// are further terms of the same sums, [x, h] [W, B]^T forward and [g, u] [W; A] backward. Compiled
// for processors with bfloat16 products; elsewhere the caller decodes strips and multiplies
// them itself.
#include "qlora_linear/qlora_linear.h"

#if defined(__AVX512BF16__)

#include <algorithm>

#include "common/integers.h"
#include "common/parallel.h"
#include "qlora_linear/panel_product.h"
#include "qlora_linear/panels.h"
#include "qlora_linear/strip_product.h"

namespace collavo::qlora_linear {

namespace {

// A slice of the left side for all tokens stays in the second-level cache while so many strips
// use it.
constexpr int64_t kMostStrips = 2;
constexpr int64_t kSliceTiles = kTermsAtOnce / kChunk;
constexpr int64_t kSlicePanels = kTermsAtOnce / kPanel;

int64_t slices_of(int64_t terms) {
  return ceil_divide(terms, kTermsAtOnce);
}

// Sixteen rows of 16 pairs each, transposed: pair q of every row at out[q * kStrip].
void transpose_rows(const BFloat16* from, int64_t rows, int64_t row, int64_t rank, int64_t first,
                    int64_t pairs, uint32_t* out) {
  Vec square[16];
  for (int64_t r = 0; r < 16; ++r) {
    // Rows behind the matrix repeat its last one.
    const BFloat16* at = from + std::min(row + r, rows - 1) * rank + first;
    const int64_t some = std::min<int64_t>(32, rank - first);
    const __mmask32 mask = some == 32 ? 0xffffffffu : (1u << some) - 1;
    square[r] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, at));
  }
  transpose(square);
  for (int64_t q = 0; q < pairs; ++q) _mm512_storeu_ps(out + q * kStrip, square[q]);
}

// One line of a tile as pairs of columns (k, k + 4), k in the order of PairProduct; lanes are rows.
void decode_line(const uint8_t* line, __m512 scale, __m512 table, __m512i (&pairs)[4]) {
  const __m512i codes = _mm512_loadu_si512(line);
  for (int s = 0; s < 4; ++s) {
    const __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * s), table);
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * s + 16), table);
    pairs[s] = round_pairs(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
  }
}

// out = [x, hidden] [W, B]^T: terms are columns, outputs are rows of the weight.
class Forward {
 public:
  explicit Forward(const ManyArgs& args) : args_(args), tiles_(args.weight) {}

  int64_t terms() const { return args_.weight.columns; }
  int64_t outputs() const { return args_.weight.rows; }

  // Terms [begin, begin + count) of a token of x, in the order of decode().
  void arrange(const BFloat16* row, int64_t begin, int64_t count, BFloat16* to) const {
    for (int64_t i = 0; i < count; i += kChunk) PairProduct::arrange(row + begin + i, to + i);
  }

  int64_t decode(int64_t slice, int64_t strip, uint32_t* right) const {
    const __m512 table = _mm512_load_ps(kNF4Code);
    const int64_t first = slice * kSliceTiles;
    const int64_t count = std::min(kSliceTiles, tiles_.chunks() - first);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t panel = 2 * strip + half;
      if (panel >= panels_of(args_.weight.rows)) {
        for (int64_t p = 0; p < count * 32; ++p) {
          _mm512_storeu_si512(right + p * kStrip + 16, _mm512_setzero_si512());
        }
        continue;
      }
      alignas(64) uint8_t room[kSliceTiles * kTile];
      const uint8_t* tile = tiles_.get(panel, first, count, room);
      for (int64_t t = 0; t < count; ++t, tile += kTile) {
        const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(tile));
        for (int64_t line = 0; line < kLines; ++line) {
          __m512i pairs[4];
          decode_line(tile + kScaleBytes + line * kLine, scale, table, pairs);
          uint32_t* out = right + ((t * kLines + line) * 4) * kStrip + 16 * half;
          for (int s = 0; s < 4; ++s) _mm512_storeu_si512(out + s * kStrip, pairs[s]);
        }
      }
    }
    return count * 32;
  }

  // Pairs of ranks [first, first + 2 pairs) of an adapter.
  void side(const Adapter& adapter, int64_t strip, int64_t first, int64_t pairs,
            uint32_t* right) const {
    const auto* b = static_cast<const BFloat16*>(adapter.b);
    for (int64_t q = 0; q < pairs; q += 16) {
      for (int64_t half = 0; half < 2; ++half) {
        transpose_rows(b, args_.weight.rows, strip * kStrip + 16 * half, adapter.rank,
                       first + 2 * q, std::min<int64_t>(16, pairs - q),
                       right + q * kStrip + 16 * half);
      }
    }
  }

  void finish(int64_t strip, int64_t token, float* sums) const {
    const int64_t rows = args_.weight.rows, row = strip * kStrip;
    const int64_t some = std::min(kStrip, rows - row);
    if (args_.row_table && args_.row_index[token] >= 0) {
      const float* table = args_.row_table + args_.row_index[token] * rows + row;
      for (int64_t r = 0; r < some; ++r) sums[r] += table[r];
    }
    if (args_.bias) {
      for (int64_t r = 0; r < some; ++r) sums[r] += args_.bias[row + r];
    }
    BFloat16* to = args_.out + token * rows + row;
    if (some < kStrip) {
      for (int64_t r = 0; r < some; ++r) from_float(sums[r], to + r);
    } else {
      store(to, load(sums));
      store(to + 16, load(sums + 16));
    }
  }

 private:
  const ManyArgs& args_;
  Tiles tiles_;
};

// out = [grad, upstream] [W; A]: terms are rows, outputs are columns of the weight.
//
// A strip is half a tile wide. The 32 lanes of a pair are its columns 0 to 3, 8 to 11, ... and then
// 4 to 7, 12 to 15, ..., since that is what transposing decoded lines gives.
class GradX {
 public:
  explicit GradX(const ManyArgs& args) : args_(args), tiles_(args.weight) {}

  int64_t terms() const { return args_.weight.rows; }
  int64_t outputs() const { return args_.weight.columns; }

  void arrange(const BFloat16* row, int64_t begin, int64_t count, BFloat16* to) const {
    std::copy(row + begin, row + begin + count, to);
    // The last panel has rows behind the matrix: they are zeros on both sides.
    std::fill(to + count, to + round_up(count, kPanel), BFloat16{0});
  }

  int64_t decode(int64_t slice, int64_t strip, uint32_t* right) const {
    const int64_t first = slice * kSlicePanels;
    const int64_t count = std::min(kSlicePanels, panels_of(args_.weight.rows) - first);
    for (int64_t p = 0; p < count; ++p) {
      alignas(64) uint8_t room[kTile];
      decode_panel(tiles_.get(first + p, strip / 2, 1, room), strip % 2, right + p * 8 * kStrip);
    }
    return count * 8;
  }

  void side(const Adapter& adapter, int64_t strip, int64_t first, int64_t pairs,
            uint32_t* right) const {
    const int64_t columns = args_.weight.columns;
    const BFloat16* a = static_cast<const BFloat16*>(adapter.a) + first * columns + strip * kStrip;
    for (int64_t q = 0; q < pairs; ++q, a += 2 * columns) {
      const __m512i even = _mm512_loadu_si512(a);
      const bool last = first + 2 * q + 1 >= adapter.rank;
      const __m512i odd = last ? _mm512_setzero_si512() : _mm512_loadu_si512(a + columns);
      for (int half = 0; half < 2; ++half) {
        _mm512_storeu_si512(right + q * kStrip + 16 * half,
                            _mm512_permutex2var_epi16(even, zip(half), odd));
      }
    }
  }

  void finish(int64_t strip, int64_t token, float* sums) const {
    const __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
    alignas(64) int32_t index[16];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) index[i] = 8 * half + i / 8 * 4 + i % 4 + i % 8 / 4 * 16;
      const __m512 columns = _mm512_permutex2var_ps(low, _mm512_load_si512(index), high);
      store(args_.out + token * args_.weight.columns + strip * kStrip + 16 * half, columns);
    }
  }

 private:
  static void decode_panel(const uint8_t* tile, int64_t half, uint32_t* right) {
    const __m512 table = _mm512_load_ps(kNF4Code);
    const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(tile));
    Vec square[16];
    for (int64_t line = 0; line < 4; ++line) {
      __m512i pairs[4];
      decode_line(tile + kScaleBytes + (4 * half + line) * kLine, scale, table, pairs);
      // Of a line's columns the second comes first.
      for (int s = 0; s < 4; ++s) square[4 * line + (s ^ 1)] = _mm512_castsi512_ps(pairs[s]);
    }
    transpose(square);
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int q = 0; q < 8; ++q, right += kStrip) {
      const __m512i even = _mm512_castps_si512(square[2 * q]);
      const __m512i odd = _mm512_castps_si512(square[2 * q + 1]);
      _mm512_storeu_si512(right,
                          _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi32(odd, 16)));
      _mm512_storeu_si512(
          right + 16, _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_andnot_si512(low, odd)));
    }
  }

  // Words of two rows side by side, for the columns of a half of the lanes.
  static __m512i zip(int half) {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) {
      index[i] = static_cast<uint16_t>(i / 8 * 8 + i % 8 / 2 + 4 * half + i % 2 * 32);
    }
    return _mm512_load_si512(index);
  }

  const ManyArgs& args_;
  Tiles tiles_;
};

// Every slice of the sum: its left part for all tokens, and its right part for a strip.
template <typename Problem>
class Sums {
 public:
  Sums(const ManyArgs& args, const Problem& problem)
      : args_(args), problem_(problem), slices_(slices_of(problem.terms())) {}

  // Tokens in groups of almost equal size: the scratch holds one at a time.
  void run() const {
    const int64_t groups = ceil_divide(args_.tokens, kMostTokensAtOnce);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = args_.tokens * g / groups;
      run_group(begin, args_.tokens * (g + 1) / groups - begin);
    }
  }

 private:
  // Tokens of the group that is in the scratch.
  BFloat16* left(int64_t slice, int64_t m) const {
    return args_.scratch + (slice * kMostTokensAtOnce + m) * kLeftStride;
  }

  void run_group(int64_t token, int64_t tokens) const {
    const int64_t grain = std::max<int64_t>(1, 65536 / problem_.terms());
    parallel_for(tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) arrange(token + m, m);
    });
    const int64_t strips = ceil_divide(problem_.outputs(), kStrip);
    // Fewer strips at once where there would be too little for every thread.
    const int64_t some = std::clamp<int64_t>(strips / (4 * num_threads()), 1, kMostStrips);
    parallel_for(ceil_divide(strips, some), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_strips(i * some, std::min(some, strips - i * some), token, tokens);
      }
    });
  }

  void arrange(int64_t token, int64_t m) const {
    const BFloat16* row = args_.x + token * problem_.terms();
    for (int64_t b = 0; b < slices_; ++b) {
      const int64_t count = std::min(kTermsAtOnce, problem_.terms() - b * kTermsAtOnce);
      problem_.arrange(row, b * kTermsAtOnce, count, left(b, m));
    }
    const BFloat16* hidden = args_.hidden + token * args_.total_rank;
    int64_t slice = slices_;
    for (int64_t i = 0; i < args_.num_adapters; hidden += args_.adapters[i++].rank) {
      const int64_t rank = args_.adapters[i].rank;
      for (int64_t first = 0; first < rank; first += kTermsAtOnce) {
        const int64_t count = std::min(kTermsAtOnce, rank - first);
        BFloat16* to = std::copy(hidden + first, hidden + first + count, left(slice++, m));
        if (count % 2) *to = BFloat16{0};
      }
    }
  }

  void run_strips(int64_t strip, int64_t strips, int64_t token, int64_t tokens) const {
    alignas(64) uint32_t right[kTermsAtOnce / 2 * kStrip];
    alignas(64) float sums[kMostStrips * kMostTokensAtOnce * kStrip];
    const int64_t stride = tokens * kStrip;
    for (int64_t b = 0; b < slices_; ++b) {
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t pairs = problem_.decode(b, strip + s, right);
        strip_product(left(b, 0), right, pairs, b == 0, tokens, sums + s * stride);
      }
    }
    for (int64_t s = 0; s < strips; ++s) {
      add_adapters(strip + s, tokens, right, sums + s * stride);
      for (int64_t m = 0; m < tokens; ++m) {
        problem_.finish(strip + s, token + m, sums + s * stride + m * kStrip);
      }
    }
  }

  void add_adapters(int64_t strip, int64_t tokens, uint32_t* right, float* sums) const {
    int64_t slice = slices_;
    for (int64_t i = 0; i < args_.num_adapters; ++i) {
      const Adapter& adapter = args_.adapters[i];
      for (int64_t first = 0; first < adapter.rank; first += kTermsAtOnce) {
        const int64_t pairs = ceil_divide(std::min(kTermsAtOnce, adapter.rank - first), 2);
        problem_.side(adapter, strip, first, pairs, right);
        strip_product(left(slice++, 0), right, pairs, false, tokens, sums);
      }
    }
  }

  const ManyArgs& args_;
  const Problem& problem_;
  int64_t slices_;
};

}  // namespace

namespace COLLAVO_ISA {

void forward_many(const ManyArgs& args) {
  const Forward problem(args);
  Sums<Forward>(args, problem).run();
}

void grad_x_many(const ManyArgs& args) {
  const GradX problem(args);
  Sums<GradX>(args, problem).run();
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear

#else

namespace collavo::qlora_linear::COLLAVO_ISA {

// dispatch.cpp refuses them before they are called.
void forward_many(const ManyArgs&) {}
void grad_x_many(const ManyArgs&) {}

}  // namespace collavo::qlora_linear::COLLAVO_ISA

#endif
