// Forward: one pass adds rows to keys and values, rotates keys and packs both; then blocks of
// queries attend.

#include <algorithm>
#include <cmath>

#include "common/arena.h"
#include "common/parallel.h"
#include "crayon_attention/crayon_attention.h"
#include "crayon_attention/operands.h"
#include "crayon_attention/softmax.h"

namespace collavo::crayon_attention {

namespace {

// Where everything lies. Packed keys are [batch * kv_heads][keys][width], values
// [batch * kv_heads][key blocks][width][kKeyBlock].
template <typename P>
struct Scratch {
  using Element = typename P::Element;
  struct Worker {
    Element *queries, *weights;
    float *scores, *mixed;
  };

  Element *keys, *values;
  Arena arena;
  int64_t workers;

  Scratch(const Problem& problem, int64_t threads, void* buffer) : arena(buffer) {
    const int64_t pairs = problem.batch * problem.kv_heads;
    const int64_t blocks = ceil_divide(problem.length, kQueryBlock);
    workers = workers_for(problem, pairs * blocks, threads);
    keys = arena.take<Element>(pairs * per_head(problem));
    values = arena.take<Element>(pairs * per_head(problem));
  }

  static int64_t per_head(const Problem& problem) {
    return round_up(problem.length, kKeyBlock) * width_of(problem);
  }

  // The buffers of one worker, behind those of the workers before it.
  Worker worker(const Problem& problem, int64_t index) const {
    Arena own = arena;
    Worker buffers{};
    for (int64_t i = 0; i <= index; ++i) buffers = take(problem, &own);
    return buffers;
  }

  int64_t bytes(const Problem& problem) const {
    Arena all = arena;
    for (int64_t i = 0; i < workers; ++i) take(problem, &all);
    return all.bytes();
  }

 private:
  static Worker take(const Problem& problem, Arena* from) {
    const int64_t width = width_of(problem);
    return {from->take<Element>(width * kQueryBlock), from->take<Element>(kKeyBlock * kQueryBlock),
            from->take<float>(kKeyBlock * kQueryBlock), from->take<float>(width * kQueryBlock)};
  }
};

// A token outside its sample's valid range has no attention.
template <typename T>
void leave_empty(const ForwardArgs& args, int64_t batch, int64_t token) {
  const Problem& problem = args.problem;
  for (int64_t head = 0; head < problem.q_heads; ++head) {
    clear(at<T>(args.out, batch, token, head), problem.head_dim);
    args.lse[(batch * problem.q_heads + head) * problem.length + token] = -INFINITY;
  }
}

// One head of a slab of keys or values, with their rows and keys rotated: into the slab, and into
// the output where there is one; then what lies behind the span is zeros.
template <typename T>
void fill_slab(const ForwardArgs& args, const Span& span, int64_t batch, int64_t head,
               int64_t position, bool is_key, T* slab) {
  const Problem& problem = args.problem;
  const Heads &from = is_key ? args.k : args.v, &to = is_key ? args.key : args.value;
  const void* table = is_key ? args.crayon_k : args.crayon_v;
  const int64_t width = width_of(problem), head_dim = problem.head_dim;
  const int64_t count = std::min(kLanes, problem.length - position);
  for (int64_t i = 0; i < count; ++i) {
    const T* x = at<const T>(from, batch, token_of(span, position + i), head);
    copy(x, head_dim, slab + i * width);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = token_of(span, position + i);
    T* x = slab + i * width;
    const T* row = row_of<T>(problem, table, batch, token, problem.kv_heads, head);
    if (is_key) {
      rotate(problem, batch, token, x, row, x);
    } else if (row) {
      add_row(x, row, head_dim, x);
    }
    if (to.data) copy(x, head_dim, at<T>(to, batch, token, head));
  }
  const int64_t inside = std::max<int64_t>(0, std::min(kLanes, span.length() - position));
  clear(slab + inside * width, (kLanes - inside) * width);
}

template <typename P, typename T>
void pack_slab(const ForwardArgs& args, const Scratch<P>& scratch, int64_t batch,
               int64_t position) {
  const Problem& problem = args.problem;
  const Span span = span_of(problem, batch);
  const int64_t width = width_of(problem);
  alignas(64) T slab[kLanes * kLargestHeadDim];
  clear(slab, kLanes * width);
  const bool packed = position < round_up(span.length(), kRows);
  for (int64_t head = 0; head < problem.kv_heads; ++head) {
    const int64_t start = (batch * problem.kv_heads + head) * Scratch<P>::per_head(problem);
    fill_slab(args, span, batch, head, position, true, slab);
    if (packed) pack_left<P>(slab, width, scratch.keys + start + position * width);
    fill_slab(args, span, batch, head, position, false, slab);
    if (!packed) continue;
    const int64_t within = position % kKeyBlock;
    pack_left_transposed<P>(
        slab, width, scratch.values + start + (position - within) * width + within, kKeyBlock);
  }
  for (int64_t i = position; i < std::min(position + kLanes, problem.length); ++i) {
    if (i >= span.length()) leave_empty<T>(args, batch, token_of(span, i));
  }
}

template <typename P, typename T>
void pack_keys_and_values(const ForwardArgs& args, const Scratch<P>& scratch) {
  const Problem& problem = args.problem;
  const int64_t slabs = round_up(problem.length, std::max(kLanes, kRows)) / kLanes;
  const int64_t per_slab = kLanes * problem.kv_heads * width_of(problem);
  parallel_for(problem.batch * slabs, (1 << 15) / per_slab + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_slab<P, T>(args, scratch, i / slabs, i % slabs * kLanes);
    }
  });
}

