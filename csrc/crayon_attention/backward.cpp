// Backward: weights are recomputed panel by panel, and every sum is made in an order that depends
// on the shapes alone.
//
// An item is a key head of a sample with some of the query heads that share it. It owns their dq;
// its dk and dv are the whole of the key head's, or a part that is added to the others in order.

#include <cmath>

#include "common/arena.h"
#include "common/parallel.h"
#include "crayon_attention/crayon_attention.h"
#include "crayon_attention/finish.h"
#include "crayon_attention/gradients.h"

namespace collavo::crayon_attention {

namespace {

// Items that keep many threads busy; with fewer key heads their query heads are split.
constexpr int64_t kItems = 16;

struct Plan {
  int64_t shared, splits, items, workers, per_head;

  Plan(const Problem& problem, int64_t threads) {
    const int64_t pairs = problem.batch * problem.kv_heads;
    shared = problem.q_heads / problem.kv_heads;
    splits = 1;
    while (splits < shared && (shared % splits || pairs * splits < kItems)) ++splits;
    items = pairs * splits;
    const int64_t work = problem.q_heads * problem.length * problem.length * problem.size;
    workers = most(1, least(least(threads, items), problem.batch * work >> 20));
    per_head = round_up(problem.length, kBlock) * width_of(problem);
  }
};

template <typename P>
struct Scratch {
  Plan plan;
  Arena arena;
  SlotSums sum_q, sum_k, sum_v;
  float* parts = nullptr;  // [items][dk, dv][keys][width], where there are splits

  Scratch(const BackwardArgs& args, int64_t threads, void* buffer)
      : plan(args.problem, threads),
        arena(buffer),
        sum_q(args, args.sum_q, args.problem.q_heads, &arena),
        sum_k(args, args.sum_k, args.problem.kv_heads, &arena),
        sum_v(args, args.sum_v, args.problem.kv_heads, &arena) {
    if (plan.splits > 1) parts = arena.take<float>(plan.items * 2 * plan.per_head);
  }
};

// Both dk and dv of a key head.
template <typename P, typename T>
void finish_pair(const BackwardArgs& args, const Scratch<P>& scratch, int64_t pair,
                 const float* parts) {
  const Plan& plan = scratch.plan;
  const int64_t batch = pair / args.problem.kv_heads, head = pair % args.problem.kv_heads;
  const Span span = span_of(args.problem, batch);
  finish_keys<T>(args, true, scratch.sum_k, span, batch, head, parts, 2 * plan.per_head,
                 plan.splits);
  finish_keys<T>(args, false, scratch.sum_v, span, batch, head, parts + plan.per_head,
                 2 * plan.per_head, plan.splits);
}

template <typename P, typename T>
void run_item(const BackwardArgs& args, const Scratch<P>& scratch, int64_t item,
              const Work<P>& work, float* own) {
  const Problem& problem = args.problem;
  const Plan& plan = scratch.plan;
  const int64_t pair = item / plan.splits, count = plan.shared / plan.splits;
  const int64_t batch = pair / problem.kv_heads, kv_head = pair % problem.kv_heads;
  const Span span = span_of(problem, batch);
  float* dk = plan.splits > 1 ? scratch.parts + item * 2 * plan.per_head : own;
  float* dv = dk + plan.per_head;
  clear(dk, 2 * plan.per_head);
  alignas(64) T strip[kLanes * kMostWidth];
  pack_keys<P>(args, span, batch, kv_head, work, strip);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t head = kv_head * plan.shared + item % plan.splits * count + i;
    pack_queries<P>(args, span, batch, head, work, strip);
    head_gradients<P>(problem, Sight(problem, span), work, dk, dv);
    finish_queries<T>(args, scratch.sum_q, span, batch, head, work.dq);
  }
  if (plan.splits == 1) finish_pair<P, T>(args, scratch, pair, dk);
}

template <typename P, typename T>
void run(const BackwardArgs& args, int64_t threads, void* buffer) {
  const Problem& problem = args.problem;
  const Scratch<P> scratch(args, threads, buffer);
  const Plan& plan = scratch.plan;
  for (const SlotSums& sums : {scratch.sum_q, scratch.sum_k, scratch.sum_v}) {
    if (sums.data) clear(sums.data, args.slot_count * sums.heads * problem.size);
  }
  parallel_for(plan.workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      Arena arena = scratch.arena;
      for (int64_t skip = 0; skip < w; ++skip) {
        Work<P>(problem, &arena);
        arena.take<float>(plan.splits > 1 ? 0 : 2 * plan.per_head);
      }
      const Work<P> work(problem, &arena);
      float* own = arena.take<float>(plan.splits > 1 ? 0 : 2 * plan.per_head);
      for (int64_t i = plan.items * w / plan.workers; i < plan.items * (w + 1) / plan.workers;
           ++i) {
        run_item<P, T>(args, scratch, i, work, own);
      }
    }
  });
  if (plan.splits > 1) {
    parallel_for(problem.batch * problem.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        finish_pair<P, T>(args, scratch, pair,
                          scratch.parts + pair * plan.splits * 2 * plan.per_head);
      }
    });
  }
  finish_table<T>(args, scratch.sum_q, args.sum_q);
  finish_table<T>(args, scratch.sum_k, args.sum_k);
  finish_table<T>(args, scratch.sum_v, args.sum_v);
}

template <typename P>
int64_t scratch_bytes(const BackwardArgs& args, int64_t threads) {
  Scratch<P> scratch(args, threads, nullptr);
  for (int64_t w = 0; w < scratch.plan.workers; ++w) {
    Work<P>(args.problem, &scratch.arena);
    scratch.arena.template take<float>(scratch.plan.splits > 1 ? 0 : 2 * scratch.plan.per_head);
  }
  return scratch.arena.bytes();
}

}  // namespace

namespace COLLAVO_ISA {

int64_t backward_scratch(const BackwardArgs& args, int64_t threads) {
  switch (args.problem.dtype) {
    case DType::float32:
      return scratch_bytes<ProductOf<float>>(args, threads);
    case DType::bfloat16:
      return scratch_bytes<ProductOf<BFloat16>>(args, threads);
    case DType::float16:
      return scratch_bytes<ProductOf<Float16>>(args, threads);
  }
  return 0;
}

void backward(const BackwardArgs& args, int64_t threads, void* scratch) {
  switch (args.problem.dtype) {
    case DType::float32:
      return run<ProductOf<float>, float>(args, threads, scratch);
    case DType::bfloat16:
      return run<ProductOf<BFloat16>, BFloat16>(args, threads, scratch);
    case DType::float16:
      return run<ProductOf<Float16>, Float16>(args, threads, scratch);
  }
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::crayon_attention
