// One pass over q, k and v: add each token's table row, rotate, write.

#include "common/parallel.h"
#include "crayon_attention/crayon_attention.h"
#include "crayon_attention/rotation.h"

namespace collavo::crayon_attention {

namespace {

// Elements that make a second thread worth its start.
constexpr int64_t kGrain = 1 << 15;

template <typename T>
inline const T* table_row(const void* table, int64_t row, int64_t heads, int64_t size) {
  return table && row >= 0 ? static_cast<const T*>(table) + row * heads * size : nullptr;
}

template <typename T>
void rotate_heads(const Heads& x, const Heads& out, const void* table, int64_t row, int64_t heads,
                  const Shape& shape, int64_t batch, int64_t token, const float* cos,
                  const float* sin) {
  if (!out.data) return;
  const T* added = table_row<T>(table, row, heads, shape.size);
  for (int64_t head = 0; head < heads; ++head) {
    rotate(at<const T>(x, batch, token, head), added ? added + head * shape.size : nullptr, cos,
           sin, shape.size / 2, at<T>(out, batch, token, head));
  }
}

template <typename T>
void prepare_token(const PrepareArgs& args, int64_t batch, int64_t token) {
  const Shape& shape = args.shape;
  const int64_t row = row_of(args.tokens, shape, batch, token);
  const int64_t angle = angle_offset(args.tokens, shape, batch, token);
  const float *cos = args.tokens.cos + angle, *sin = args.tokens.sin + angle;
  rotate_heads<T>(args.q, args.q_out, args.table_q, row, shape.q_heads, shape, batch, token, cos,
                  sin);
  rotate_heads<T>(args.k, args.k_out, args.table_k, row, shape.kv_heads, shape, batch, token, cos,
                  sin);
  if (!args.v_out.data) return;
  const T* added = table_row<T>(args.table_v, row, shape.kv_heads, shape.size);
  for (int64_t head = 0; head < shape.kv_heads; ++head) {
    add(at<const T>(args.v, batch, token, head), added ? added + head * shape.size : nullptr,
        shape.size, at<T>(args.v_out, batch, token, head));
  }
}

template <typename T>
void prepare_all(const PrepareArgs& args) {
  const Shape& shape = args.shape;
  const int64_t per_token = (shape.q_heads + 2 * shape.kv_heads) * shape.size;
  const int64_t grain = kGrain / (per_token > 0 ? per_token : 1) + 1;
  parallel_for(shape.batch * shape.length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      prepare_token<T>(args, i / shape.length, i % shape.length);
    }
  });
}

}  // namespace

namespace COLLAVO_ISA {

void prepare(const PrepareArgs& args) {
  switch (args.dtype) {
    case DType::float32:
      return prepare_all<float>(args);
    case DType::bfloat16:
      return prepare_all<BFloat16>(args);
    case DType::float16:
      return prepare_all<Float16>(args);
  }
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::crayon_attention
