// A part of the weight as dense numbers, with the adapters beside or below it, for a matrix product
// that then needs nothing else: [W | B_1 | B_2 ..] or [W; A_1; A_2 ..].

#include "qlora_linear/cuda/operands.cuh"
#include "qlora_linear/nf4_code.h"

namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;      // neighbours of a row: one store of 16 bytes of a 16-bit type
constexpr int kPerThread = 4;  // groups, whose loads are under way together

__constant__ float kCode[16] = {COLLAVO_NF4_CODE};

struct Strip {
  Weight weight;
  Side sides[kMaxAdapters];
  int64_t ranks[kMaxAdapters];
  int count;
  bool below;  // sides are [rank, k] below the weight, and not [n, rank] beside it
  int64_t row, rows, column, columns;
  void* out;  // [rows, columns]
};

// An element of the adapters' part; `rank` counts on over all of them. Zero beyond the last.
template <typename T>
__device__ float side_at(const Strip& p, int64_t rank, int64_t other) {
  for (int i = 0; i < p.count; ++i) {
    if (rank < p.ranks[i]) {
      return value_at<T>(p.sides[i],
                         p.below ? rank * p.weight.k + other : other * p.ranks[i] + rank);
    }
    rank -= p.ranks[i];
  }
  return 0.0f;
}

template <typename T>
__device__ float value_of(const Strip& p, const float* code, int64_t row, int64_t column) {
  const Weight& w = p.weight;
  if (row >= w.n) return column < w.k ? side_at<T>(p, row - w.n, column) : 0.0f;
  if (column >= w.k) return p.below ? 0.0f : side_at<T>(p, column - w.k, row);
  const int64_t element = row * w.k + column;
  const int byte = w.packed[element / 2];
  return code[element % 2 ? byte & 15 : byte >> 4] * scale_at(w, element);
}

__device__ __forceinline__ void store_group(float* to, const float (&v)[kGroup]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T>
__device__ __forceinline__ void store_group(T* to, const float (&v)[kGroup]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]),
                                             pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// kWhole: groups begin at whole words of codes, and 8 neighbours have one scale.
template <typename T, bool kWhole>
__device__ void put_group(const Strip& p, const float* code, uint32_t group) {
  const auto groups = static_cast<uint32_t>(ceil_divide(p.columns, kGroup));
  const int64_t r = group / groups, c = int64_t{group % groups} * kGroup;
  const int64_t row = p.row + r, column = p.column + c;
  T* to = static_cast<T*>(p.out) + r * p.columns + c;
  if (kWhole && row < p.weight.n && column < p.weight.k) {
    const int64_t element = row * p.weight.k + column;
    const uint32_t word = reinterpret_cast<const uint32_t*>(p.weight.packed)[element / 8];
    const float scale = scale_at(p.weight, element);
    float values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      // Of a byte the high half comes first.
      values[i] = code[word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15] * scale;
    }
    store_group(to, values);
    return;
  }
  for (int i = 0; i < kGroup && c + i < p.columns; ++i) {
    put(to + i, value_of<T>(p, code, row, column + i));
  }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) fill_strip(Strip p) {
  // Of 16 floats every one has a bank of its own.
  auto* code = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x < 16) code[threadIdx.x] = kCode[threadIdx.x];
  __syncthreads();
  const auto total = static_cast<uint32_t>(p.rows * ceil_divide(p.columns, kGroup));
  const uint32_t first = blockIdx.x * (kThreads * kPerThread) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t group = first + i * kThreads;
    if (group < total) put_group<T, kWhole>(p, code, group);
  }
}

template <typename T>
int launch_strip(const Strip& p, void* stream) {
  const int64_t groups = p.rows * ceil_divide(p.columns, kGroup);
  if (groups > UINT32_MAX / 2) return cudaErrorInvalidValue;
  constexpr int64_t kPerBlock = kThreads * kPerThread;
  Launch how{};
  how.grid = dim3(static_cast<unsigned>(ceil_divide(groups, kPerBlock)));
  how.threads = kThreads;
  how.shared = 16 * sizeof(float);
  const auto address = reinterpret_cast<uintptr_t>(p.out);
  const bool whole = p.weight.k % kGroup == 0 && p.column % kGroup == 0 &&
                     p.columns % kGroup == 0 && address % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(p.weight.packed) % 4 == 0;
  return whole ? launch(how, stream, fill_strip<T, true>, p)
               : launch(how, stream, fill_strip<T, false>, p);
}

}  // namespace

extern "C" int collavo_qlora_linear_strip(const StripArguments* arguments, void* stream) {
  const StripArguments& from = *arguments;
  if (from.num_adapters < 0 || from.num_adapters > kMaxAdapters || from.rows < 1 ||
      from.columns < 1 || from.row < 0 || from.column < 0) {
    return cudaErrorInvalidValue;
  }
  Strip p{};
  p.weight = weight_from(from.weight);
  p.count = static_cast<int>(from.num_adapters);
  for (int i = 0; i < p.count; ++i) {
    p.sides[i] = from.below ? a_of(from.adapters[i]) : b_of(from.adapters[i]);
    p.ranks[i] = from.adapters[i].rank;
  }
  p.below = from.below;
  p.row = from.row;
  p.rows = from.rows;
  p.column = from.column;
  p.columns = from.columns;
  p.out = from.out;
  if (from.dtype == kFloat32) return launch_strip<float>(p, stream);
  if (from.dtype == kBfloat16) return launch_strip<__nv_bfloat16>(p, stream);
  if (from.dtype == kFloat16) return launch_strip<__half>(p, stream);
  return cudaErrorInvalidValue;
}
