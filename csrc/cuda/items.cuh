// Items of a plan (problem.h), as the thread blocks of the block-wise kernels take them.
#pragma once

#include <cstdint>

#include "problem.h"

namespace stof {

constexpr int kTile = 64, kGranule = 16, kHalves = 2, kConsumers = 128 * kHalves;

// Division of 0 .. 2^31 - 1 by a number that the host knows.
struct Divisor {
  int by, shift;
  uint32_t factor;

  __host__ explicit Divisor(int64_t n) : by((int)n), shift(0) {
    while ((1ll << shift) < n) ++shift;
    factor = (uint32_t)(((1ull << 32) * ((1ull << shift) - n)) / n + 1);
  }
  __device__ __forceinline__ int divide(int x) const {
    return (int)(((uint64_t)__umulhi(x, factor) + x) >> shift);
  }
};

// What the kernels need to know of a problem, but for where queries, keys and values lie.
struct Arguments {
  const float* sinks;
  const uint64_t* kv_valid;
  int64_t valid_batch;
  void* out;
  float *lse, *part;
  Divisor copies, heads_of, group;  // heads_of: heads, or pairs of them, of a batch element
  int heads, n_queue, q_len, value_dim, two_heads;
  float scale;  // of the scores, whose exponentials are to base 2
  Plan plan;

  __host__ Arguments(const Problem& p, double base2_scale)
      : sinks(p.sinks),
        kv_valid(p.kv_valid),
        valid_batch(p.valid_batch),
        out(p.out),
        lse(p.lse),
        part(p.workspace),
        copies(p.batch * p.heads / (p.two_heads ? 2 : 1)),
        heads_of(p.heads / (p.two_heads ? 2 : 1)),
        group(p.heads / p.kv_heads),
        heads((int)p.heads),
        n_queue((int)p.plan.n_queue),
        q_len((int)p.q_len),
        value_dim((int)p.value_dim),
        two_heads((int)p.two_heads),
        scale((float)base2_scale),
        plan(p.plan) {}
};

// Tells the compiler that all lanes hold the same: products must not lie in divergent branches.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// An item's place in the plan, and what it is to be computed for.
struct Place {
  int64_t index;
  int batch, head;
};

struct Item {
  int4 x, y;
  int batch, head;
};

__device__ __forceinline__ int fetch_entry(const Arguments& a, int at) {
  return at >= a.n_queue ? -1 : a.plan.queue ? __ldg(a.plan.queue + at) : at;
}

__device__ __forceinline__ Place find_place(const Arguments& a, int entry) {
  Place place;
  place.index = a.copies.divide(entry);
  const int copy = entry - (int)place.index * a.copies.by;
  place.batch = a.heads_of.divide(copy);
  place.head = (copy - place.batch * a.heads_of.by) * (a.two_heads ? 2 : 1);
  if (a.plan.pattern_id)
    place.index +=
        __ldg(a.plan.pattern_id + place.batch * a.plan.pattern_batch + place.head * a.plan.pattern_head) *
        a.plan.n_items;
  return place;
}

__device__ __forceinline__ Item fetch(const Arguments& a, int entry) {
  Item item;
  item.x.x = kNone;
  if (entry < 0) return item;
  const Place place = find_place(a, entry);
  const int4* at = reinterpret_cast<const int4*>(a.plan.items) + 2 * place.index;
  item.x = __ldg(at);
  item.y = __ldg(at + 1);
  item.batch = place.batch;
  item.head = place.head;
  return item;
}

}  // namespace stof
