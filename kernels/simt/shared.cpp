// shared.cpp - the checks of shared memory. The records are described in shared.h.
#include "shared.h"

#include <algorithm>
#include <cstdio>

#include "global.h"

namespace simt {

// A write: [62] a cp.async under way, [61:32] time of the block, [31:12] time of the warp, [11:2] thread, [1:0] bytes.
// Reads:   [61:32] time of the block, [31:0] warps that read.
// A lane's read: [30:26] warp, [25:6] time of the warp, [5:1] lane, [0] several lanes.
constexpr int64_t kPending = 1ll << 62;
constexpr uint32_t kSeveralLanes = 1;

static int64_t write_record(const Sm& m, uint32_t bytes) {
  const Fiber& f = *m.current;
  return (int64_t)m.clock.now << 32 | (int64_t)(f.warp->clock.now << 12 | (uint32_t)f.thread << 2 | bytes);
}
static uint32_t writer(int64_t w) { return (uint32_t)w >> 2 & 1023; }
static uint32_t block_time(int64_t record) { return (uint32_t)(record >> 32) & 0x3fffffff; }
static bool pending(const Sm& m, int64_t w) { return (w & kPending) && block_time(w) >= m.begun; }
static uint32_t writer_warp_time(int64_t w) { return (uint32_t)w >> 12; }
static uint32_t lane_record(const Fiber& f) {
  return f.warp->index << 26 | f.warp->clock.now << 6 | (uint32_t)f.lane << 1;
}
static uint32_t lane_warp_time(uint32_t r) { return r >> 6 & 0xfffff; }

static const char* place(const Sm& m, uint32_t address, char (&text)[128]) {
  const StaticShared* s = nullptr;
  for (const StaticShared& t : m.statics)
    if (address >= t.lo && address < t.hi + kStaticGap) s = &t;
  if (s)
    snprintf(text, sizeof text, "byte %u of static '%s' (%u bytes)", address - s->lo, s->name, s->hi - s->lo);
  else
    snprintf(text, sizeof text, "byte %d of dynamic shared memory (%u bytes)", (int)(address - kDynamic),
             m.dynamic_hi - kDynamic);
  return text;
}

void fail_shared(uint32_t address, uint32_t bytes, const char* what, Site site) {
  char at[128];
  place(*sm, address, at);
  if (address & (bytes - 1)) fail(site, "misaligned: %s of %u bytes at %s", what, bytes, at);
  fail(site, "out of bounds: %s of %u bytes at %s", what, bytes, at);
}

bool in_static_shared(const Sm& m, uint32_t address, uint32_t bytes) {
  for (const StaticShared& s : m.statics)
    if (address >= s.lo && address <= s.hi - bytes && bytes <= s.hi - s.lo) return true;
  return false;
}

uint32_t static_shared(const void* key, const char* name, uint32_t bytes) {
  Sm& m = *sm;
  uint32_t lo = kStatics, total = 0;
  for (const StaticShared& s : m.statics) {
    if (s.key == key) return s.lo;
    lo = s.hi + kStaticGap;
    total += s.hi - s.lo;
  }
  const Site site = {m.kernel->file, 0};
  if (total + bytes > kMaxStatic) fail(site, "more than %u bytes of static shared memory", kMaxStatic);
  if (total + bytes + m.dynamic_hi - kDynamic > kMaxDynamic)
    fail(site, "static and dynamic shared memory exceed %u bytes", kMaxDynamic);
  lo = (lo + 15) / 16 * 16;
  m.statics.push_back({key, name, lo, lo + bytes});
  if (!m.checks) memset(m.window + lo, 0xff, bytes);
  return lo;
}

// Is the write w ordered before what the current thread (`warp_wide`: what each lane of its warp) does now?
static bool ordered_after_write(const Sm& m, int64_t w, bool warp_wide) {
  const Fiber& f = *m.current;
  const uint32_t by = writer(w), then = block_time(w);
  if (then < m.clock.all) return true;
  if (by / kWarp != f.warp->index) return m.clock.ordered(f.warp->index, by / kWarp, then);
  if (warp_wide) return writer_warp_time(w) < f.warp->clock.all;
  return by == f.thread || f.warp->clock.ordered(f.lane, by % kWarp, writer_warp_time(w));
}

// The cold half of a read: some record of the access is young, absent or pending.
static void check_read(Sm& m, uint32_t unit, bool warp_wide, uint32_t bytes, const char* what, Site site) {
  const int64_t w = m.writes[unit];
  char at[128];
  if (pending(m, w))
    fail(site, "unwaited: %s reads %s, the target of a cp.async that thread %u has not waited for", what,
         place(m, unit * 2, at), writer(w));
  if (block_time(w) < m.begun)
    fail(site, "uninitialised: %s reads %s, which nothing wrote", what, place(m, unit * 2, at));
  if (!ordered_after_write(m, w, warp_wide) && ((uint32_t)w & bytes))
    fail(site, "race: %s reads %s, written by thread %u (warp %u) with no %s between", what, place(m, unit * 2, at),
         writer(w), writer(w) / kWarp, writer(w) / kWarp == m.current->warp->index ? "__syncwarp" : "barrier");
  // Reads of other warps before a named barrier that this warp took part in are done with.
  const int64_t r = m.reads[unit];
  const uint32_t me = m.current->warp->index, then = block_time(r);
  if (then < m.clock.all || then == m.clock.now) return;
  uint32_t warps = (uint32_t)r;
  for (uint32_t left = warps; left; left &= left - 1) {
    const uint32_t by = (uint32_t)__builtin_ctz(left);
    if (by != me && m.clock.ordered(me, by, then)) warps &= ~(1u << by);
  }
  m.reads[unit] = (r & ~0xffffffffll) | warps;
}

// Times as records hold them, and the reading warp's bit.
struct Reader {
  int64_t begun, all, now, bit;
  explicit Reader(const Sm& m)
      : begun((int64_t)m.begun << 32), all((int64_t)m.clock.all << 32), now((int64_t)m.clock.now << 32),
        bit(1ll << m.current->warp->index) {}
};
template <int kBytes>
SIMT_INLINE void read_units(Sm& m, uint32_t address, Reader reader, bool warp_wide, const char* what, Site site) {
  constexpr int kN = kBytes < 2 ? 1 : kBytes / 2;
  const auto [begun, all, now, bit] = reader;
  const uint32_t unit = address / 2;
  const int64_t* w = m.writes + unit;
  int64_t* r = m.reads + unit;
  int64_t slow = 0;
  for (int i = 0; i < kN; i++) slow |= (w[i] < begun) | (w[i] >= all) | ((r[i] >= all) & (r[i] < now));
  if (__builtin_expect(slow != 0, 0)) {
    const uint32_t bytes = kBytes == 1 ? 1 + (address & 1) : 3;
    for (int i = 0; i < kN; i++) check_read(m, unit + (uint32_t)i, warp_wide, bytes, what, site);
  }
  for (int i = 0; i < kN; i++) r[i] = (r[i] >= all ? r[i] & 0xffffffffll : 0) | now | bit;
}

template <int kBytes> void shared_read(uint32_t address, Site site) {
  constexpr int kN = kBytes < 2 ? 1 : kBytes / 2;
  Sm& m = *sm;
  const Fiber& f = *m.current;
  read_units<kBytes>(m, address, Reader(m), false, "ld.shared", site);
  // Another lane of this warp that read since the last __syncwarp: from now on, several lanes did.
  const uint32_t mine = lane_record(f), since = f.warp->index << 26 | f.warp->clock.all << 6;
  uint32_t* lanes = m.lane_reads + address / 2;
  for (int i = 0; i < kN; i++) {
    const uint32_t old = lanes[i];
    const bool young = old >= since && old >> 26 == f.warp->index;
    lanes[i] = mine | (young & ((old & 63) != (mine & 63)) ? kSeveralLanes : 0);
  }
}
void shared_read_rows(Sm& m, const uint32_t* addresses, int rows, Site site) {
  const Reader reader(m);
  const uint32_t mine = lane_record(*m.current) | kSeveralLanes;
  for (int row = 0; row < rows; row++) {
    read_units<16>(m, addresses[row], reader, true, "ldmatrix", site);
    for (uint32_t i = 0; i < 8; i++) m.lane_reads[addresses[row] / 2 + i] = mine;
  }
}

// The cold half of a write: some record is of this barrier interval.
static void check_write(Sm& m, uint32_t unit, uint32_t bytes, const char* what, Site site) {
  const Fiber& f = *m.current;
  const int64_t w = m.writes[unit], r = m.reads[unit];
  char at[128];
  if (pending(m, w))
    fail(site, "unwaited: %s writes %s, the target of a cp.async that thread %u has not waited for", what,
         place(m, unit * 2, at), writer(w));
  if (!ordered_after_write(m, w, false) && ((uint32_t)w & bytes))
    fail(site, "race: %s writes %s, written by thread %u (warp %u) with no %s between", what, place(m, unit * 2, at),
         writer(w), writer(w) / kWarp, writer(w) / kWarp == f.warp->index ? "__syncwarp" : "barrier");
  const uint32_t then = block_time(r);
  if (then < m.clock.all) return;
  for (uint32_t left = (uint32_t)r; left; left &= left - 1) {
    const uint32_t by = (uint32_t)__builtin_ctz(left);
    if (by != f.warp->index && !m.clock.ordered(f.warp->index, by, then))
      fail(site, "race: %s writes %s, read by warp %u with no barrier between", what, place(m, unit * 2, at), by);
  }
  const uint32_t lanes = m.lane_reads[unit], lane = lanes >> 1 & 31;
  if (!((uint32_t)r >> f.warp->index & 1) || lanes >> 26 != f.warp->index) return;
  // With partial masks it is not known which of several lanes have met: then nothing is said.
  const bool several = lanes & kSeveralLanes;
  const bool ordered = several ? f.warp->clock.some || lane_warp_time(lanes) < f.warp->clock.all
                               : lane == f.lane || f.warp->clock.ordered(f.lane, lane, lane_warp_time(lanes));
  if (!ordered)
    fail(site, "race: %s writes %s, read by %s %u of this warp with no __syncwarp between", what,
         place(m, unit * 2, at), several ? "several lanes, one of them" : "lane", lane);
}

template <int kBytes> SIMT_INLINE void write_units(uint32_t address, bool pending, const char* what, Site site) {
  constexpr int kN = kBytes < 2 ? 1 : kBytes / 2;
  Sm& m = *sm;
  const uint32_t unit = address / 2, bytes = kBytes == 1 ? 1 + (address & 1) : 3;
  const int64_t all = (int64_t)m.clock.all << 32, mine = write_record(m, bytes) | (pending ? kPending : 0);
  int64_t *w = m.writes + unit, *r = m.reads + unit, slow = 0;
  for (int i = 0; i < kN; i++) slow |= ((w[i] >= all) & (w[i] != mine)) | (r[i] >= all);
  if (__builtin_expect(slow != 0, 0))
    for (int i = 0; i < kN; i++) check_write(m, unit + (uint32_t)i, bytes, what, site);
  for (int i = 0; i < kN; i++) w[i] = mine;
}
template <int kBytes> void shared_write(uint32_t address, Site site) {
  write_units<kBytes>(address, false, "st.shared", site);
}

template void shared_read<1>(uint32_t, Site);
template void shared_read<2>(uint32_t, Site);
template void shared_read<4>(uint32_t, Site);
template void shared_read<8>(uint32_t, Site);
template void shared_read<16>(uint32_t, Site);
template void shared_write<1>(uint32_t, Site);
template void shared_write<2>(uint32_t, Site);
template void shared_write<4>(uint32_t, Site);
template void shared_write<8>(uint32_t, Site);
template void shared_write<16>(uint32_t, Site);

void cp_async16(uint32_t dst, const void* src, int bytes, Site site) {
  Sm& m = *sm;
  Fiber& f = *m.current;
  if (bytes < 0 || bytes > 16) fail(site, "cp.async of %d bytes: 0 to 16 are possible", bytes);
  if ((uintptr_t)src & 15) fail(site, "misaligned: cp.async of 16 bytes from %p", src);
  uint8_t* to = shared_at(dst, 16, "cp.async", site);
  Copy copy = {dst, f.groups, {}};
  if (bytes) global_read_bytes(src, (uint32_t)bytes, "cp.async", site);
  memcpy(copy.data, src, (size_t)bytes);
  if (m.checks) write_units<16>(dst, true, "cp.async", site);
  memset(to, 0xff, 16);
  f.copies.push_back(copy);
}

// Lands what belongs to all but the newest `keep` groups; copies without a group of their own stay.
void cp_async_wait(uint32_t keep) {
  Sm& m = *sm;
  Fiber& f = *m.current;
  const int64_t landed = write_record(m, 3);
  size_t left = 0;
  for (const Copy& copy : f.copies) {
    if (copy.group + keep >= f.groups) {
      f.copies[left++] = copy;
      continue;
    }
    memcpy(m.window + copy.dst, copy.data, sizeof copy.data);
    if (m.checks) std::fill_n(m.writes + copy.dst / 2, 8, landed);
  }
  f.copies.resize(left);
}

}  // namespace simt
