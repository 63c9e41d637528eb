// block_sum.cuh - the sum of one number per thread, in f64 and in a fixed order.
#pragma once
#include "ptx.cuh"

// Butterflies within each warp, then one warp after another. All threads of the block, whole warps and at most 32 of
// them, call it, once in a kernel; all get the result.
DEV double block_sum(double x) {
  STATIC_SHARED(sums, 32 * sizeof(double));
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  if (threadIdx.x % 32 == 0) sts(sums + 8 * (threadIdx.x / 32), x);
  __syncthreads();
  double total = 0;
  for (uint32_t warp = 0; warp < blockDim.x / 32; warp++) total += lds<double>(sums + 8 * warp);
  return total;
}
