// simt.h - the host executor: what ptx.cuh calls where a kernel is built with a C++ compiler, and CUDA's names.
// How it works: fiber.h. What it checks, what it cannot show, what it costs: docs/executor.md.
#pragma once
#ifdef __CUDACC__
#error "simt.h is the host executor: kernels include common/ptx.cuh"
#endif
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "the host executor needs x86-64 Linux and -mavx2 -mfma -mf16c"
#endif
#include "collectives.h"
#include "fiber.h"
#include "global.h"
#include "numbers.h"
#include "shared.h"

#define SIMT_SITE simt::Site site_ = {__builtin_FILE(), __builtin_LINE()}

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define threadIdx (simt::sm->current->tid)
#define blockIdx (simt::sm->block)
#define blockDim (simt::sm->block_dim)
#define gridDim (simt::sm->grid_dim)

SIMT_INLINE void __syncthreads(SIMT_SITE) { simt::syncthreads(site_); }
SIMT_INLINE void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::syncwarp(mask, site_); }
template <class T> SIMT_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
  return simt::shfl(mask, value, lane, simt::Shuffle::index, width, site_);
}
template <class T> SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_SITE) {
  return simt::shfl(mask, value, bits, simt::Shuffle::bit_xor, width, site_);
}
template <class T> SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_SITE) {
  return simt::shfl(mask, value, (int)by, simt::Shuffle::up, width, site_);
}
template <class T> SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_SITE) {
  return simt::shfl(mask, value, (int)by, simt::Shuffle::down, width, site_);
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int value, SIMT_SITE) {
  return simt::ballot(mask, value != 0, site_);
}
SIMT_INLINE int __any_sync(unsigned mask, int value, SIMT_SITE) { return simt::ballot(mask, value != 0, site_) != 0; }
SIMT_INLINE int __all_sync(unsigned mask, int value, SIMT_SITE) { return simt::ballot(mask, value == 0, site_) == 0; }
template <class T> SIMT_INLINE T __reduce_add_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::reduce_sync(mask, value, [](T a, T b) { return (T)((uint32_t)a + (uint32_t)b); }, site_);
}
template <class T> SIMT_INLINE T __reduce_min_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::reduce_sync(mask, value, [](T a, T b) { return a < b ? a : b; }, site_);
}
template <class T> SIMT_INLINE T __reduce_max_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::reduce_sync(mask, value, [](T a, T b) { return a > b ? a : b; }, site_);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
