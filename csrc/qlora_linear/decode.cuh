// y = W x + B hidden + table + bias for up to 16 tokens; the packed weight is streamed once.
//
// A warp serves kRowTiles * 16 rows and a share of K, in chunks of 128 columns: the four lanes of a
// row load 16 bytes each, 32 codes. Lanes t and t ^ 2 then exchange halves, so that all four lanes
// hold quarters of the same block, whose one scale can multiply the products' float32 sum: weights
// are exact codes, rounded to x's type, and meet no other rounding. A byte becomes two weights by
// one look-up in a table that each lane has a copy of in its own bank.
#pragma once

#include "qlora_linear/nf4_code.h"
#include "qlora_linear/shrink.cuh"

namespace {

constexpr int kChunk = 2 * kBlock;
constexpr int kTableBytes = 256 * 32 * sizeof(uint32_t);
constexpr int kCodeBytes = 256 * sizeof(float);

__constant__ float kCode[16] = {COLLAVO_NF4_CODE};

// Tiles of 16 rows that a warp serves: what it reads of x serves all of them, and more of them take
// more registers than two blocks on a processor have.
constexpr int kRowTiles = 2;
// Chunks that a warp has requested before it needs them; x of 16 tokens leaves registers for one.
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
  int window;  // chunks of x and of scales that shared memory holds
};

template <typename T>
__device__ void build_table(uint4* table) {
#pragma unroll 1
  for (int i = threadIdx.x; i < 256 * 8; i += kThreads) {
    const int byte = i / 8;
    const uint32_t both = pack<T>(kCode[byte >> 4], kCode[byte & 15]);
    table[i] = make_uint4(both, both, both, both);
  }
}

// The two weights of a byte of a word; `table` is the address of the lane's copy.
__device__ __forceinline__ uint32_t look_up(uint32_t table, uint32_t word, int byte) {
  return load_shared(table + byte_of(word, byte) * (32 * sizeof(uint32_t)));
}

// Scales of whole chunks: [chunk][block of 2][row tile][8] pairs of rows g and g + 8. `code` is the
// second quantisation's table in shared memory. Loads come in batches: they take long.
template <int kRows>
__device__ void stage_scales(float* to, const float* code, const Weight& w, int64_t row,
                             int first_block, int blocks) {
  constexpr int kBatch = 6;
  const float offset = w.nested_absmax ? *w.offset : 0.0f;
#pragma unroll 1
  for (int start = threadIdx.x; start < kRows * blocks; start += kBatch * kThreads) {
    float outer[kBatch];
    int slot[kBatch], inner[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = start + i * kThreads, r = index / blocks, block = index % blocks;
      const int64_t column = static_cast<int64_t>(first_block + block) * kBlock;
      slot[i] = index < kRows * blocks
                    ? (block * (kRows / 16) + r / 16) * 16 + r % 8 * 2 + r / 8 % 2
                    : -1;
      inner[i] = -1;
      outer[i] = 0.0f;
      if (slot[i] < 0 || row + r >= w.n || column >= w.k) continue;
      const int64_t scale = ((row + r) * w.k + column) >> w.block_shift;
      if (w.nested_absmax) {
        inner[i] = static_cast<const uint8_t*>(w.absmax)[scale];
        outer[i] = w.nested_absmax[scale >> 8];
      } else {
        outer[i] = static_cast<const float*>(w.absmax)[scale];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (slot[i] < 0) continue;
      to[slot[i]] = inner[i] < 0 ? outer[i] : nested_scale(code[inner[i]], outer[i], offset);
    }
  }
}

// Where a lane's codes lie: its row of the warp's first tile, and how many rows follow it in the
// matrix. Rows beyond it repeat the last one and are dropped in the end; columns beyond it repeat
// the last ones and meet zeros of x.
struct Codes {
  const uint8_t* row;
  int bytes;  // of a row
  int left;

  __device__ Codes(const Weight& w, int64_t wanted) : bytes(static_cast<int>(w.k / 2)), left(0) {
    const int64_t last = w.n - 1, first = wanted < last ? wanted : last;
    row = w.packed + first * bytes;
    left = static_cast<int>(last - first < 64 ? last - first : 64);
  }

  // Rows g and g + 8 of each tile.
  __device__ __forceinline__ void load(int chunk, uint4 (&codes)[kRowTiles][2]) const {
    const int wanted = chunk * (kChunk / 2) + threadIdx.x % 4 * 16;
    const uint8_t* column = row + (wanted < bytes ? wanted : bytes - 16);
    const int stride = recomputed(bytes);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      // Of a few rows: 32 bits are enough.
      const int down = 8 * i < left ? 8 * i : left;
      codes[i / 2][i % 2] = load_streamed(column + static_cast<uint32_t>(down * stride));
    }
  }
};

// Lane t keeps a quarter of its own block and gets one of the block of lane t ^ 2.
__device__ __forceinline__ void share_codes(const uint4& codes, uint32_t (&blocks)[2][2]) {
  const bool second = threadIdx.x & 2;
  const uint32_t first = exchange(second ? codes.x : codes.z, 2);
  const uint32_t next = exchange(second ? codes.y : codes.w, 2);
  blocks[0][0] = second ? first : codes.x;
  blocks[0][1] = second ? next : codes.y;
  blocks[1][0] = second ? codes.z : first;
  blocks[1][1] = second ? codes.w : next;
}

// sums += scale * (16 rows x 64 codes) * x
template <typename T, int kTokenTiles>
__device__ __forceinline__ void add_block(uint32_t table, const uint32_t (&above)[2],
                                          const uint32_t (&below)[2], float2 scale,
                                          const uint32_t (&x)[kTokenTiles][8],
                                          float (&sums)[kTokenTiles][4]) {
  float fresh[kTokenTiles][4] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int word = step / 2, byte = step % 2 * 2;
    const uint32_t a[4] = {look_up(table, above[word], byte), look_up(table, below[word], byte),
                           look_up(table, above[word], byte + 1),
                           look_up(table, below[word], byte + 1)};
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      multiply_add<T>(fresh[i], a, x[i][2 * step], x[i][2 * step + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    sums[i][0] = fmaf(scale.x, fresh[i][0], sums[i][0]);
    sums[i][1] = fmaf(scale.x, fresh[i][1], sums[i][1]);
    sums[i][2] = fmaf(scale.y, fresh[i][2], sums[i][2]);
    sums[i][3] = fmaf(scale.y, fresh[i][3], sums[i][3]);
  }
}

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
  const int chunks = static_cast<int>((p.weight.k + kChunk - 1) / kChunk);
  const int end = share_of(chunks, rank + 1, size);

  float sums[kRowTiles][kTokenTiles][4] = {};
  uint4 codes[kAhead][kRowTiles][2];
  int start = share_of(chunks, rank, size);
  // Of the window at `start`: its chunks, and the warp's share of them, which it requests.
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
    for (int chunk = first; chunk < last; chunk += kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int here = chunk + ahead;
        if (here >= last) break;
        uint32_t shared[kRowTiles][2][2][2];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          share_codes(codes[ahead][r][0], shared[r][0]);
          share_codes(codes[ahead][r][1], shared[r][1]);
        }
        if (here + kAhead < last) source.load(start + here + kAhead, codes[ahead]);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          // Keeps the compiler from starting the next block's look-ups: they take too many
          // registers.
          __syncwarp();
          const int at = 2 * here + block;
          uint32_t x[kTokenTiles][8];
          read_x<kTokenTiles>(staged + at * kXVectors<kTokenTiles>, x);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            const int slot = (at * (S::kRows / 16) + tile + r) * 8 + g;
            add_block<T, kTokenTiles>(table, shared[r][0][block], shared[r][1][block],
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
