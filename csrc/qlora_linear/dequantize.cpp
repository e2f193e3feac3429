#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "qlora_linear/panels.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

float weight_at(const NF4& weight, int64_t element) {
  const uint8_t pair = weight.packed[element / 2];
  return kNF4Code[element % 2 ? pair & 15 : pair >> 4];
}

// Elements [first, last) of the flattened matrix; they share no boundary with rows.
template <typename T>
void dequantize_run(const NF4& weight, const Scales& scales, int64_t first, int64_t last, T* out) {
  const Decoder decoder;
  while (first < last) {
    const int64_t stop = std::min(last, scales.block_end(first));
    const float scale = scales.at(first);
    if (first % 2) from_float(weight_at(weight, first++) * scale, out++);
#if defined(__AVX2__)
    const Vec scale_vector = broadcast(scale);
    for (; first + kLanes <= stop; first += kLanes, out += kLanes) {
      store(out, decoder.ordered(weight.packed + first / 2, scale_vector));
    }
#endif
    for (; first + 2 <= stop; first += 2, out += 2) {
      const uint8_t pair = weight.packed[first / 2];
      from_float(kNF4Code[pair >> 4] * scale, out);
      from_float(kNF4Code[pair & 15] * scale, out + 1);
    }
    if (first < stop) from_float(weight_at(weight, first++) * scale, out++);
  }
  (void)decoder;
}

// The codes of a row in a tile, in the order of the row.
inline void row_codes(const uint8_t* tile, int64_t row, uint8_t (&codes)[kChunk / 2]) {
  const uint8_t* from = tile + kScaleBytes + 4 * row;
  for (int64_t line = 0; line < kLines; ++line) {
    std::memcpy(codes + 4 * line, from + line * kLine, 4);
  }
}

// Whole tiles of one row of a weight in panels.
template <typename T>
void dequantize_tiles(const NF4& weight, int64_t row, int64_t column_begin, int64_t column_end,
                      T* out) {
  const Decoder decoder;
  const int64_t chunks = weight.columns / kChunk;
  const uint8_t* tile = weight.packed + row / kPanel * chunks * kTile;
  tile += column_begin / kChunk * kTile;
  for (int64_t k = column_begin; k < column_end; k += kChunk, tile += kTile) {
    float scale;
    std::memcpy(&scale, tile + row % kPanel * sizeof(float), sizeof(scale));
    uint8_t codes[kChunk / 2];
    row_codes(tile, row % kPanel, codes);
    const Vec wide = broadcast(scale);
#if defined(__AVX2__)
    for (int64_t i = 0; i < kChunk; i += kLanes, out += kLanes) {
      store(out, decoder.ordered(codes + i / 2, wide));
    }
#else
    for (int64_t i = 0; i < kChunk; i += 2, out += 2) {
      Vec high, low;
      decoder.split(codes + i / 2, wide, &high, &low);
      from_float(high, out);
      from_float(low, out + 1);
    }
#endif
  }
}

template <typename T>
void dequantize_strip(const DequantizeArgs& args, T* out) {
  const Scales scales(args.weight);
  const int64_t width = args.column_end - args.column_begin;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1));
  parallel_for(args.row_end - args.row_begin, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (args.weight.in_panels) {
        dequantize_tiles(args.weight, args.row_begin + i, args.column_begin, args.column_end,
                         out + i * args.row_stride);
        continue;
      }
      const int64_t start = (args.row_begin + i) * args.weight.columns;
      dequantize_run(args.weight, scales, start + args.column_begin, start + args.column_end,
                     out + i * args.row_stride);
    }
  });
}

}  // namespace

namespace COLLAVO_ISA {

void dequantize(const DequantizeArgs& args) {
  with_type(args.dtype, args.out, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    dequantize_strip(args, static_cast<T*>(args.out));
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear
