#include "crayon_attention/crayon_attention.h"

namespace collavo::crayon_attention {

int64_t first_bad_row(const int32_t* row_index, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (row_index[i] < -1 || row_index[i] >= rows) return i;
  }
  return -1;
}

void prepare(int isa, const PrepareArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, prepare(args));
}

void finish(int isa, const FinishArgs& args) {
  COLLAVO_RETURN_PER_ISA(isa, finish(args));
}

}  // namespace collavo::crayon_attention
