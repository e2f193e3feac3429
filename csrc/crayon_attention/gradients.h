// Backward of one query head over the keys of its key head: the products and their sums.
//
//   P = 2^(scale * products - lse)          recomputed
//   dS = P * (dOut V^T - delta)             delta = rowsum(dOut * out)
//   dV += P^T dOut,  dK += dS^T Q,  dQ += dS K
//
// Factors that all terms share are left to whoever reads the sums: dK and dQ lack the scale.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/arena.h"
#include "crayon_attention/operands.h"
#include "crayon_attention/softmax.h"

namespace collavo::crayon_attention {

namespace {

// Query blocks whose queries are one sum in dK and dV.
constexpr int64_t kQueryBlocks = 4;
constexpr int64_t kQueryGroup = kQueryBlocks * kQueryBlock;

// Buffers of one worker. Positions are padded to whole blocks.
template <typename P>
struct Work {
  using Element = typename P::Element;

  // Left operands of the key head: [keys][width], [key blocks][width][kKeyBlock], [keys][width].
  Element *keys, *keys_transposed, *values;
  // Right operands of the query head and of dOut: query blocks with positions in lanes, and
  // [positions][width].
  Element *queries, *queries_by_value, *grads, *grads_by_value;
  float *whole, *fraction;        // [positions], the log-sum-exp in powers of two
  float* delta;                   // [positions]
  float* dq;                      // [query blocks][width][kQueryBlock]
  float *products, *d_weights;    // [kKeyBlock][kQueryBlock]
  Element *weights, *d_products;  // left operands, [kKeyBlock][kQueryGroup]
  Element* d_products_right;      // right operand, [kKeyBlock][kQueryBlock]

  Work(const Problem& problem, Arena* arena) {
    const int64_t width = width_of(problem);
    const int64_t keys_count = round_up(problem.length, kKeyBlock);
    const int64_t positions = round_up(problem.length, kQueryBlock);
    for (Element** buffer : {&keys, &keys_transposed, &values}) {
      *buffer = arena->take<Element>(keys_count * width);
    }
    for (Element** buffer : {&queries, &queries_by_value, &grads, &grads_by_value}) {
      *buffer = arena->take<Element>(positions * width);
    }
    for (float** buffer : {&whole, &fraction, &delta}) *buffer = arena->take<float>(positions);
    dq = arena->take<float>(positions * width);
    for (float** buffer : {&products, &d_weights})
      *buffer = arena->take<float>(kKeyBlock * kQueryBlock);
    for (Element** buffer : {&weights, &d_products}) {
      *buffer = arena->take<Element>(kKeyBlock * kQueryGroup);
    }
    d_products_right = arena->take<Element>(kKeyBlock * kQueryBlock);
  }
};

// In four sums side by side, since chains of additions lose digits (common/tile.h), and of the
// difference of two such sums little but their rounding may be left.
template <typename T>
inline float dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t kSums = 4;
  Vec sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * kLanes <= count; d += kSums * kLanes) {
    for (int64_t i = 0; i < kSums; ++i) {
      sums[i] = fma(load(a + d + i * kLanes), load(b + d + i * kLanes), sums[i]);
    }
  }
  for (; d + kLanes <= count; d += kLanes) sums[0] = fma(load(a + d), load(b + d), sums[0]);
  float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; d < count; ++d) total += to_float(a[d]) * to_float(b[d]);
  return total;
}

template <typename P, typename T>
void pack_keys(const BackwardArgs& args, const Span& span, int64_t batch, int64_t head,
               const Work<P>& work, T* slab) {
  const int64_t width = width_of(args.problem);
  clear(slab, kLanes * width);
  for (int64_t i = 0; i < round_up(span.length(), std::max(kRows, kLanes)); i += kLanes) {
    token_slab(args.problem, args.key, span, batch, head, i, slab);
    pack_left<P>(slab, width, work.keys + i * width);
    const int64_t within = i % kKeyBlock;
    pack_left_transposed<P>(slab, width, work.keys_transposed + (i - within) * width + within,
                            kKeyBlock);
    token_slab(args.problem, args.value, span, batch, head, i, slab);
    pack_left<P>(slab, width, work.values + i * width);
  }
}

