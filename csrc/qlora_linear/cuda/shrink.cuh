// hidden = gate * scaling * A x for all adapters in one launch, rounded to x's type.
//
// A cluster serves 16 rows of one adapter's A; its blocks and their warps share K out.
#pragma once

#include "qlora_linear/cuda/products.cuh"

namespace {

constexpr int kRankTile = 16;

// hidden is [8 * token tiles, padded]: every adapter's ranks are padded to whole tiles, with zeros,
// and so are the tokens: who reads it needs no bounds.
struct Shrink {
  const void* x;        // [m, k]
  const uint8_t* mask;  // [m] or null
  void* hidden;
  int64_t m, k, padded;
  int window;  // chunks of x that shared memory holds
};

__host__ __device__ inline int64_t rank_tiles(int64_t rank) {
  return ceil_divide(rank, kRankTile);
}

// A lane's 16 neighbours of a row, as 8 pairs.
template <typename T>
__device__ __forceinline__ void read_side(const Side& side, int64_t first, uint32_t (&pairs)[8]) {
  if (side.wide) {
    const float4* from =
        reinterpret_cast<const float4*>(static_cast<const float*>(side.values) + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = from[i];
      pairs[2 * i] = pack<T>(four.x, four.y);
      pairs[2 * i + 1] = pack<T>(four.z, four.w);
    }
  } else {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(side.values) + first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 eight = from[i];
      pairs[4 * i] = eight.x;
      pairs[4 * i + 1] = eight.y;
      pairs[4 * i + 2] = eight.z;
      pairs[4 * i + 3] = eight.w;
    }
  }
}

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads) shrink(Shrink p, Adapters adapters) {
  constexpr int kTokens = 8 * kTokenTiles;
  let_next_start();
  const int size = cluster_size();
  int64_t tile = blockIdx.x / size;
  const int64_t column = tile * kRankTile;
  int index = 0;
  while (tile >= rank_tiles(adapters.rank[index])) tile -= rank_tiles(adapters.rank[index++]);
  const int64_t row = tile * kRankTile, rows = adapters.rank[index];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  // Rows beyond the rank repeat the last one and are dropped in the end.
  const int64_t low = (row + g < rows ? row + g : rows - 1) * p.k + 16 * quarter(t);
  const int64_t high = (row + g + 8 < rows ? row + g + 8 : rows - 1) * p.k + 16 * quarter(t);

  float sums[kTokenTiles][4] = {};
  auto* staged = reinterpret_cast<uint4*>(shared_memory());
  const int chunks = static_cast<int>(p.k / kChunk);
  const int first = share_of(chunks, cluster_rank(), size);
  const int last = share_of(chunks, cluster_rank() + 1, size);
  for (int start = first; start < last; start += p.window) {
    const int count = last - start < p.window ? last - start : p.window;
    __syncthreads();
    stage_x<kTokenTiles>(staged, p.x, p.m, p.k, start, count);
    copy_async_wait();
    __syncthreads();
    for (int chunk = warp; chunk < count; chunk += kWarps) {
      uint32_t x[kTokenTiles][8], above[8], below[8];
      read_side<T>(adapters.a[index], low + (start + chunk) * int64_t{kChunk}, above);
      read_side<T>(adapters.a[index], high + (start + chunk) * int64_t{kChunk}, below);
      read_x<kTokenTiles>(staged + chunk * kXVectors<kTokenTiles>, x);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t a[4] = {above[2 * step], below[2 * step], above[2 * step + 1],
                               below[2 * step + 1]};
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          multiply_add<T>(sums[i], a, x[i][2 * step], x[i][2 * step + 1]);
        }
      }
    }
  }
  __syncthreads();
  auto* partial = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    put_partial<kRankTile>(partial + warp * kTokens * kPaddedRows<kRankTile>, 0, 8 * i, sums[i]);
  }
  const float scaling = adapters.scaling[index];
  finish<kTokens, kRankTile, kWarps>(partial, kTokens, [&](int r, int token, float sum) {
    const bool active = token < p.m && row + r < rows && (!p.mask || (p.mask[token] >> index & 1));
    put(static_cast<T*>(p.hidden) + token * p.padded + column + r, active ? sum * scaling : 0.0f);
  });
}

}  // namespace
