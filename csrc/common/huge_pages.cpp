#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace collavo {

void advise_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  void* start = reinterpret_cast<void*>(address);
  const size_t size = static_cast<size_t>(bytes);
  madvise(start, size, MADV_HUGEPAGE);
  // Memory that malloc gives again has small pages already; from Linux 6.1 on they can be joined.
  constexpr int kCollapse = 25;
  madvise(start, size, kCollapse);
#else
  (void)address;
  (void)bytes;
#endif
}

}  // namespace collavo
