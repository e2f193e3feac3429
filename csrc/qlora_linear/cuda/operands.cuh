// What a call brings along, and how single values of it are read.
#pragma once

#include "common/integers.h"
#include "qlora_linear/cuda/arguments.h"
#include "qlora_linear/cuda/gpu.cuh"

namespace {

using namespace collavo::qlora_linear::cuda;
using collavo::ceil_divide;

constexpr int kRowOutOfRange = 1;
enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// The 4-bit matrix [n, k]; every pointer is on the device.
struct Weight {
  const uint8_t* packed;
  const void* absmax;          // float32, or uint8 when nested
  const float* nested_absmax;  // null when plain
  const float* nested_code;
  const float* offset;
  int64_t n, k;
  int block_shift;
};

// A matrix whose values are of x's type, or float32 (wide).
struct Side {
  const void* values;
  bool wide;
};

struct Adapters {
  Side a[kMaxAdapters];  // [rank, k]
  Side b[kMaxAdapters];  // [n, rank]
  int64_t rank[kMaxAdapters];
  float scaling[kMaxAdapters];
  int count;
};

// What is added at the end: a table's row for each token that has one, and a bias.
struct Epilogue {
  Side row_table;            // [table_rows, n]; null values: none
  Side bias;                 // [n]; null values: none
  const int32_t* row_index;  // [m]
  int32_t* errors;           // [1]
  int64_t table_rows;
};

__device__ __forceinline__ float as_float(float value) {
  return value;
}
__device__ __forceinline__ float as_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float as_float(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ void put(float* to, float value) {
  *to = value;
}
__device__ __forceinline__ void put(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void put(__half* to, float value) {
  *to = __float2half_rn(value);
}

// Two values side by side, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  union {
    T values[2];
    uint32_t word;
  } both;
  put(&both.values[0], first);
  put(&both.values[1], second);
  return both.word;
}

template <typename T>
__device__ __forceinline__ float value_at(const Side& side, int64_t index) {
  return side.wide ? static_cast<const float*>(side.values)[index]
                   : as_float(static_cast<const T*>(side.values)[index]);
}

// Undoes the second quantisation. Multiply and add round separately, as they did in making it.
__device__ __forceinline__ float nested_scale(float inner, float outer, float offset) {
  return __fadd_rn(__fmul_rn(inner, outer), offset);
}

// The scale of the block that holds an element of the flattened matrix.
__device__ __forceinline__ float scale_at(const Weight& w, int64_t element) {
  const int64_t block = element >> w.block_shift;
  if (!w.nested_absmax) return static_cast<const float*>(w.absmax)[block];
  const uint8_t code = static_cast<const uint8_t*>(w.absmax)[block];
  return nested_scale(w.nested_code[code], w.nested_absmax[block >> 8], *w.offset);
}

// The row of the table that a token gets, -1 for none. A bad one is none, and `reports` says so.
__device__ __forceinline__ int64_t table_row(const Epilogue& e, int64_t token, bool reports) {
  if (!e.row_table.values) return -1;
  const int32_t index = e.row_index[token];
  if (index >= 0 && index < e.table_rows) return index;
  if (index != -1 && reports) atomicOr(e.errors, kRowOutOfRange);
  return -1;
}

// Table and bias of an output. They are summed first: large values in them may cancel.
template <typename T>
__device__ __forceinline__ float addition(const Epilogue& e, int64_t row, int64_t n,
                                          int64_t column) {
  float value = row < 0 ? 0.0f : value_at<T>(e.row_table, row * n + column);
  if (e.bias.values) value += value_at<T>(e.bias, column);
  return value;
}

inline Weight weight_from(const WeightArguments& from) {
  Weight w{};
  w.packed = from.packed;
  w.absmax = from.absmax;
  w.nested_absmax = from.nested_absmax;
  w.nested_code = from.nested_code;
  w.offset = from.offset;
  w.n = from.n;
  w.k = from.k;
  while ((int64_t{1} << w.block_shift) < from.block_size) ++w.block_shift;
  return w;
}

inline Epilogue epilogue_from(const EpilogueArguments& from) {
  Epilogue e{};
  e.row_table = {from.row_table, from.row_table_wide};
  e.bias = {from.bias, from.bias_wide};
  e.row_index = from.row_index;
  e.errors = from.errors;
  e.table_rows = from.table_rows;
  return e;
}

inline Side a_of(const BranchArguments& branch) {
  return {branch.a, branch.a_wide};
}
inline Side b_of(const BranchArguments& branch) {
  return {branch.b, branch.b_wide};
}

inline bool adapters_from(const BranchArguments* branches, int64_t count, Adapters* adapters) {
  if (count < 0 || count > kMaxAdapters) return false;
  adapters->count = static_cast<int>(count);
  for (int i = 0; i < adapters->count; ++i) {
    adapters->a[i] = a_of(branches[i]);
    adapters->b[i] = b_of(branches[i]);
    adapters->rank[i] = branches[i].rank;
    adapters->scaling[i] = branches[i].scaling;
  }
  return true;
}

}  // namespace
