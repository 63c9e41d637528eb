// global.cpp - buffers, their shadow and the checks of global memory (global.h).
#include "global.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"

namespace simt {

constexpr size_t kSpan = 64ull << 30, kGranule = 64 << 10, kGranules = kSpan / kGranule;

struct Buffer {
  const uint8_t *lo, *hi;
  size_t granule, granules;
  std::string name;
};

static struct {
  std::mutex mutex;  // of what follows; launches read without it, since no buffer they use comes or goes meanwhile
  uint8_t* base;
  std::atomic<uint16_t>* written;  // bit per byte
  std::atomic<uint64_t>* log;      // per 2 bytes
  std::atomic<const Buffer*> table[kGranules];
  std::vector<Buffer*> spare;      // never freed: a stray pointer of another launch may lead to a buffer that goes
  size_t next;                     // where the search for free granules starts: addresses are not soon used again
} memory;

// ---- buffers -----------------------------------------------------------------------------------------------------

static void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
static bool commit(void* p, size_t bytes) { return mprotect(p, bytes, PROT_READ | PROT_WRITE) == 0; }
static void release(void* p, size_t bytes) {
  madvise(p, bytes, MADV_DONTNEED);
  mprotect(p, bytes, PROT_NONE);
}
static uint8_t* data_of(size_t granule) { return memory.base + granule * kGranule; }
static std::atomic<uint16_t>* written_of(size_t granule) { return memory.written + granule * (kGranule / 16); }
static std::atomic<uint64_t>* log_of(size_t granule) { return memory.log + granule * (kGranule / 2); }

// The first of `count` free granules with a free one, the guard, on either side.
static size_t find_free(size_t count) {
  for (size_t tries = 0; tries < 2; tries++, memory.next = 0) {
    size_t run = 0;
    for (size_t g = memory.next; g < kGranules; g++) {
      run = memory.table[g].load(std::memory_order_relaxed) ? 0 : run + 1;
      if (run == count + 2) {
        memory.next = g;
        return g - count;
      }
    }
  }
  return 0;
}

static const Buffer* buffer_at(const void* p) {
  const size_t at = (size_t)(static_cast<const uint8_t*>(p) - memory.base);
  return at < kSpan ? memory.table[at / kGranule].load(std::memory_order_relaxed) : nullptr;
}
static bool inside(const Buffer* b, const void* p, size_t bytes) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  return b && q >= b->lo && q <= b->hi && bytes <= (size_t)(b->hi - q);
}

void describe_global(const void* p, char* text, size_t bytes) {
  const std::lock_guard<std::mutex> lock(memory.mutex);
  const uint8_t* q = static_cast<const uint8_t*>(p);
  const Buffer* b = buffer_at(p);
  if (!b) {  // in a guard: the nearer neighbour
    const Buffer *before = buffer_at(q - kGranule), *after = buffer_at(q + kGranule);
    b = !after || (before && q - before->hi < after->lo - q) ? before : after;
  }
  if (!p)
    snprintf(text, bytes, "the null pointer");
  else if (!b)
    snprintf(text, bytes, "address %p, in no buffer", p);
  else
    snprintf(text, bytes, "byte %td of global buffer '%s' (%td bytes)", q - b->lo, b->name.c_str(), b->hi - b->lo);
}

// ---- checks ------------------------------------------------------------------------------------------------------

// A log entry: [63:32] id of the block, or of "several blocks", [31:16] line, [15:8] file, [2:1] bytes, [0] written.
constexpr uint64_t kWrote = 1;

static const char* files[256];
static uint32_t file_index(Sm& m, const char* file) {
  if (m.log_file == file) return m.log_file_index;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  uint32_t i = 0;
  while (i < 255 && files[i] && files[i] != file) i++;
  if (!files[i]) files[i] = file;
  m.log_file = file;
  return m.log_file_index = i;
}
static uint64_t entry(Sm& m, uint32_t id, uint32_t bytes, bool wrote, Site site) {
  const uint64_t line = (uint32_t)site.line & 0xffff;
  return (uint64_t)id << 32 | line << 16 | (uint64_t)file_index(m, site.file) << 8 | bytes << 1 | (uint64_t)wrote;
}

[[noreturn, gnu::cold]] static void fail_race(const void* p, const char* what, bool write, uint64_t other, Site site) {
  const Sm& m = *sm;
  char at[256], by[64] = "several blocks";
  describe_global(p, at, sizeof at);
  const uint32_t id = (uint32_t)(other >> 32);
  if (id != m.several_id) snprintf(by, sizeof by, "block %u", id - m.several_id - 1);
  fail(site, "race between blocks: %s %s %s, %s by %s at %s:%u in the same launch", what,
       write ? "writes" : "reads", at, other & kWrote ? "written" : "read", by,
       short_path(files[other >> 8 & 255]), (uint32_t)(other >> 16) & 0xffff);
}