// A log-sum-exp in powers of two as a whole number and what is left, which has digits of its own.
inline void split(float lse, float* whole, float* fraction) {
  const double power = static_cast<double>(lse) * 1.4426950408889634;
  *whole = static_cast<float>(std::floor(power));
  *fraction = std::isfinite(*whole) ? static_cast<float>(power - *whole) : 0.0f;
}

// Positions behind the last query get zeros everywhere: their weights meet gradients of zero.
template <typename P, typename T>
void pack_queries(const BackwardArgs& args, const Span& span, int64_t batch, int64_t head,
                  const Work<P>& work, T* slab) {
  const Problem& problem = args.problem;
  const int64_t width = width_of(problem);
  alignas(64) float query[kLanes * kLargestHeadDim];
  clear(query, kLanes * width);
  const float* lse = args.lse + (batch * problem.q_heads + head) * problem.length + span.first;
  clear(slab, kLanes * width);
  for (int64_t i = 0; i < round_up(span.length(), kQueryBlock); i += kLanes) {
    const int64_t place = i / kQueryBlock * kQueryBlock * width + i % kQueryBlock * P::kDepth;
    query_slab(problem, args.q, args.crayon_q, span, batch, head, i, slab, query);
    pack_right_transposed<P>(query, width, work.queries + place, kQueryBlock);
    pack_right<P>(query, width, work.queries_by_value + i * width);
    token_slab(problem, args.grad_out, span, batch, head, i, slab);
    pack_right_transposed<P>(slab, width, work.grads + place, kQueryBlock);
    pack_right<P>(slab, width, work.grads_by_value + i * width);
    for (int64_t j = i; j < i + kLanes; ++j) {
      const bool inside = j < span.length();
      split(inside && lse[j] != -INFINITY ? lse[j] : 0.0f, work.whole + j, work.fraction + j);
      work.delta[j] =
          inside ? dot(slab + (j - i) * width, at<const T>(args.out, batch, span.first + j, head),
                       problem.head_dim)
                 : 0.0f;
    }
  }
}

// Keys of a block that a block of queries sees, from whole tile to whole tile.
struct Keys {
  int64_t first = 0, end = 0;
};

// product * scale - whole, rounded once.
inline Vec exponent(Vec product, Vec scale, Vec whole) {
#if defined(__AVX2__)
  return fma(product, scale, subtract(zeros(), whole));
#else
  return static_cast<float>(static_cast<double>(product) * scale - whole);
#endif
}

// Weights from the products, and the products' gradients from the weights'. Both become left
// operands at the query block's place in the group, the gradients a right operand too.
template <typename P>
void weigh(int64_t keys, float scale, const float* whole, const float* fraction, const float* delta,
           const float* products, const float* d_weights, typename P::Element* weights,
           typename P::Element* d_products, typename P::Element* d_products_right) {
  using Power = PowerOf<P>;
  constexpr int64_t kDepth = P::kDepth;
  const Vec factor = broadcast(scale);
  for (int64_t v = 0; v < kQueryBlock; v += kLanes) {
    const Vec base = load(whole + v), rest = load(fraction + v), shift = load(delta + v);
    for (int64_t r = 0; r < keys; r += kDepth) {
      Vec pair[kDepth];
#pragma GCC unroll 2
      for (int64_t j = 0; j < kDepth; ++j) {
        const int64_t at = (r + j) * kQueryBlock + v, to = (r + j) * kQueryGroup + v;
        // Of a large weight little is left behind the whole number, and it is rounded as little.
        const Vec score = exponent(load(products + at), factor, base);
        const Vec weight = power_of_two<Power>(subtract(score, rest));
        pair[j] = multiply(weight, subtract(load(d_weights + at), shift));
        P::put_left(weights + to, weight);
        P::put_left(d_products + to, pair[j]);
      }
      P::put(d_products_right + r * kQueryBlock + v * kDepth, pair);
    }
  }
}

