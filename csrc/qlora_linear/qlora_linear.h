// Linear layer over an NF4 weight with LoRA adapters and a table of row vectors.
//
// The mathematics is in collavo_kernels/ops/qlora_linear/README.md. The weight lies in rows, as
// bitsandbytes stores it, or in panels; nothing here makes it dense beyond a strip. Threads own
// rows of the weight, and sums run in an order that does not depend on them.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/dtype.h"

namespace collavo::qlora_linear {

// Codes two a byte, the first of two neighbours in the high half, in blocks over the flattened
// matrix. Scales: float32 per block, or with double_quant one blob of
//   offset float32 | outer float32 [ceil(blocks / 256)] | code float32 [256] | uint8 [blocks].
// In panels (panels.h) the codes lie beside float32 scales, which are read in place of the blob's.
struct NF4 {
  const uint8_t* packed;
  const uint8_t* scales;
  int64_t rows, columns;
  int64_t block_size;  // a power of two
  bool double_quant;
  bool in_panels;
};

// Writes weight[row_begin:row_end, column_begin:column_end] densely: code * scale in float32,
// rounded once. `row_stride` is in elements. Of a weight in panels the columns begin and end with
// tiles.
struct DequantizeArgs {
  NF4 weight;
  int64_t row_begin, row_end, column_begin, column_end;
  DType dtype;
  void* out;
  int64_t row_stride;
};

// Contiguous a [rank, columns] and b [rows, rank].
struct Adapter {
  const void* a;
  const void* b;
  int64_t rank;
  float scaling;
  DType dtype;
};

// The whole operator for a few tokens: the weight is streamed once for every 16 of them.
// Needs columns % 64 == 0 and block_size >= 64.
struct ForwardArgs {
  NF4 weight;
  DType dtype;    // of x and out
  const void* x;  // [tokens, columns]
  int64_t tokens;
  const Adapter* adapters;
  int64_t num_adapters;
  const uint8_t* adapter_mask;  // [tokens], or null: all adapters are active
  const float* row_table;       // [table_rows, rows], or null
  const int32_t* row_index;     // [tokens], checked
  const float* bias;            // [rows], or null
  bool int8_activations;        // round x to 8 bits; taken where the processor has such products
  float* scratch;               // forward_scratch() bytes
  void* out;                    // [tokens, rows]
};

// Tokens that forward_many() and grad_x_many() take at once.
constexpr int64_t kMostTokensAtOnce = 512;
// They cut sums into slices of so many terms. A slice's row of x is a little longer in memory: rows
// a power of two apart would fall into the same lines of the cache.
constexpr int64_t kTermsAtOnce = 512, kLeftStride = kTermsAtOnce + 32;

// Many tokens in bfloat16, on processors with bfloat16 products (avx512).
//   forward_many: out = [x, hidden] [W, B]^T + row_table[row_index] + bias    [tokens, rows]
//   grad_x_many:  out = [x, hidden] [W; A]                                    [tokens, columns]
// x is then the gradient of the output. Everything is bfloat16 but row_table and bias. Needs
// columns % 64 == 0 and block_size >= 64.
struct ManyArgs {
  NF4 weight;
  const BFloat16* x;  // [tokens, columns] or [tokens, rows]
  int64_t tokens;
  const BFloat16* hidden;   // [tokens, total_rank], scaled and gated, all adapters side by side
  const Adapter* adapters;  // a [rank, columns] or b [rows, rank] in bfloat16
  int64_t num_adapters;
  int64_t total_rank;
  const float* row_table;  // [table_rows, rows], or null
  const int32_t* row_index;
  const float* bias;  // [rows], or null
  BFloat16* scratch;  // as many bytes as ..._scratch() says
  BFloat16* out;
};

// out[m] += row_table[row_index[m]] where row_index[m] >= 0; out [tokens, columns] of dtype.
struct AddRowsArgs {
  DType dtype;
  void* out;
  const float* row_table;
  const int32_t* row_index;
  int64_t tokens, columns;
};

// grad_row_table[t] = sum of grad_out[m] over row_index[m] == t, in the order of m.
struct SumRowsArgs {
  DType dtype;
  const void* grad_out;
  const int32_t* row_index;
  float* grad_row_table;
  int64_t tokens, columns, table_rows;
};

// A float32 matrix; strides are in elements.
struct Matrix {
  float* values;
  int64_t row_stride, column_stride;
};

// out = a b, [m, k] times [k, n]; the columns of out lie side by side.
struct ProductArgs {
  Matrix a, b, out;
  int64_t m, n, k;
};

COLLAVO_DECLARE_PER_ISA(void dequantize(const DequantizeArgs& args);
                        void forward(const ForwardArgs& args);
                        void forward_many(const ManyArgs& args);
                        void grad_x_many(const ManyArgs& args);
                        void add_rows(const AddRowsArgs& args);
                        void sum_rows(const SumRowsArgs& args);
                        void product(const ProductArgs& args))

void dequantize(int isa, const DequantizeArgs& args);
void forward(int isa, const ForwardArgs& args);
void forward_many(int isa, const ManyArgs& args);
void grad_x_many(int isa, const ManyArgs& args);
void add_rows(int isa, const AddRowsArgs& args);
void sum_rows(int isa, const SumRowsArgs& args);
void product(int isa, const ProductArgs& args);

// Bytes of scratch that a call needs; its own scratch is not looked at.
int64_t forward_scratch(const ForwardArgs& args);
int64_t forward_many_scratch(const ManyArgs& args);
int64_t grad_x_many_scratch(const ManyArgs& args);

}  // namespace collavo::qlora_linear
