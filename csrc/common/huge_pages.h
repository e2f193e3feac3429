// Pages of 2 MiB under a large buffer: one entry of the processor's address cache serves 512 times
// as much of it.
#pragma once

#include <cstdint>

namespace collavo {

// Asks for them under [address, address + bytes), which begins and ends with such pages. A hint:
// nothing happens where the system has none.
void advise_huge_pages(uintptr_t address, int64_t bytes);

}  // namespace collavo
