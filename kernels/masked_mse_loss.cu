// masked_mse_loss.cu - mean squared error over the numbers of masked patches and its gradient, in one pass.
//
// One warp per patch. It holds the patch's target and prediction in registers, 4 neighbours a lane and step, so that
// the target's mean and variance (two-pass) cost no second read; patches too long or too odd for that are read again
// instead. A warp takes 8 patches, a block 64; each block leaves one f64, and a second kernel of one block adds these
// up. Both orders depend on the number of patches alone.
//
// Bytes: a number of target (4), prediction and gradient (sizeof(T) each), all once.
#include "common/block_sum.cuh"

struct MaskedMseLoss {
  Global<void> grad_pred;       // (B, M, E) in T
  Global<const void> pred;      // (B, M, E) in T
  Global<const float> target;   // (B, M, E)
  Global<double> partials;      // one for each block: sum of squared errors
  int64_t patches;              // B M
  uint32_t numbers;             // E
  uint32_t norm_pix;            // 1: each target patch is normalised by its own mean and variance
  float grad_scale;             // 2 scale / (B M E)
  float eps;                    // added to a target patch's variance
};
static_assert(sizeof(MaskedMseLoss) == 56 && offsetof(MaskedMseLoss, eps) == 52, "as in src/ops/masked_mse_loss.rs");

struct MaskedMseLossSum {
  Global<float> loss;             // (1)
  Global<const double> partials;
  int64_t count;
  double scale;                   // scale / (B M E)
};
static_assert(sizeof(MaskedMseLossSum) == 32 && offsetof(MaskedMseLossSum, scale) == 24,
              "as in src/ops/masked_mse_loss.rs");

namespace masked_mse_loss {

constexpr int kWarps = 8, kPatchesOfWarp = 8;

// One over the standard deviation of `n` numbers with this sum of squared differences from their mean.
DEV float rstd(float squares, uint32_t n, float eps) {
  return div_rn(1.f, sqrt_rn(div_rn(squares, (float)(n - 1)) + eps));
}

// A patch of at most 128 STEPS numbers, a multiple of 4. Returns this lane's share of the squared error.
template <class T, int STEPS> struct InRegisters {
  static DEV float patch(const MaskedMseLoss& p, int64_t patch) {
    const auto target_at = p.target + patch * p.numbers;
    const auto pred_at = p.pred.template as<const T>() + patch * p.numbers;
    const auto grad_at = p.grad_pred.template as<T>() + patch * p.numbers;
    const uint32_t lane = threadIdx.x % 32;
    const auto at = [&](int step) { return 4 * (lane + 32 * step); };
    Vec<float, 4> target[STEPS];
    Vec<T, 4> pred[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (at(step) < p.numbers) {
        target[step] = load_vec<4>(target_at, at(step));
        pred[step] = load_vec<4>(pred_at, at(step));
      } else {
        target[step] = {};
        pred[step] = {};
      }
    }
    float mean = 0, factor = 1;
    if (p.norm_pix) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum += target[step][i];
      }
      mean = div_rn(warp_sum(sum), (float)p.numbers);
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        if (at(step) < p.numbers) {
#pragma unroll
          for (int i = 0; i < 4; i++) squares += (target[step][i] - mean) * (target[step][i] - mean);
        }
      }
      factor = rstd(warp_sum(squares), p.numbers, p.eps);
    }
    float loss = 0;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (at(step) < p.numbers) {
        Vec<T, 4> grad;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float error = to_f32(pred[step][i]) - (target[step][i] - mean) * factor;
          loss += error * error;
          grad[i] = from_f32<T>(p.grad_scale * error);
        }
        store_vec<4>(grad_at, at(step), grad);
      }
    }
    return loss;
  }
};

// A patch of any length.
template <class T> struct InPasses {
  static DEV float patch(const MaskedMseLoss& p, int64_t patch) {
    const auto target = p.target + patch * p.numbers;
    const auto pred = p.pred.template as<const T>() + patch * p.numbers;
    const auto grad = p.grad_pred.template as<T>() + patch * p.numbers;
    const uint32_t lane = threadIdx.x % 32;
    float mean = 0, factor = 1;
    if (p.norm_pix) {
      float sum = 0, squares = 0;
      for (uint32_t i = lane; i < p.numbers; i += 32) sum += load(target, i);
      mean = div_rn(warp_sum(sum), (float)p.numbers);
      for (uint32_t i = lane; i < p.numbers; i += 32) {
        const float x = load(target, i) - mean;
        squares += x * x;
      }
      factor = rstd(warp_sum(squares), p.numbers, p.eps);
    }
    float loss = 0;
    for (uint32_t i = lane; i < p.numbers; i += 32) {
      const float error = to_f32(load(pred, i)) - (load(target, i) - mean) * factor;
      loss += error * error;
      store(grad, i, from_f32<T>(p.grad_scale * error));
    }
    return loss;
  }
};

template <class How> DEV void run(const MaskedMseLoss& p) {
  double loss = 0;
  for (int i = 0; i < kPatchesOfWarp; i++) {
    const int64_t patch = ((int64_t)blockIdx.x * kPatchesOfWarp + i) * kWarps + threadIdx.x / 32;
    if (patch < p.patches) loss += How::patch(p, patch);
  }
  const double total = block_sum(loss);
  if (threadIdx.x == 0) store(p.partials, blockIdx.x, total);
}

DEV void sum(const MaskedMseLossSum& p) {
  double x = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) x += load(p.partials, i);
  const double total = block_sum(x);
  if (threadIdx.x == 0) store(p.loss, 0, load(p.loss, 0) + (float)(total * p.scale));
}

}  // namespace masked_mse_loss

using masked_mse_loss::InPasses;
using masked_mse_loss::InRegisters;
HOT_KERNEL(masked_mse_loss_bf16_256, MaskedMseLoss, 256, 5) { masked_mse_loss::run<InRegisters<bf16, 2>>(p); }
HOT_KERNEL(masked_mse_loss_bf16_768, MaskedMseLoss, 256, 3) { masked_mse_loss::run<InRegisters<bf16, 6>>(p); }
KERNEL(masked_mse_loss_bf16_any, MaskedMseLoss, 256, 4) { masked_mse_loss::run<InPasses<bf16>>(p); }
HOT_KERNEL(masked_mse_loss_f32_256, MaskedMseLoss, 256, 5) { masked_mse_loss::run<InRegisters<float, 2>>(p); }
HOT_KERNEL(masked_mse_loss_f32_768, MaskedMseLoss, 256, 3) { masked_mse_loss::run<InRegisters<float, 6>>(p); }
KERNEL(masked_mse_loss_f32_any, MaskedMseLoss, 256, 4) { masked_mse_loss::run<InPasses<float>>(p); }
KERNEL(masked_mse_loss_sum, MaskedMseLossSum, 1024, 1) { masked_mse_loss::sum(p); }
