// Attention with the Crayon Prompt inside, forward and backward.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/dtype.h"

namespace collavo::crayon_attention {

// The largest head dim: slabs of tokens lie on the stack.
constexpr int64_t kLargestHeadDim = 256;

// A [batch, length, heads, head_dim] tensor: its last dimension is contiguous, strides are in
// elements. data is null where a tensor is absent.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// What forward and backward share. q_heads is a multiple of kv_heads, head_dim is even.
//
// Angles are contiguous [1 or batch, length, head_dim], or null: no rotation; a batch stride of 0
// shares them. row_index is a contiguous [batch, length], or null: no token has a row. key_range is
// a contiguous [batch, 2], or null: all tokens are valid. Query i sees key j if both are valid, j
// <= i (causal), and |i - j| < window.
struct Problem {
  DType dtype;
  int64_t batch, length, q_heads, kv_heads, head_dim;
  int64_t table_rows;
  const float *cos, *sin;
  int64_t angle_batch_stride;
  const int32_t *row_index, *key_range;
  bool causal;
  int64_t window;
  float softmax_scale;
};

// Tables are contiguous [table_rows, heads, head_dim] or null. key and value are null where they
// would equal k and v. lse is a contiguous [batch, q_heads, length].
struct ForwardArgs {
  Problem problem;
  Heads q, k, v;
  const void *crayon_q, *crayon_k, *crayon_v;
  Heads key, value, out;
  float* lse;
};

// key and value are what the forward wrote, or k and v where it wrote nothing; q is its input.
// Gradients of out, key and value come in. Those of q, k, v and the tables go out, null where they
// are not wanted; the tables' are contiguous [table_rows, heads, head_dim] of the problem's dtype.
// slots is what number_slots() wrote, and slot_count what it returned; null and 0 where no sum is
// wanted.
struct BackwardArgs {
  Problem problem;
  Heads q, key, value;
  const void* crayon_q;
  Heads out, grad_out, grad_key, grad_value;
  const float* lse;
  Heads grad_q, grad_k, grad_v;
  void *grad_crayon_q, *grad_crayon_k, *grad_crayon_v;
  const int32_t* slots;
  int64_t slot_count;
};

// The first row index outside [-1, rows), and the first sample whose key range is not
// 0 <= first <= end <= length; -1 where there is none. The kernels must not see such values.
int64_t first_bad_row(const int32_t* row_index, int64_t count, int64_t rows);
int64_t first_bad_range(const int32_t* key_range, int64_t batch, int64_t length);

// Numbers the pairs of a sample and a row that any of its tokens has: slots is [batch, rows], -1
// where there is no such token. Each has a sum of its own, so samples can be summed side by side.
// Returns how many there are.
int64_t number_slots(const int32_t* row_index, int64_t batch, int64_t length, int64_t rows,
                     int32_t* slots);

// Bytes of scratch that a call needs with this many threads at most.
int64_t forward_scratch(int isa, const ForwardArgs& args, int64_t threads);
int64_t backward_scratch(int isa, const BackwardArgs& args, int64_t threads);

// The same threads and instruction set as for the scratch.
void forward(int isa, const ForwardArgs& args, int64_t threads, void* scratch);
void backward(int isa, const BackwardArgs& args, int64_t threads, void* scratch);

COLLAVO_DECLARE_PER_ISA(int64_t forward_scratch(const ForwardArgs& args, int64_t threads))
COLLAVO_DECLARE_PER_ISA(int64_t backward_scratch(const BackwardArgs& args, int64_t threads))
COLLAVO_DECLARE_PER_ISA(void forward(const ForwardArgs& args, int64_t threads, void* scratch))
COLLAVO_DECLARE_PER_ISA(void backward(const BackwardArgs& args, int64_t threads, void* scratch))

}  // namespace collavo::crayon_attention
