// What gpu.cuh and CUDA's headers have, for the emulated GPU of emulated_machine.h.
#pragma once

#include <cmath>

#include "emulated_machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaErrorInvalidValue = 1;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __half2float(__half value) {
  return value.value;
}
inline __half __float2half_rn(float value) {
  return {static_cast<_Float16>(value)};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t word = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &word, 4);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline int __popc(uint32_t value) {
  return __builtin_popcount(value);
}
inline int32_t atomicOr(int32_t* at, int32_t bits) {
  const int32_t before = *at;
  *at |= bits;
  return before;
}

inline emulated::ThreadIndex threadIdx;
inline emulated::BlockIndex blockIdx;

inline void __syncthreads() {
  emulated::wait_at(emulated::machine.running->block->barrier);
}
inline void __syncwarp() {
  emulated::Fiber* self = emulated::machine.running;
  emulated::wait_at(self->block->warps[self->thread / 32].barrier);
}

namespace {

inline unsigned char* shared_memory() {
  return emulated::machine.running->block->shared;
}
inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - shared_memory());
}
inline uint32_t load_shared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, shared_memory() + address, 4);
  return value;
}
inline int recomputed(int value) {
  return value;
}
inline uint32_t byte_of(uint32_t word, int byte) {
  return word >> 8 * byte & 255;
}

inline uint4 load_streamed(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a load is not aligned");
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}
inline void copy_async(void* to, const void* from, bool live) {
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (addresses % 16) emulated::fail("a copy is not aligned");
  emulated::machine.running->copies.push_back({to, from, live});
}
inline void copy_async_wait() {
  for (const emulated::Copy& copy : emulated::machine.running->copies) {
    copy.live ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  }
  emulated::machine.running->copies.clear();
}

inline uint32_t exchange(uint32_t value, int lanes) {
  return emulated::show(&value, 1)[threadIdx.x % 32 ^ lanes][0];
}
inline uint32_t vote(bool yes) {
  const uint32_t mine = yes;
  const auto* all = emulated::show(&mine, 1);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= all[lane][0] << lane;
  return votes;
}

inline float operand(__nv_bfloat16, uint16_t bits) {
  return __bfloat162float({bits});
}
inline float operand(__half, uint16_t bits) {
  __half value;
  std::memcpy(&value, &bits, 2);
  return __half2float(value);
}

// The layout of operands is that of mma.sync.m16n8k16 in the PTX manual.
template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* all = emulated::show(words, 6);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i / 2) * 8, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = all[column * 4 + k % 8 / 2][4 + k / 8];
      const int shift = k % 2 * 16;
      sum += static_cast<double>(operand(T{}, static_cast<uint16_t>(left >> shift))) *
             operand(T{}, static_cast<uint16_t>(right >> shift));
    }
    c[i] = static_cast<float>(sum);
  }
}

inline int cluster_size() {
  return static_cast<int>(emulated::machine.blocks.size());
}
inline int cluster_rank() {
  return emulated::machine.running->block->rank;
}
inline void cluster_sync() {
  emulated::wait_at(emulated::machine.cluster);
}
inline void cluster_end() {
  cluster_sync();
}
inline float cluster_read(const float* shared, int rank) {
  float value;
  std::memcpy(&value, emulated::machine.blocks[rank].shared + shared_address(shared), 4);
  return value;
}
inline void let_next_start() {}
inline void wait_for_previous() {
  emulated::Machine& machine = emulated::machine;
  if (!machine.pending) return;
  // The kernel before runs from within this one: what runs now is put aside.
  const auto kernel = machine.kernel;
  const auto running = machine.running;
  const auto cluster = machine.cluster;
  std::vector<emulated::Block> blocks = std::move(machine.blocks);
  std::jmp_buf scheduler;
  std::memcpy(&scheduler, &machine.scheduler, sizeof(scheduler));
  emulated::finish();
  std::memcpy(&machine.scheduler, &scheduler, sizeof(scheduler));
  machine.blocks = std::move(blocks);
  machine.cluster = cluster;
  machine.running = running;
  machine.kernel = kernel;
}

struct Device {
  bool clusters;
  int processors;
  int shared_per_processor;
};

inline cudaError_t current_device(Device* device) {
  const emulated::Machine& machine = emulated::machine;
  *device = {machine.clusters, machine.processors, machine.shared_per_processor};
  return 0;
}

struct Launch {
  dim3 grid;
  int threads;
  size_t shared = 0;
  int cluster = 1;
  bool overlaps_previous = false;
};

template <typename... Arguments>
cudaError_t launch(const Launch& how, void*, void (*kernel)(Arguments...), Arguments... arguments) {
  const auto run = [=] {
    emulated::run(how.grid, how.threads, how.cluster, how.shared, [&] { kernel(arguments...); });
  };
  if (how.overlaps_previous) {
    run();
    emulated::finish();
  } else {
    emulated::finish();
    emulated::machine.pending = run;
  }
  return 0;
}

}  // namespace
