// What this processor can run, and the choice among the instruction sets the kernels were
// compiled for. setup.py defines COLLAVO_HAS_AVX2 and COLLAVO_HAS_AVX512 where it compiled them.
#pragma once

namespace collavo {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C, with the operating system saving ymm
  bool avx512 = false;       // AVX-512 F, CD, BW, DQ and VL, with the operating system saving zmm
  bool avx512_vbmi = false;  // byte permutes
  bool avx512_vnni = false;  // dot products of bytes
  bool avx512_bf16 = false;  // bfloat16 dot products and conversions
};

// The codes Python passes; a higher one includes the lower ones. avx512 needs all five fields
// above.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

const CpuFeatures& cpu_features();

// True if the instruction set was compiled in and this processor runs it.
bool isa_usable(Isa isa);

// The fastest of them, or what use_isa() chose.
Isa best_isa();

// Makes a slower one the best (for tests and measurements). Throws as resolve_isa() does.
void use_isa(Isa isa);

// The instruction set for a request from Python: -1 is the best one. Throws std::invalid_argument
// for a code that is unknown, was not compiled, or that this processor cannot run.
Isa resolve_isa(int requested);

}  // namespace collavo

// In <op>.h, inside namespace collavo::<op>: declares an entry point once per instruction set.
#define COLLAVO_DECLARE_PER_ISA(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__;                       \
  }

#ifdef COLLAVO_HAS_AVX2
#define COLLAVO_CASE_AVX2(...) \
  case ::collavo::Isa::avx2:   \
    return avx2::__VA_ARGS__
#else
#define COLLAVO_CASE_AVX2(...)
#endif

#ifdef COLLAVO_HAS_AVX512
#define COLLAVO_CASE_AVX512(...) \
  case ::collavo::Isa::avx512:   \
    return avx512::__VA_ARGS__
#else
#define COLLAVO_CASE_AVX512(...)
#endif

// In dispatch.cpp, as a function's last statement: calls the entry point of the instruction set.
//   COLLAVO_RETURN_PER_ISA(isa, forward(x, out, rows, columns));
#define COLLAVO_RETURN_PER_ISA(isa, ...) \
  switch (::collavo::resolve_isa(isa)) { \
    COLLAVO_CASE_AVX512(__VA_ARGS__);    \
    COLLAVO_CASE_AVX2(__VA_ARGS__);      \
    default:                             \
      return baseline::__VA_ARGS__;      \
  }
