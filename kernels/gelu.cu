// gelu.cu - GELU in its exact form, x cdf(x), and its gradient.
//
// Elementwise: forward moves 2 numbers an element, backward 3. A thread takes 2 x 16 bytes of each input before it
// computes: with four blocks of 256 on an SM 32 KB are on their way, enough to hide the memory's latency. Some 20
// instructions an element (32 would be as long as its bytes take on an H200), 2 of them in the special function unit.
#include "common/packed.cuh"

template <class T> struct GeluForward {
  Global<T> out;
  Global<const T> inp;
  int64_t count;
};
static_assert(sizeof(GeluForward<bf16>) == 24 && offsetof(GeluForward<bf16>, count) == 16, "as in src/ops/gelu.rs");

template <class T> struct GeluBackward {
  Global<T> grad_inp;
  Global<const T> grad_out, inp;
  int64_t count;
};
static_assert(sizeof(GeluBackward<bf16>) == 32 && offsetof(GeluBackward<bf16>, count) == 24, "as in src/ops/gelu.rs");

namespace gelu {

constexpr int THREADS = 256;
constexpr int VECTORS = 2;  // of 16 bytes, for each thread

// The normal distribution's cumulative function and density, as the CPU computes them (src/cpu/real.rs):
// cdf(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.28 |x|), P a minimax polynomial, exact to 2e-10 before rounding.
struct Normal { float cdf, pdf; };

DEV Normal normal(float x) {
  constexpr float MINUS_HALF_LOG2E = -0.72134752f, INV_SQRT_TAU = 0.39894228f;
  const float t = rcp(fma3(bits_float(float_bits(x) & 0x7fffffffu), 0.28f, 1.f));
  float p = 4.003399e-2f;
  p = fma3(p, t, -0.21751971f);
  p = fma3(p, t, 0.3958476f);
  p = fma3(p, t, -0.24616513f);
  p = fma3(p, t, 0.24132436f);
  p = fma3(p, t, 5.581525e-2f);
  p = fma3(p, t, 0.11949325f);
  p = fma3(p, t, 0.1111704f);
  const float bell = ex2(x * MINUS_HALF_LOG2E * x);
  const float tail = bell * t * p;
  return {x < 0.f ? tail : 1.f - tail, INV_SQRT_TAU * bell};
}

struct Value {
  DEV float operator()(const float (&x)[1]) const { return x[0] * normal(x[0]).cdf; }
};
struct GradInp {  // of grad_out and inp
  DEV float operator()(const float (&x)[2]) const {
    const Normal n = normal(x[1]);
    return x[0] * fma3(x[1], n.pdf, n.cdf);
  }
};

// out = f(inputs), element by element. `out` may be one of the inputs: a thread reads what it writes, and first.
template <class T, int INPUTS, class F>
DEV void apply(Global<T> out, const Global<const T> (&inputs)[INPUTS], int64_t count, F f) {
  constexpr int N = Packed<T>::N;
  const int64_t first = ((int64_t)blockIdx.x * VECTORS * THREADS + threadIdx.x) * N;
  Packed<T> x[VECTORS][INPUTS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int64_t at = first + v * THREADS * N;
    if (at + N > count) continue;
    for (int k = 0; k < INPUTS; k++) x[v][k] = load_packed(inputs[k], at);
  }
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int64_t at = first + v * THREADS * N;
    if (at + N <= count) {
      float y[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        float element[INPUTS];
        for (int k = 0; k < INPUTS; k++) element[k] = x[v][k][i];
        y[i] = f(element);
      }
      store_packed(out, at, y);
    } else {
      for (int64_t i = at; i < count; i++) {
        float element[INPUTS];
        for (int k = 0; k < INPUTS; k++) element[k] = to_f32(load(inputs[k], i));
        store(out, i, from_f32<T>(f(element)));
      }
    }
  }
}

template <class T> DEV void forward(const GeluForward<T>& p) {
  const Global<const T> inputs[1] = {p.inp};
  apply(p.out, inputs, p.count, Value());
}
template <class T> DEV void backward(const GeluBackward<T>& p) {
  const Global<const T> inputs[2] = {p.grad_out, p.inp};
  apply(p.grad_inp, inputs, p.count, GradInp());
}

}  // namespace gelu

HOT_KERNEL(gelu_forward_bf16, GeluForward<bf16>, 256, 4) { gelu::forward(p); }
HOT_KERNEL(gelu_forward_f32, GeluForward<float>, 256, 4) { gelu::forward(p); }
HOT_KERNEL(gelu_backward_bf16, GeluBackward<bf16>, 256, 4) { gelu::backward(p); }
HOT_KERNEL(gelu_backward_f32, GeluBackward<float>, 256, 4) { gelu::backward(p); }
