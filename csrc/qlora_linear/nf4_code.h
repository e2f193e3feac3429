// The 16 values of NF4 in the order of their codes (Dettmers et al., arXiv 2305.14314).
#pragma once

// A list as well as an array, since __constant__ memory cannot be filled from an array.
#define COLLAVO_NF4_CODE                                                                           \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f,                    \
      0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f,      \
      0.5626170039176941f, 0.7229568362236023f, 1.0f

namespace collavo::qlora_linear {
namespace {

alignas(64) constexpr float kNF4Code[16] = {COLLAVO_NF4_CODE};

}  // namespace
}  // namespace collavo::qlora_linear
