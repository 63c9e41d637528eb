// simt.cpp - the executor's cold parts: stack switch, block runner, fault handler, guarded memory, matrix collectives.
#include "simt.h"
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <signal.h>
#include <sys/mman.h>
#include <thread>



namespace simt {
__thread Worker* W __attribute__((tls_model("initial-exec")));

static const size_t kPage = 4096, kStack = 128 << 10, kMaxThreads = 1024, kDynEnd = 1 << 20, kArena = 9 << 20, kSlot = 128 << 10;
const char* kind_name(Kind k) { static const char* n[] = {"nothing", "__syncthreads", "__syncwarp", "shfl", "vote", "reduce", "ldmatrix", "mma"}; return n[k]; }

// ---- errors ----------------------------------------------------------------------------------------------------
static void record(const char* text) {
  Worker* w = W; Fiber* f = w->cur; char where[512];
  snprintf(where, sizeof where, "%s (%s) block %u thread %u: ", w->kernel->name, w->kernel->file, w->bid.x, f->warp * 32u + f->lane);
  if (!w->failed) { w->failed = true; w->error = std::string(where) + text; }
}
void fail(const char* fmt, ...) {
  char t[1024]; va_list a; va_start(a, fmt); vsnprintf(t, sizeof t, fmt, a); va_end(a);
  record(t); void* dead; simt_switch(&dead, W->sched_sp); abort();
}
void fail_mismatch(const Coll& c, Kind k, int line) {
  fail("warp divergence: this lane is in %s at line %d while lanes %08x wait in %s at line %d", kind_name(k), line, c.arrived, kind_name(c.kind), c.line);
}
void fail_deadlock() {
  Worker* w = W; std::string s = "deadlock:"; char t[160];
  for (int i = 0; i < w->nwarp; i++) { Warp& p = w->warp[i];
    for (uint32_t left = p.alive; left;) {                     // group lanes by what they wait for
      Fiber& f = w->fiber[i * 32 + __builtin_ctz(left)]; uint32_t m = 0;
      for (int l = 0; l < 32; l++) if (left >> l & 1) { Fiber& g = w->fiber[i * 32 + l]; if (g.wait == f.wait && g.line == f.line) m |= 1u << l; }
      snprintf(t, sizeof t, " [warp %d lanes %08x: %s line %d]", i, m, kind_name(f.wait), f.line); s += t; left &= ~m; }
    if (s.size() > 700) { s += " ..."; break; } }
  fail("%s", s.c_str());
}
void race_fail(const Shadow& s, uint32_t addr, bool write, const char* what, int line) {
  Worker* w = W; int off = (int)(addr - w->dyn_lo);
  if (!write && s.pending) fail("%s at line %d reads shared word %d whose cp.async (thread %u) has not been waited for", what, line, off, s.wthread);
  if (!write && s.wr < w->epoch0) fail("%s at line %d reads shared word %d that nothing wrote", what, line, off);
  if (s.wr == w->epoch) fail("race: %s at line %d %s shared word %d written by thread %u with no barrier between", what, line, write ? "writes" : "reads", off, s.wthread);
  fail("race: %s at line %d writes shared word %d read by %s %u with no barrier between", what, line, off, "warp", s.rwarp);
}

struct Region { char *lo, *hi, *map; size_t len; std::string name; };
static std::mutex g_mutex; static std::vector<Region> g_regions;
static void on_fault(int sig, siginfo_t* si, void*) {
  Worker* w = W; char* a = (char*)si->si_addr;
  if (!w || !w->cur) { signal(sig, SIG_DFL); raise(sig); return; }
  char t[256]; snprintf(t, sizeof t, "invalid access at %p", (void*)a);
  if (a >= w->arena + kDynEnd + kSlot && a < w->arena + kArena) { int s = (int)((a - w->arena - kDynEnd) / kSlot); snprintf(t, sizeof t, "static shared array %d (%u bytes) accessed out of bounds at byte %d", s, w->slot_hi[s] - w->slot_lo[s], (int)(a - w->arena - w->slot_lo[s])); }
  else if (a >= w->arena && a < w->arena + kDynEnd + kSlot) snprintf(t, sizeof t, "shared memory access out of bounds: byte %d of %u", (int)(a - w->arena - w->dyn_lo), w->dyn_hi - w->dyn_lo);
  else if (a >= w->stacks && a < w->stacks + kStack * kMaxThreads) snprintf(t, sizeof t, "fiber stack overflow");
  else for (auto& r : g_regions) if (a >= r.map && a < r.map + r.len) snprintf(t, sizeof t, "global buffer '%s' (%zu bytes) accessed out of bounds at byte %td", r.name.c_str(), (size_t)(r.hi - r.lo), a - r.lo);
  record(t); void* dead; simt_switch(&dead, w->sched_sp);      // leave the signal stack for good; the block is abandoned
}
void* guarded(size_t bytes, const char* name, bool front) {
  size_t body = (bytes + kPage - 1) / kPage * kPage, len = body + 2 * 16 * kPage;      // 64 KiB of guard on each side
  char* m = (char*)mmap(nullptr, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); if (m == MAP_FAILED) abort();
  mprotect(m + 16 * kPage, body, PROT_READ | PROT_WRITE); memset(m + 16 * kPage, 0xff, body);
  char* p = m + 16 * kPage + (front ? 0 : (body - bytes) & ~(size_t)15);               // keeps 16-byte alignment
  std::lock_guard<std::mutex> g(g_mutex); g_regions.push_back({p, p + bytes, m, len, name}); return p;
}
bool guarded_free(void* p) {
  std::lock_guard<std::mutex> g(g_mutex);
  for (size_t i = 0; i < g_regions.size(); i++) if (g_regions[i].lo == p) { munmap(g_regions[i].map, g_regions[i].len); g_regions.erase(g_regions.begin() + i); return true; }
  return false;
}
bool guarded_inside(const void* p, size_t n) {
  std::lock_guard<std::mutex> g(g_mutex);
  for (auto& r : g_regions) if ((char*)p >= r.lo && n <= (size_t)(r.hi - (char*)p) && (char*)p <= r.hi) return true;
  return false;
}

// ---- workers ---------------------------------------------------------------------------------------------------
static std::vector<Worker*> g_idle;
static Worker* get_worker() {
  { std::lock_guard<std::mutex> g(g_mutex); if (!g_idle.empty()) { Worker* w = g_idle.back(); g_idle.pop_back(); return w; } }
  Worker* w = new Worker(); auto map = [](size_t n, int prot) { void* m = mmap(nullptr, n, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); if (m == MAP_FAILED) abort(); return (char*)m; };
  w->arena = map(kArena, PROT_NONE); w->stacks = map(kStack * kMaxThreads, PROT_READ | PROT_WRITE);
  for (size_t i = 0; i < kMaxThreads; i++) mprotect(w->stacks + i * kStack, kPage, PROT_NONE);
  w->shadow = (Shadow*)map(kArena / 4 * sizeof(Shadow), PROT_READ | PROT_WRITE);
  w->fiber = new Fiber[kMaxThreads](); w->warp = (Warp*)aligned_alloc(64, sizeof(Warp) * 32); w->epoch = 1;
  return w;
}
Fiber* next_slow(Worker* w, Warp* here) {
  if (!here->run || (w->seed && (rnd(w) & 15) == 0)) {          // a seed also takes the warp off now and then
    uint32_t ready = 0; for (int i = 0; i < w->nwarp; i++) ready |= (uint32_t)(w->warp[i].run != 0) << i;
    if (!ready) fail_deadlock();
    here = &w->warp[pick(ready, w)]; }
  return &w->fiber[(here - w->warp) * 32 + pick(here->run, w)];
}
static void thread_main() {                                     // first frame of every fiber
  Worker* w = W; w->kernel->body(w->params);
  w = W; Fiber* f = w->cur; Warp* wp = &w->warp[f->warp];
  if (!f->copies.empty()) fail("thread ends with %zu cp.async not waited for", f->copies.size());
  f->done = true; f->wait = kNone; w->alive--; wp->alive &= ~(1u << f->lane);
  if (w->arrived) fail("thread ends while %d threads wait in __syncthreads at line %d", w->arrived, w->barrier_line);
  for (Coll* c = &wp->full; c < wp->part + 4; c++) if (c->arrived && (c->mask >> f->lane & 1)) fail("lane ends while lanes %08x wait in %s at line %d", c->arrived, kind_name(c->kind), c->line);
  wp->run &= ~(1u << f->lane);
  if (!w->alive) { void* dead; simt_switch(&dead, w->sched_sp); }
  Fiber* n = next(w, wp); w->cur = n; simt_switch(&f->sp, n->sp); abort();
}
void barrier_release(Worker* w) {
  w->arrived = 0; w->epoch++;
  for (int i = 0; i < w->nwarp; i++) { Warp& p = w->warp[i]; p.run |= p.at_barrier; p.at_barrier = 0; }
}
void named_release(Worker* w, int number) {
  auto& b = w->named[number]; w->epoch++;
  for (int i = 0; i < w->nwarp; i++) w->warp[i].run |= b.who[i];
  memset(&b, 0, sizeof b);
}
Coll& partial(Warp& wp, uint32_t mask) {
  Coll* empty = nullptr; int l = W->cur->lane; if (!(mask >> l & 1)) fail("lane %d is not in its own mask %08x", l, mask);
  for (auto& c : wp.part) { if (c.arrived && c.mask == mask) return c; if (c.arrived && (c.mask & mask)) fail("overlapping masks %08x and %08x", c.mask, mask); if (!c.arrived) empty = &c; }
  if (wp.full.arrived & mask || !empty) fail("mask %08x overlaps a full-warp operation", mask);
  return *empty;
}
static void run_block(Worker* w, uint32_t index, uint32_t seed) {
  w->bid = {index, 0, 0}; memset(w->named, 0, sizeof w->named);
  int n = w->bdim.x; w->nfiber = n; w->nwarp = (n + 31) / 32; w->alive = n; w->arrived = 0;
  w->seed = seed; w->rng = (seed * 0x9E3779B9u ^ (index + 1) * 0x85EBCA6Bu) | 1; w->epoch++; w->epoch0 = w->epoch;
  memset(w->arena + w->dyn_lo, 0xff, kDynEnd - w->dyn_lo);      // NaN in every float format
  memset(w->arena + w->dyn_hi, 0xc5, kDynEnd - w->dyn_hi);      // canary in the slack before the guard page
  for (int i = 0; i < w->nwarp; i++) { Warp& p = w->warp[i]; int k = n - i * 32 < 32 ? n - i * 32 : 32; p.run = p.alive = k == 32 ? ~0u : (1u << k) - 1; p.at_barrier = 0; p.sync_epoch = 0; p.full.arrived = 0; for (auto& c : p.part) c.arrived = 0; }
  for (int i = 0; i < n; i++) { Fiber& f = w->fiber[i];
    f.tid = {(unsigned)i, 0, 0}; f.warp = i / 32; f.wp = &w->warp[i / 32]; f.lane = i % 32; f.done = false; f.wait = kNone; f.line = 0; f.group = 0; f.copies.clear();
    // Colour the stacks: tops at the same offset in a page would share L1 sets across lanes.
    uint64_t* s = (uint64_t*)(w->stacks + kStack * (i + 1) - (size_t)(i % 61) * 17 * 64 % (56 << 10));
    *--s = 0; *--s = (uint64_t)&thread_main; f.sp = s; }
  Fiber* f = next_slow(w, w->warp);
  w->cur = f; simt_switch(&w->sched_sp, f->sp);                 // comes back when every thread has ended, or on failure
  w->st.blocks++;
  if (!w->failed) for (size_t a = w->dyn_hi; a < kDynEnd; a++) if ((uint8_t)w->arena[a] != 0xc5) { record("bytes after the end of dynamic shared memory were overwritten"); break; }
  w->cur = nullptr;
}
Report run(const Kernel& k, uint32_t grid, uint32_t block, size_t smem, const void* p, const Options& o) {
  static std::once_flag once; std::call_once(once, [] { struct sigaction s = {}; s.sa_sigaction = on_fault; s.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; sigaction(SIGSEGV, &s, nullptr); sigaction(SIGBUS, &s, nullptr); });
  uint32_t nb = grid; Report rep; int nt = block;
  if (nt < 1 || nt > (int)kMaxThreads || smem > 232448) { rep.ok = false; rep.text = "bad launch: threads or shared memory"; return rep; }
  std::vector<uint32_t> order(nb); for (uint32_t i = 0; i < nb; i++) order[i] = i;
  if (o.seed) { uint32_t x = o.seed * 2654435761u | 1; for (uint32_t i = nb; i > 1; i--) { x ^= x << 13; x ^= x >> 17; x ^= x << 5; std::swap(order[i - 1], order[x % i]); } }
  std::atomic<uint32_t> nextb{0}; std::atomic<bool> stop{false}; std::mutex m;
  auto stream = [&] {
    Worker* w = get_worker(); static thread_local char* alt = nullptr;
    if (!alt) { alt = (char*)malloc(64 << 10); stack_t s = {}; s.ss_sp = alt; s.ss_size = 64 << 10; sigaltstack(&s, nullptr); }
    W = w; w->bdim = {block, 1, 1}; w->gdim = {grid, 1, 1}; w->kernel = &k; w->params = p; w->race = o.race; w->count = o.stats; w->failed = false; w->st = Stats();
    w->dyn_lo = (kDynEnd - smem) & ~(size_t)1023; w->dyn_hi = w->dyn_lo + smem;
    mprotect(w->arena, kDynEnd, PROT_NONE); if (smem) mprotect(w->arena + w->dyn_lo / kPage * kPage, kDynEnd - w->dyn_lo / kPage * kPage, PROT_READ | PROT_WRITE);
    for (uint32_t i; !stop && (i = nextb++) < nb;) { run_block(w, order[i], o.seed); if (w->failed) stop = true; }
    W = nullptr; std::lock_guard<std::mutex> g(m);
    if (w->failed && rep.ok) { rep.ok = false; rep.text = w->error; }
    Stats& s = rep.stats; s.mma += w->st.mma; s.ldmatrix += w->st.ldmatrix; s.shfl += w->st.shfl; s.reduce += w->st.reduce; s.syncwarp += w->st.syncwarp; s.barrier += w->st.barrier; s.conflicts += w->st.conflicts; s.blocks += w->st.blocks;
    std::lock_guard<std::mutex> gg(g_mutex); g_idle.push_back(w);
  };
  int want = o.threads ? o.threads : (int)std::thread::hardware_concurrency(); if (want > (int)nb) want = nb;
  std::vector<std::thread> ts; for (int i = 1; i < want; i++) ts.emplace_back(stream);
  stream(); for (auto& t : ts) t.join();
  return rep;
}

// ---- shared memory ---------------------------------------------------------------------------------------------
static std::atomic<int> g_slots{1};                            // slot 0 stays unmapped: guard after dynamic shared memory
int new_slot() { int i = g_slots++; if (i >= 64) abort(); return i; }
uint32_t slot_of(Worker* w, uint32_t a) { if (a < kDynEnd || a >= kArena) return ~0u; uint32_t s = (a - kDynEnd) / kSlot; return w->slot_block[s] && a >= w->slot_lo[s] && a < w->slot_hi[s] ? s : ~0u; }
uint32_t static_shared(int id, uint32_t bytes) {
  const uint32_t align = 16;
  Worker* w = W; uint32_t end = kDynEnd + (id + 1) * kSlot - kPage;          // last page of the slot stays unmapped
  uint32_t lo = (end - bytes) & ~(align - 1);   // ends at the guard page
  if (w->slot_block[id] != w->epoch0) { mprotect(w->arena + lo / kPage * kPage, end - lo / kPage * kPage, PROT_READ | PROT_WRITE); w->slot_lo[id] = lo; w->slot_hi[id] = lo + bytes; w->slot_block[id] = w->epoch0; memset(w->arena + lo, 0xff, bytes); }
  return lo;
}
void cp_async16(uint32_t dst, const void* src, int bytes, int line) {
  if (bytes < 0 || bytes > 16) fail("cp.async at line %d: source size %d", line, bytes);
  if ((uintptr_t)src & 15) fail("cp.async at line %d: source %p not aligned to 16", line, src);
  char* d = at(dst, 16, "cp.async", line); Fiber* f = W->cur; Pending q; q.dst = dst; q.group = f->group;
  memset(q.data, 0, 16); memcpy(q.data, src, bytes); memset(d, 0xff, 16); note_write(dst, 16, "cp.async", line, 1); f->copies.push_back(q);
}
void cp_async_wait(uint32_t keep, int line) {
  Fiber* f = W->cur; size_t n = 0;
  for (auto& q : f->copies) if (q.group + keep < f->group) { memcpy(W->arena + q.dst, q.data, 16); note_write(q.dst, 16, "cp.async landing", line, 0); } else f->copies[n++] = q;
  f->copies.resize(n);
}
// ---- collectives -----------------------------------------------------------------------------------------------
void do_shfl(Warp& w, uint32_t mask, int line) {
  for (uint32_t m = mask; m; m &= m - 1) { int l = __builtin_ctz(m); if (!(mask >> w.src[l] & 1)) fail("shfl at line %d: lane %d reads lane %u, which does not take part", line, l, w.src[l]); w.out[l] = w.in[w.src[l]]; }
}
void do_ldmatrix(Worker* w, Warp& p, int n, bool trans, int line) {
  w->st.ldmatrix++; alignas(64) uint16_t m[4][8][8];
  for (int t = 0; t < 8 * n; t++) { memcpy(m[t >> 3][t & 7], at(p.addr[t], 16, "ldmatrix", line), 16); note_read(p.addr[t], 16, -1, "ldmatrix", line); }
  if (w->count) for (int i = 0; i < n; i++) { int hit[8] = {}, worst = 0; for (int r = 0; r < 8; r++) { int& h = hit[p.addr[i * 8 + r] >> 4 & 7]; if (++h > worst) worst = h; } w->st.conflicts += worst - 1; }
  for (int i = 0; i < n; i++) {
    if (!trans) memcpy(p.r[i], m[i], 128);                     // lane t holds row t/4, columns 2(t%4), 2(t%4)+1
    else for (int t = 0; t < 32; t++) p.r[i][t] = m[i][(t & 3) * 2][t >> 2] | (uint32_t)m[i][(t & 3) * 2 + 1][t >> 2] << 16;
  }
}
typedef float v8 __attribute__((vector_size(32), may_alias));
typedef uint32_t u8v __attribute__((vector_size(32), may_alias));
static inline __attribute__((always_inline)) u8v widen(u8v h) { // low halves: fp16 -> f32, exact, subnormals included
  u8v e = h & 0x7fff; v8 f = (v8)(e << 13) * 0x1p112f; u8v inf = (u8v)((e & 0x7c00) == 0x7c00) & 0x7f800000;
  return ((u8v)f | inf) | (h & 0x8000) << 16;
}
// D = A B + C in f32, k ascending, one rounding per addition. Products of bf16 or fp16 are exact in f32, so the result
// is the same with and without fused multiply-add. (Hardware keeps a few extra bits and adds in another order.)
__attribute__((optimize("O3"))) void do_mma(Warp& w, int tiles, bool f16) {
  alignas(64) float lo[4 * 32], hi[4 * 32]; v8 b[16];
  for (int j = 0; j < 16; j++) { u8v x = *(u8v*)&w.a[j * 8], l = f16 ? widen(x & 0xffff) : x << 16, h = f16 ? widen(x >> 16) : x & 0xffff0000u; *(u8v*)&lo[j * 8] = l; *(u8v*)&hi[j * 8] = h; }
  for (int j = 0; j < tiles; j++) {
  for (int t = 0; t < 8; t++) { u8v x = *(u8v*)&w.b[j][t * 8], l = f16 ? widen(x & 0xffff) : x << 16, h = f16 ? widen(x >> 16) : x & 0xffff0000u; b[2 * t] = (v8)l; b[2 * t + 1] = (v8)h; }
  for (int r = 0; r < 16; r++) { v8 c = *(v8*)w.c[j][r]; int s = (r >> 3) * 32 + (r & 7) * 4;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) { c += lo[s + 64 * (k >> 2) + (k & 3)] * b[2 * k]; c += hi[s + 64 * (k >> 2) + (k & 3)] * b[2 * k + 1]; }
    *(v8*)w.c[j][r] = c; }
  }
}
}  // namespace simt
