// What both decoding kernels share: x in shared memory, and the sum over warps and blocks.
//
// y^T = W x^T on matrix units: 16 rows of W are the left operand, 8 tokens the right one. The sum
// over K may run in any order, so K is permuted within a chunk such that a lane owns 16
// neighbours: of the four lanes that share a row, lane t owns those at 16 * quarter(t).
#pragma once

#include "qlora_linear/cuda/operands.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 64;  // columns: the least that a scale covers

// Bits of 0..3 swapped: its own inverse. Two lanes that load 32 neighbours each own, after they
// have exchanged halves, a quarter of each of two chunks (see codes.cuh).
__device__ __forceinline__ int quarter(int t) {
  return (t & 1) * 2 + t / 2;
}

// Where share `index` of at most 8 of `count` units begins; the last one ends at share_of(units,
// of, of).
__device__ __forceinline__ int share_of(int units, int index, int of) {
  return units * index / of;
}

// Vectors of 16 bytes that a chunk of x takes: two for each lane and group of 8 tokens.
template <int kTokenTiles>
constexpr int kXVectors = 2 * 32 * kTokenTiles;

// Starts copies of `chunks` chunks of all tokens, in the order that lanes read them in; zeros
// beyond the tokens and beyond K. A warp copies two chunks of two tokens: eight neighbouring lanes
// write to all 32 banks.
template <int kTokenTiles>
__device__ void stage_x(uint4* to, const void* x, int64_t m, int64_t k, int first_chunk,
                        int chunks) {
  constexpr int kPairs = 4 * kTokenTiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = warp % kPairs * 2 + lane / 4 % 2, half = lane / 8 % 2;
  const uint16_t* from = static_cast<const uint16_t*>(x) + token * k + 16 * (lane % 4) + 8 * half;
  const int place = (token / 8 * 2 + half) * 32 + token % 8 * 4 + quarter(lane % 4);
#pragma unroll 1
  for (int chunk = warp / kPairs * 2 + lane / 16; chunk < chunks; chunk += 2 * kWarps / kPairs) {
    const int64_t column = static_cast<int64_t>(first_chunk + chunk) * kChunk;
    const bool live = token < m && column < k;
    copy_async(to + chunk * kXVectors<kTokenTiles> + place, live ? from + column : x, live);
  }
}

// A lane's part of a chunk: 16 values of each of its tokens, as 8 pairs.
template <int kTokenTiles>
__device__ __forceinline__ void read_x(const uint4* chunk, uint32_t (&x)[kTokenTiles][8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 pairs = chunk[(tile * 2 + half) * 32 + lane];
      x[tile][4 * half] = pairs.x;
      x[tile][4 * half + 1] = pairs.y;
      x[tile][4 * half + 2] = pairs.z;
      x[tile][4 * half + 3] = pairs.w;
    }
  }
}

// Partial sums in shared memory: [split][tokens][rows], rows padded so that a warp's stores meet no
// bank twice.
template <int kRows>
constexpr int kPaddedRows = kRows + 4;

template <int kTokens, int kRows, int kSplit>
constexpr size_t kPartialBytes = sizeof(float) * kSplit * kTokens * kPaddedRows<kRows>;

template <int kRows>
__device__ __forceinline__ void put_partial(float* of_split, int row, int token,
                                            const float (&sums)[4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* to = of_split + (token + 2 * t) * kPaddedRows<kRows> + row + g;
  to[0] = sums[0];
  to[kPaddedRows<kRows>] = sums[1];
  to[8] = sums[2];
  to[kPaddedRows<kRows> + 8] = sums[3];
}

// Adds the partial sums of a block's warps, then those of the cluster's blocks, each in one order,
// and calls store(row, token, sum): every block serves its share of the rows.
template <int kTokens, int kRows, int kSplit, typename Store>
__device__ void finish(float* partial, int tokens, const Store& store) {
  constexpr int kStride = kTokens * kPaddedRows<kRows>;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
    float* at = partial + i / kRows * kPaddedRows<kRows> + i % kRows;
    float sum = at[0];
#pragma unroll
    for (int split = 1; split < kSplit; ++split) sum += at[split * kStride];
    at[0] = sum;
  }
  cluster_sync();
  const int size = cluster_size(), share = kRows / size, first = cluster_rank() * share;
  for (int i = threadIdx.x; i < tokens * share; i += kThreads) {
    const int token = i / share, row = first + i % share;
    float sum = 0.0f;
    for (int rank = 0; rank < size; ++rank) {
      sum += cluster_read(partial + token * kPaddedRows<kRows> + row, rank);
    }
    store(row, token, sum);
  }
  // No block may end while another reads its shared memory. What was read has been stored.
  cluster_end();
}

}  // namespace
