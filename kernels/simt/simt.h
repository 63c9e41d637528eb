// simt.h - runs CUDA-style kernels on the CPU: one fiber per CUDA thread, one OS thread per stream of blocks.
//
// The kernel source is ordinary CUDA C++ that includes ptx.cuh; under g++ (no __CUDACC__) ptx.cuh includes this file and
// supplies host twins for the PTX wrappers. A fiber runs until it needs the other lanes of its warp (a "collective") or
// the other threads of its block (a barrier). It leaves its operands in the warp's mailbox and switches straight to the
// next runnable lane; the LAST lane to arrive computes the result for all 32, marks them runnable and carries on.
// One collective therefore costs 31 stack switches and one computation.
//
// Limits and costs: README.md. x86-64 System V only (stack switch in assembly).
#pragma once
#ifdef __CUDACC__
#error "simt.h is the host executor: kernels include ptx.cuh"
#endif
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct uint3 { unsigned x, y, z; };

// Everything between a wrapper and its stack switch is forced inline: then each call site has its own indirect jump, whose
// target the branch predictor learns. A shared out-of-line function returns to the wrong site every time (2.3x slower).
#define SIMT_INLINE inline __attribute__((always_inline))

namespace simt {

struct Kernel { const char *name, *file; size_t params_bytes; int max_threads; void (*body)(const void* params); };
enum Kind : uint8_t { kNone, kBarrier, kSyncWarp, kShfl, kVote, kReduce, kLdmatrix, kMma };
const char* kind_name(Kind k);

struct Options {
  uint32_t seed = 0;      // 0: a fixed order (lowest lane first); else a reproducible random schedule
  int threads = 0;        // OS threads (block streams); 0: one per core
  bool race = true;       // shadow memory for shared accesses made through the wrappers
  bool stats = false;     // count ldmatrix bank conflicts
};
struct Stats { uint64_t mma = 0, ldmatrix = 0, shfl = 0, reduce = 0, syncwarp = 0, barrier = 0, conflicts = 0, blocks = 0; };
struct Report { bool ok = true; std::string text; Stats stats; };

struct Pending { uint32_t dst, group; uint8_t data[16]; };   // one cp.async: the bytes land at wait_group
struct Fiber {
  void* sp; uint3 tid; uint16_t warp; uint8_t lane; bool done; struct Warp* wp;
  Kind wait; int line;                                       // what a blocked lane waits for (deadlock report)
  uint32_t group;                                            // cp.async groups committed so far
  std::vector<Pending> copies;
};
struct Coll { uint32_t mask = 0, arrived = 0; Kind kind = kNone; int line = 0; };

// Mailboxes are per kind and every lane owns its slots, inputs and results: a lane that has resumed may leave operands
// for its next collective while slower lanes have not yet read this one's result.
struct alignas(64) Warp {
  uint32_t run, alive, at_barrier, sync_epoch;
  Coll full, part[4];                                        // in flight: full mask; partial masks (shfl, syncwarp)
  alignas(64) uint32_t a[4 * 32];                            // mma A registers, [register][lane]
  alignas(64) uint32_t b[2][2 * 32];                         // mma B registers, [tile][register][tc*8+g]: 8 columns contiguous
  alignas(64) float c[2][16][8];                             // mma C/D tiles (two for mma_x2)
  alignas(64) uint32_t addr[32], r[4][32];                   // ldmatrix row addresses, result registers
  alignas(64) uint64_t in[32], out[32]; uint32_t src[32];    // shfl, reduce
};
struct Shadow { uint32_t wr, rd; uint16_t wthread, rwarp; uint16_t wsync; uint16_t pending; };   // one 4-byte shared word

struct Worker {
  Fiber* cur; void* sched_sp;
  Fiber* fiber; Warp* warp; int nfiber, nwarp;
  uint32_t rng, seed; bool race, count;
  int arrived, alive, barrier_line; struct { int arrived, threads, line; uint32_t who[32]; } named[16];
  uint32_t epoch, epoch0;                                    // barrier intervals (never reset); first one of this block
  uint3 bid, bdim, gdim;
  char* arena; uint32_t dyn_lo, dyn_hi;                      // shared window; dynamic part is [dyn_lo, dyn_hi)
  Shadow* shadow;
  uint32_t slot_lo[64], slot_hi[64]; uint32_t slot_block[64]; // static shared variables
  const Kernel* kernel; const void* params;
  Stats st; bool failed; std::string error;
  char* stacks;
};
extern __thread Worker* W __attribute__((tls_model("initial-exec")));

// Saves the current stack in *from and continues on `to`. Inline, so the compiler spills only what is live, and with an
// indirect jump instead of ret, which the return predictor would always get wrong.
inline __attribute__((always_inline)) void simt_switch(void** from, void* to) {
  asm volatile("lea -128(%%rsp), %%rsp\n\tpush %%rbp\n\tpush %%rbx\n\tlea 1f(%%rip), %%rax\n\tpush %%rax\n\tmov %%rsp, (%0)\n\tmov %1, %%rsp\n\t"
               "pop %%rax\n\tjmp *%%rax\n1:\tpop %%rbx\n\tpop %%rbp\n\tlea 128(%%rsp), %%rsp"
               : "+D"(from), "+S"(to) : : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
                 "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#ifdef __AVX512F__
                 , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#endif
  );
}
[[noreturn]] void fail(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_mismatch(const Coll&, Kind, int line);
[[noreturn]] void fail_deadlock();
void barrier_release(Worker*);
Coll& partial(Warp&, uint32_t mask);
Report run(const Kernel&, uint32_t grid, uint32_t block, size_t smem, const void* params, const Options&);

// ---- scheduling ------------------------------------------------------------------------------------------------
inline uint32_t rnd(Worker* w) { uint32_t x = w->rng; x ^= x << 13; x ^= x >> 17; x ^= x << 5; return w->rng = x; }
inline int pick(uint32_t mask, Worker* w) {                  // a set bit: the lowest, or a random one under a seed
  if (!w->seed) return __builtin_ctz(mask);
  uint32_t r = rnd(w) & 31; uint32_t m = mask >> r | mask << ((32 - r) & 31);
  return (__builtin_ctz(m) + r) & 31;
}
Fiber* next_slow(Worker* w, Warp* here);                     // another warp's turn, or a random choice under a seed
SIMT_INLINE Fiber* next(Worker* w, Warp* here) {             // stay in the warp while it has a runnable lane
  if (__builtin_expect(here->run == 0 || w->seed, 0)) return next_slow(w, here);
  return &w->fiber[(here - w->warp) * 32 + __builtin_ctz(here->run)];
}
SIMT_INLINE void block_on(Kind k, int line) {                // the current lane cannot go on: switch to another
  Worker* w = W; Fiber* f = w->cur; Warp* wp = f->wp;
  f->wait = k; f->line = line; wp->run &= ~(1u << f->lane);
  Fiber* n = next(w, wp); w->cur = n; simt_switch(&f->sp, n->sp);
}
// Returns true in the last lane to arrive, which must compute and then call finish(); others return false once done.
SIMT_INLINE bool arrive(Worker* w, Warp& wp, Coll& c, uint32_t mask, int lane, Kind k, int line) {
  if (!c.arrived) { c.mask = mask; c.kind = k; c.line = line; }
  else if (c.kind != k || c.line != line) fail_mismatch(c, k, line);
  c.arrived |= 1u << lane;
  if (c.arrived == (mask & wp.alive)) return true;
  block_on(k, line); return false;
}
SIMT_INLINE void finish(Worker*, Warp& wp, Coll& c) { wp.run |= c.arrived; c.arrived = 0; }
SIMT_INLINE Coll& coll(Warp& wp, uint32_t mask) { return mask == ~0u ? wp.full : partial(wp, mask); }
SIMT_INLINE void need_full(Warp& wp, Kind k, int line) { if (wp.alive != ~0u) fail("%s at line %d needs all 32 lanes, alive %08x", kind_name(k), line, wp.alive); }

SIMT_INLINE void syncthreads(int line) {
  Worker* w = W; Fiber* f = w->cur; w->st.barrier++;
  if (!w->arrived) w->barrier_line = line;
  else if (w->barrier_line != line) fail("__syncthreads at line %d while other threads wait at line %d", line, w->barrier_line);
  if (++w->arrived == w->alive) { barrier_release(w); return; }
  w->warp[f->warp].at_barrier |= 1u << f->lane; block_on(kBarrier, line);
}
void named_release(Worker*, int number);
SIMT_INLINE void named_barrier(int number, int threads, int line) {
  Worker* w = W; Fiber* f = w->cur;
  if (!number) { syncthreads(line); return; }
  if (number < 0 || number > 15 || threads <= 0 || threads % 32) fail("named barrier %d of %d threads at line %d", number, threads, line);
  auto& b = w->named[number];
  if (!b.arrived) { b.threads = threads; b.line = line; }
  else if (b.threads != threads) fail("named barrier %d at line %d of %d threads, others wait at line %d for %d", number, line, threads, b.line, b.threads);
  b.who[f->warp] |= 1u << f->lane;
  if (++b.arrived == threads) { named_release(w, number); return; }
  block_on(kBarrier, line);
}
SIMT_INLINE void syncwarp(uint32_t mask, int line) {
  Worker* w = W; Warp& wp = *w->cur->wp; Coll& c = coll(wp, mask);
  if (arrive(w, wp, c, mask, w->cur->lane, kSyncWarp, line)) { w->st.syncwarp++; wp.sync_epoch++; finish(w, wp, c); }
}

// ---- shared memory ---------------------------------------------------------------------------------------------
// A shared address is the offset in the worker's window. Every access through a wrapper is bounds- and
// alignment-checked; raw C++ accesses are caught by the guard page that follows the last byte.
uint32_t slot_of(Worker*, uint32_t addr);
uint32_t static_shared(int id, uint32_t bytes);
inline uint32_t dynamic_shared() { return W->dyn_lo; }
int new_slot();
inline char* at(uint32_t addr, uint32_t bytes, const char* what, int line) {
  Worker* w = W;
  if (addr < w->dyn_lo || addr + bytes > w->dyn_hi) { uint32_t s = slot_of(w, addr);
    if (s == ~0u || addr + bytes > w->slot_hi[s]) fail("%s at line %d: shared address %d out of bounds (dynamic size %u)", what, line, (int)(addr - w->dyn_lo), w->dyn_hi - w->dyn_lo); }
  if (addr & (bytes - 1)) fail("%s at line %d: shared address %d not aligned to %u", what, line, (int)(addr - w->dyn_lo), bytes);
  return w->arena + addr;
}
void race_fail(const Shadow&, uint32_t addr, bool write, const char* what, int line);
// lane < 0: the whole warp reads (ldmatrix)
inline void note_read(uint32_t addr, uint32_t bytes, int lane, const char* what, int line) {
  Worker* w = W; if (!w->race) return; int wi = w->cur->warp; Shadow* s = w->shadow + (addr >> 2);
  for (uint32_t i = 0; i < (bytes + 3) / 4; i++) {
    if (s[i].pending | (s[i].wr < w->epoch0)) race_fail(s[i], addr + 4 * i, false, what, line);
    if (s[i].wr == w->epoch && (s[i].wthread >> 5 != wi || ((int)(s[i].wthread & 31) != lane && s[i].wsync == (uint16_t)w->warp[wi].sync_epoch))) race_fail(s[i], addr + 4 * i, false, what, line);
    s[i].rwarp = s[i].rd == w->epoch && s[i].rwarp != wi ? 0xffff : wi; s[i].rd = w->epoch; }
}
inline void note_write(uint32_t addr, uint32_t bytes, const char* what, int line, int pending = 0) {
  Worker* w = W; if (!w->race) return; Fiber* f = w->cur; Shadow* s = w->shadow + (addr >> 2); int t = f->warp * 32 + f->lane;
  for (uint32_t i = 0; i < (bytes + 3) / 4; i++) {
    if ((s[i].wr == w->epoch && s[i].wthread != t && (s[i].wthread >> 5 != f->warp || s[i].wsync == (uint16_t)w->warp[f->warp].sync_epoch)) || (s[i].rd == w->epoch && s[i].rwarp != f->warp)) race_fail(s[i], addr + 4 * i, true, what, line);
    s[i].wr = w->epoch; s[i].wthread = t; s[i].wsync = (uint16_t)w->warp[f->warp].sync_epoch; s[i].pending = pending; }
}
template <class T> inline T lds(uint32_t a, int line) { T v; memcpy(&v, at(a, sizeof v, "ld.shared", line), sizeof v); note_read(a, sizeof v, W->cur->lane, "ld.shared", line); return v; }
template <class T> inline void sts(uint32_t a, T v, int line) { memcpy(at(a, sizeof v, "st.shared", line), &v, sizeof v); note_write(a, sizeof v, "st.shared", line); }

template <class T> inline T load(const T* p, int line) {
  if ((uintptr_t)p & (sizeof(T) - 1)) fail("load at line %d: address %p not aligned to %zu", line, (const void*)p, sizeof(T));
  T v; memcpy(&v, p, sizeof v); return v;
}
template <class T> inline void store(T* p, const T& v, int line) {
  if ((uintptr_t)p & (sizeof(T) - 1)) fail("store at line %d: address %p not aligned to %zu", line, (void*)p, sizeof(T));
  memcpy((void*)p, &v, sizeof v);
}
// cp.async: the source is read at once (so a bad pointer is reported at the right line), the destination holds 0xFF
// bytes (a NaN in bf16, fp16 and f32) until the issuing thread waits for the group.
void cp_async16(uint32_t dst, const void* src, int bytes, int line);
void cp_async_wait(uint32_t keep, int line);
inline void cp_async_commit() { W->cur->group++; }

// ---- collectives -----------------------------------------------------------------------------------------------
enum Shfl { kIdx, kXor, kUp, kDown };
void do_shfl(Warp&, uint32_t mask, int line);
template <class T> SIMT_INLINE T shfl(uint32_t mask, T v, int arg, Shfl how, int width, int line) {
  static_assert(sizeof(T) <= 8, ""); Worker* w = W; int l = w->cur->lane; Warp& wp = *w->cur->wp;
  int seg = l & ~(width - 1), s = how == kIdx ? seg | (arg & (width - 1)) : how == kXor ? l ^ arg : how == kUp ? l - arg : l + arg;
  if ((how == kUp && s < seg) || (how == kDown && s >= seg + width) || (how == kXor && s >= seg + width)) s = l;
  uint64_t x = 0; memcpy(&x, &v, sizeof v); wp.in[l] = x; wp.src[l] = s; Coll& c = coll(wp, mask);
  if (arrive(w, wp, c, mask, l, kShfl, line)) { w->st.shfl++; do_shfl(wp, c.arrived, line); finish(w, wp, c); }
  memcpy(&v, &wp.out[l], sizeof v); return v;
}
// Butterfly over lane bits `bits` (31: the warp, 3: a quad), highest first: same additions as the shuffle version.
template <class Op> SIMT_INLINE float reduce(float v, int bits, Op op, int line) {
  Worker* w = W; int l = w->cur->lane; Warp& wp = *w->cur->wp; memcpy(&wp.in[l], &v, 4);
  if (arrive(w, wp, wp.full, ~0u, l, kReduce, line)) {
    need_full(wp, kReduce, line); w->st.reduce++; float x[32], y[32];
    for (int i = 0; i < 32; i++) memcpy(&x[i], &wp.in[i], 4);
    for (int m = 16; m; m >>= 1) if (bits & m) { for (int i = 0; i < 32; i++) y[i] = op(x[i], x[i ^ m]); memcpy(x, y, sizeof x); }
    for (int i = 0; i < 32; i++) memcpy(&wp.out[i], &x[i], 4);
    finish(w, wp, wp.full);
  }
  memcpy(&v, &wp.out[l], 4); return v;
}
SIMT_INLINE unsigned ballot(uint32_t mask, bool v, int line) {
  Worker* w = W; int l = w->cur->lane; Warp& wp = *w->cur->wp; wp.in[l] = v; Coll& c = coll(wp, mask);
  if (arrive(w, wp, c, mask, l, kVote, line)) { uint32_t r = 0; for (uint32_t m = c.arrived; m; m &= m - 1) { int i = __builtin_ctz(m); r |= (uint32_t)wp.in[i] << i; }
    for (int i = 0; i < 32; i++) if (c.arrived >> i & 1) wp.out[i] = r;
    finish(w, wp, c); }
  return (unsigned)wp.out[l];
}
void do_ldmatrix(Worker*, Warp&, int n, bool trans, int line);
template <int N> SIMT_INLINE void ldmatrix(uint32_t (&r)[N], uint32_t addr, bool trans, int line) {
  Worker* w = W; int l = w->cur->lane; Warp& wp = *w->cur->wp; wp.addr[l] = addr;
  if (arrive(w, wp, wp.full, ~0u, l, kLdmatrix, line)) { need_full(wp, kLdmatrix, line); do_ldmatrix(w, wp, N, trans, line); finish(w, wp, wp.full); }
  for (int i = 0; i < N; i++) r[i] = wp.r[i][l];
}
void do_mma(Warp&, int tiles, bool f16);
// TILES neighbouring n8 tiles that share A: one arrival instead of two.
template <int TILES> SIMT_INLINE void mma(float* const (&c)[TILES], const uint32_t* a, const uint32_t* b, bool f16, int line) {
  Worker* w = W; int l = w->cur->lane, g = l >> 2, t = l & 3; Warp& wp = *w->cur->wp;
  for (int i = 0; i < 4; i++) wp.a[i * 32 + l] = a[i];
  for (int j = 0; j < TILES; j++) { wp.b[j][t * 8 + g] = b[2 * j]; wp.b[j][32 + t * 8 + g] = b[2 * j + 1]; memcpy(&wp.c[j][g][2 * t], c[j], 8); memcpy(&wp.c[j][g + 8][2 * t], c[j] + 2, 8); }
  if (arrive(w, wp, wp.full, ~0u, l, kMma, line)) { need_full(wp, kMma, line); w->st.mma += TILES; do_mma(wp, TILES, f16); finish(w, wp, wp.full); }
  for (int j = 0; j < TILES; j++) { memcpy(c[j], &wp.c[j][g][2 * t], 8); memcpy(c[j] + 2, &wp.c[j][g + 8][2 * t], 8); }
}

// ---- scalar arithmetic -----------------------------------------------------------------------------------------
inline uint32_t bits(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
inline float unbits(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
inline uint16_t f2bf(float f) { uint32_t x = bits(f); if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff; return (x + 0x7fff + ((x >> 16) & 1)) >> 16; }
inline float bf2f(uint16_t u) { return unbits((uint32_t)u << 16); }
inline float h2f(uint16_t h) {
  float f = unbits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f; uint32_t x = bits(f);
  if ((h & 0x7c00) == 0x7c00) x |= 0x7f800000;
  return unbits(x | (uint32_t)(h & 0x8000) << 16);
}
inline uint16_t f2h(float f) {                               // round to nearest even, subnormals kept, overflow to inf
  uint32_t x = bits(f), s = x >> 16 & 0x8000; x &= 0x7fffffff;
  if (x > 0x7f800000) return 0x7fff;
  if (x >= 0x477ff000) return s | 0x7c00;
  if (x < 0x38800000) { uint32_t r = bits(unbits(x) + 0.5f); return s | (r - 0x3f000000); }   // ulp(0.5)=2^-24
  uint32_t r = x + 0xfff + (x >> 13 & 1) - 0x38000000; return s | r >> 13;
}
// ex2.approx.ftz: polynomial with fixed operations, so results do not depend on the C library (error below 2 ulp)
inline float ex2(float x) {
  if (!(x < 128.f)) return x != x ? x : INFINITY;
  if (x < -126.f) return 0.f;
  float n = std::floor(x + 0.5f), f = x - n;
  float p = 1.5403530e-4f; p = p * f + 1.3333558e-3f; p = p * f + 9.6181291e-3f; p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f; p = p * f + 6.9314718e-1f; p = p * f + 1.f;
  int e = (int)n; if (e == 128) return p * 0x1p127f * 2.f; 
  float y = p * unbits((uint32_t)(e + 127) << 23); return y < FLT_MIN ? 0.f : y;
}

inline float lg2(float x) { return x < FLT_MIN && x >= 0 ? -INFINITY : (float)std::log2((double)x); }

// ---- buffers with guard pages ----------------------------------------------------------------------------------
// The last byte touches an unmapped page (front = true: the first byte follows one). Faults name the buffer.
void* guarded(size_t bytes, const char* name, bool front);
bool guarded_free(void*);
bool guarded_inside(const void*, size_t);
}  // namespace simt

// ---- CUDA names ------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (simt::W->cur->tid)
#define blockIdx (simt::W->bid)
#define blockDim (simt::W->bdim)
#define gridDim (simt::W->gdim)
inline void __syncthreads(int line = __builtin_LINE()) { simt::syncthreads(line); }
inline void __syncwarp(unsigned m = ~0u, int line = __builtin_LINE()) { simt::syncwarp(m, line); }
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, int line = __builtin_LINE()) { return simt::shfl(m, v, x, simt::kXor, w, line); }
template <class T> inline T __shfl_sync(unsigned m, T v, int x, int w = 32, int line = __builtin_LINE()) { return simt::shfl(m, v, x, simt::kIdx, w, line); }
template <class T> inline T __shfl_up_sync(unsigned m, T v, int x, int w = 32, int line = __builtin_LINE()) { return simt::shfl(m, v, x, simt::kUp, w, line); }
template <class T> inline T __shfl_down_sync(unsigned m, T v, int x, int w = 32, int line = __builtin_LINE()) { return simt::shfl(m, v, x, simt::kDown, w, line); }
inline unsigned __ballot_sync(unsigned m, int v, int line = __builtin_LINE()) { return simt::ballot(m, v != 0, line); }
inline int __any_sync(unsigned m, int v, int line = __builtin_LINE()) { return simt::ballot(m, v != 0, line) != 0; }
inline int __all_sync(unsigned m, int v, int line = __builtin_LINE()) { return simt::ballot(m, v == 0, line) == 0; }