// A block of one head's queries over the keys it reaches.
template <typename P>
void attend(const Problem& problem, const Sight& sight, const typename P::Element* keys,
            const typename P::Element* values, int64_t position, int64_t count,
            const typename Scratch<P>::Worker& worker, Running* running) {
  const int64_t width = width_of(problem), lanes = round_up(count, kLanes);
  const float scale = exponent_scale(problem.softmax_scale);
  const Reach reach(sight, position, count);
  alignas(64) float shrink[kQueryBlock];
  bool fresh = true;
  for (int64_t block = reach.first / kKeyBlock; block * kKeyBlock < reach.end; ++block) {
    const int64_t first = reach.first_key(block), end = reach.end_key(block);
    const int64_t key_count = end - first;
    product<P>(keys + first * width, width, key_count, worker.queries, lanes, width, true,
               worker.scores);
    hide(sight, reach, position, lanes, first, end, worker.scores);
    bool changed = false;
    over_vectors(lanes, [&](int64_t lane, auto some) {
      changed |= fold_vectors<P, decltype(some)::value>(
          worker.scores + lane, key_count, scale, running->top + lane, running->total + lane,
          worker.weights + lane * P::kDepth, shrink + lane);
    });
    if (changed && !fresh) shrink_rows(shrink, lanes, width, worker.mixed);
    product<P>(values + block * kKeyBlock * width + first % kKeyBlock, kKeyBlock, width,
               worker.weights, lanes, key_count, fresh, worker.mixed);
    fresh = false;
  }
}

