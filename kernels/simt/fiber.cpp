// fiber.cpp - runs one block: its threads begin, take turns and end here.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "shared.h"

namespace simt {

__thread Sm* sm __attribute__((tls_model("initial-exec")));

constexpr size_t kUnits = kWindow / 2;

void Clock::sync_some(uint32_t members) {
  if (!some) memset(seen, 0, sizeof seen);
  some = true;
  now++;
  uint32_t joined[kWarp] = {};
  for (uint32_t i = 0; i < kWarp; i++)
    if (members >> i & 1)
      for (uint32_t j = 0; j < kWarp; j++) joined[j] = joined[j] > seen[i][j] ? joined[j] : seen[i][j];
  for (uint32_t i = 0; i < kWarp; i++) {
    if (!(members >> i & 1)) continue;
    for (uint32_t j = 0; j < kWarp; j++) seen[i][j] = members >> j & 1 ? now : joined[j];
  }
}

static uint32_t random_bits(Sm& m) {  // xorshift32
  m.random ^= m.random << 13;
  m.random ^= m.random >> 17;
  return m.random ^= m.random << 5;
}
static int pick(Sm& m, uint32_t mask) {  // a set bit: the lowest, or a random one under a seed
  if (!m.seed) return __builtin_ctz(mask);
  const uint32_t by = random_bits(m) & 31;
  const uint32_t turned = mask >> by | mask << ((32 - by) & 31);
  return (int)((__builtin_ctz(turned) + by) & 31);
}
Fiber* next_slow(Sm& m, Warp* here) {
  if (!here->run || (m.seed && random_bits(m) % 16 == 0)) {  // a seed also takes a warp off now and then
    uint32_t ready = 0;
    for (uint32_t i = 0; i < m.nwarps; i++) ready |= (uint32_t)(m.warps[i].run != 0) << i;
    if (!ready) fail_deadlock();
    here = &m.warps[pick(m, ready)];
  }
  return &m.fibers[here->index * kWarp + (uint32_t)pick(m, here->run)];
}

static void end_thread(Sm& m, Fiber& f) {
  const Site end = {m.kernel->file, 0};
  Warp& w = *f.warp;
  if (!f.copies.empty()) fail(end, "the thread ends with %zu cp.async not waited for", f.copies.size());
  if (m.at_barrier)
    fail(end, "the thread ends while %u threads wait in __syncthreads at %s:%d", m.at_barrier,
         short_path(m.barrier_site.file), m.barrier_site.line);
  const uint32_t bit = 1u << f.lane;
  for (Collective* c = w.part - 1; c < w.part + 4; c++) {
    const Collective& in_flight = c < w.part ? w.full : *c;
    if (in_flight.arrived && (in_flight.mask & bit))
      fail(end, "the thread ends while lanes %08x wait for it in %s at %s:%d", in_flight.arrived,
           op_name(in_flight.op), short_path(in_flight.site.file), in_flight.site.line);
  }
  f.op = Op::none;
  w.alive &= ~bit;
  w.run &= ~bit;
  m.alive--;
}

// The first frame of every stack. A thread that ends hands its stack to the next one if that has not begun yet, so
// that threads without collectives run one after the other without a switch.
static void thread_main() {
  Sm& m = *sm;
  m.current->used_stack = true;
  for (;;) {
    m.kernel->body(m.params);
    Fiber& f = *m.current;
    end_thread(m, f);
    if (!m.alive) {
      void* dead;
      switch_stack(&dead, m.scheduler);
    }
    Fiber* n = next(m, f.warp);
    m.current = n;
    if (n->sp != n->top) switch_stack(&f.sp, n->sp);
    std::swap(f.top, n->top);
    std::swap(f.used_stack, n->used_stack);
    n->sp = nullptr;
  }
}

static void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

Sm* new_sm() {
  Sm* m = new Sm();
  m->window = static_cast<uint8_t*>(map(kWindow));
  m->writes = static_cast<int64_t*>(map(kUnits * sizeof(int64_t)));
  m->reads = static_cast<int64_t*>(map(kUnits * sizeof(int64_t)));
  m->lane_reads = static_cast<uint32_t*>(map(kUnits * sizeof(uint32_t)));
  m->stacks = static_cast<uint8_t*>(map(kStack * kMaxThreads));
  m->fibers = new Fiber[kMaxThreads]();
  m->warps = new Warp[kMaxWarps]();
  if (!m->window || !m->writes || !m->reads || !m->lane_reads || !m->stacks) return nullptr;
  m->clock.now = m->clock.all = 1;
  for (uint32_t i = 0; i < kMaxWarps; i++) m->warps[i].index = i;
  for (uint32_t i = 0; i < kMaxThreads; i++) {
    mprotect(m->stacks + i * kStack, kStackGuard, PROT_NONE);
    Fiber& f = m->fibers[i];
    f.thread = (uint16_t)i;
    f.lane = (uint8_t)(i % kWarp);
    f.warp = &m->warps[i / kWarp];
    f.tid = {i, 0, 0};
    // Tops at one offset within their pages would share L1 sets: spread them. A stack starts with the address to jump
    // to and a null return address; the ABI wants `top` to be a multiple of 16.
    uint8_t* top = m->stacks + (i + 1) * kStack - 16 - i % 61 * (17 * 64) % (56 << 10);
    f.top = top;
    f.used_stack = true;
    memset(top + 8, 0, 8);
  }
  return m;
}

// Times in the records of shared memory have 30 and 20 bits: start again long before they are used up.
static void restart_clocks(Sm& m) {
  madvise(m.writes, kUnits * sizeof(int64_t), MADV_DONTNEED);
  madvise(m.reads, kUnits * sizeof(int64_t), MADV_DONTNEED);
  madvise(m.lane_reads, kUnits * sizeof(uint32_t), MADV_DONTNEED);
  m.clock.now = m.clock.all = 1;
  for (uint32_t i = 0; i < kMaxWarps; i++) m.warps[i].clock.now = m.warps[i].clock.all = 0;
}

void run_block(Sm& m, uint32_t block) {
  m.block = {block, 0, 0};
  m.block_id = m.several_id + 1 + block;
  m.alive = m.threads;
  m.at_barrier = 0;
  m.random = (m.seed * 0x9E3779B9u ^ (block + 1) * 0x85EBCA6Bu) | 1;
  m.statics.clear();
  memset(m.named, 0, sizeof m.named);
  uint32_t latest = m.clock.now >> 10;  // 30 bits against 20
  for (uint32_t i = 0; i < kMaxWarps; i++) latest = latest > m.warps[i].clock.now ? latest : m.warps[i].clock.now;
  if (latest > kMaxWarpTime / 2) restart_clocks(m);
  m.clock.sync_all();
  m.begun = m.clock.now;
  if (!m.checks) memset(m.window + kDynamic, 0xff, m.dynamic_hi - kDynamic);  // NaN, since no check tells
  for (uint32_t i = 0; i < m.nwarps; i++) {
    Warp& w = m.warps[i];
    const uint32_t lanes = m.threads - i * kWarp;
    w.run = w.alive = lanes < kWarp ? (1u << lanes) - 1 : ~0u;
    w.at_barrier = w.full.arrived = 0;
    for (Collective& c : w.part) c.arrived = 0;
    w.clock.sync_all();
  }
  for (uint32_t i = 0; i < m.threads; i++) {
    Fiber& f = m.fibers[i];
    f.sp = f.top;
    f.groups = 0;
    f.op = Op::none;
    f.copies.clear();
    if (!f.used_stack) continue;
    void (*const entry)() = thread_main;
    memcpy(f.top, &entry, sizeof entry);
    f.used_stack = false;
  }
  m.current = next_slow(m, &m.warps[0]);
  switch_stack(&m.scheduler, m.current->sp);  // comes back when every thread has ended, or with a finding
  if (m.signal) describe_signal(m);
  m.current = nullptr;
}

}  // namespace simt
