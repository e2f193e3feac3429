// From the sums of the backward to its gradients: scale, the rotation's transpose, rounding, and
// the sums over the tokens of each table row in token order.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "common/parallel.h"
#include "crayon_attention/operands.h"

namespace collavo::crayon_attention {

namespace {

// Sums of one table: a row per slot, [slots][heads][head_dim]; null where they are not wanted.
struct SlotSums {
  float* data = nullptr;
  int64_t heads = 0;

  SlotSums(const BackwardArgs& args, const void* wanted, int64_t heads_of_table, Arena* arena)
      : heads(heads_of_table) {
    if (wanted) data = arena->take<float>(args.slot_count * heads * args.problem.head_dim);
  }

  // A token's sum, or null.
  float* of(const BackwardArgs& args, int64_t batch, int64_t token, int64_t head) const {
    const Problem& problem = args.problem;
    if (!data || !problem.row_index) return nullptr;
    const int64_t row = problem.row_index[batch * problem.length + token];
    if (row < 0) return nullptr;
    return data + (args.slots[batch * problem.table_rows + row] * heads + head) * problem.head_dim;
  }
};

// One token's finished gradient, in float32, to its row's sum and to the output.
template <typename T>
void deliver(const BackwardArgs& args, const Heads& to, const SlotSums& sums, int64_t batch,
             int64_t token, int64_t head, const float* x) {
  const int64_t head_dim = args.problem.head_dim;
  if (float* slot = sums.of(args, batch, token, head)) accumulate(x, head_dim, slot);
  if (to.data) convert(x, head_dim, at<T>(to, batch, token, head));
}

// dq of one head: sums are [query blocks][width][kQueryBlock], tokens in lanes.
template <typename T>
void finish_queries(const BackwardArgs& args, const SlotSums& sums, const Span& span, int64_t batch,
                    int64_t head, const float* dq) {
  const Problem& problem = args.problem;
  const int64_t width = width_of(problem);
  const Vec scale = broadcast(problem.softmax_scale);
  alignas(64) float slab[kLanes * kLargestHeadDim];
  for (int64_t position = 0; position < span.length(); position += kLanes) {
    const float* from = dq + position / kQueryBlock * kQueryBlock * width + position % kQueryBlock;
    Vec square[kLanes];
    for (int64_t d = 0; d < width; d += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = multiply(load(from + (d + i) * kQueryBlock), scale);
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(slab + i * width + d, square[i]);
    }
    for (int64_t i = 0; i < std::min(kLanes, span.length() - position); ++i) {
      const int64_t token = span.first + position + i;
      unrotate(problem, batch, token, slab + i * width);
      deliver<T>(args, args.grad_q, sums, batch, token, head, slab + i * width);
    }
  }
  for (int64_t i = span.length(); args.grad_q.data && i < problem.length; ++i) {
    clear(at<T>(args.grad_q, batch, token_of(span, i), head), problem.head_dim);
  }
}

// dk or dv of one head: the parts of `count` splits one after the other, [keys][width] each, and
// the gradient that comes through the output.
template <typename T>
void finish_keys(const BackwardArgs& args, bool is_key, const SlotSums& sums, const Span& span,
                 int64_t batch, int64_t head, const float* parts, int64_t part_stride,
                 int64_t count) {
  const Problem& problem = args.problem;
  const int64_t width = width_of(problem), head_dim = problem.head_dim;
  const Heads &extra = is_key ? args.grad_key : args.grad_value,
              &to = is_key ? args.grad_k : args.grad_v;
  const float magnitude =
      problem.softmax_scale < 0 ? -problem.softmax_scale : problem.softmax_scale;
  const Vec scale = broadcast(is_key ? magnitude : 1.0f);
  alignas(64) float x[kLargestHeadDim];
  for (int64_t token = 0; token < problem.length; ++token) {
    clear(x, width);
    if (token >= span.first && token < span.end) {
      for (int64_t part = 0; part < count; ++part) {
        accumulate(parts + part * part_stride + (token - span.first) * width, width, x);
      }
      for (int64_t d = 0; d < width; d += kLanes) store(x + d, multiply(load(x + d), scale));
    }
    if (extra.data) accumulate(at<const T>(extra, batch, token, head), head_dim, x);
    if (is_key) unrotate(problem, batch, token, x);
    deliver<T>(args, to, sums, batch, token, head, x);
  }
}

// A table's gradient: each row's slots, sample after sample.
template <typename T>
void finish_table(const BackwardArgs& args, const SlotSums& sums, void* table) {
  if (!table) return;
  const Problem& problem = args.problem;
  const int64_t row_size = sums.heads * problem.head_dim;
  parallel_for(problem.table_rows, (1 << 14) / row_size + 1, [&](int64_t begin, int64_t end) {
    alignas(64) float x[kLargestHeadDim];
    for (int64_t i = begin * sums.heads; i < end * sums.heads; ++i) {
      const int64_t row = i / sums.heads, head = i % sums.heads;
      clear(x, problem.head_dim);
      for (int64_t batch = 0; args.slots && batch < problem.batch; ++batch) {
        const int64_t slot = args.slots[batch * problem.table_rows + row];
        if (slot >= 0) {
          accumulate(sums.data + slot * row_size + head * problem.head_dim, problem.head_dim, x);
        }
      }
      convert(x, problem.head_dim, static_cast<T*>(table) + i * problem.head_dim);
    }
  });
}

}  // namespace

}  // namespace collavo::crayon_attention
