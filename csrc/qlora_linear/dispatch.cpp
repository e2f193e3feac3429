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

int64_t many_scratch(const ManyArgs& args, int64_t terms) {
  int64_t slices = ceil_divide(terms, kTermsAtOnce);
  for (int64_t i = 0; i < args.num_adapters; ++i) {
    slices += ceil_divide(args.adapters[i].rank, kTermsAtOnce);
  }
  return slices * kMostTokensAtOnce * kLeftStride * static_cast<int64_t>(sizeof(BFloat16));
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

int64_t forward_scratch(const ForwardArgs& args) {
  // x as float32 in the order of the products, the sums of whole panels, and the hidden values, an
  // even number per adapter, as float32 and as bfloat16.
  int64_t hidden = 0;
  for (int64_t i = 0; i < args.num_adapters; ++i) hidden += args.adapters[i].rank + 1;
  const int64_t values = args.weight.columns + round_up(args.weight.rows, 16) + 2 * hidden;
  return args.tokens * values * static_cast<int64_t>(sizeof(float));
}

int64_t forward_many_scratch(const ManyArgs& args) {
  return many_scratch(args, args.weight.columns);
}

int64_t grad_x_many_scratch(const ManyArgs& args) {
  return many_scratch(args, args.weight.rows);
}

}  // namespace collavo::qlora_linear
