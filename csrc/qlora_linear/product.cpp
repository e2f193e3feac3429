// Float32 matrix products whose bits do not depend on the number of threads. Libraries cut the sum
// between threads where a product has few rows or columns; here a thread owns elements, and the
// sum of each is cut at the same places for any number of them.
#include <algorithm>

#include "common/integers.h"
#include "common/parallel.h"
#include "common/tile.h"
#include "qlora_linear/qlora_linear.h"

namespace collavo::qlora_linear {

namespace {

constexpr int64_t kVectors = 2;
constexpr int64_t kWidth = kVectors * kLanes;
// So many rows of sums fill the registers.
constexpr int64_t kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
// Copies of so many terms of both factors stay in the first-level cache; a row is a little longer
// than a power of two.
constexpr int64_t kTerms = 256;
constexpr int64_t kStride = kTerms + 16;
// Tiles side by side that one copy of the left factor serves.
constexpr int64_t kTiles = 4;

struct Buffers {
  alignas(64) float a[kRows * kStride] = {};  // rows that a tile lacks: they are not kept
  alignas(64) float b[kTiles][kTerms * kWidth];
  alignas(64) float c[kRows * kWidth];
};

void copy_a(const ProductArgs& args, int64_t i, int64_t rows, int64_t first, int64_t terms,
            float* to) {
  for (int64_t r = 0; r < rows; ++r, to += kStride) {
    const float* from = args.a.values + (i + r) * args.a.row_stride + first * args.a.column_stride;
    if (args.a.column_stride == 1) {
      std::copy(from, from + terms, to);
    } else {
      for (int64_t p = 0; p < terms; ++p) to[p] = from[p * args.a.column_stride];
    }
  }
}

void copy_b(const ProductArgs& args, int64_t j, int64_t width, int64_t first, int64_t terms,
            float* to) {
  const float* from = args.b.values + first * args.b.row_stride + j * args.b.column_stride;
  if (width < kWidth) std::fill(to, to + terms * kWidth, 0.0f);
  if (args.b.column_stride == 1) {
    for (int64_t p = 0; p < terms; ++p) {
      std::copy(from + p * args.b.row_stride, from + p * args.b.row_stride + width,
                to + p * kWidth);
    }
    return;
  }
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t p = 0; p < terms; ++p) {
      to[p * kWidth + w] = from[w * args.b.column_stride + p * args.b.row_stride];
    }
  }
}

void add_tile(const ProductArgs& args, int64_t i, int64_t rows, int64_t j, int64_t width,
              bool first, const float* from) {
  for (int64_t r = 0; r < rows; ++r, from += kWidth) {
    float* to = args.out.values + (i + r) * args.out.row_stride + j;
    for (int64_t w = 0; w < width; ++w) to[w] = first ? from[w] : to[w] + from[w];
  }
}

// Rows [i_begin, i_end) of `tiles` tiles side by side, from column j on.
void output_tiles(const ProductArgs& args, int64_t i_begin, int64_t i_end, int64_t j, int64_t tiles,
                  Buffers& buffers) {
  for (int64_t first = 0; first < args.k || first == 0; first += kTerms) {
    const int64_t terms = std::min(kTerms, args.k - first);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t column = j + t * kWidth;
      copy_b(args, column, std::min(kWidth, args.n - column), first, terms, buffers.b[t]);
    }
    for (int64_t i = i_begin; i < i_end; i += kRows) {
      const int64_t rows = std::min(kRows, i_end - i);
      copy_a(args, i, rows, first, terms, buffers.a);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t column = j + t * kWidth;
        tile_product<Floats, kRows, kVectors>(buffers.a, kStride, buffers.b[t], kWidth, terms, true,
                                              buffers.c, kWidth);
        add_tile(args, i, rows, column, std::min(kWidth, args.n - column), first == 0, buffers.c);
      }
    }
  }
}

}  // namespace

namespace COLLAVO_ISA {

void product(const ProductArgs& args) {
  const int64_t across = ceil_divide(args.n, kWidth);
  const int64_t down = ceil_divide(args.m, kRows);
  const int64_t work = std::max<int64_t>(1, 262144 / std::max<int64_t>(1, args.k * kWidth * kRows));
  const bool by_rows = down > across;
  parallel_for(by_rows ? down : across, work, [&](int64_t begin, int64_t end) {
    Buffers buffers;
    const int64_t i_begin = by_rows ? begin * kRows : 0;
    const int64_t i_end = by_rows ? std::min(args.m, end * kRows) : args.m;
    const int64_t last = by_rows ? across : end;
    for (int64_t p = by_rows ? 0 : begin; p < last; p += kTiles) {
      output_tiles(args, i_begin, i_end, p * kWidth, std::min(kTiles, last - p), buffers);
    }
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear
