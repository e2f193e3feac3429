// A few tokens on a GPU, in two launches: shrink makes the adapters' hidden values, decode streams
// the packed weight and adds everything. From sm_90 on decode starts while shrink runs and waits
// for it only before it adds the adapters. Sums are float32 and run in one order.

#include <algorithm>

#include "qlora_linear/cuda/decode.cuh"

namespace {

struct Few {
  Decode decode;
  Shrink shrink;
  Adapters adapters;
  Device device;
  int64_t tiles;  // of ranks, of all adapters
};

// Offsets within a warp's rows of codes take 32 bits.
constexpr int64_t kMaxK = int64_t{1} << 25;

// The largest cluster whose blocks all run at once, two on a processor, as long as each has `least`
// units of K: the blocks of a second wave would have the processors to themselves.
int cluster_for(const Device& device, int64_t groups, int64_t units, int64_t least) {
  const int64_t room = 2 * device.processors;
  int size = 1;
  while (device.clusters && size < 8 && 2 * size * groups <= room && units >= 2 * size * least) {
    size *= 2;
  }
  return size;
}

// Two blocks share a processor; the runtime keeps 1 KiB of shared memory for each.
int64_t shared_budget(const Device& device) {
  return device.shared_per_processor / 2 - 1024;
}

template <typename T, int kTokenTiles>
int launch_shrink(Few& few, void* stream) {
  Shrink& p = few.shrink;
  constexpr int64_t kBytes = 16 * kXVectors<kTokenTiles>;
  const int64_t chunks = p.k / kChunk;
  const int cluster = cluster_for(few.device, few.tiles, chunks, kWarps);
  const int64_t window = std::min(ceil_divide(chunks, cluster), shared_budget(few.device) / kBytes);
  p.window = static_cast<int>(window);
  Launch how{};
  how.grid = dim3(static_cast<unsigned>(few.tiles * cluster));
  how.threads = kThreads;
  how.cluster = cluster;
  how.shared = std::max<size_t>(static_cast<size_t>(window * kBytes),
                                kPartialBytes<8 * kTokenTiles, kRankTile, kWarps>);
  return launch(how, stream, shrink<T, kTokenTiles>, p, few.adapters);
}

template <typename T, int kRowWarps, int kTokenTiles>
int launch_decode(Few& few, void* stream) {
  using S = Shape<kRowWarps>;
  Decode& p = few.decode;
  // Of a slice: x, and the scales of its two chunks.
  constexpr int64_t kBytes = 2 * 16 * kXVectors<kTokenTiles> + 2 * sizeof(float) * S::kRows;
  const int64_t slices = ceil_divide(p.weight.k, kSlice),
                groups = ceil_divide(p.weight.n, S::kRows);
  const int cluster = cluster_for(few.device, groups, slices, S::kSplit);
  const int64_t room = (shared_budget(few.device) - kTableBytes - kCodeBytes) / kBytes;
  const int64_t window = std::min(ceil_divide(slices, cluster), room);
  p.window = static_cast<int>(window);
  Launch how{};
  how.grid = dim3(static_cast<unsigned>(groups * cluster));
  how.threads = kThreads;
  how.cluster = cluster;
  how.overlaps_previous = few.device.clusters && few.tiles > 0;
  how.shared = std::max<size_t>(static_cast<size_t>(kTableBytes + kCodeBytes + window * kBytes),
                                kPartialBytes<8 * kTokenTiles, S::kRows, S::kSplit>);
  return launch(how, stream, decode<T, kRowWarps, kTokenTiles>, p, few.adapters);
}

template <typename T, int kTokenTiles>
int launch_both(Few& few, void* stream) {
  if (few.tiles > 0) {
    const int error = launch_shrink<T, kTokenTiles>(few, stream);
    if (error) return error;
  }
  // Tall blocks pay off where clusters of them can fill the processors.
  const int64_t tall = ceil_divide(few.decode.weight.n, Shape<4>::kRows) * 8;
  return few.device.clusters && tall >= few.device.processors
             ? launch_decode<T, 4, kTokenTiles>(few, stream)
             : launch_decode<T, 1, kTokenTiles>(few, stream);
}

template <typename T>
int launch_all(Few& few, void* stream) {
  return few.decode.m <= 8 ? launch_both<T, 1>(few, stream) : launch_both<T, 2>(few, stream);
}

}  // namespace

extern "C" int collavo_qlora_linear_decode(const DecodeArguments* arguments, void* stream) {
  const DecodeArguments& from = *arguments;
  const int64_t m = from.m, n = from.weight.n, k = from.weight.k;
  Few few{};
  if (m < 1 || m > 16 || n < 1 || k < kChunk || k % kChunk || k > kMaxK ||
      from.weight.block_size < kChunk ||
      !adapters_from(from.adapters, from.num_adapters, &few.adapters)) {
    return cudaErrorInvalidValue;
  }
  for (int i = 0; i < few.adapters.count; ++i) few.tiles += rank_tiles(few.adapters.rank[i]);
  few.shrink.x = from.x;
  few.shrink.mask = from.adapter_mask;
  few.shrink.hidden = from.hidden;
  few.shrink.m = m;
  few.shrink.k = k;
  few.shrink.padded = few.tiles * kRankTile;
  few.decode.weight = weight_from(from.weight);
  few.decode.epilogue = epilogue_from(from.epilogue);
  few.decode.x = from.x;
  few.decode.hidden = from.hidden;
  few.decode.out = from.out;
  few.decode.m = m;
  few.decode.padded = few.shrink.padded;
  const cudaError_t error = current_device(&few.device);
  if (error) return error;
  if (from.dtype == kBfloat16) return launch_all<__nv_bfloat16>(few, stream);
  if (from.dtype == kFloat16) return launch_all<__half>(few, stream);
  return cudaErrorInvalidValue;
}
