// A few tokens on a GPU: the packed weight is streamed once, all adapters in the same launches.
//
// Two kernels on one stream. shrink: a warp per row of the adapters' A gives the hidden values.
// decode: a warp per row of the weight; a lane decodes 16 neighbours, which share one scale, and
// multiplies them with every token. Sums are float32 and run in one order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kWarps = 4;
constexpr int kElements = 16;  // per lane and step: 8 bytes of codes
constexpr int kMaxAdapters = 8;
constexpr int kRowOutOfRange = 1;

__constant__ float kCode[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

struct Adapters {
  const void* a[kMaxAdapters];  // [rank, k]
  const void* b[kMaxAdapters];  // [n, rank]
  int64_t rank[kMaxAdapters];
  float scaling[kMaxAdapters];
  bool wide[kMaxAdapters];  // float32 in place of x's type
  int count;
  int64_t total_rank;
};

struct Problem {
  const void* x;  // [m, k]
  const uint8_t* packed;
  const void* absmax;          // float32, or uint8 when nested
  const float* nested_absmax;  // null when plain
  const float* nested_code;
  const float* offset;
  const uint8_t* mask;       // [m] or null
  const float* table;        // [rows, n] or null
  const int32_t* row_index;  // [m]
  const float* bias;         // [n] or null
  int32_t* errors;           // [1]
  float* hidden;             // [m, total rank]
  void* out;                 // [m, n]
  int64_t m, n, k, rows;
  int block_shift;
};

__device__ float as_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ float as_float(__half value) {
  return __half2float(value);
}
__device__ void put(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}
__device__ void put(__half* to, float value) {
  *to = __float2half_rn(value);
}

__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <typename T>
__device__ float side_value(const void* from, bool wide, int64_t index) {
  return wide ? static_cast<const float*>(from)[index]
              : as_float(static_cast<const T*>(from)[index]);
}

// Sixteen neighbours of a token, by two loads of 16 bytes.
template <typename T>
__device__ void load_sixteen(const T* from, float (&to)[kElements]) {
  union {
    uint4 raw[2];
    T values[kElements];
  } loaded;
  loaded.raw[0] = reinterpret_cast<const uint4*>(from)[0];
  loaded.raw[1] = reinterpret_cast<const uint4*>(from)[1];
#pragma unroll
  for (int i = 0; i < kElements; ++i) to[i] = as_float(loaded.values[i]);
}

__device__ float scale_at(const Problem& p, int64_t element) {
  const int64_t block = element >> p.block_shift;
  if (!p.nested_absmax) return static_cast<const float*>(p.absmax)[block];
  const uint8_t code = static_cast<const uint8_t*>(p.absmax)[block];
  return p.nested_code[code] * p.nested_absmax[block >> 8] + *p.offset;
}

// hidden[m, r] = gate * scaling * A[r] . x[m]
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) shrink(Problem p, Adapters adapters) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (slot >= adapters.total_rank) return;
  int index = 0;
  int64_t row = slot;
  while (row >= adapters.rank[index]) row -= adapters.rank[index++];
  const T* x = static_cast<const T*>(p.x);
  for (int64_t m = 0; m < p.m; ++m) {
    float sum = 0.0f;
    for (int64_t k = lane; k < p.k; k += 32) {
      const float a = side_value<T>(adapters.a[index], adapters.wide[index], row * p.k + k);
      sum += a * as_float(x[m * p.k + k]);
    }
    sum = warp_sum(sum) * adapters.scaling[index];
    const bool active = !p.mask || (p.mask[m] >> index & 1);
    if (lane == 0) p.hidden[m * adapters.total_rank + slot] = active ? sum : 0.0f;
  }
}

template <typename T, int kTokens>
__device__ void add_weight(const Problem& p, const float* code, int64_t row, int64_t first,
                           int lane, float (&sums)[kTokens]) {
  const T* x = static_cast<const T*>(p.x) + first * p.k;
  for (int64_t k = lane * kElements; k < p.k; k += 32 * kElements) {
    const int64_t element = row * p.k + k;
    const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(p.packed + element / 2));
    const float scale = scale_at(p, element);
    float weight[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const uint32_t word = i < 8 ? raw.x : raw.y;
      // Of a byte the high half comes first.
      weight[i] = code[word >> (i % 8 / 2 * 8 + (i % 2 ? 0 : 4)) & 15] * scale;
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (first + m >= p.m) break;
      float values[kElements];
      load_sixteen(x + m * p.k + k, values);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sums[m] = fmaf(weight[i], values[i], sums[m]);
    }
  }
}

