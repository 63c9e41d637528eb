// global.h - global memory: buffers between guard pages, each access checked.
//
// All buffers lie in one reserved range of addresses, so that what is known about an address is found by arithmetic:
//   table    per 64 KiB: the buffer there;
//   written  one bit per byte: something wrote it;
//   log      per 2 bytes: who accessed it in the launch that runs.
// A log entry says "read by block b", "read by several blocks" or "written by block b", and where. Blocks of a launch
// are never ordered, so an access that fits none of these is a race, whatever the schedule: entries change by compare
// and swap, and every pair of accesses is seen whichever comes first.
#pragma once
#include <cstring>

#include "fiber.h"

namespace simt {

// Ends the launch unless `bytes` (a power of two up to 16) at p are aligned, in one buffer and, for a read, written.
template <int kBytes> void global_read(const void* p, const char* what, Site site);
template <int kBytes> void global_write(void* p, Site site);
void global_read_bytes(const void* p, uint32_t bytes, const char* what, Site site);  // the same for any number

template <class T> inline T load(const T* p, Site site) {
  global_read<sizeof(T)>(p, "load", site);
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}
template <class T> inline void store(T* p, const T& value, Site site) {
  global_write<sizeof(T)>(p, site);
  memcpy(static_cast<void*>(p), &value, sizeof(T));
}

// Ids of the blocks of a launch in the log: `first` stands for "several blocks", block b is first + 1 + b. Zero: this
// process has used up the ids.
uint32_t take_block_ids(uint32_t grid);
// What lies at an address: "byte 1200 of global buffer 'x' (1200 bytes)", or that no buffer is near.
void describe_global(const void* p, char* text, size_t bytes);

}  // namespace simt
