// collectives.h - barriers, shuffles, votes, reductions, ldmatrix and mma.
#pragma once
#include <cstring>

#include "fiber.h"

namespace simt {

void release_barrier(Sm& m);
void release_named(Sm& m, uint32_t number);
Collective& partial(Warp& w, uint32_t mask, uint32_t lane, Op op, Site site);

SIMT_INLINE Collective& collective(Warp& w, uint32_t mask, uint32_t lane, Op op, Site site) {
  return mask == ~0u ? w.full : partial(w, mask, lane, op, site);
}
// True in the last lane to arrive, which computes and calls finish(); in the others false, once that is done.
SIMT_INLINE bool arrive(Warp& w, Collective& c, uint32_t mask, uint32_t lane, Op op, Site site) {
  if (!c.arrived) {
    if (mask & ~w.alive) fail_ended(mask, w.alive, op, site);
    c.mask = mask;
    c.op = op;
    c.site = site;
  } else if (c.op != op || !(c.site == site)) {
    fail_mismatch(c, op, site);
  }
  c.arrived |= 1u << lane;
  if (c.arrived == mask) return true;
  block_on(op, site);
  return false;
}
SIMT_INLINE void finish(Warp& w, Collective& c) {
  w.run |= c.arrived;
  c.arrived = 0;
}

[[noreturn]] void fail_barrier(Site site);
SIMT_INLINE void syncthreads(Site site) {
  Sm& m = *sm;
  Fiber& f = *m.current;
  if (!m.at_barrier) m.barrier_site = site;
  if (m.alive != m.threads || !(m.barrier_site == site)) fail_barrier(site);
  if (++m.at_barrier == m.threads) return release_barrier(m);
  f.warp->at_barrier |= 1u << f.lane;
  block_on(Op::syncthreads, site);
}
void check_named(Sm& m, int number, int threads, Site site);
SIMT_INLINE void named_barrier(int number, int threads, Site site) {
  if (number == 0) return syncthreads(site);
  Sm& m = *sm;
  Fiber& f = *m.current;
  check_named(m, number, threads, site);
  NamedBarrier& b = m.named[number];
  b.lanes[f.warp->index] |= 1u << f.lane;
  if (++b.arrived == b.threads) return release_named(m, (uint32_t)number);
  block_on(Op::named_barrier, site);
}
void release_syncwarp(Warp& w, uint32_t mask, Site site);
SIMT_INLINE void syncwarp(uint32_t mask, Site site) {
  Fiber& f = *sm->current;
  Warp& w = *f.warp;
  Collective& c = collective(w, mask, f.lane, Op::syncwarp, site);
  if (!arrive(w, c, mask, f.lane, Op::syncwarp, site)) return;
  release_syncwarp(w, mask, site);
  finish(w, c);
}

enum class Shuffle { index, bit_xor, up, down };
void do_shfl(Warp& w, uint32_t mask, Site site);
[[noreturn]] void fail_width(int width, Site site);
// The lane whose value is read, by CUDA's rules: a source outside the segment of `width` lanes means the lane itself.
SIMT_INLINE uint32_t shuffle_source(int lane, int arg, Shuffle how, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  int from = lane;
  if (how == Shuffle::index) from = first | (arg & (width - 1));
  if (how == Shuffle::bit_xor) from = (lane ^ arg) <= last ? lane ^ arg : lane;
  if (how == Shuffle::up) from = lane - arg >= first ? lane - arg : lane;
  if (how == Shuffle::down) from = lane + arg <= last ? lane + arg : lane;
  return (uint32_t)from;
}
template <class T> SIMT_INLINE T shfl(uint32_t mask, T value, int arg, Shuffle how, int width, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1))) fail_width(width, site);
  Fiber& f = *sm->current;
  Warp& w = *f.warp;
  uint64_t in = 0;
  memcpy(&in, &value, sizeof value);
  w.in[f.lane] = in;
  w.source[f.lane] = shuffle_source(f.lane, arg, how, width);
  Collective& c = collective(w, mask, f.lane, Op::shfl, site);
  if (arrive(w, c, mask, f.lane, Op::shfl, site)) {
    do_shfl(w, mask, site);
    finish(w, c);
  }
  memcpy(&value, &w.out[f.lane], sizeof value);
  return value;
}

