// y = W x + B hidden + table + bias for up to 16 tokens; the packed weight is streamed once.
//
// A warp serves kRowTiles * 16 rows and a share of K, in slices of 128 columns. x and the scales of
// a window of K lie in shared memory.
#pragma once

#include "qlora_linear/cuda/codes.cuh"
#include "qlora_linear/cuda/shrink.cuh"

namespace {

// Slices that a warp has requested before it needs them; x of 16 tokens leaves registers for one.
template <int kTokenTiles>
constexpr int kAheadOf = kTokenTiles == 1 ? 2 : 1;

// A block has kRowWarps groups of warps that serve different rows; the warps of a group share K
// out. With four, x is read from L2 once for 128 rows, and clusters divide K further; with one,
// there are enough blocks without clusters.
template <int kRowWarps>
struct Shape {
  static constexpr int kSplit = kWarps / kRowWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
};

struct Decode {
  Weight weight;
  Epilogue epilogue;
  const void* x;       // [m, k]
  const void* hidden;  // as shrink leaves it
  void* out;           // [m, n]
  int64_t m, padded;
  int window;  // slices of x and of scales that shared memory holds
};

// Four neighbours of a row of B as two pairs; zeros beyond the rank. B begins at a multiple of 8
// bytes.
template <typename T>
__device__ __forceinline__ void read_four(const Side& side, int64_t row, int64_t rank,
                                          int64_t column, uint32_t (&pairs)[2]) {
  const int64_t first = row * rank + column;
  if (rank % 4 == 0 && !side.wide) {
    uint2 both = {0, 0};
    if (column < rank) {
      both = *reinterpret_cast<const uint2*>(static_cast<const T*>(side.values) + first);
    }
    pairs[0] = both.x;
    pairs[1] = both.y;
    return;
  }
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = column + i < rank ? value_at<T>(side, first + i) : 0.0f;
  }
  pairs[0] = pack<T>(values[0], values[1]);
  pairs[1] = pack<T>(values[2], values[3]);
}

// sums += B hidden; a step is 16 ranks of one adapter, steps are dealt out over all shares of K.
template <typename T, int kTokenTiles>
__device__ void add_adapters(const Decode& p, const Adapters& adapters, int64_t row, int share,
                             int shares, float (&sums)[kRowTiles][kTokenTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int64_t step = 0;
  for (int index = 0; index < adapters.count; ++index) {
    const int64_t rank = adapters.rank[index], end = step + rank_tiles(rank);
    const int64_t start = step;
    for (; step < end; ++step) {
      if (step % shares != share) continue;
      const int64_t column = (step - start) * kRankTile + 4 * t;
      uint32_t b[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t at = row + 16 * r + 8 * half + g;
          uint32_t pairs[2];
          read_four<T>(adapters.b[index], at < p.weight.n ? at : p.weight.n - 1, rank, column,
                       pairs);
          b[r][half] = pairs[0];
          b[r][half + 2] = pairs[1];
        }
      }
      // Only here the kernel needs what shrink wrote.
      wait_for_previous();
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        const T* from = static_cast<const T*>(p.hidden) + (8 * i + g) * p.padded;
        const uint2 hidden = *reinterpret_cast<const uint2*>(from + step * kRankTile + 4 * t);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(sums[r][i], b[r], hidden.x, hidden.y);
        }
      }
    }
  }
}

template <typename T, int kRowWarps, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2) decode(Decode p, Adapters adapters) {
  using S = Shape<kRowWarps>;
  constexpr int kTokens = 8 * kTokenTiles, kAhead = kAheadOf<kTokenTiles>;
  auto* code = reinterpret_cast<float*>(shared_memory() + kTableBytes);
  auto* staged = reinterpret_cast<uint4*>(shared_memory() + kTableBytes + kCodeBytes);
  const uint32_t table = shared_address(shared_memory()) + threadIdx.x % 32 * sizeof(uint32_t);
  auto* scales = reinterpret_cast<float*>(staged + p.window * 2 * kXVectors<kTokenTiles>);
  const int size = cluster_size(), rank = cluster_rank();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int split = warp % S::kSplit, tile = warp / S::kSplit * kRowTiles;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) / size * S::kRows;
  const int64_t row = block_row + 16 * tile;
  const Codes source(p.weight, row + g);
  const int slices = static_cast<int>(ceil_divide(p.weight.k, kSlice));
  const int end = share_of(slices, rank + 1, size);

  float sums[kRowTiles][kTokenTiles][4] = {};
  uint4 codes[kAhead][kRowTiles][2];
  int start = share_of(slices, rank, size);
  // Of the window at `start`: its slices, and the warp's share of them, which it requests.
  int count, first, last;
  const auto request = [&] {
    count = end - start < p.window ? end - start : p.window;
    first = share_of(count, split, S::kSplit);
    last = share_of(count, split + 1, S::kSplit);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (first + ahead < last) source.load(start + first + ahead, codes[ahead]);
    }
  };
  request();
  build_table<T>(reinterpret_cast<uint4*>(shared_memory()));
  if (p.weight.nested_absmax) code[threadIdx.x] = p.weight.nested_code[threadIdx.x];
#pragma unroll 1
  while (start < end) {
    // Whoever is still at the window before has to end.
    __syncthreads();
    stage_x<kTokenTiles>(staged, p.x, p.m, p.weight.k, 2 * start, 2 * count);
    stage_scales<S::kRows>(scales, code, p.weight, block_row, 2 * start, 2 * count);
    copy_async_wait();
    __syncthreads();
#pragma unroll 1
    for (int slice = first; slice < last; slice += kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int here = slice + ahead;
        if (here >= last) break;
        uint32_t shared[kRowTiles][2][2][2];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          share_codes(codes[ahead][r][0], shared[r][0]);
          share_codes(codes[ahead][r][1], shared[r][1]);
        }
        if (here + kAhead < last) source.load(start + here + kAhead, codes[ahead]);
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          // Keeps the compiler from starting the next chunk's look-ups: they take too many
          // registers.
          __syncwarp();
          const int at = 2 * here + chunk;
          uint32_t x[kTokenTiles][8];
          read_x<kTokenTiles>(staged + at * kXVectors<kTokenTiles>, x);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            const int slot = (at * (S::kRows / 16) + tile + r) * 8 + g;
            add_chunk<T, kTokenTiles>(table, shared[r][0][chunk], shared[r][1][chunk],
                                      reinterpret_cast<const float2*>(scales)[slot], x, sums[r]);
          }
        }
      }
    }
    start += p.window;
    if (start < end) request();
  }
  add_adapters<T, kTokenTiles>(p, adapters, row, rank * S::kSplit + split, size * S::kSplit, sums);
  __syncthreads();
  auto* partial = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      put_partial<S::kRows>(partial + split * kTokens * kPaddedRows<S::kRows>, 16 * (tile + r),
                            8 * i, sums[r][i]);
    }
  }
  // Nothing is written before the kernel before has ended: it may read what lies at `out`.
  wait_for_previous();
  finish<kTokens, S::kRows, S::kSplit>(
      partial, static_cast<int>(p.m), [&](int r, int token, float sum) {
        const int64_t column = block_row + r;
        if (column >= p.weight.n) return;
        const int64_t from = table_row(p.epilogue, token, column == 0);
        const float value = sum + addition<T>(p.epilogue, from, p.weight.n, column);
        put(static_cast<T*>(p.out) + token * p.weight.n + column, value);
      });
}

}  // namespace