static bool of_this_launch(const Sm& m, uint64_t e) { return (uint32_t)(e >> 32) - m.several_id <= m.grid_dim.x; }

// The cold halves: the entry changes, or tells of a race.
static void log_read(Sm& m, std::atomic<uint64_t>& log, uint64_t old, uint32_t bytes, const void* p, const char* what,
                     Site site) {
  for (;;) {
    uint64_t now = entry(m, m.block_id, bytes, false, site);
    if (of_this_launch(m, old)) {
      if (!(old >> 1 & bytes)) return;  // other bytes of these two
      if (old & kWrote) fail_race(p, what, false, old, site);
      now = entry(m, m.several_id, 3, false, site);
    }
    if (log.compare_exchange_weak(old, now) || (uint32_t)(old >> 32) == m.block_id) return;
  }
}
static void log_write(Sm& m, std::atomic<uint64_t>& log, uint64_t old, uint32_t bytes, const void* p, Site site) {
  const uint64_t now = entry(m, m.block_id, bytes, true, site);
  do {
    if (of_this_launch(m, old) && (uint32_t)(old >> 32) != m.block_id && (old >> 1 & bytes))
      fail_race(p, "store", true, old, site);
  } while (!log.compare_exchange_weak(old, now));
}

// Bounds and alignment; the offset of p in the reserved range.
template <int kBytes> static size_t checked_offset(const void* p, const char* what, Site site) {
  if (__builtin_expect(!inside(buffer_at(p), p, kBytes) || (uintptr_t)p % kBytes, 0)) {
    char at[256];
    describe_global(p, at, sizeof at);
    fail(site, "%s: %s of %d bytes at %s", inside(buffer_at(p), p, kBytes) ? "misaligned" : "out of bounds", what,
         kBytes, at);
  }
  return (size_t)(static_cast<const uint8_t*>(p) - memory.base);
}

template <int kBytes> void global_read(const void* p, const char* what, Site site) {
  Sm& m = *sm;
  const size_t at = checked_offset<kBytes>(p, what, site);
  if (!m.checks) return;
  constexpr uint32_t kMask = (1u << kBytes) - 1;
  const uint32_t written = memory.written[at / 16].load(std::memory_order_relaxed) >> at % 16;
  if (__builtin_expect((written & kMask) != kMask, 0)) {
    char where[256];
    describe_global(p, where, sizeof where);
    fail(site, "uninitialised: %s of %d bytes at %s, which nothing wrote", what, kBytes, where);
  }
  std::atomic<uint64_t>* log = memory.log + at / 2;
  const uint32_t bytes = kBytes == 1 ? 1 + (uint32_t)(at & 1) : 3;
  for (int i = 0; i < (kBytes < 2 ? 1 : kBytes / 2); i++) {
    const uint64_t e = log[i].load(std::memory_order_relaxed);
    const uint32_t id = (uint32_t)(e >> 32);
    if (__builtin_expect(id != m.block_id && id != m.several_id, 0))
      log_read(m, log[i], e, bytes, static_cast<const uint8_t*>(p) + 2 * i, what, site);
  }
}
template <int kBytes> void global_write(void* p, Site site) {
  Sm& m = *sm;
  const size_t at = checked_offset<kBytes>(p, "store", site);
  const uint16_t mask = (uint16_t)(((1u << kBytes) - 1) << at % 16);
  std::atomic<uint16_t>& written = memory.written[at / 16];
  if ((written.load(std::memory_order_relaxed) & mask) != mask) written.fetch_or(mask, std::memory_order_relaxed);
  if (!m.checks) return;
  std::atomic<uint64_t>* log = memory.log + at / 2;
  const uint32_t bytes = kBytes == 1 ? 1 + (uint32_t)(at & 1) : 3;
  for (int i = 0; i < (kBytes < 2 ? 1 : kBytes / 2); i++) {
    const uint64_t e = log[i].load(std::memory_order_relaxed);
    if (__builtin_expect((uint32_t)(e >> 32) != m.block_id || !(e & kWrote), 0))
      log_write(m, log[i], e, bytes, static_cast<uint8_t*>(p) + 2 * i, site);
  }
}
void global_read_bytes(const void* p, uint32_t bytes, const char* what, Site site) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  if (bytes == 16) return global_read<16>(q, what, site);
  for (uint32_t i = 0; i < bytes; i++) global_read<1>(q + i, what, site);
}

