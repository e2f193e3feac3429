// A GPU in one thread of a CPU, for the kernels of csrc/qlora_linear/cuda: who runs when.
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

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

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
