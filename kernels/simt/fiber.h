// fiber.h - one fiber per CUDA thread: the state of a block that runs, the stack switch, the choice of who runs next.
//
// An OS thread plays one SM and runs one block at a time. A fiber runs until it needs the other lanes of its warp (a
// collective) or the other threads of its block (a barrier): it leaves its operands in the warp's mailbox and switches
// straight to the next runnable lane. The LAST lane to arrive computes the result for all, marks them runnable and goes
// on. So a collective costs 31 stack switches and one computation, and a kernel without collectives none.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

// Everything between a wrapper and its stack switch is forced inline: then each call site has an indirect jump of its
// own, whose target the branch predictor learns. One shared function would be mispredicted at every switch (2.3x).
#define SIMT_INLINE inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};

namespace simt {

struct Site {
  const char* file;
  int line;
};
SIMT_INLINE bool operator==(Site a, Site b) { return a.line == b.line && a.file == b.file; }

struct Kernel {
  const char *name, *file;
  size_t params_bytes;
  int max_threads;
  void (*body)(const void* params);
};

enum class Op : uint8_t { none, syncthreads, named_barrier, syncwarp, shfl, vote, reduce, ldmatrix, mma };

constexpr uint32_t kWarp = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;
constexpr uint32_t kMaxWarpTime = (1 << 20) - 1;  // synchronisations of a warp that the records of shared memory hold
constexpr size_t kStack = 128 << 10, kStackGuard = 16 << 10;

// Which accesses are ordered by synchronisation, among the lanes of a warp or the warps of a block. Time counts the
// synchronisations; an access carries the time at which it was made.
struct Clock {
  uint32_t now = 0, all = 0;             // time; the last time at which every member took part
  bool some = false;                     // since then a part of the members met: `seen` counts
  uint32_t seen[kWarp][kWarp];           // [i][j]: i is ordered after what j did before this time
  void sync_all() {
    all = ++now;
    some = false;
  }
  void sync_some(uint32_t members);
  bool ordered(uint32_t me, uint32_t other, uint32_t then) const {
    return then < all || (some && then < seen[me][other]);
  }
};

struct Copy {  // a cp.async under way: the bytes land at the wait
  uint32_t dst, group;
  uint8_t data[16];
};

struct Warp;
struct Fiber {
  void* sp;
  void* top;          // where `sp` starts on its stack: equal to `sp` while the thread has not begun
  bool used_stack;    // the entry address at `top` was overwritten
  uint8_t lane;
  uint16_t thread;
  Warp* warp;
  uint3 tid;
  Op op;              // what a blocked thread waits in
  Site site;
  uint32_t groups;    // cp.async groups committed so far
  std::vector<Copy> copies;
};

struct Collective {   // in flight: `arrived` is zero where none is
  uint32_t mask, arrived;
  Op op;
  Site site;
};

// Every lane owns its slots in the mailboxes, operands and results: a lane that has resumed may leave operands for its
// next collective while slower lanes have not read this one's result.
struct alignas(64) Warp {
  uint32_t run, alive, at_barrier;         // lanes that can go on, that have not ended, that wait in __syncthreads
  uint32_t index;
  Collective full, part[4];                // on all lanes; on some (shuffles, votes, __syncwarp)
  Clock clock;                             // of __syncwarp
  alignas(64) uint32_t a[4 * 32];          // mma A: [register][lane]
  alignas(64) uint32_t b[2][2 * 32];       // mma B: [tile][register][t * 8 + g], the 8 columns of a row side by side
  alignas(64) float c[2][16][8];           // mma C and D: [tile][row][column]
  alignas(64) uint32_t address[32], r[4][32];  // ldmatrix
  alignas(64) uint64_t in[32], out[32];    // shuffles, votes, reductions
  uint32_t source[32];
};

struct NamedBarrier {
  uint32_t threads, arrived;
  Site site;
  uint32_t lanes[kMaxWarps];
};

struct StaticShared {
  const void* key;    // one per STATIC_SHARED of the source
  const char* name;
  uint32_t lo, hi;
};

struct Sm {
  Fiber* current;     // null while no kernel code runs on this OS thread
  void* scheduler;    // stack pointer of run_block
  Fiber* fibers;
  Warp* warps;
  uint8_t* stacks;
  uint32_t threads, nwarps, alive;
  uint32_t seed, random;
  bool checks;
  const Kernel* kernel;
  const void* params;
  uint3 block, block_dim, grid_dim;

  uint32_t at_barrier;  // threads in __syncthreads
  Site barrier_site;
  NamedBarrier named[16];

  // Shared memory: a window, and per 2 bytes of it the last write and the reads since (shared.h).
  Clock clock;          // of barriers; time goes on from block to block
  uint32_t begun;       // time at which this block started
  uint8_t* window;
  uint32_t dynamic_hi;
  std::vector<StaticShared> statics;
  int64_t *writes, *reads;
  uint32_t* lane_reads;

  // Global memory (global.h): this block and "several blocks" in the access log.
  uint32_t block_id, several_id;
  const char* log_file;
  uint32_t log_file_index;

  bool failed;
  int signal;           // caught in kernel code: described once back on the scheduler's stack
  void* fault;
  char finding[2048];
};
extern __thread Sm* sm __attribute__((tls_model("initial-exec")));

// Saves the current stack in *from and goes on with `to`. Inline, so that the compiler spills only what is live; leaves
// with a jump, since a return would never be predicted.
SIMT_INLINE void switch_stack(void** from, void* to) {
  asm volatile(
      "lea -128(%%rsp), %%rsp\n\t"  // the red zone
      "push %%rbp\n\tpush %%rbx\n\t"
      "lea 1f(%%rip), %%rax\n\tpush %%rax\n\t"
      "mov %%rsp, (%0)\n\tmov %1, %%rsp\n\t"
      "pop %%rax\n\tjmp *%%rax\n"
      "1:\tpop %%rbx\n\tpop %%rbp\n\t"
      "lea 128(%%rsp), %%rsp"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1",
        "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
        "xmm15"
#ifdef __AVX512F__
        , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27",
        "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#endif
  );
}

// Findings (faults.cpp). Each ends the launch: kernel code does not go on.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail_mismatch(const Collective& other, Op op, Site site);
[[noreturn]] void fail_ended(uint32_t mask, uint32_t alive, Op op, Site site);
[[noreturn]] void fail_deadlock();
void describe_signal(Sm& m);  // turns a signal caught in kernel code into the finding
const char* op_name(Op op);
const char* short_path(const char* file);

// Runs one block to its end or to a finding (fiber.cpp).
void run_block(Sm& m, uint32_t block);
Sm* new_sm();  // null: no memory

Fiber* next_slow(Sm& m, Warp* here);     // another warp's turn, or a random choice
SIMT_INLINE Fiber* next(Sm& m, Warp* here) {
  if (__builtin_expect(here->run == 0 || m.seed, 0)) return next_slow(m, here);
  return &m.fibers[here->index * kWarp + __builtin_ctz(here->run)];
}
// The current thread cannot go on.
SIMT_INLINE void block_on(Op op, Site site) {
  Sm& m = *sm;
  Fiber& f = *m.current;
  f.op = op;
  f.site = site;
  f.warp->run &= ~(1u << f.lane);
  Fiber* n = next(m, f.warp);
  m.current = n;
  switch_stack(&f.sp, n->sp);
}

}  // namespace simt
