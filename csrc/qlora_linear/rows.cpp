// The crayon table's part of the operator: rows added to tokens, and their gradients summed back.
#include <algorithm>
#include <type_traits>

#include "common/integers.h"
#include "common/parallel.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

// Columns that a thread sums together.
constexpr int64_t kChunk = 64;

template <typename T>
void add_to(T* out, const float* row, int64_t columns) {
  int64_t n = 0;
  for (; n + kLanes <= columns; n += kLanes) store(out + n, add(load(out + n), load(row + n)));
  for (; n < columns; ++n) from_float(to_float(out[n]) + row[n], out + n);
}

template <typename T>
void sum_columns(const SumRowsArgs& args, const T* grad, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < args.table_rows; ++t) {
    std::fill(args.grad_row_table + t * args.columns + begin,
              args.grad_row_table + t * args.columns + end, 0.0f);
  }
  for (int64_t m = 0; m < args.tokens; ++m) {
    const int32_t row = args.row_index[m];
    if (row < 0) continue;
    const T* from = grad + m * args.columns;
    float* to = args.grad_row_table + row * args.columns;
    int64_t n = begin;
    for (; n + kLanes <= end; n += kLanes) store(to + n, add(load(to + n), load(from + n)));
    for (; n < end; ++n) to[n] += to_float(from[n]);
  }
}

}  // namespace

namespace COLLAVO_ISA {

void add_rows(const AddRowsArgs& args) {
  with_type(args.dtype, args.out, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    T* out = static_cast<T*>(args.out);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(args.columns, 1));
    parallel_for(args.tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int32_t row = args.row_index[m];
        if (row >= 0)
          add_to(out + m * args.columns, args.row_table + row * args.columns, args.columns);
      }
    });
  });
}

// Threads own columns, so every sum runs over tokens in their order.
void sum_rows(const SumRowsArgs& args) {
  with_type(args.dtype, args.grad_out, [&](const auto* grad) {
    const int64_t chunks = ceil_divide(args.columns, kChunk);
    const int64_t grain = std::max<int64_t>(1, 1024 / std::max<int64_t>(args.tokens, 1));
    parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
      sum_columns(args, grad, begin * kChunk, std::min(end * kChunk, args.columns));
    });
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear
