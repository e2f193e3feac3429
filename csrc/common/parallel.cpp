#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

#include "common/integers.h"

namespace collavo {

namespace {

// LLVM's description of a source location; its runtime wants one per parallel region.
struct Ident {
  int32_t reserved_1, flags, reserved_2, reserved_3;
  const char* source;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using KmpcMicrotask = void (*)(int32_t*, int32_t*, ...);
using KmpcForkCall = void (*)(Ident*, int32_t arguments, KmpcMicrotask, ...);
using KmpcPushNumThreads = void (*)(Ident*, int32_t thread, int32_t threads);
using KmpcThreadNum = int32_t (*)(Ident*);
using IntGetter = int (*)();

struct Runtime {
  GompParallel gomp_parallel = nullptr;
  KmpcForkCall fork_call = nullptr;
  KmpcPushNumThreads push_num_threads = nullptr;
  KmpcThreadNum global_thread_num = nullptr;
  IntGetter thread_num = nullptr, team_size = nullptr, max_threads = nullptr, in_parallel = nullptr;
  std::string path;

  bool complete() const {
    const bool kmpc = fork_call && push_num_threads && global_thread_num;
    return (gomp_parallel || kmpc) && thread_num && team_size && max_threads && in_parallel;
  }
};

Runtime runtime;
std::atomic<bool> attached{false};
std::atomic<bool> forked{false};

template <typename Function>
void resolve(void* handle, const char* name, Function* function) {
  void* symbol = dlsym(handle, name);
  std::memcpy(function, &symbol, sizeof(symbol));
}

Runtime runtime_in(void* handle) {
  Runtime found;
  resolve(handle, "GOMP_parallel", &found.gomp_parallel);
  resolve(handle, "__kmpc_fork_call", &found.fork_call);
  resolve(handle, "__kmpc_push_num_threads", &found.push_num_threads);
  resolve(handle, "__kmpc_global_thread_num", &found.global_thread_num);
  resolve(handle, "omp_get_thread_num", &found.thread_num);
  resolve(handle, "omp_get_num_threads", &found.team_size);
  resolve(handle, "omp_get_max_threads", &found.max_threads);
  resolve(handle, "omp_in_parallel", &found.in_parallel);
  Dl_info info;
  if (found.complete() && dladdr(reinterpret_cast<void*>(found.thread_num), &info)) {
    found.path = info.dli_fname;
  }
  return found;
}

std::vector<std::string> loaded_libraries() {
  std::vector<std::string> paths;
#if defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count(); ++i) paths.emplace_back(_dyld_get_image_name(i));
#else
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        static_cast<std::vector<std::string>*>(data)->emplace_back(info->dlpi_name);
        return 0;
      },
      &paths);
#endif
  return paths;
}

// A handle to a library that is loaded already and whose file name starts so, or null.
void* loaded_library(const std::vector<std::string>& paths, const std::string& start) {
  for (const std::string& path : paths) {
    if (path.compare(path.rfind('/') + 1, start.size(), start) != 0) continue;
    if (void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) return handle;
  }
  return nullptr;
}

// The global scope and then torch's own dependencies: the order in which torch's symbols were
// bound, so that this is the very runtime torch runs on. The names cover a torch that hides its
// dependency.
Runtime find_runtime(const std::vector<std::string>& paths) {
  Runtime found = runtime_in(RTLD_DEFAULT);
  for (const char* start : {"libtorch_cpu", "libiomp5", "libomp", "libgomp"}) {
    if (found.complete()) break;
    if (void* handle = loaded_library(paths, start)) found = runtime_in(handle);
  }
  return found;
}

struct Loop {
  int64_t n, length, ranges;  // ranges of `length`, the last one shorter
  RangeBody body;
  const void* context;
};

void run_share(void* data) {
  const Loop& loop = *static_cast<const Loop*>(data);
  const int64_t team = runtime.team_size();
  for (int64_t i = runtime.thread_num(); i < loop.ranges; i += team) {
    loop.body(loop.context, i * loop.length, std::min(loop.n, (i + 1) * loop.length));
  }
}

void kmpc_entry(int32_t*, int32_t*, void* data) {
  run_share(data);
}

void run_team(Loop* loop, int threads) {
  if (runtime.gomp_parallel) {
    runtime.gomp_parallel(run_share, loop, static_cast<unsigned>(threads), 0);
    return;
  }
  static Ident here = {0, 2, 0, 0, ";collavo;parallel_ranges;0;0;;"};
  runtime.push_num_threads(&here, runtime.global_thread_num(&here), threads);
  runtime.fork_call(&here, 1, reinterpret_cast<KmpcMicrotask>(kmpc_entry), loop);
}

}  // namespace

bool attach_thread_pool() {
  if (attached) return true;
  const std::vector<std::string> paths = loaded_libraries();
  Runtime found = find_runtime(paths);
  if (!found.complete()) return false;
  // at::get_num_threads() makes torch.set_num_threads count on every thread, where OpenMP's own
  // count is the calling thread's alone.
  if (void* torch = loaded_library(paths, "libtorch_cpu")) {
    IntGetter torch_threads = nullptr;
    resolve(torch, "_ZN2at15get_num_threadsEv", &torch_threads);
    if (torch_threads) found.max_threads = torch_threads;
  }
  runtime = found;
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  attached = true;
  return true;
}

std::string thread_pool_path() {
  return attached ? runtime.path : std::string();
}

int num_threads() {
  if (!attached || forked || runtime.in_parallel()) return 1;
  return std::max(1, runtime.max_threads());
}

void parallel_ranges(int64_t n, int64_t grain, RangeBody body, const void* context) noexcept {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t threads = n <= grain ? 1 : std::min<int64_t>(num_threads(), n / grain);
  if (threads <= 1) return body(context, 0, n);
  Loop loop{n, ceil_divide(n, threads), threads, body, context};
  loop.ranges = ceil_divide(n, loop.length);
  run_team(&loop, static_cast<int>(loop.ranges));
}

}  // namespace collavo
