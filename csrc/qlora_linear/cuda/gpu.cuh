// What the kernels need of a GPU that C++ has no word for: one small function per instruction.
//
// Everything else in the kernels is plain C++, so that a test can run it on a CPU, with the
// functions of this file replaced (COLLAVO_EMULATED).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef COLLAVO_EMULATED
#include "emulated_gpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char collavo_shared[];
  return collavo_shared;
}

// c += a b: a is 16 x 16 by rows, b is 16 x 8 by columns. Of a lane, with g = lane / 4 and
// t = lane % 4: a holds (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right
// neighbour; b holds (2t, g), (2t + 8, g), each with its lower neighbour; c holds (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes that are read once: they stay out of L1, and L2 fetches the whole line.
__device__ __forceinline__ uint4 load_streamed(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// A word of shared memory by its address there, which takes no arithmetic beyond an offset.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// The same value, but what follows from it is computed anew and not kept in registers.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A byte of a word, the lowest is 0.
__device__ __forceinline__ uint32_t byte_of(uint32_t word, int byte) {
  return __byte_perm(word, 0, 0x4440 | byte);
}

// 16 bytes from global to shared memory behind the thread's back, zeros where dead.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(live ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ uint32_t exchange(uint32_t value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
__device__ __forceinline__ uint32_t vote(bool yes) {
  return __ballot_sync(0xffffffffu, yes);
}

// A cluster's blocks run side by side and read each other's shared memory; before sm_90 a block
// is a cluster of its own.
__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t value;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(value));
  return static_cast<int>(value);
#else
  return 1;
#endif
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t value;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return static_cast<int>(value);
#else
  return 0;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#else
  __syncthreads();
#endif
}
// The same without an order of memory accesses: no block goes on to its end before all came here.
// Otherwise it would wait for what was stored to global memory as well.
__device__ __forceinline__ void cluster_end() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
#endif
}
__device__ __forceinline__ float cluster_read(const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  float value;
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
#else
  (void)rank;
  return *shared;
#endif
}

// Programmatic dependent launch: let the next kernel start; wait until the one before has ended.
// Before sm_90 kernels of a stream run one after the other.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Device {
  bool clusters;             // and programmatic dependent launch
  int processors;            // streaming multiprocessors
  int shared_per_processor;  // bytes
};

inline cudaError_t current_device(Device* device) {
  int index = 0, major = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error) return error;
  device->clusters = major >= 9;
  error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, index);
  if (error) return error;
  return cudaDeviceGetAttribute(&device->shared_per_processor,
                                cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
}

struct Launch {
  dim3 grid;
  int threads;
  size_t shared = 0;
  int cluster = 1;
  bool overlaps_previous = false;  // the kernel calls wait_for_previous()
};

template <typename... Arguments>
cudaError_t launch(const Launch& how, void* stream, void (*kernel)(Arguments...),
                   Arguments... arguments) {
  if (how.shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(how.shared));
    if (error) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  if (how.overlaps_previous) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error ? error : cudaGetLastError();
}

}  // namespace

#endif
