// A few tokens: the weight is decoded in registers, once for up to 16 tokens, with adapters, table
// and bias in the same pass.
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "common/integers.h"
#include "common/parallel.h"
#include "qlora_linear/adapters.h"
#include "qlora_linear/byte_product.h"
#include "qlora_linear/panel_product.h"
#include "qlora_linear/panels.h"
#include "qlora_linear/simd.h"

namespace collavo::qlora_linear {

namespace {

// Tokens in groups of almost equal size, none above 16.
struct Groups {
  int64_t tokens, count;

  explicit Groups(int64_t all) : tokens(all), count(ceil_divide(all, kMostTokens)) {}
  int64_t begin(int64_t group) const { return tokens * group / count; }
};

// x in the order of the product: by group, chunk of 64 columns and token.
template <typename Product, typename T>
void arrange(const T* x, const Groups& groups, int64_t columns, typename Product::X* to) {
  const int64_t chunks = columns / kChunk;
  const int64_t grain = std::max<int64_t>(1, 512 / groups.tokens);
  parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t first = groups.begin(g), count = groups.begin(g + 1) - first;
      for (int64_t i = begin; i < end; ++i) {
        auto* chunk = to + (first * chunks + i * count) * Product::kPerChunk;
        for (int64_t m = 0; m < count; ++m) {
          Product::arrange(x + (first + m) * columns + i * kChunk, chunk + m * Product::kPerChunk);
        }
      }
    }
  });
}

template <typename Product, int kTokens>
void run_panel(const Tiles& tiles, int64_t panel, const typename Product::X* x, float* sums) {
  alignas(64) uint8_t room[kRun * kTile];
  const int64_t step = tiles.run(kRun);
  for (int64_t first = 0; first < tiles.chunks(); first += step) {
    const int64_t count = std::min(step, tiles.chunks() - first);
    Product::template run<kTokens>(tiles.get(panel, first, count, room), count,
                                   x + first * kTokens * Product::kPerChunk, sums);
  }
}

template <typename Product>
using PanelRunner = void (*)(const Tiles&, int64_t, const typename Product::X*, float*);

template <typename Product, size_t... kIndex>
constexpr std::array<PanelRunner<Product>, sizeof...(kIndex)> runners(
    std::index_sequence<kIndex...>) {
  return {run_panel<Product, kIndex + 1>...};
}

template <typename T>
void finish(const ForwardArgs& args, int64_t row, int64_t token, float* sums, T* out) {
  const int64_t rows = args.weight.rows, some = std::min(kPanel, rows - row);
  if (args.row_table && args.row_index[token] >= 0) {
    const float* table = args.row_table + args.row_index[token] * rows + row;
    for (int64_t r = 0; r < some; ++r) sums[r] += table[r];
  }
  if (args.bias) {
    for (int64_t r = 0; r < some; ++r) sums[r] += args.bias[row + r];
  }
  T* to = out + token * rows + row;
  if (some < kPanel) {
    for (int64_t r = 0; r < some; ++r) from_float(sums[r], to + r);
    return;
  }
  for (int64_t r = 0; r < kPanel; r += kLanes) store(to + r, load(sums + r));
}

template <typename Product, typename T>
void forward_with(const ForwardArgs& args, const T* x, T* out) {
  using X = typename Product::X;
  static constexpr auto kRunners = runners<Product>(std::make_index_sequence<kMostTokens>());
  const int64_t columns = args.weight.columns;
  int64_t slots = 0;
  for (int64_t i = 0; i < args.num_adapters; ++i) slots += slots_of(args.adapters[i].rank);
  X* arranged = reinterpret_cast<X*>(args.scratch);
  float* sums = args.scratch + args.tokens * columns;  // by panel and token
  float* wide = sums + args.tokens * panels_of(args.weight.rows) * kPanel;
  const Hidden hidden{wide, reinterpret_cast<BFloat16*>(wide + args.tokens * slots), slots};
  const Groups groups(args.tokens);
  arrange<Product>(x, groups, columns, arranged);
  shrink(args, x, hidden);
  const Tiles tiles(args.weight);
  const int64_t width = columns / kChunk * Product::kPerChunk;
  const int64_t grain = std::max<int64_t>(1, 65536 / (kPanel * columns));
  parallel_for(panels_of(args.weight.rows), grain, [&](int64_t begin, int64_t end) {
    // Nothing but codes is read until all of them are: a stream from memory that is interrupted
    // takes long to come up to speed again.
    const int64_t stride = args.tokens * kPanel;
    std::fill(sums + begin * stride, sums + end * stride, 0.0f);
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t first = groups.begin(g), count = groups.begin(g + 1) - first;
        kRunners[count - 1](tiles, panel, arranged + first * width,
                            sums + panel * stride + first * kPanel);
      }
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      float* of_panel = sums + panel * stride;
      expand(args, panel * kPanel, hidden, of_panel);
      for (int64_t m = 0; m < args.tokens; ++m) {
        finish(args, panel * kPanel, m, of_panel + m * kPanel, out);
      }
    }
  });
}

}  // namespace

namespace COLLAVO_ISA {

void forward(const ForwardArgs& args) {
  with_type(args.dtype, args.x, [&](const auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    T* out = static_cast<T*>(args.out);
#if defined(__AVX512VNNI__)
    if (args.int8_activations) return forward_with<ByteProduct>(args, x, out);
#endif
    forward_with<ProductOf<T>>(args, x, out);
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::qlora_linear
