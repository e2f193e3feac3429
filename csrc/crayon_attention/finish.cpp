// After attention's backward: undo the rotation and sum the gradients of each table row.
//
// Threads own heads, and each walks all tokens in order, so every sum is made in token order
// whatever the number of threads.

#include <cstring>

#include "common/parallel.h"
#include "crayon_attention/crayon_attention.h"
#include "crayon_attention/rotation.h"

namespace collavo::crayon_attention {

namespace {

// Elements that make a second thread worth its start.
constexpr int64_t kGrain = 1 << 15;

// One of dq, dk, dv with what belongs to it, and the heads a thread owns of it.
struct Part {
  const Heads& gradient;
  const Heads& extra;
  float* sum;
  int64_t heads;
  bool rotated;
};

void clear_sums(const Part& part, const Shape& shape, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < shape.rows; ++row) {
    float* first = part.sum + (row * part.heads + begin) * shape.size;
    std::memset(first, 0, static_cast<size_t>((end - begin) * shape.size) * sizeof(float));
  }
}

template <typename T>
void finish_token(const Part& part, const FinishArgs& args, int64_t batch, int64_t token,
                  int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const int64_t row = row_of(args.tokens, shape, batch, token);
  const int64_t angle = angle_offset(args.tokens, shape, batch, token);
  const float *cos = args.tokens.cos + angle, *sin = args.tokens.sin + angle;
  for (int64_t head = begin; head < end; ++head) {
    T* x = at<T>(part.gradient, batch, token, head);
    const T* extra = part.extra.data ? at<const T>(part.extra, batch, token, head) : nullptr;
    float* sum = nullptr;
    if (part.sum && row >= 0) sum = part.sum + (row * part.heads + head) * shape.size;
    if (part.rotated) {
      unrotate(x, extra, cos, sin, shape.size / 2, sum);
    } else {
      add_and_sum(x, extra, shape.size, sum);
    }
  }
}

// The items [begin, end) of all heads of dq, dk and dv, of which this part starts at `first`.
template <typename T>
void finish_part(const Part& part, const FinishArgs& args, int64_t first, int64_t begin,
                 int64_t end) {
  const Shape& shape = args.shape;
  begin = begin > first ? begin - first : 0;
  end = end - first < part.heads ? end - first : part.heads;
  if (begin >= end) return;
  if (part.sum) clear_sums(part, shape, begin, end);
  if (!part.gradient.data || (!part.rotated && !part.extra.data && !part.sum)) return;
  for (int64_t batch = 0; batch < shape.batch; ++batch) {
    for (int64_t token = 0; token < shape.length; ++token) {
      finish_token<T>(part, args, batch, token, begin, end);
    }
  }
}

template <typename T>
void finish_all(const FinishArgs& args) {
  const Shape& shape = args.shape;
  const int64_t h = shape.q_heads, g = shape.kv_heads;
  const Heads none;
  const Part q{args.dq, none, args.sum_q, h, true};
  const Part k{args.dk, args.grad_key, args.sum_k, g, true};
  const Part v{args.dv, args.grad_value, args.sum_v, g, false};
  const int64_t per_head = shape.batch * shape.length * shape.size;
  const int64_t grain = kGrain / (per_head > 0 ? per_head : 1) + 1;
  parallel_for(h + 2 * g, grain, [&](int64_t begin, int64_t end) {
    finish_part<T>(q, args, 0, begin, end);
    finish_part<T>(k, args, h, begin, end);
    finish_part<T>(v, args, h + g, begin, end);
  });
}

}  // namespace

namespace COLLAVO_ISA {

void finish(const FinishArgs& args) {
  switch (args.dtype) {
    case DType::float32:
      return finish_all<float>(args);
    case DType::bfloat16:
      return finish_all<BFloat16>(args);
    case DType::float16:
      return finish_all<Float16>(args);
  }
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::crayon_attention
