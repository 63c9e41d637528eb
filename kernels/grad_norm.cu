// grad_norm.cu - L2 norm of a long vector.
//
// A block adds up the squares of a piece in f64, in which none of f32 overflows, and leaves one number; a second
// kernel of one block adds these up. Pieces depend on the vector's length alone, so the bits do not depend on the
// GPU.
//
// Bytes: 4 per number. f64 is no bottleneck where it has at least 5 additions a clock and SM.
#include "common/block_sum.cuh"

struct GradNormPartial {
  Global<const float> grad;  // (N)
  Global<double> partials;   // one for each block
  int64_t elems;             // N
};
static_assert(sizeof(GradNormPartial) == 24 && offsetof(GradNormPartial, elems) == 16, "as in src/ops/grad_norm.rs");

struct GradNormSum {
  Global<float> norm;              // (1)
  Global<const double> partials;
  int64_t count;
};
static_assert(sizeof(GradNormSum) == 24 && offsetof(GradNormSum, count) == 16, "as in src/ops/grad_norm.rs");

namespace grad_norm {

constexpr int kPiece = 16384;  // as in src/ops/grad_norm.rs
constexpr int kThreads = 256;

DEV double square(float x) { return (double)x * (double)x; }

DEV void partial(const GradNormPartial& p) {
  const int64_t first = (int64_t)blockIdx.x * kPiece;
  const auto grad = p.grad + first;
  const int count = p.elems - first < kPiece ? (int)(p.elems - first) : kPiece;
  double sum = 0;
#pragma unroll 8
  for (int i = 4 * threadIdx.x; i < count - 3; i += 4 * kThreads) {
    const Vec<float, 4> x = load_vec<4>(grad, i);
#pragma unroll
    for (int j = 0; j < 4; j++) sum += square(x[j]);
  }
  const int tail = count - count % 4 + (int)threadIdx.x;
  if (tail < count) sum += square(load(grad, tail));
  const double total = block_sum(sum);
  if (threadIdx.x == 0) store(p.partials, blockIdx.x, total);
}

DEV void sum(const GradNormSum& p) {
  double x = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) x += load(p.partials, i);
  const double total = block_sum(x);
  if (threadIdx.x == 0) store(p.norm, 0, (float)sqrt(total));
}

}  // namespace grad_norm

HOT_KERNEL(grad_norm_partial, GradNormPartial, 256, 8) { grad_norm::partial(p); }
KERNEL(grad_norm_sum, GradNormSum, 1024, 1) { grad_norm::sum(p); }
