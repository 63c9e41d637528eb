// shared.h - shared memory: a window of 32-bit addresses, reached through these functions alone, so that every access
// is checked. Dynamic memory starts at kDynamic; each static piece lies far enough from the others for an overrun to
// miss them all.
//
// Two bytes are the unit of the checks: threads may share a 4-byte word. Per unit there are
//   writes      the last write: time of the block's clock, time of the warp's clock, thread; bit 62 marks a cp.async
//               that was not waited for;
//   reads       time of the last read since, and the set of warps that read;
//   lane_reads  warp, time of the warp's clock and lane of the last read (or: several lanes).
// An access races with an earlier one unless a barrier (other warp) or __syncwarp (other lane) lies between.
#pragma once
#include <cstring>

#include "fiber.h"

namespace simt {

constexpr uint32_t kDynamic = 1024, kStatics = 512 << 10, kWindow = 1 << 20;
constexpr uint32_t kMaxDynamic = 232448;  // 227 KiB, the most a block can have on sm_90
constexpr uint32_t kMaxStatic = 48 << 10, kStaticGap = 4096;

[[noreturn]] void fail_shared(uint32_t address, uint32_t bytes, const char* what, Site site);
bool in_static_shared(const Sm& m, uint32_t address, uint32_t bytes);

// Where the bytes of an aligned access inside one piece of shared memory lie.
SIMT_INLINE uint8_t* shared_at(uint32_t address, uint32_t bytes, const char* what, Site site) {
  const Sm& m = *sm;
  const bool dynamic = address >= kDynamic && address <= m.dynamic_hi - bytes;
  if (__builtin_expect((address & (bytes - 1)) || !(dynamic || in_static_shared(m, address, bytes)), 0))
    fail_shared(address, bytes, what, site);
  return m.window + address;
}

// Checks and notes an access of 1, 2, 4, 8 or 16 bytes by the current thread.
template <int kBytes> void shared_read(uint32_t address, Site site);
template <int kBytes> void shared_write(uint32_t address, Site site);
// ldmatrix: all lanes of the warp read rows of 16 bytes.
void shared_read_rows(Sm& m, const uint32_t* addresses, int rows, Site site);

inline uint32_t dynamic_shared() { return kDynamic; }
uint32_t static_shared(const void* key, const char* name, uint32_t bytes);

template <class T> inline T lds(uint32_t address, Site site) {
  T value;
  memcpy(&value, shared_at(address, sizeof(T), "ld.shared", site), sizeof(T));
  if (sm->checks) shared_read<sizeof(T)>(address, site);
  return value;
}
template <class T> inline void sts(uint32_t address, T value, Site site) {
  uint8_t* to = shared_at(address, sizeof(T), "st.shared", site);
  if (sm->checks) shared_write<sizeof(T)>(address, site);
  memcpy(to, &value, sizeof(T));
}

// The source is read at once; the destination holds 0xff bytes (a NaN) until the issuing thread waits for the group.
void cp_async16(uint32_t dst, const void* src, int bytes, Site site);
void cp_async_wait(uint32_t keep);
inline void cp_async_commit() { sm->current->groups++; }

}  // namespace simt