// A block of keys and one of queries: weights and gradients of the products, and dQ.
template <typename P>
Keys gradients_of_blocks(const Problem& problem, const Sight& sight, const Work<P>& work,
                         int64_t block, int64_t position, int64_t column) {
  if (position >= sight.length) return {};
  const Reach reach(sight, position, std::min(kQueryBlock, sight.length - position));
  const Keys keys{reach.first_key(block), reach.end_key(block)};
  if (keys.first >= keys.end) return {};
  const int64_t width = width_of(problem), count = keys.end - keys.first;
  product<P>(work.keys + keys.first * width, width, count, work.queries + position * width,
             kQueryBlock, width, true, work.products);
  product<P>(work.values + keys.first * width, width, count, work.grads + position * width,
             kQueryBlock, width, true, work.d_weights);
  hide(sight, reach, position, kQueryBlock, keys.first, keys.end, work.products);
  const int64_t within = keys.first % kKeyBlock, left = within * kQueryGroup + column;
  weigh<P>(count, exponent_scale(problem.softmax_scale), work.whole + position,
           work.fraction + position, work.delta + position, work.products, work.d_weights,
           work.weights + left, work.d_products + left, work.d_products_right);
  product<P>(work.keys_transposed + block * kKeyBlock * width + within, kKeyBlock, width,
             work.d_products_right, kQueryBlock, count, false, work.dq + position * width);
  return keys;
}

// to[key] += sum over the group's queries of left[key][query] * right[query], for a block's keys.
template <typename P>
void sum_over_queries(const Keys (&keys)[kQueryBlocks], int64_t block, int64_t width,
                      const typename P::Element* left, const typename P::Element* right,
                      float* to) {
  over_vectors(width, [&](int64_t lane, auto count) {
    for (int64_t r = 0; r < kKeyBlock; r += kRows) {
      const int64_t key = block * kKeyBlock + r;
      int64_t first = 0, end = kQueryBlocks;
      while (first < end && (key < keys[first].first || key >= keys[first].end)) ++first;
      while (first < end && (key < keys[end - 1].first || key >= keys[end - 1].end)) --end;
      if (first == end) continue;
      tile_product<P, kRows, decltype(count)::value>(
          left + r * kQueryGroup + first * kQueryBlock, kQueryGroup,
          right + first * kQueryBlock * width + lane * P::kDepth, width * P::kDepth,
          (end - first) * kQueryBlock / P::kDepth, false, to + key * width + lane, width);
    }
  });
}

// All of one query head: dq of the worker is written, dk and dv [keys][width] are added to.
template <typename P>
void head_gradients(const Problem& problem, const Sight& sight, const Work<P>& work, float* dk,
                    float* dv) {
  const int64_t width = width_of(problem);
  clear(work.dq, round_up(sight.length, kQueryBlock) * width);
  for (int64_t block = 0; block * kKeyBlock < sight.length; ++block) {
    const int64_t last = std::min(sight.length, (block + 1) * kKeyBlock) - 1;
    int64_t group = sight.first_query(block * kKeyBlock) / kQueryGroup * kQueryGroup;
    for (; group < sight.end_query(last); group += kQueryGroup) {
      Keys keys[kQueryBlocks];
      for (int64_t i = 0; i < kQueryBlocks; ++i) {
        keys[i] = gradients_of_blocks<P>(problem, sight, work, block, group + i * kQueryBlock,
                                         i * kQueryBlock);
      }
      sum_over_queries<P>(keys, block, width, work.weights, work.grads_by_value + group * width,
                          dv);
      sum_over_queries<P>(keys, block, width, work.d_products,
                          work.queries_by_value + group * width, dk);
    }
  }
}

}  // namespace

}  // namespace collavo::crayon_attention
