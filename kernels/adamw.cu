// adamw.cu - one update of all parameters, and the decision whether it is taken.
//
// `prepare` is one thread: it looks at loss and gradient norm, counts the step and leaves five coefficients, so that
// neither the host nor a captured graph knows the step. `update` is one pass: four parameters a thread, in 16-byte
// vectors. It asks for them before it knows whether the step is taken, which is nearly always.
//
// Bytes: 28 a parameter, and 2 for the copy in bf16.
#include "common/ptx.cuh"

struct AdamWPrepare {
  Global<float> coefficients;      // (5): taken, clip, step size, root correction, lr
  Global<int64_t> step;            // (1)
  Global<const double> lr;         // (1)
  Global<const float> loss;        // (1)
  Global<const float> grad_norm;   // (1)
  double clip;                     // largest norm; 0: none
  double beta1, beta2;
};
static_assert(sizeof(AdamWPrepare) == 64 && offsetof(AdamWPrepare, beta2) == 56, "as in src/ops/adamw.rs");

struct AdamWUpdate {
  Global<float> param;               // (N)
  Global<bf16> copy;                 // (N), or none
  Global<float> exp_avg;             // (N)
  Global<float> exp_avg_sq;          // (N)
  Global<const float> grad;          // (N)
  Global<const float> coefficients;  // (5)
  int64_t elems;                     // N
  float beta1, new1;                 // new1 = 1 - beta1, rounded once
  float beta2, new2;
  float eps, weight_decay;
};
static_assert(sizeof(AdamWUpdate) == 80 && offsetof(AdamWUpdate, weight_decay) == 76, "as in src/ops/adamw.rs");

namespace adamw {

DEV bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// By repeated squaring.
DEV double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent; exponent /= 2) {
    if (exponent % 2) result *= base;
    base *= base;
  }
  return result;
}

DEV void prepare(const AdamWPrepare& p) {
  const double lr = load(p.lr, 0), norm = load(p.grad_norm, 0);
  const bool is_taken = is_finite(load(p.loss, 0)) && is_finite((float)(norm * norm));
  const int64_t step = load(p.step, 0) + is_taken;
  store(p.step, 0, step);
  store(p.coefficients, 0, is_taken ? 1.f : 0.f);
  store(p.coefficients, 1, p.clip > 0 && norm > p.clip ? (float)(p.clip / norm) : 1.f);
  store(p.coefficients, 2, (float)(lr / (1 - power(p.beta1, step))));
  store(p.coefficients, 3, (float)(1 / sqrt(1 - power(p.beta2, step))));
  store(p.coefficients, 4, (float)lr);
}

struct Step {
  float clip, size, root_correction, decay;
};

DEV void update_one(const AdamWUpdate& p, const Step& step, float& param, float& m, float& v, float grad) {
  const float g = grad * step.clip;
  m = p.beta1 * m + p.new1 * g;
  v = p.beta2 * v + p.new2 * g * g;
  const float toward = div_rn(step.size * m, sqrt_rn(v) * step.root_correction + p.eps);
  // Not as a factor 1 - lr wd on the parameter: f32 rounds that by as much as a small rate decays in a step.
  param = param - (toward + step.decay * param);
}

DEV void update(const AdamWUpdate& p) {
  const int64_t first = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
  const bool is_whole = first + 4 <= p.elems;
  Vec<float, 4> param = {}, m = {}, v = {}, grad = {};
  if (is_whole) {
    param = load_vec<4>(p.param, first);
    m = load_vec<4>(p.exp_avg, first);
    v = load_vec<4>(p.exp_avg_sq, first);
    grad = load_vec<4>(p.grad, first);
  }
  if (load(p.coefficients, 0) == 0.f) return;
  const Step step{load(p.coefficients, 1), load(p.coefficients, 2), load(p.coefficients, 3),
                  load(p.coefficients, 4) * p.weight_decay};
  if (is_whole) {
#pragma unroll
    for (int i = 0; i < 4; i++) update_one(p, step, param[i], m[i], v[i], grad[i]);
    store_vec<4>(p.param, first, param);
    store_vec<4>(p.exp_avg, first, m);
    store_vec<4>(p.exp_avg_sq, first, v);
    if (p.copy) {
      const Vec<uint32_t, 2> copy{{pack_bf16(param[0], param[1]), pack_bf16(param[2], param[3])}};
      store_vec<2>(p.copy.as<uint32_t>(), first / 2, copy);
    }
    return;
  }
  for (int64_t i = first; i < p.elems; i++) {
    float one = load(p.param, i), one_m = load(p.exp_avg, i), one_v = load(p.exp_avg_sq, i);
    update_one(p, step, one, one_m, one_v, load(p.grad, i));
    store(p.param, i, one);
    store(p.exp_avg, i, one_m);
    store(p.exp_avg_sq, i, one_v);
    if (p.copy) store(p.copy, i, from_f32<bf16>(one));
  }
}

}  // namespace adamw

KERNEL(adamw_prepare, AdamWPrepare, 1, 1) { adamw::prepare(p); }
HOT_KERNEL(adamw_update, AdamWUpdate, 256, 6) { adamw::update(p); }
