// faults.cpp - findings: their words, and the signals that become one.
#include <signal.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fiber.h"
#include "global.h"
#include "launch.h"

namespace simt {

const char* op_name(Op op) {
  static const char* const names[] = {"nothing", "__syncthreads", "named barrier", "__syncwarp", "shuffle",
                                      "vote",    "reduction",     "ldmatrix",      "mma"};
  return names[(int)op];
}

// From the folder of kernels or tests on, whatever directory the build ran in.
const char* short_path(const char* file) {
  const char* found = file;
  for (const char* root : {"kernels/", "tests/"})
    for (const char* p = strstr(file, root); p; p = strstr(p + 1, root)) found = p > found || found == file ? p : found;
  return found;
}

// "kernel: block 3, thread 44 (warp 1, lane 12), kernels/x.cu:120: ..."; line 0 stands for no line.
static void record(Sm& m, Site site, const char* what) {
  const Fiber& f = *m.current;
  char line[16] = "";
  if (site.line) snprintf(line, sizeof line, ":%d", site.line);
  snprintf(m.finding, sizeof m.finding, "%s: block %u, thread %u (warp %u, lane %u), %s%s: %s [seed %u]",
           m.kernel->name, m.block.x, f.thread, f.warp->index, f.lane, short_path(site.file), line, what, m.seed);
  m.failed = true;
}

void fail(Site site, const char* format, ...) {
  Sm& m = *sm;
  char what[1536];
  va_list args;
  va_start(args, format);
  vsnprintf(what, sizeof what, format, args);
  va_end(args);
  record(m, site, what);
  void* abandoned;
  switch_stack(&abandoned, m.scheduler);
  abort();  // an abandoned stack is never resumed
}

void fail_mismatch(const Collective& other, Op op, Site site) {
  fail(site, "divergent warp: %s here while lanes %08x wait in %s at %s:%d", op_name(op), other.arrived,
       op_name(other.op), short_path(other.site.file), other.site.line);
}
void fail_ended(uint32_t mask, uint32_t alive, Op op, Site site) {
  fail(site, "incomplete: %s with mask %08x, but only lanes %08x have not ended", op_name(op), mask, alive);
}

void fail_deadlock() {
  const Sm& m = *sm;
  char list[1400] = "";  // not a std::string: this stack is abandoned
  size_t used = 0;
  for (uint32_t i = 0; i < m.nwarps && used < sizeof list - 256; i++) {
    const Fiber* fibers = m.fibers + i * kWarp;
    for (uint32_t left = m.warps[i].alive; left && used < sizeof list - 256;) {  // lanes by what they wait in
      const Fiber& f = fibers[__builtin_ctz(left)];
      uint32_t lanes = 0;
      for (uint32_t l = 0; l < kWarp; l++)
        if ((left >> l & 1) && fibers[l].op == f.op && fibers[l].site == f.site) lanes |= 1u << l;
      used += (size_t)snprintf(list + used, 256, "%s warp %u lanes %08x in %s at %.160s:%d", used ? "," : "", i, lanes,
                               op_name(f.op), short_path(f.site.file), f.site.line);
      left &= ~lanes;
    }
  }
  fail({m.kernel->file, 0}, "deadlock: these wait for ever:%s", list);
}

// ---- signals -----------------------------------------------------------------------------------------------------

static struct sigaction previous[NSIG];

// In kernel code: leave the signal stack for good; the block is abandoned. Elsewhere: whoever was here before.
static void on_signal(int number, siginfo_t* info, void*) {
  Sm* m = sm;
  if (m && m->current) {
    m->signal = number;
    m->fault = info->si_addr;
    void* abandoned;
    switch_stack(&abandoned, m->scheduler);
  }
  sigaction(number, &previous[number], nullptr);  // the instruction runs again, under the old handler
}

void catch_signals() {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(number, &action, &previous[number]);
}

void describe_signal(Sm& m) {
  const uint8_t* a = static_cast<const uint8_t*>(m.fault);
  char what[320] = "illegal instruction", at[256];
  if (m.signal == SIGFPE) {
    snprintf(what, sizeof what, "integer division by zero");
  } else if (m.signal != SIGILL && a >= m.stacks && a < m.stacks + kStack * kMaxThreads) {
    snprintf(what, sizeof what, "stack overflow: a thread has %zu bytes", kStack - kStackGuard);
  } else if (m.signal != SIGILL) {
    describe_global(a, at, sizeof at);
    snprintf(what, sizeof what, "invalid access, not through the wrappers, at %s", at);
  }
  m.signal = 0;
  record(m, {m.kernel->file, 0}, what);
}

}  // namespace simt
