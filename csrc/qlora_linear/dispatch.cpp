#include "qlora_linear/qlora_linear.h"

namespace collavo::qlora_linear {

void dequantize(int isa, const DequantizeArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, dequantize(args));
}

void forward(int isa, const ForwardArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, forward(args));
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

int64_t forward_scratch(int64_t tokens, int64_t columns, int64_t total_rank) {
  // x as float32, x in the order of the decoded weight (padded to 128), and the adapters' hidden
  // values.
  const int64_t padded = (columns + 127) / 128 * 128;
  return tokens * (columns + padded + total_rank);
}

}  // namespace collavo::qlora_linear
