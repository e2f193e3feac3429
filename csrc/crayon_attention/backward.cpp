// Backward: weights are recomputed block by block, and every sum is made in an order that depends
// on the shapes alone.
//
// An item is a key head of a sample with some of the query heads that share it. It owns their dq;
// its dk and dv are the whole of the key head's, or a part that is added to the others in order.

#include <algorithm>
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

// Everything about the cut depends on the shapes alone, so that no sum's order depends on threads.
struct Plan {
  int64_t shared, splits, items, workers, per_head;

  Plan(const Problem& problem, int64_t threads)
      : shared(problem.q_heads / problem.kv_heads),
        per_head(round_up(problem.length, kKeyBlock) * width_of(problem)) {
    const int64_t pairs = problem.batch * problem.kv_heads;
    splits = std::min(shared, ceil_divide(kItems, pairs));
    items = pairs * splits;
    workers = workers_for(problem, items, threads);
  }
};

struct Scratch {
  Plan plan;
  Arena arena;
  SlotSums sum_q, sum_k, sum_v;
  float* parts = nullptr;  // [items][dk, dv][keys][width], where there are splits

  Scratch(const BackwardArgs& args, int64_t threads, void* buffer)
      : plan(args.problem, threads),
        arena(buffer),
        sum_q(args, args.grad_crayon_q, args.problem.q_heads, &arena),
        sum_k(args, args.grad_crayon_k, args.problem.kv_heads, &arena),
        sum_v(args, args.grad_crayon_v, args.problem.kv_heads, &arena) {
    if (plan.splits > 1) parts = arena.take<float>(plan.items * 2 * plan.per_head);
  }
};

// One worker's operands, and its dk and dv where there are no parts.
template <typename P>
struct Worker {
  Work<P> work;
  float* own;

  Worker(const Problem& problem, const Plan& plan, Arena* arena)
      : work(problem, arena), own(arena->take<float>(plan.splits > 1 ? 0 : 2 * plan.per_head)) {}
};

// Both dk and dv of a key head.
template <typename T>
void finish_pair(const BackwardArgs& args, const Scratch& scratch, int64_t pair,
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
void run_item(const BackwardArgs& args, const Scratch& scratch, int64_t item,
              const Worker<P>& worker) {
  const Problem& problem = args.problem;
  const Plan& plan = scratch.plan;
  const Work<P>& work = worker.work;
  const int64_t pair = item / plan.splits, part = item % plan.splits;
  const int64_t batch = pair / problem.kv_heads, kv_head = pair % problem.kv_heads;
  const Span span = span_of(problem, batch);
  float* dk = plan.splits > 1 ? scratch.parts + item * 2 * plan.per_head : worker.own;
  float* dv = dk + plan.per_head;
  clear(dk, 2 * plan.per_head);
  alignas(64) T slab[kLanes * kLargestHeadDim];
  pack_keys<P>(args, span, batch, kv_head, work, slab);
  const int64_t end = plan.shared * (part + 1) / plan.splits;
  for (int64_t i = plan.shared * part / plan.splits; i < end; ++i) {
    const int64_t head = kv_head * plan.shared + i;
    pack_queries<P>(args, span, batch, head, work, slab);
    head_gradients<P>(problem, Sight(problem, span), work, dk, dv);
    finish_queries<T>(args, scratch.sum_q, span, batch, head, work.dq);
  }
  if (plan.splits == 1) finish_pair<T>(args, scratch, pair, dk);
}

template <typename P, typename T>
void run(const BackwardArgs& args, int64_t threads, void* buffer) {
  const Problem& problem = args.problem;
  const Scratch scratch(args, threads, buffer);
  const Plan& plan = scratch.plan;
  for (const SlotSums& sums : {scratch.sum_q, scratch.sum_k, scratch.sum_v}) {
    if (sums.data) clear(sums.data, args.slot_count * sums.heads * problem.head_dim);
  }
  parallel_items(plan.workers, plan.items, [&](int64_t worker, int64_t item) {
    Arena arena = scratch.arena;
    for (int64_t i = 0; i < worker; ++i) Worker<P>(problem, plan, &arena);
    run_item<P, T>(args, scratch, item, Worker<P>(problem, plan, &arena));
  });
  if (plan.splits > 1) {
    parallel_for(problem.batch * problem.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t first = pair * plan.splits * 2 * plan.per_head;
        finish_pair<T>(args, scratch, pair, scratch.parts + first);
      }
    });
  }
  finish_table<T>(args, scratch.sum_q, args.grad_crayon_q);
  finish_table<T>(args, scratch.sum_k, args.grad_crayon_k);
  finish_table<T>(args, scratch.sum_v, args.grad_crayon_v);
}

}  // namespace

namespace COLLAVO_ISA {

int64_t backward_scratch(const BackwardArgs& args, int64_t threads) {
  Scratch scratch(args, threads, nullptr);
  with_type(args.problem.dtype, nullptr, [&](auto* type) {
    using P = ProductOf<Value<decltype(type)>>;
    for (int64_t i = 0; i < scratch.plan.workers; ++i) {
      Worker<P>(args.problem, scratch.plan, &scratch.arena);
    }
  });
  return scratch.arena.bytes();
}

void backward(const BackwardArgs& args, int64_t threads, void* scratch) {
  with_type(args.problem.dtype, nullptr, [&](auto* type) {
    using T = Value<decltype(type)>;
    run<ProductOf<T>, T>(args, threads, scratch);
  });
}

}  // namespace COLLAVO_ISA

}  // namespace collavo::crayon_attention
