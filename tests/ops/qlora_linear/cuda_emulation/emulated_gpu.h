// A GPU in one thread of a CPU, for the kernels of csrc/qlora_linear: it stands in for gpu.cuh.
//
// Every CUDA thread is a fiber, and the fibers of a cluster's blocks take turns. A fiber runs until
// it waits: at a barrier of its block or cluster, or where its warp exchanges values (shuffles,
// votes, matrix products). One warp runs as far as it can before the next one does, so what it
// reads without a barrier is not there yet. A kernel whose successor may overlap it runs as late as
// it may: when the successor waits for it. Shared memory begins as NaN and ends at a page that
// cannot be touched; asynchronous copies arrive when they are waited for, and not before.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaErrorInvalidValue = 1;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
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

namespace emulated {

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

// What the lanes of a warp lay open to each other; two sets, so that one barrier per exchange will
// do: who writes the next set has not touched the one that others still read.
struct Warp {
  Barrier barrier;
  uint32_t open[2][32][10];
};

struct Block {
  dim3 index;
  unsigned char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
  int rank;
};

struct Copy {
  void* to;
  const void* from;
  bool live;
};

struct Fiber {
  Block* block;
  unsigned thread;
  ucontext_t start;
  std::jmp_buf state;
  bool started = false, done = false;
  Barrier* waits_for = nullptr;
  uint64_t generation = 0;
  unsigned exchanges = 0;
  std::vector<Copy> copies;
};

struct Machine {
  bool clusters = true;
  int processors = 132;
  int shared_per_processor = 228 * 1024;
  ucontext_t home;
  std::jmp_buf scheduler;
  Fiber* running = nullptr;
  std::vector<Block> blocks;
  Barrier cluster;
  const std::function<void()>* kernel = nullptr;
  std::function<void()> pending;  // a launch that has not run yet
};
inline Machine machine;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated GPU: %s\n", why);
  std::abort();
}

inline void enter() {
  (*machine.kernel)();
  machine.running->done = true;
  std::longjmp(machine.scheduler, 1);
}

inline void wait_at(Barrier& barrier) {
  Fiber* self = machine.running;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self->waits_for = &barrier;
  self->generation = barrier.generation;
  if (setjmp(self->state) == 0) std::longjmp(machine.scheduler, 1);
}

constexpr size_t kStack = 64 * 1024;

// Memory that ends at a page without access.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes = (bytes + 15) / 16 * 16;
    size_ = (bytes + page - 1) / page * page + page;
    void* found = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) fail("no memory");
    base_ = static_cast<unsigned char*>(found);
    mprotect(base_ + size_ - page, page, PROT_NONE);
    data_ = base_ + size_ - page - bytes;
    std::memset(data_, 0xff, bytes);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() { return data_; }

 private:
  unsigned char *base_, *data_;
  size_t size_;
};

// Resumes a fiber until it waits or ends.
inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  if (setjmp(machine.scheduler) != 0) return;
  if (fiber.started) std::longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs one warp until all of its fibers wait or have ended; says how many ended, -1 if none moved.
inline int run_warp(Fiber* fibers) {
  int ended = -1;
  for (bool moved = true; moved;) {
    moved = false;
    for (Fiber* fiber = fibers; fiber < fibers + 32; ++fiber) {
      if (fiber->done) continue;
      if (fiber->waits_for && fiber->waits_for->generation == fiber->generation) continue;
      fiber->waits_for = nullptr;
      moved = true;
      resume(*fiber);
      ended = (ended < 0 ? 0 : ended) + fiber->done;
    }
  }
  return ended;
}

// Runs the blocks of one cluster to their end, the warps in turn from the first and from the last.
inline void run_cluster(std::vector<Fiber>& fibers) {
  const size_t warps = fibers.size() / 32;
  bool backwards = false;
  for (size_t left = fibers.size(); left > 0; backwards = !backwards) {
    bool moved = false;
    for (size_t i = 0; i < warps; ++i) {
      const int ended = run_warp(&fibers[32 * (backwards ? warps - 1 - i : i)]);
      moved = moved || ended >= 0;
      left -= ended > 0 ? ended : 0;
    }
    if (!moved) fail("every thread waits: some did not come to a barrier");
  }
}

inline void launch_cluster(dim3 first, int size, int threads, size_t shared,
                           unsigned char* stacks) {
  std::vector<std::unique_ptr<Guarded>> memory;
  machine.blocks = std::vector<Block>(size);
  machine.cluster = {size * threads};
  std::vector<Fiber> fibers(size * threads);
  for (int rank = 0; rank < size; ++rank) {
    memory.push_back(std::make_unique<Guarded>(shared));
    Block& block = machine.blocks[rank];
    block.index = dim3(first.x + rank, first.y, first.z);
    block.shared = memory.back()->data();
    block.barrier = {threads};
    block.warps = std::vector<Warp>(threads / 32);
    block.rank = rank;
    for (Warp& warp : block.warps) warp.barrier = {32};
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[rank * threads + thread];
      fiber.block = &block;
      fiber.thread = thread;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stacks + (rank * threads + thread) * kStack;
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
    }
  }
  run_cluster(fibers);
  for (const Fiber& fiber : fibers) {
    if (!fiber.copies.empty()) fail("a copy was never waited for");
  }
}

inline void run(dim3 grid, int threads, int cluster, size_t shared,
                const std::function<void()>& kernel) {
  if (threads % 32 || cluster < 1 || grid.x % cluster) fail("the grid is no whole clusters");
  if (!machine.clusters && cluster > 1) fail("there are no clusters before sm_90");
  if (shared + 1024 > static_cast<size_t>(machine.shared_per_processor)) {
    fail("too much shared memory");
  }
  machine.kernel = &kernel;
  const size_t bytes = static_cast<size_t>(threads) * cluster * kStack;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory");
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) {
        launch_cluster(dim3(x, y, z), cluster, threads, shared,
                       static_cast<unsigned char*>(stacks));
      }
    }
  }
  munmap(stacks, bytes);
}

// Runs what has been launched and has not run.
inline void finish() {
  const std::function<void()> launched = std::move(machine.pending);
  machine.pending = nullptr;
  if (launched) launched();
}

// Lays words open to the warp and returns all lanes' words.
inline const uint32_t (*show(const uint32_t* words, int count))[10] {
  Fiber* self = machine.running;
  Warp& warp = self->block->warps[self->thread / 32];
  auto& open = warp.open[self->exchanges++ % 2];
  std::memcpy(open[self->thread % 32], words, count * sizeof(uint32_t));
  wait_at(warp.barrier);
  return open;
}

// threadIdx and blockIdx: the running fiber's.
struct ThreadIndex {
  struct X {
    operator unsigned() const { return machine.running->thread; }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return machine.running->block->index.x; }
  } x;
  struct Y {
    operator unsigned() const { return machine.running->block->index.y; }
  } y;
};

}  // namespace emulated

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