template void global_read<1>(const void*, const char*, Site);
template void global_read<2>(const void*, const char*, Site);
template void global_read<4>(const void*, const char*, Site);
template void global_read<8>(const void*, const char*, Site);
template void global_read<16>(const void*, const char*, Site);
template void global_write<1>(void*, Site);
template void global_write<2>(void*, Site);
template void global_write<4>(void*, Site);
template void global_write<8>(void*, Site);
template void global_write<16>(void*, Site);

uint32_t take_block_ids(uint32_t grid) {
  static std::atomic<uint32_t> next{1};  // zero: an empty entry of the log
  uint32_t first = next.load();
  do {
    if (grid >= UINT32_MAX - first) return 0;
  } while (!next.compare_exchange_weak(first, first + grid + 1));
  return first;
}

}  // namespace simt

// ---- the interface of api.h --------------------------------------------------------------------------------------

using namespace simt;

void* pixmim_simt_alloc(size_t bytes, const char* name, int front) {
  const std::lock_guard<std::mutex> lock(memory.mutex);
  if (bytes > kSpan / 2) return nullptr;
  if (!memory.base) {
    void* data = reserve(kSpan);
    memory.written = static_cast<std::atomic<uint16_t>*>(reserve(kSpan / 8));
    memory.log = static_cast<std::atomic<uint64_t>*>(reserve(kSpan * 4));
    if (!data || !memory.written || !memory.log) return nullptr;
    memory.base = static_cast<uint8_t*>(data);
  }
  const size_t count = std::max<size_t>(1, (bytes + kGranule - 1) / kGranule), granule = find_free(count);
  if (!granule) return nullptr;
  uint8_t* first = data_of(granule);
  if (!commit(first, count * kGranule) || !commit(written_of(granule), count * (kGranule / 8)) ||
      !commit(log_of(granule), count * (kGranule * 4)))
    return nullptr;
  uint8_t* lo = front ? first : first + count * kGranule - (bytes + 15) / 16 * 16;
  memset(lo, 0xff, bytes);
  Buffer* b = nullptr;
  if (memory.spare.empty()) {
    b = new Buffer();
  } else {
    b = memory.spare.back();
    memory.spare.pop_back();
  }
  *b = {lo, lo + bytes, granule, count, name};
  for (size_t g = granule; g < granule + count; g++) memory.table[g].store(b, std::memory_order_relaxed);
  return lo;
}

void pixmim_simt_free(void* p) {
  const std::lock_guard<std::mutex> lock(memory.mutex);
  const Buffer* b = memory.base ? buffer_at(p) : nullptr;
  if (!b || b->lo != p) return;
  for (size_t g = b->granule; g < b->granule + b->granules; g++)
    memory.table[g].store(nullptr, std::memory_order_relaxed);
  release(data_of(b->granule), b->granules * kGranule);
  release(written_of(b->granule), b->granules * (kGranule / 8));
  release(log_of(b->granule), b->granules * (kGranule * 4));
  memory.spare.push_back(const_cast<Buffer*>(b));
}

void pixmim_simt_wrote(void* p, size_t bytes) {
  if (!inside(buffer_at(p), p, bytes)) return;
  size_t at = (size_t)(static_cast<uint8_t*>(p) - memory.base);
  const size_t end = at + bytes;
  while (at < end) {
    if (at % 16 == 0 && end - at >= 16) {  // whole words of the map
      memset(static_cast<void*>(memory.written + at / 16), 0xff, (end - at) / 16 * 2);
      at += (end - at) / 16 * 16;
      continue;
    }
    memory.written[at / 16].fetch_or((uint16_t)(1u << at % 16), std::memory_order_relaxed);
    at++;
  }
}

int pixmim_simt_reads(const void* p, size_t bytes, char* text, size_t text_bytes) {
  char at[256];
  if (!inside(buffer_at(p), p, bytes)) {
    describe_global(p, at, sizeof at);
    snprintf(text, text_bytes, "out of bounds: the host reads %zu bytes at %s", bytes, at);
    return 1;
  }
  const size_t first = (size_t)(static_cast<const uint8_t*>(p) - memory.base);
  size_t missing = 0, where = 0;
  for (size_t i = first; i < first + bytes; i++) {
    const uint16_t word = memory.written[i / 16].load(std::memory_order_relaxed);
    if (word == 0xffff && i % 16 == 0) {
      i += 15;
    } else if (!(word >> i % 16 & 1) && missing++ == 0) {
      where = i;
    }
  }
  if (!missing) return 0;
  describe_global(memory.base + where, at, sizeof at);
  snprintf(text, text_bytes, "unwritten output: the host reads %zu bytes that nothing wrote, the first %s", missing,
           at);
  return 1;
}
