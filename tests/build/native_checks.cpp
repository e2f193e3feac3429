// Built by test_build_common.py, once per instruction set, from the headers the kernels use.
//   native_checks convert < floats > results    every conversion of dtype.h, scalar and vector
//   native_checks parallel                      loops of parallel.h; prints what is wrong

#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"

namespace {

using collavo::BFloat16;
using collavo::Float16;

template <typename T>
void put(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// Results by the scalar and by every vector function there is, one after the other.
template <typename T>
void convert(const std::vector<float>& values) {
  std::vector<T> narrow(values.size());
  std::vector<float> wide(values.size());
  for (size_t i = 0; i < values.size(); ++i) collavo::from_float(values[i], &narrow[i]);
  for (size_t i = 0; i < values.size(); ++i) wide[i] = collavo::to_float(narrow[i]);
  put(narrow);
  put(wide);
#if defined(__AVX2__)
  for (size_t i = 0; i < values.size(); i += 8) {
    collavo::store8(&narrow[i], collavo::load8(&values[i]));
    collavo::store8(&wide[i], collavo::load8(&narrow[i]));
  }
  put(narrow);
  put(wide);
#endif
#if defined(__AVX512F__)
  for (size_t i = 0; i < values.size(); i += 16) {
    collavo::store16(&narrow[i], collavo::load16(&values[i]));
    collavo::store16(&wide[i], collavo::load16(&narrow[i]));
  }
  put(narrow);
  put(wide);
#endif
}

int convert_all() {
  std::vector<float> values;
  float buffer[16];
  while (std::fread(buffer, sizeof(float), 16, stdin) == 16) {
    values.insert(values.end(), buffer, buffer + 16);
  }
  convert<BFloat16>(values);
  convert<Float16>(values);
  return 0;
}

int failures = 0;

void check(bool good, const char* what, int64_t n, int64_t grain) {
  if (good) return;
  ++failures;
  std::printf("%s: n %lld, grain %lld\n", what, static_cast<long long>(n),
              static_cast<long long>(grain));
}

// Every element once; no empty range; ranges of at least `grain` but the last.
void check_cover(int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
  std::atomic<int> small{0}, empty{0};
  collavo::parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    empty += begin >= end;
    small += end - begin < grain && end != n;
    for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
  });
  const bool once = std::all_of(seen.begin(), seen.end(), [](const auto& s) { return s == 1; });
  check(once, "not every element exactly once", n, grain);
  check(empty == 0, "an empty range", n, grain);
  check(small == 0, "a range below the grain", n, grain);
}

int check_parallel() {
  check(collavo::num_threads() == 1, "threads before a pool is attached", 0, 0);
  check_cover(100, 1);
  check(collavo::attach_thread_pool(), "no OpenMP runtime found", 0, 0);
  for (int threads : {1, 2, 3, 8}) {
    omp_set_num_threads(threads);
    check(collavo::num_threads() == threads, "threads", threads, 0);
    for (int64_t n : {0, 1, 2, 7, 8, 9, 100, 1000}) {
      for (int64_t grain : {0, 1, 3, 8, 64, 5000}) check_cover(n, grain);
    }
  }
  std::atomic<int> inner{0}, teams{0};
  collavo::parallel_for(8, 1, [&](int64_t begin, int64_t end) {
    teams += collavo::num_threads() != 1;
    for (int64_t i = begin; i < end; ++i) {
      collavo::parallel_for(10, 1, [&](int64_t b, int64_t e) { inner += static_cast<int>(e - b); });
    }
  });
  check(inner == 80, "a loop inside a loop", inner, 0);
  check(teams == 0, "a team inside a team", teams, 0);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    check(collavo::num_threads() == 1, "threads in a forked child", 0, 0);
    check_cover(100, 1);
    std::fflush(stdout);
    _exit(failures);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(status == 0, "the forked child failed or hung", status, 0);
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  const bool converting = count > 1 && std::strcmp(arguments[1], "convert") == 0;
  return converting ? convert_all() : check_parallel();
}
