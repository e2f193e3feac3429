#include <stdexcept>

#include "common/integers.h"
#include "qlora_linear/qlora_linear.h"

namespace collavo::qlora_linear {

void dequantize(int isa, const DequantizeArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, dequantize(args));
}

void forward(int isa, const ForwardArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, forward(args));
}

namespace {

void expect_pairs(int isa) {
  if (resolve_isa(isa) == Isa::avx512) return;
  throw std::invalid_argument("isa: products of bfloat16 pairs need avx512");
}

}  // namespace

void forward_many(int isa, const ManyArgs& args) {
  expect_pairs(isa);
  COLLAVO_RETURN_PER_ISA(isa, forward_many(args));
}

void grad_x_many(int isa, const ManyArgs& args) {
  expect_pairs(isa);
  COLLAVO_RETURN_PER_ISA(isa, grad_x_many(args));
}

void add_rows(int isa, const AddRowsArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, add_rows(args));
}

void sum_rows(int isa, const SumRowsArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, sum_rows(args));
}

void product(int isa, const ProductArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, product(args));
}

int64_t forward_scratch(int64_t tokens, int64_t rows, int64_t columns, int64_t num_adapters,
                        int64_t total_rank) {
  // x as float32 in the order of the products, the sums of whole panels, and the hidden values, an
  // even number per adapter, as float32 and as bfloat16.
  return tokens * (columns + round_up(rows, 16) + 2 * (total_rank + num_adapters));
}

int64_t many_scratch(int64_t terms, const int64_t* ranks, int64_t num_adapters) {
  int64_t slices = ceil_divide(terms, kTermsAtOnce);
  for (int64_t i = 0; i < num_adapters; ++i) slices += ceil_divide(ranks[i], kTermsAtOnce);
  return slices * kMostTokensAtOnce * kLeftStride;
}

}  // namespace collavo::qlora_linear