template <typename T, int kTokens>
__device__ void add_adapters(const Problem& p, const Adapters& adapters, int64_t row, int64_t first,
                             int lane, float (&sums)[kTokens]) {
  int64_t start = 0;
  for (int i = 0; i < adapters.count; ++i) {
    const int64_t rank = adapters.rank[i];
    for (int64_t r = lane; r < rank; r += 32) {
      const float b = side_value<T>(adapters.b[i], adapters.wide[i], row * rank + r);
      const float* hidden = p.hidden + first * adapters.total_rank + start + r;
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        if (first + m < p.m) sums[m] = fmaf(b, hidden[m * adapters.total_rank], sums[m]);
      }
    }
    start += rank;
  }
}

template <typename T>
__device__ void finish(const Problem& p, int64_t row, int64_t token, float value) {
  if (p.table) {
    const int32_t index = p.row_index[token];
    if (index >= 0 && index < p.rows) {
      value += p.table[index * p.n + row];
    } else if (index != -1 && row == 0) {
      atomicOr(p.errors, kRowOutOfRange);
    }
  }
  if (p.bias) value += p.bias[row];
  put(static_cast<T*>(p.out) + token * p.n + row, value);
}

template <typename T, int kTokens>
__global__ void __launch_bounds__(32 * kWarps) decode(Problem p, Adapters adapters) {
  __shared__ float code[16];
  if (threadIdx.x < 16) code[threadIdx.x] = kCode[threadIdx.x];
  __syncthreads();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int lane = threadIdx.x % 32;
  if (row >= p.n) return;
  float sums[kTokens] = {};
  add_weight<T, kTokens>(p, code, row, first, lane, sums);
  add_adapters<T, kTokens>(p, adapters, row, first, lane, sums);
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    const float value = warp_sum(sums[m]);
    if (lane == 0 && first + m < p.m) finish<T>(p, row, first + m, value);
  }
}

template <typename T>
int launch(const Problem& p, const Adapters& adapters, cudaStream_t stream) {
  const dim3 threads(32 * kWarps);
  if (adapters.total_rank > 0) {
    const auto blocks = static_cast<unsigned>((adapters.total_rank + kWarps - 1) / kWarps);
    shrink<T><<<blocks, threads, 0, stream>>>(p, adapters);
  }
  const auto rows = static_cast<unsigned>((p.n + kWarps - 1) / kWarps);
  if (p.m == 1) {
    decode<T, 1><<<dim3(rows, 1), threads, 0, stream>>>(p, adapters);
  } else if (p.m <= 4) {
    decode<T, 4><<<dim3(rows, 1), threads, 0, stream>>>(p, adapters);
  } else {
    const auto groups = static_cast<unsigned>((p.m + 7) / 8);
    decode<T, 8><<<dim3(rows, groups), threads, 0, stream>>>(p, adapters);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

// pointers: x, packed, absmax, nested_absmax, nested_code, offset, mask, table, row_index, bias,
//   errors, hidden, out; null where absent.
// sizes: m, n, k, table rows, log2 of the block size, adapters, dtype (1 bfloat16, 2 float16).
// adapters: a, b, rank, wide of each, as int64; scaling beside it.
// Needs k % 64 == 0, blocks of at least 64, x and packed aligned to 16 and 8 bytes.
extern "C" int collavo_qlora_linear_decode(void* const* pointers, const int64_t* sizes,
                                           const int64_t* adapters, const float* scaling,
                                           void* stream) {
  Problem p{};
  p.x = pointers[0];
  p.packed = static_cast<const uint8_t*>(pointers[1]);
  p.absmax = pointers[2];
  p.nested_absmax = static_cast<const float*>(pointers[3]);
  p.nested_code = static_cast<const float*>(pointers[4]);
  p.offset = static_cast<const float*>(pointers[5]);
  p.mask = static_cast<const uint8_t*>(pointers[6]);
  p.table = static_cast<const float*>(pointers[7]);
  p.row_index = static_cast<const int32_t*>(pointers[8]);
  p.bias = static_cast<const float*>(pointers[9]);
  p.errors = static_cast<int32_t*>(pointers[10]);
  p.hidden = static_cast<float*>(pointers[11]);
  p.out = pointers[12];
  p.m = sizes[0];
  p.n = sizes[1];
  p.k = sizes[2];
  p.rows = sizes[3];
  p.block_shift = static_cast<int>(sizes[4]);
  Adapters list{};
  list.count = static_cast<int>(sizes[5]);
  if (list.count > kMaxAdapters) return static_cast<int>(cudaErrorInvalidValue);
  for (int i = 0; i < list.count; ++i) {
    list.a[i] = reinterpret_cast<const void*>(adapters[4 * i]);
    list.b[i] = reinterpret_cast<const void*>(adapters[4 * i + 1]);
    list.rank[i] = adapters[4 * i + 2];
    list.wide[i] = adapters[4 * i + 3] != 0;
    list.scaling[i] = scaling[i];
    list.total_rank += list.rank[i];
  }
  const auto on = static_cast<cudaStream_t>(stream);
  return sizes[6] == 1 ? launch<__nv_bfloat16>(p, list, on) : launch<__half>(p, list, on);
}
