// The order in which kernels for a few tokens read an NF4 weight: panels of 16 rows.
//
//   panel  rows 16 p to 16 p + 15, tiles in the order of the columns
//   tile   64 columns: 16 float32 scales, one per row, then 8 lines of codes, 576 bytes in all
//   line   8 columns: of every row the 4 bytes that bitsandbytes stores for them
//
// So a tile is its rows' bytes transposed four at a time, and a 64-byte vector holds one dword for
// each of 16 rows: sums need no reduction across lanes, and the scales of a tile come with its
// codes in one stream. Rows behind the matrix have scale 0. A weight that lies in rows is brought
// into this order a few tiles at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/integers.h"
#include "qlora_linear/qlora_linear.h"
#include "qlora_linear/scales.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kChunk = 64;
constexpr int64_t kLine = 64;
constexpr int64_t kLines = 8;
constexpr int64_t kScaleBytes = kPanel * sizeof(float);
constexpr int64_t kTile = kScaleBytes + kLines * kLine;

// Tiles that are gathered at once from a weight in rows.
constexpr int64_t kRun = 8;

inline int64_t panels_of(int64_t rows) {
  return ceil_divide(rows, kPanel);
}

// The values that meet a chunk in a product's order: eight to eight.
template <typename T>
inline void arrange_floats(const int (&order)[8], const T* from, float* to) {
  for (int64_t i = 0; i < kChunk; i += 8) {
    for (int64_t j = 0; j < 8; ++j) to[i + j] = to_float(from[i + order[j]]);
  }
}

// Tiles of a weight in either order. Needs columns % 64 == 0 and block_size >= 64.
class Tiles {
 public:
  explicit Tiles(const NF4& weight)
      : weight_(weight), scales_(weight), chunks_(weight.columns / kChunk) {}

  // `count` tiles of a panel from tile `first` on; `room` has space for them.
  const uint8_t* get(int64_t panel, int64_t first, int64_t count, uint8_t* room) const {
    if (weight_.in_panels) return weight_.packed + (panel * chunks_ + first) * kTile;
    int64_t t = 0;
    if constexpr (kTransposed > 0) {
      const bool whole = (panel + 1) * kPanel <= weight_.rows;
      for (; whole && t + kTransposed <= count; t += kTransposed) {
        transpose_tiles(panel, first + t, room + t * kTile);
      }
    }
    for (; t < count; ++t) gather(panel, first + t, room + t * kTile);
    return room;
  }

  // How many tiles are worth asking for at once.
  int64_t run(int64_t most) const { return weight_.in_panels ? chunks_ : most; }

  int64_t chunks() const { return chunks_; }

 private:
  // Tiles that a vector's dwords of a row reach over.
  static constexpr int64_t kTransposed = kLanes / kLines;

  // Tiles of a panel that has all its rows: squares of dwords are transposed in registers.
  void transpose_tiles(int64_t panel, int64_t chunk, uint8_t* tile) const {
    const int64_t element = panel * kPanel * weight_.columns + chunk * kChunk;
    for (int64_t t = 0; t < kTransposed; ++t) {
      for (int64_t r = 0; r < kPanel; ++r) {
        const float scale = scales_.at(element + r * weight_.columns + t * kChunk);
        std::memcpy(tile + t * kTile + r * sizeof(float), &scale, sizeof(float));
      }
    }
    for (int64_t first = 0; first < kPanel; first += kLanes) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t at = element + (first + i) * weight_.columns;
        square[i] = load(reinterpret_cast<const float*>(weight_.packed + at / 2));
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) {
        uint8_t* line = tile + i / kLines * kTile + kScaleBytes + i % kLines * kLine;
        store(reinterpret_cast<float*>(line) + first, square[i]);
      }
    }
  }

  void gather(int64_t panel, int64_t chunk, uint8_t* tile) const {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t row = panel * kPanel + r;
      const bool real = row < weight_.rows;
      const int64_t element = row * weight_.columns + chunk * kChunk;
      const float scale = real ? scales_.at(element) : 0.0f;
      std::memcpy(tile + r * sizeof(float), &scale, sizeof(float));
      uint8_t* to = tile + kScaleBytes + 4 * r;
      const uint8_t* from = weight_.packed + element / 2;
      for (int64_t line = 0; line < kLines; ++line) {
        uint32_t codes = 0x77777777u;
        if (real) std::memcpy(&codes, from + 4 * line, sizeof(codes));
        std::memcpy(to + line * kLine, &codes, sizeof(codes));
      }
    }
  }

  const NF4& weight_;
  Scales scales_;
  int64_t chunks_;
};

}  // namespace

}  // namespace collavo::qlora_linear
