// faults.cu - kernels for the tests of the executor.
#include "../../kernels/common/ptx.cuh"

struct ScaleParams {
  Global<const float> x;
  Global<float> y;
  int64_t n;
};
KERNEL(executor_scale, ScaleParams, 128, 1) {
  const uint32_t smem = dynamic_shared();
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  sts<float>(smem + 4 * threadIdx.x, i < p.n ? load(p.x, i) : 0.f);
  __syncthreads();
  const float v = lds<float>(smem + 4 * (blockDim.x - 1 - threadIdx.x));
  const float s = warp_sum(v);
  if (i < p.n) store(p.y, i, v + s);
}