// Divides by the sums of weights and writes the block's outputs and log-sum-exps.
template <typename T>
void write_out(const ForwardArgs& args, int64_t batch, int64_t head, int64_t token, int64_t count,
               const float* mixed, const Running& running, T* slab) {
  const Problem& problem = args.problem;
  const int64_t width = width_of(problem);
  const float scale = exponent_scale(problem.softmax_scale);
  float* lse = args.lse + (batch * problem.q_heads + head) * problem.length + token;
  alignas(64) float inverse[kQueryBlock];
  for (int64_t lane = 0; lane < kQueryBlock; ++lane) {
    const float total = running.total[lane];
    inverse[lane] = total == 0 ? 0.0f : 1.0f / total;
  }
  for (int64_t i = 0; i < count; ++i) {
    // Rounded once: the backward's weights are as exact as this is.
    const double power = static_cast<double>(running.top[i]) * scale;
    const double log_sum = power + std::log2(static_cast<double>(running.total[i]));
    lse[i] = static_cast<float>(log_sum * 0.6931471805599453);
  }
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    Vec square[kLanes];
    const Vec factor = load(inverse + lane);
    for (int64_t d = 0; d < width; d += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = multiply(load(mixed + (d + i) * kQueryBlock + lane), factor);
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(slab + i * width + d, square[i]);
    }
    for (int64_t i = 0; i < std::min(kLanes, count - lane); ++i) {
      copy(slab + i * width, problem.head_dim, at<T>(args.out, batch, token + lane + i, head));
    }
  }
}

// Blocks of queries in the order in which workers take them: a key head's last block, which sees
// most keys, for all of its query heads, then the block before it.
struct Order {
  int64_t blocks, shared, kv_heads, count;

  explicit Order(const Problem& problem)
      : blocks(ceil_divide(problem.length, kQueryBlock)),
        shared(problem.q_heads / problem.kv_heads),
        kv_heads(problem.kv_heads),
        count(problem.batch * problem.q_heads * blocks) {}

  struct Place {
    int64_t batch, head, pair, position;
  };

  Place operator[](int64_t i) const {
    const int64_t item = i / shared, pair = item / blocks, block = blocks - 1 - item % blocks;
    return {pair / kv_heads, pair % kv_heads * shared + i % shared, pair, block * kQueryBlock};
  }
};

template <typename P, typename T>
void attend_block(const ForwardArgs& args, const Scratch<P>& scratch, const Order::Place& place,
                  const typename Scratch<P>::Worker& worker) {
  const Problem& problem = args.problem;
  const int64_t batch = place.batch, head = place.head, width = width_of(problem);
  const Span span = span_of(problem, batch);
  if (place.position >= span.length()) return;
  const int64_t count = std::min(kQueryBlock, span.length() - place.position);
  const int64_t start = place.pair * Scratch<P>::per_head(problem);
  alignas(64) T raw[kLanes * kLargestHeadDim];
  alignas(64) float slab[kLanes * kLargestHeadDim];
  clear(raw, kLanes * width);
  clear(slab, kLanes * width);
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    query_slab(problem, args.q, args.crayon_q, span, batch, head, place.position + lane, raw, slab);
    pack_right_transposed<P>(slab, width, worker.queries + lane * P::kDepth, kQueryBlock);
  }
  Running running(exponent_scale(problem.softmax_scale));
  attend<P>(problem, Sight(problem, span), scratch.keys + start, scratch.values + start,
            place.position, count, worker, &running);
  write_out(args, batch, head, span.first + place.position, count, worker.mixed, running, raw);
}

template <typename P, typename T>
void run(const ForwardArgs& args, int64_t threads, void* buffer) {
  const Problem& problem = args.problem;
  const Scratch<P> scratch(problem, threads, buffer);
  pack_keys_and_values<P, T>(args, scratch);
  const Order order(problem);
  parallel_items(scratch.workers, order.count, [&](int64_t worker, int64_t item) {
    attend_block<P, T>(args, scratch, order[item], scratch.worker(problem, worker));
  });
}

}  // namespace

namespace COLLAVO_ISA {

int64_t forward_scratch(const ForwardArgs& args, int64_t threads) {
  int64_t bytes = 0;
  with_type(args.problem.dtype, nullptr, [&](auto* type) {
    using P = ProductOf<Value<decltype(type)>>;
    bytes = Scratch<P>(args.problem, threads, nullptr).bytes(args.problem);
  });
  return bytes;
}

void forward(const ForwardArgs& args, int64_t threads, void* scratch) {
  with_type(args.problem.dtype, nullptr, [&](auto* type) {
    using T = Value<decltype(type)>;
    run<ProductOf<T>, T>(args, threads, scratch);
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::crayon_attention