SIMT_INLINE uint32_t ballot(uint32_t mask, bool value, Site site) {
  Fiber& f = *sm->current;
  Warp& w = *f.warp;
  w.in[f.lane] = value;
  Collective& c = collective(w, mask, f.lane, Op::vote, site);
  if (arrive(w, c, mask, f.lane, Op::vote, site)) {
    uint32_t votes = 0;
    for (uint32_t left = mask; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      votes |= (uint32_t)w.in[i] << i;
    }
    for (uint32_t left = mask; left; left &= left - 1) w.out[__builtin_ctz(left)] = votes;
    finish(w, c);
  }
  return (uint32_t)w.out[f.lane];
}

// __reduce_*_sync: `op` is associative and commutative, so that the order does not matter.
template <class T, class F> SIMT_INLINE T reduce_sync(uint32_t mask, T value, F op, Site site) {
  Fiber& f = *sm->current;
  Warp& w = *f.warp;
  w.in[f.lane] = (uint32_t)value;
  Collective& c = collective(w, mask, f.lane, Op::reduce, site);
  if (arrive(w, c, mask, f.lane, Op::reduce, site)) {
    T all = (T)(uint32_t)w.in[__builtin_ctz(mask)];
    for (uint32_t left = mask & (mask - 1); left; left &= left - 1)
      all = op(all, (T)(uint32_t)w.in[__builtin_ctz(left)]);
    for (uint32_t left = mask; left; left &= left - 1) w.out[__builtin_ctz(left)] = (uint32_t)all;
    finish(w, c);
  }
  return (T)(uint32_t)w.out[f.lane];
}

// The butterfly over lane bits `steps` (31: the warp, 3: a quad), largest first: the additions of the shuffle version.
template <class F> SIMT_INLINE float reduce(float value, int steps, F op, Site site) {
  Fiber& f = *sm->current;
  Warp& w = *f.warp;
  memcpy(&w.in[f.lane], &value, sizeof value);
  if (arrive(w, w.full, ~0u, f.lane, Op::reduce, site)) {
    float x[32], y[32];
    for (int i = 0; i < 32; i++) memcpy(&x[i], &w.in[i], sizeof x[i]);
    for (int step = 16; step; step >>= 1) {
      if (!(steps & step)) continue;
      for (int i = 0; i < 32; i++) y[i] = op(x[i], x[i ^ step]);
      memcpy(x, y, sizeof x);
    }
    for (int i = 0; i < 32; i++) memcpy(&w.out[i], &x[i], sizeof x[i]);
    finish(w, w.full);
  }
  memcpy(&value, &w.out[f.lane], sizeof value);
  return value;
}

void do_ldmatrix(Sm& m, Warp& w, int matrices, bool trans, Site site);
template <int N> SIMT_INLINE void ldmatrix(uint32_t (&r)[N], uint32_t address, bool trans, Site site) {
  Sm& m = *sm;
  const uint32_t lane = m.current->lane;
  Warp& w = *m.current->warp;
  w.address[lane] = address;
  if (arrive(w, w.full, ~0u, lane, Op::ldmatrix, site)) {
    do_ldmatrix(m, w, N, trans, site);
    finish(w, w.full);
  }
  for (int i = 0; i < N; i++) r[i] = w.r[i][lane];
}

void do_mma(Warp& w, int tiles, bool f16);
// Neighbouring n8 tiles that share A: one arrival instead of two.
template <int kTiles>
SIMT_INLINE void mma(float* const (&c)[kTiles], const uint32_t* a, const uint32_t* b, bool f16, Site site) {
  const uint32_t lane = sm->current->lane, g = lane >> 2, t = lane & 3;
  Warp& w = *sm->current->warp;
  for (int i = 0; i < 4; i++) w.a[i * 32 + lane] = a[i];
  for (int j = 0; j < kTiles; j++) {
    w.b[j][t * 8 + g] = b[2 * j];
    w.b[j][32 + t * 8 + g] = b[2 * j + 1];
    memcpy(&w.c[j][g][2 * t], c[j], 8);
    memcpy(&w.c[j][g + 8][2 * t], c[j] + 2, 8);
  }
  if (arrive(w, w.full, ~0u, lane, Op::mma, site)) {
    do_mma(w, kTiles, f16);
    finish(w, w.full);
  }
  for (int j = 0; j < kTiles; j++) {
    memcpy(c[j], &w.c[j][g][2 * t], 8);
    memcpy(c[j] + 2, &w.c[j][g + 8][2 * t], 8);
  }
}

}  // namespace simt
