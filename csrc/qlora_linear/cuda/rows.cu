// A table's rows and a bias added to an output, and gradients summed over the tokens of each row.

#include "qlora_linear/cuda/operands.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 4;   // of a thread
constexpr int kTogether = 8;  // tokens whose loads are under way together

struct Rows {
  Epilogue epilogue;
  const void* grad;  // [m, n]
  void* out;         // [m, n]; of sum_rows: float32 [rows, n]
  int64_t m, n;
};

// Four neighbours, by one load where the row length allows it.
template <typename T>
struct alignas(kColumns * sizeof(T)) Four {
  T values[kColumns];
};

template <typename T>
__device__ __forceinline__ Four<T> load_four(const T* from, int64_t left, bool whole) {
  if (whole) return *reinterpret_cast<const Four<T>*>(from);
  Four<T> four;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) four.values[i] = from[i < left ? i : 0];
  return four;
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, const Four<T>& four, int64_t left, bool whole) {
  if (whole) {
    *reinterpret_cast<Four<T>*>(to) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (i < left) to[i] = four.values[i];
  }
}

// A block of add_rows serves one token, one of sum_rows one row of the table, and 512 columns.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_rows(Rows p, bool whole) {
  const int64_t token = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kColumns;
  const int64_t row = table_row(p.epilogue, token, column == 0);
  if (column >= p.n || (row < 0 && !p.epilogue.bias.values)) return;
  T* at = static_cast<T*>(p.out) + token * p.n + column;
  Four<T> four = load_four(at, p.n - column, whole);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (column + i >= p.n) break;
    put(&four.values[i], as_float(four.values[i]) + addition<T>(p.epilogue, row, p.n, column + i));
  }
  store_four(at, four, p.n - column, whole);
}

// The next kThreads tokens' share of a row: which of them have it, in their order. Whoever still
// reads the tokens before holds up the first barrier.
__device__ int collect(const Epilogue& e, int64_t token, int64_t m, int64_t row, bool reports,
                       int32_t* tokens, int* counts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool hit = token < m && table_row(e, token, reports) == row;
  const uint32_t votes = vote(hit);
  if (lane == 0) counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0, total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    before += i < warp ? counts[i] : 0;
    total += counts[i];
  }
  if (hit) tokens[before + __popc(votes & ((1u << lane) - 1))] = static_cast<int32_t>(threadIdx.x);
  __syncthreads();
  return total;
}

// out[row] = sum of grad over the row's tokens, in their order. A thread owns its columns, so no
// two threads add to one number; tokens of other rows are never read.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_rows(Rows p, bool whole) {
  auto* tokens = reinterpret_cast<int32_t*>(shared_memory());
  int* counts = tokens + kThreads;
  const int64_t row = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kColumns;
  const bool reports = row == 0 && blockIdx.y == 0;
  const T* grad = static_cast<const T*>(p.grad) + column;
  float sums[kColumns] = {};
  for (int64_t start = 0; start < p.m; start += kThreads) {
    const int count = collect(p.epilogue, start + threadIdx.x, p.m, row, reports, tokens, counts);
    if (column < p.n) {
      for (int first = 0; first < count; first += kTogether) {
        Four<T> values[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          // Beyond the last token the last one is loaded again and not added.
          const int at = first + i < count ? first + i : count - 1;
          values[i] = load_four(grad + (start + tokens[at]) * p.n, p.n - column, whole);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (first + i >= count) break;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[j] += as_float(values[i].values[j]);
        }
      }
    }
  }
  if (column >= p.n) return;
  Four<float> four;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) four.values[j] = sums[j];
  const bool aligned = p.n % kColumns == 0;
  store_four(static_cast<float*>(p.out) + row * p.n + column, four, p.n - column, aligned);
}

template <typename T>
int launch_rows(const Rows& p, bool sums, void* stream) {
  Launch how{};
  constexpr int64_t kPerBlock = kThreads * kColumns;
  const int64_t groups = ceil_divide(p.n, kPerBlock), first = sums ? p.epilogue.table_rows : p.m;
  if (groups > 65535 || first > INT32_MAX || p.m > INT32_MAX) return cudaErrorInvalidValue;
  how.grid = dim3(static_cast<unsigned>(first), static_cast<unsigned>(groups));
  how.threads = kThreads;
  how.shared = (kThreads + kThreads / 32) * sizeof(int);
  const auto address = reinterpret_cast<uintptr_t>(sums ? p.grad : p.out);
  const bool whole = p.n % kColumns == 0 && address % (kColumns * sizeof(T)) == 0;
  return sums ? launch(how, stream, sum_rows<T>, p, whole)
              : launch(how, stream, add_rows<T>, p, whole);
}

int launch_dtype(const Rows& p, bool sums, int64_t dtype, void* stream) {
  if (p.m < 1 || p.n < 1 || (sums && p.epilogue.table_rows < 1)) return cudaErrorInvalidValue;
  if (dtype == kFloat32) return launch_rows<float>(p, sums, stream);
  if (dtype == kBfloat16) return launch_rows<__nv_bfloat16>(p, sums, stream);
  if (dtype == kFloat16) return launch_rows<__half>(p, sums, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

// out += row_table[row_index] + bias
extern "C" int collavo_qlora_linear_add_rows(const AddRowsArguments* arguments, void* stream) {
  Rows p{};
  p.epilogue = epilogue_from(arguments->epilogue);
  p.out = arguments->out;
  p.m = arguments->m;
  p.n = arguments->n;
  return launch_dtype(p, false, arguments->dtype, stream);
}

// grad_row_table[row] = sum of grad_out over the tokens of the row, float32
extern "C" int collavo_qlora_linear_sum_rows(const SumRowsArguments* arguments, void* stream) {
  Rows p{};
  // Any address: rows are looked up, the table's values are not.
  p.epilogue.row_table.values = arguments->grad_out;
  p.epilogue.row_index = arguments->row_index;
  p.epilogue.errors = arguments->errors;
  p.epilogue.table_rows = arguments->table_rows;
  p.grad = arguments->grad_out;
  p.out = arguments->grad_row_table;
  p.m = arguments->m;
  p.n = arguments->n;
  return launch_dtype(p, true, arguments->dtype, stream);
}
