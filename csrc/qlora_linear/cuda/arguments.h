// What Python hands a launcher: structs of C, filled by name.
//
// collavo_kernels/ops/qlora_linear/cuda_arguments.py has the same structs, field by field; a test
// compares where every field lies. All pointers but those to branches are the device's, null where
// something is absent. A matrix that is `wide` is float32, any other is of x's type.
#pragma once

#include <cstdint>

namespace collavo::qlora_linear::cuda {

constexpr int kMaxAdapters = 8;

// A branch's factors, of which a strip has one: what lies beside or below the weight.
struct BranchArguments {
  const void* a;  // [rank, k]
  bool a_wide;
  const void* b;  // [n, rank]
  bool b_wide;
  int64_t rank;
  float scaling;
};

// The 4-bit matrix [n, k].
struct WeightArguments {
  const uint8_t* packed;
  const void* absmax;          // float32, or uint8 when nested
  const float* nested_absmax;  // null when plain
  const float* nested_code;
  const float* offset;
  int64_t n, k;
  int64_t block_size;
};

// What is added at the end: a table's row for each token that has one, and a bias.
struct EpilogueArguments {
  const void* row_table;  // [table_rows, n]
  bool row_table_wide;
  const void* bias;  // [n]
  bool bias_wide;
  const int32_t* row_index;  // [m]
  int32_t* errors;           // [1]
  int64_t table_rows;
};

// hidden has 8 * ceil(m / 8) rows of all ranks, each adapter's rounded up to 16, in x's dtype.
// Needs 1 <= m <= 16, k % 64 == 0, blocks of at least 64; x, packed, every a and b aligned to 16
// bytes.
struct DecodeArguments {
  WeightArguments weight;
  EpilogueArguments epilogue;
  const BranchArguments* adapters;
  int64_t num_adapters;
  const uint8_t* adapter_mask;  // [m]
  const void* x;                // [m, k]
  void* hidden;
  void* out;  // [m, n]
  int64_t m;
  int64_t dtype;  // of x and out, as DType numbers them
};

// Rows and columns of [W | b b ..], or below of [W; a; a ..]; zeros beyond the factors.
struct StripArguments {
  WeightArguments weight;
  const BranchArguments* adapters;
  int64_t num_adapters;
  bool below;
  int64_t row, rows, column, columns;
  void* out;  // [rows, columns]
  int64_t dtype;
};

struct AddRowsArguments {
  EpilogueArguments epilogue;
  void* out;  // [m, n]
  int64_t m, n;
  int64_t dtype;
};

struct SumRowsArguments {
  const void* grad_out;  // [m, n]
  const int32_t* row_index;
  int32_t* errors;
  float* grad_row_table;  // [table_rows, n]
  int64_t m, n, table_rows;
  int64_t dtype;  // of grad_out
};

}  // namespace collavo::qlora_linear::cuda
