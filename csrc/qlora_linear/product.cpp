// Small float32 matrix products whose bits do not depend on the number of threads. Libraries cut
// thin products along the sum when they have threads to spare; here every element is one sum.
#include <algorithm>

#include "common/parallel.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kVectors = 2;

// c[i0 : i0 + kRows, j : j + kVectors * kLanes], b's columns side by side.
template <int kRows>
void block(const ProductArgs& args, int64_t i0, int64_t j) {
  Vec sums[kRows][kVectors];
  for (auto& line : sums) {
    for (Vec& each : line) each = zeros();
  }
  for (int64_t p = 0; p < args.k; ++p) {
    const float* b = args.b + p * args.b_row + j;
    for (int r = 0; r < kRows; ++r) {
      const Vec a = broadcast(args.a[(i0 + r) * args.a_row + p * args.a_column]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(a, load(b + v * kLanes), sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* c = args.c + (i0 + r) * args.c_row + j;
    for (int v = 0; v < kVectors; ++v) store(c + v * kLanes, sums[r][v]);
  }
}

void element(const ProductArgs& args, int64_t i, int64_t j) {
  const float* a = args.a + i * args.a_row;
  const float* b = args.b + j * args.b_column;
  int64_t p = 0;
  Vec sums = zeros();
  if (args.a_column == 1 && args.b_row == 1) {
    for (; p + kLanes <= args.k; p += kLanes) sums = fma(load(a + p), load(b + p), sums);
  }
  float rest = 0.0f;
  for (; p < args.k; ++p) rest += a[p * args.a_column] * b[p * args.b_row];
  args.c[i * args.c_row + j] = sum(sums) + rest;
}

void panel(const ProductArgs& args, int64_t i_begin, int64_t i_end, int64_t j_begin,
           int64_t j_end) {
  int64_t j = j_begin;
  if (args.b_column == 1) {
    for (; j + kVectors * kLanes <= j_end; j += kVectors * kLanes) {
      int64_t i = i_begin;
      for (; i + 4 <= i_end; i += 4) block<4>(args, i, j);
      for (; i < i_end; ++i) block<1>(args, i, j);
    }
  }
  for (int64_t i = i_begin; i < i_end; ++i) {
    for (int64_t rest = j; rest < j_end; ++rest) element(args, i, rest);
  }
}

}  // namespace

namespace COLLAVO_ISA {

void product(const ProductArgs& args) {
  const int64_t work = 65536;
  if (args.m > args.n) {
    const int64_t grain = std::max<int64_t>(4, work / std::max<int64_t>(1, args.n * args.k));
    parallel_for(args.m, grain,
                 [&](int64_t begin, int64_t end) { panel(args, begin, end, 0, args.n); });
    return;
  }
  // Panels start where vectors do, so an element is summed the same way in any of them.
  const int64_t grain = std::max<int64_t>(1, work / std::max<int64_t>(1, args.m * args.k * kPanel));
  parallel_for((args.n + kPanel - 1) / kPanel, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      panel(args, 0, args.m, p * kPanel, std::min(args.n, (p + 1) * kPanel));
    }
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear
