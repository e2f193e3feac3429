// The packed weight on its way to the matrix units: how codes are loaded, looked up and scaled.
//
// The four lanes of a row load 16 bytes each, 32 codes. Lanes t and t ^ 2 then exchange halves, so
// that all four lanes hold quarters of the same chunk, whose one scale can multiply the products'
// float32 sum: weights are exact codes, rounded to x's type, and meet no other rounding. A byte
// becomes two weights by one look-up in a table that each lane has a copy of in its own bank.
#pragma once

#include "qlora_linear/cuda/products.cuh"
#include "qlora_linear/nf4_code.h"

namespace {

constexpr int kSlice = 2 * kChunk;  // columns that the four lanes of a row load together
constexpr int kTableBytes = 256 * 32 * sizeof(uint32_t);
constexpr int kCodeBytes = 256 * sizeof(float);

__constant__ float kCode[16] = {COLLAVO_NF4_CODE};

// Tiles of 16 rows that a warp serves: what it reads of x serves all of them, and more of them take
// more registers than two blocks on a processor have.
constexpr int kRowTiles = 2;

// [256][32]: the weights of every byte, once per bank.
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

// Scales of whole slices: [slice][chunk of 2][row tile][8] pairs of rows g and g + 8. `code` is the
// second quantisation's table in shared memory. Loads come in batches: they take long.
template <int kRows>
__device__ void stage_scales(float* to, const float* code, const Weight& w, int64_t row,
                             int first_chunk, int chunks) {
  constexpr int kBatch = 6;
  const float offset = w.nested_absmax ? *w.offset : 0.0f;
#pragma unroll 1
  for (int start = threadIdx.x; start < kRows * chunks; start += kBatch * kThreads) {
    float outer[kBatch];
    int slot[kBatch], inner[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = start + i * kThreads, r = index / chunks, chunk = index % chunks;
      const int64_t column = static_cast<int64_t>(first_chunk + chunk) * kChunk;
      slot[i] = index < kRows * chunks
                    ? (chunk * (kRows / 16) + r / 16) * 16 + r % 8 * 2 + r / 8 % 2
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
  __device__ __forceinline__ void load(int slice, uint4 (&codes)[kRowTiles][2]) const {
    const int wanted = slice * (kSlice / 2) + threadIdx.x % 4 * 16;
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

// Lane t keeps a quarter of its own chunk and gets one of the chunk of lane t ^ 2.
__device__ __forceinline__ void share_codes(const uint4& codes, uint32_t (&chunks)[2][2]) {
  const bool second = threadIdx.x & 2;
  const uint32_t first = exchange(second ? codes.x : codes.z, 2);
  const uint32_t next = exchange(second ? codes.y : codes.w, 2);
  chunks[0][0] = second ? first : codes.x;
  chunks[0][1] = second ? next : codes.y;
  chunks[1][0] = second ? codes.z : first;
  chunks[1][1] = second ? codes.w : next;
}

// sums += scale * (16 rows x 64 codes) * x
template <typename T, int kTokenTiles>
__device__ __forceinline__ void add_chunk(uint32_t table, const uint32_t (&above)[2],
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

}  // namespace
