// launch.cpp - blocks of a grid, handed out to OS threads; the launch of api.h.
//
// The calling thread works on its own launch, and threads of the pool, started once and kept, help whichever launch has
// blocks left. So launches from several threads go on at the same time without waiting for each other.
#include "launch.h"

#include <signal.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "api.h"
#include "global.h"
#include "shared.h"

namespace simt {

struct Launch {
  const Kernel* kernel;
  const void* params;
  uint32_t grid, block, shared_bytes;
  Options options;
  std::vector<uint32_t> order;  // of the blocks; empty: as numbered
  uint32_t first_id;
  // Under the pool's mutex:
  uint32_t next = 0;            // position in the order
  uint32_t helpers = 0;         // pool threads at work on it
  uint32_t wanted = 0;          // pool threads that may still join
  uint32_t failed_at = UINT32_MAX;
  std::string finding = {};
};

struct Pool {
  std::mutex mutex;
  std::condition_variable work, done;
  std::vector<Launch*> launches;
  std::vector<Sm*> idle;
  uint32_t threads = 0;
};
// Never destroyed: its threads wait in it while the process ends.
static Pool& pool = *new Pool;

// Signals need a stack of their own: a fiber's may be what has overflowed.
class SignalStack {
  std::unique_ptr<char[]> memory_;
  stack_t before_;

 public:
  SignalStack() : memory_(new char[kBytes]) {
    stack_t s = {};
    s.ss_sp = memory_.get();
    s.ss_size = kBytes;
    sigaltstack(&s, &before_);
  }
  ~SignalStack() { sigaltstack(&before_, nullptr); }
  static constexpr size_t kBytes = 32 << 10;
};

static bool has_blocks(const Launch& l) { return l.next < l.grid && l.failed_at == UINT32_MAX; }

// Runs blocks of a launch until none are left. Blocks are handed out in order and those begun are finished, so that of
// several findings the one that comes first in the order is reported, however many threads there are.
static void work_on(Launch& l, std::unique_lock<std::mutex>& lock) {
  Sm* m = nullptr;
  if (!pool.idle.empty()) {
    m = pool.idle.back();
    pool.idle.pop_back();
  } else if (!(m = new_sm())) {
    l.failed_at = 0;
    l.finding = "the executor cannot map memory for the stacks of a block";
    return;
  }
  m->kernel = l.kernel;
  m->params = l.params;
  m->block_dim = {l.block, 1, 1};
  m->grid_dim = {l.grid, 1, 1};
  m->threads = l.block;
  m->nwarps = (l.block + kWarp - 1) / kWarp;
  m->dynamic_hi = kDynamic + l.shared_bytes;
  m->seed = l.options.seed;
  m->checks = l.options.checks;
  m->several_id = l.first_id;
  const SignalStack signal_stack;
  sm = m;
  while (has_blocks(l)) {
    // Small blocks: several at once, so that the lock is not what the time goes to.
    const uint32_t from = l.next, count = std::max(1u, std::min(16u, (l.grid - from) / 64));
    l.next += count;
    lock.unlock();
    uint32_t i = from;
    for (m->failed = false; i < from + count; i++) {
      run_block(*m, l.order.empty() ? i : l.order[i]);
      if (m->failed) break;
    }
    lock.lock();
    if (m->failed && i < l.failed_at) {
      l.failed_at = i;
      l.finding = m->finding;
    }
  }
  sm = nullptr;
  pool.idle.push_back(m);
}

static void pool_thread() {
  std::unique_lock<std::mutex> lock(pool.mutex);
  for (;;) {
    const auto wants = [](const Launch* l) { return l->wanted && has_blocks(*l); };
    const auto it = std::find_if(pool.launches.begin(), pool.launches.end(), wants);
    if (it == pool.launches.end()) {
      pool.work.wait(lock);
      continue;
    }
    Launch& l = **it;
    l.wanted--;
    l.helpers++;
    work_on(l, lock);
    l.helpers--;
    pool.done.notify_all();
  }
}

static std::vector<uint32_t> shuffled(uint32_t n, uint32_t seed) {
  std::vector<uint32_t> order(n);
  for (uint32_t i = 0; i < n; i++) order[i] = i;
  uint32_t x = seed * 2654435761u | 1;
  for (uint32_t i = n; i > 1; i--) {
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    std::swap(order[i - 1], order[x % i]);
  }
  return order;
}

std::string launch(const Kernel& kernel, const void* params, uint32_t grid, uint32_t block, uint32_t shared_bytes,
                   const Options& options) {
  Launch l = {&kernel, params, grid, block, shared_bytes, options, {}, take_block_ids(grid)};
  if (!l.first_id) return "the executor has run 2^32 blocks: start a new process";
  if (options.seed) l.order = shuffled(grid, options.seed);
  const uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  l.wanted = std::min(grid, options.threads ? options.threads : cores) - 1;

  std::unique_lock<std::mutex> lock(pool.mutex);
  static const bool caught = (catch_signals(), true);
  (void)caught;
  for (; pool.threads < l.wanted; pool.threads++) std::thread(pool_thread).detach();
  pool.launches.push_back(&l);
  for (uint32_t i = 0; i < l.wanted; i++) pool.work.notify_one();
  work_on(l, lock);
  pool.done.wait(lock, [&] { return l.helpers == 0; });
  pool.launches.erase(std::find(pool.launches.begin(), pool.launches.end(), &l));
  return l.finding;
}

}  // namespace simt

extern "C" const simt::Kernel* const pixmim_simt_kernels[];  // written by the build: null-terminated

static std::string launch_by_name(const char* name, const void* params, size_t params_bytes, uint32_t grid,
                                  uint32_t block, uint32_t shared_bytes, const simt::Options& options) {
  const simt::Kernel* const* k = pixmim_simt_kernels;
  while (*k && strcmp((*k)->name, name)) k++;
  const auto refuse = [&](const std::string& why) { return std::string(name) + ": " + why; };
  if (!*k) return refuse("no kernel has this name");
  if ((*k)->params_bytes != params_bytes)
    return refuse("the parameters have " + std::to_string((*k)->params_bytes) + " bytes, not " +
                  std::to_string(params_bytes));
  if (block < 1 || block > (uint32_t)(*k)->max_threads)
    return refuse("a block has 1 to " + std::to_string((*k)->max_threads) + " threads, not " + std::to_string(block));
  if (grid < 1 || grid > INT32_MAX) return refuse("a grid has 1 to 2^31-1 blocks, not " + std::to_string(grid));
  if (shared_bytes > simt::kMaxDynamic)
    return refuse("a block has at most " + std::to_string(simt::kMaxDynamic) + " bytes of shared memory, not " +
                  std::to_string(shared_bytes));
  return simt::launch(**k, params, grid, block, shared_bytes, options);
}

int pixmim_simt_launch(const char* kernel, const void* params, size_t params_bytes, uint32_t grid, uint32_t block,
                       uint32_t shared_bytes, const PixmimSimtOptions* options, char* text, size_t text_bytes) {
  const std::string finding = launch_by_name(kernel, params, params_bytes, grid, block, shared_bytes,
                                             {options->seed, options->threads, options->checks != 0});
  if (finding.empty()) return 0;
  snprintf(text, text_bytes, "%s", finding.c_str());
  return 1;
}
