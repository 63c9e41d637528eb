// collectives.cpp - what the last lane to arrive does.
#include "collectives.h"

#include <immintrin.h>

#include "shared.h"

namespace simt {

// ---- barriers ----------------------------------------------------------------------------------------------------

void fail_barrier(Site site) {
  const Sm& m = *sm;
  if (m.alive != m.threads)
    fail(site, "early exit: __syncthreads after %u of %u threads have ended", m.threads - m.alive, m.threads);
  fail(site, "divergent barrier: __syncthreads here while %u threads wait in __syncthreads at %s:%d", m.at_barrier,
       short_path(m.barrier_site.file), m.barrier_site.line);
}
static void check_time(const Warp& w, Site site) {
  if (w.clock.now >= kMaxWarpTime)
    fail(site, "more than %u barriers and __syncwarp in one block: the executor counts no further", kMaxWarpTime / 2);
}
void release_barrier(Sm& m) {
  check_time(m.warps[0], m.barrier_site);
  m.at_barrier = 0;
  m.clock.sync_all();
  for (uint32_t i = 0; i < m.nwarps; i++) {
    Warp& w = m.warps[i];
    w.run |= w.at_barrier;
    w.at_barrier = 0;
    w.clock.sync_all();
  }
}

void check_named(Sm& m, int number, int threads, Site site) {
  if (number < 1 || number > 15 || threads < 32 || threads % 32 || (uint32_t)threads > m.threads)
    fail(site, "named barrier %d of %d threads: numbers are 1 to 15, threads whole warps of the block", number,
         threads);
  NamedBarrier& b = m.named[number];
  if (!b.arrived) {
    b.threads = (uint32_t)threads;
    b.site = site;
  }
  if (b.threads != (uint32_t)threads)
    fail(site, "named barrier %d of %d threads here, of %u at %s:%d", number, threads, b.threads,
         short_path(b.site.file), b.site.line);
}
void release_named(Sm& m, uint32_t number) {
  NamedBarrier& b = m.named[number];
  uint32_t members = 0;
  for (uint32_t i = 0; i < m.nwarps; i++) {
    Warp& w = m.warps[i];
    if (!b.lanes[i]) continue;
    if (b.lanes[i] != ~0u) fail(b.site, "named barrier %u: of warp %u only lanes %08x came", number, i, b.lanes[i]);
    members |= 1u << i;
    w.run |= b.lanes[i];
    w.clock.sync_all();
  }
  if ((uint32_t)__builtin_popcount(members) == m.nwarps)
    m.clock.sync_all();
  else
    m.clock.sync_some(members);
  memset(&b, 0, sizeof b);
}
void release_syncwarp(Warp& w, uint32_t mask, Site site) {
  check_time(w, site);
  if (mask == w.alive)
    w.clock.sync_all();
  else
    w.clock.sync_some(mask);
}

// A collective of some lanes: the one in flight with this mask, or a free one.
Collective& partial(Warp& w, uint32_t mask, uint32_t lane, Op op, Site site) {
  if (!(mask >> lane & 1))
    fail(site, "%s with mask %08x, which leaves out the calling lane %u", op_name(op), mask, lane);
  Collective* found = nullptr;
  for (Collective& c : w.part) {
    if (c.arrived && c.mask == mask) return c;
    if (c.arrived & mask) fail_mismatch(c, op, site);
    if (!c.arrived) found = &c;
  }
  if (w.full.arrived & mask) fail_mismatch(w.full, op, site);
  if (!found) fail(site, "%s: more than 4 groups of lanes of one warp at once", op_name(op));
  return *found;
}

void do_shfl(Warp& w, uint32_t mask, Site site) {
  for (uint32_t left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (!(mask >> w.source[lane] & 1))
      fail(site, "shuffle: lane %d reads lane %u, which is not in the mask %08x", lane, w.source[lane], mask);
    w.out[lane] = w.in[w.source[lane]];
  }
}
void fail_width(int width, Site site) { fail(site, "shuffle of width %d: a power of two up to 32 is needed", width); }

// ---- tensor cores ------------------------------------------------------------------------------------------------

void do_ldmatrix(Sm& m, Warp& w, int matrices, bool trans, Site site) {
  alignas(64) uint16_t in[4][8][8];  // [matrix][row][column]
  for (int lane = 0; lane < 8 * matrices; lane++)
    memcpy(in[lane / 8][lane % 8], shared_at(w.address[lane], 16, "ldmatrix", site), 16);
  if (m.checks) shared_read_rows(m, w.address, 8 * matrices, site);
  for (int i = 0; i < matrices; i++) {
    if (!trans) {  // lane t holds row t/4, columns 2(t%4) and 2(t%4)+1: the matrix as it lies
      memcpy(w.r[i], in[i], sizeof in[i]);
      continue;
    }
    for (int t = 0; t < 32; t++) w.r[i][t] = in[i][t % 4 * 2][t / 4] | (uint32_t)in[i][t % 4 * 2 + 1][t / 4] << 16;
  }
}

// Eight 16-bit numbers in the low halves, as f32.
template <bool kF16> SIMT_INLINE __m256 widen(__m256i x) {
  if (!kF16) return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_packus_epi32(low, low);  // each half: its four numbers twice
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
template <bool kF16> SIMT_INLINE void split(const uint32_t* pairs, __m256* lo, __m256* hi) {
  const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(pairs));
  *lo = widen<kF16>(x);
  *hi = kF16 ? widen<kF16>(_mm256_srli_epi32(x, 16))
             : _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
}

// D = A B + C in f32: c, then k = 0 to 15 one after the other, each step a fused multiply-add. Products of bf16 or f16
// are exact in f32, so this is one rounding per addition. (A tensor core adds in another order and truncates.)
template <bool kF16> static void mma_tiles(Warp& w, int tiles) {
  alignas(32) float lo[4 * 32], hi[4 * 32];  // [register][lane]: even and odd k
  for (int i = 0; i < 16; i++) {
    __m256 even, odd;
    split<kF16>(w.a + i * 8, &even, &odd);
    _mm256_store_ps(lo + i * 8, even);
    _mm256_store_ps(hi + i * 8, odd);
  }
  for (int tile = 0; tile < tiles; tile++) {
    __m256 b[16];  // row k, 8 columns
    for (int t = 0; t < 8; t++) split<kF16>(w.b[tile] + t * 8, &b[2 * t], &b[2 * t + 1]);
    for (int half = 0; half < 2; half++) {  // rows 0-7 are in registers 0 and 2 of A, rows 8-15 in 1 and 3
      __m256 c[8];
      for (int g = 0; g < 8; g++) c[g] = _mm256_load_ps(w.c[tile][8 * half + g]);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {  // k / 4: the register, k % 4: the lane of the quad
        const int from = (half + k / 4 * 2) * 32 + k % 4;
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
          c[g] = _mm256_fmadd_ps(_mm256_broadcast_ss(lo + from + 4 * g), b[2 * k], c[g]);
          c[g] = _mm256_fmadd_ps(_mm256_broadcast_ss(hi + from + 4 * g), b[2 * k + 1], c[g]);
        }
      }
      for (int g = 0; g < 8; g++) _mm256_store_ps(w.c[tile][8 * half + g], c[g]);
    }
  }
}
void do_mma(Warp& w, int tiles, bool f16) { f16 ? mma_tiles<true>(w, tiles) : mma_tiles<false>(w, tiles); }

}  // namespace simt
