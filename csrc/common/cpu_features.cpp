#include "cpu_features.h"

#include <atomic>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace collavo {

namespace {

#if defined(__x86_64__)
unsigned long long enabled_state() {
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool bit(unsigned value, int position) {
  return (value >> position) & 1u;
}

CpuFeatures detect() {
  CpuFeatures found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = bit(c, 27), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned leaf7_b = b, leaf7_c = c, subleaves = a;
  const unsigned long long state = enabled_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  found.avx2 = ymm && fma && f16c && bit(leaf7_b, 5);
  found.avx512 = zmm && found.avx2 && bit(leaf7_b, 16) && bit(leaf7_b, 28) && bit(leaf7_b, 30) &&
                 bit(leaf7_b, 17) && bit(leaf7_b, 31);
  found.avx512_vbmi = found.avx512 && bit(leaf7_c, 1);
  found.avx512_vnni = found.avx512 && bit(leaf7_c, 11);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    found.avx512_bf16 = found.avx512 && bit(a, 5);
  }
  return found;
}
#else
CpuFeatures detect() {
  return CpuFeatures();
}
#endif

bool compiled(Isa isa) {
#ifdef COLLAVO_HAS_AVX2
  if (isa == Isa::avx2) return true;
#endif
#ifdef COLLAVO_HAS_AVX512
  if (isa == Isa::avx512) return true;
#endif
  return isa == Isa::baseline;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

bool isa_usable(Isa isa) {
  if (!compiled(isa)) return false;
  const CpuFeatures& cpu = cpu_features();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return cpu.avx2;
    case Isa::avx512:
      return cpu.avx512 && cpu.avx512_vbmi && cpu.avx512_vnni && cpu.avx512_bf16;
  }
  return false;
}

namespace {

Isa fastest() {
  if (isa_usable(Isa::avx512)) return Isa::avx512;
  return isa_usable(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{fastest()};
  return isa;
}

}  // namespace

Isa best_isa() {
  return chosen();
}

void use_isa(Isa isa) {
  chosen() = resolve_isa(static_cast<int>(isa));
}

Isa resolve_isa(int requested) {
  if (requested == -1) return best_isa();
  if (requested < 0 || requested > 2 || !isa_usable(static_cast<Isa>(requested))) {
    throw std::invalid_argument(
        "isa: expected -1 (the best) or the code of an instruction set that was compiled and that "
        "this processor runs, got " +
        std::to_string(requested));
  }
  return static_cast<Isa>(requested);
}

}  // namespace collavo
