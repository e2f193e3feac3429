// Parallel loops on the thread pool that torch already runs.
//
// This module links no OpenMP: a second pool beside torch's is 10 to 18 times slower, since torch's
// idle workers spin on the cores it needs. attach_thread_pool() finds the OpenMP runtime in the
// process; until it does, and where there is none, loops run serially.
#pragma once

#include <cstdint>
#include <string>

namespace collavo {

// Looks for the OpenMP runtime torch uses and keeps its entry points. Call once, after torch was
// loaded. Returns false if none is found.
bool attach_thread_pool();

// Path of the runtime that serves parallel loops, or "" while loops are serial.
std::string thread_pool_path();

// Threads a loop started here and now may use: torch.get_num_threads(), and 1 inside a parallel
// region or in a forked child (whose copy of the pool has no threads).
int num_threads();

using RangeBody = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body on consecutive ranges that cover [0, n), none empty and all but the last of at least
// `grain` elements. The body must not throw, and what it computes for an element must not depend on
// where ranges are cut: then results are the same for any number of threads.
void parallel_ranges(int64_t n, int64_t grain, RangeBody body, const void* context) noexcept;

// Internal linkage: sources compiled for several instruction sets must not share this code.
namespace {

// parallel_for(rows, 16, [&](int64_t begin, int64_t end) { ... });
template <typename Function>
inline void parallel_for(int64_t n, int64_t grain, const Function& function) {
  parallel_ranges(
      n, grain,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Function*>(context))(begin, end);
      },
      &function);
}

// Runs function(worker, item) for every item of [0, items): each of `workers` workers, as many as
// the pool has threads or fewer, takes the next one when it has done its last. For items of unequal
// size whose results do not depend on who makes them.
template <typename Function>
inline void parallel_items(int64_t workers, int64_t items, const Function& function) {
  int64_t next = 0;
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (;;) {
        const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (item >= items) break;
        function(worker, item);
      }
    }
  });
}

}  // namespace

}  // namespace collavo
