#include "crayon_attention/crayon_attention.h"

namespace collavo::crayon_attention {

int64_t first_bad_row(const int32_t* row_index, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (row_index[i] < -1 || row_index[i] >= rows) return i;
  }
  return -1;
}

int64_t first_bad_range(const int32_t* key_range, int64_t batch, int64_t length) {
  for (int64_t i = 0; i < batch; ++i) {
    const int32_t first = key_range[2 * i], end = key_range[2 * i + 1];
    if (first < 0 || first > end || end > length) return i;
  }
  return -1;
}

int64_t number_slots(const int32_t* row_index, int64_t batch, int64_t length, int64_t rows,
                     int32_t* slots) {
  int32_t count = 0;
  for (int64_t b = 0; b < batch; ++b, row_index += length, slots += rows) {
    for (int64_t row = 0; row < rows; ++row) slots[row] = -1;
    for (int64_t i = 0; i < length; ++i) {
      const int32_t row = row_index[i];
      if (row >= 0 && slots[row] < 0) slots[row] = count++;
    }
  }
  return count;
}

int64_t forward_scratch(int isa, const ForwardArgs& args, int64_t threads) {
  COLLAVO_RETURN_PER_ISA(isa, forward_scratch(args, threads));
}

int64_t backward_scratch(int isa, const BackwardArgs& args, int64_t threads) {
  COLLAVO_RETURN_PER_ISA(isa, backward_scratch(args, threads));
}

void forward(int isa, const ForwardArgs& args, int64_t threads, void* scratch) {
  COLLAVO_RETURN_PER_ISA(isa, forward(args, threads, scratch));
}

void backward(int isa, const BackwardArgs& args, int64_t threads, void* scratch) {
  COLLAVO_RETURN_PER_ISA(isa, backward(args, threads, scratch));
}

}  // namespace collavo::crayon_attention
