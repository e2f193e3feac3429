// The passes around attention: add the crayon rows and rotate before it, and the transpose of both
// after its backward. Attention itself is not here.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/dtype.h"

namespace collavo::crayon_attention {

// A [batch, length, heads, size] tensor: its last dimension is contiguous, strides are in elements.
// data is null where a tensor is absent.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

struct Shape {
  int64_t batch, length;
  int64_t q_heads, kv_heads;
  int64_t size;  // head dim, even
  int64_t rows;  // of the tables
};

// What both passes know of positions and rows. Angles are [1 or batch, length, size]; a batch
// stride of 0 shares them. row_index is a contiguous [batch, length], or null: no token has a row.
struct Tokens {
  const float* cos;
  const float* sin;
  int64_t angle_batch_stride;
  const int32_t* row_index;
};

// q' = R (q + table_q[row]), k' = R (k + table_k[row]), v' = v + table_v[row]. Tables are
// contiguous [rows, heads, size] or null. An output that is null is not computed.
struct PrepareArgs {
  DType dtype;
  Shape shape;
  Tokens tokens;
  Heads q, k, v;
  const void *table_q, *table_k, *table_v;
  Heads q_out, k_out, v_out;
};

// In place: dq = R^T dq, dk = R^T (dk + grad_key), dv = dv + grad_value. Then sum_q[t] is the sum
// of dq over the tokens of row t in token order, in float32, and so on: contiguous
// [rows, heads, size], or null where it is not wanted.
struct FinishArgs {
  DType dtype;
  Shape shape;
  Tokens tokens;
  Heads dq, dk, dv;
  Heads grad_key, grad_value;
  float *sum_q, *sum_k, *sum_v;
};

// The position in row_index of the first entry outside [-1, rows), or -1. The passes below must
// not see an index that this rejects.
int64_t first_bad_row(const int32_t* row_index, int64_t count, int64_t rows);

void prepare(int isa, const PrepareArgs& args);
void finish(int isa, const FinishArgs& args);

COLLAVO_DECLARE_PER_ISA(void prepare(const PrepareArgs& args))
COLLAVO_DECLARE_PER_ISA(void finish(const FinishArgs& args))

}  // namespace collavo::crayon_attention
