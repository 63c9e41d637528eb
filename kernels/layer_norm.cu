// layer_norm.cu - layer normalization of rows, and its gradients.
//
// Forward moves 4 bytes an element in bf16, backward 8 (grad_out, inp, and grad_inp read and written). A row belongs to
// one warp, to several where it is wide, and is cut lane by lane into 16 bytes each, so that accesses are whole lines; a
// row narrower than the template's WIDTH leaves the last lanes idle. Forward reads a row once into registers: the
// variance is the mean square of what is left when the mean is taken off. In flight on an SM: 32 warps' rows, 49 KB at
// D = 768.
//
// Backward gives each warp many rows, so that the gradients of weight and bias stay in registers, two f32 a column, until
// the block's warps add theirs up in shared memory and write one row of `partials`; linear_add_partials adds those. So
// many registers leave room for few warps: while a row is computed the next one is on its way to shared memory (12 warps'
// rows, 55 KB at D = 768). The grid is a function of the shape, not of the GPU: the order of every sum, and so every bit,
// is the same everywhere.
#include "common/packed.cuh"

template <class T> struct LayerNormForward {
  Global<T> out;
  Global<float> mean, rstd;
  Global<const T> inp, weight, bias;
  int64_t rows;
  int32_t dim;
  float eps;
};
static_assert(sizeof(LayerNormForward<bf16>) == 64 && offsetof(LayerNormForward<bf16>, eps) == 60,
              "as in src/ops/layer_norm.rs");

template <class T> struct LayerNormBackward {
  Global<T> grad_inp;
  Global<float> partials;  // (blocks, 2, dim): of grad_weight, of grad_bias
  Global<const T> grad_out, inp, weight;
  Global<const float> mean, rstd;
  int64_t rows, dim;
};
static_assert(sizeof(LayerNormBackward<bf16>) == 72 && offsetof(LayerNormBackward<bf16>, dim) == 64,
              "as in src/ops/layer_norm.rs");

namespace layer_norm {

// How rows of up to WIDTH lie in a block: each in WARPS neighbouring warps, a thread holding CHUNKS times 16 bytes.
template <class T, int WIDTH, int WARPS, int THREADS> struct Layout {
  static constexpr int N = Packed<T>::N, SPAN = 32 * WARPS, CHUNKS = WIDTH / (SPAN * N), ROWS = THREADS / SPAN;
  static_assert(CHUNKS * SPAN * N == WIDTH && ROWS * SPAN == THREADS, "rows fill the block");

  static constexpr int STEP = SPAN * N;  // columns from a thread's 16 bytes to its next

  DEV static int row() { return threadIdx.x / SPAN; }
  DEV static int column() { return threadIdx.x % SPAN * N; }  // of the first 16 bytes

  // Sums over a row of what its threads hold. Where a row has several warps they meet in `slots` (K floats for each
  // warp of the block) at a barrier of the whole block.
  template <int K> DEV static void sum(float (&x)[K], uint32_t slots) {
    for (int k = 0; k < K; k++) x[k] = warp_sum(x[k]);
    if constexpr (WARPS > 1) {
      const int warp = threadIdx.x / 32, first = warp / WARPS * WARPS;
      if (threadIdx.x % 32 == 0) {
        for (int k = 0; k < K; k++) sts(slots + (warp * K + k) * 4, x[k]);
      }
      __syncthreads();
      for (int k = 0; k < K; k++) {
        x[k] = 0.f;
        for (int w = 0; w < WARPS; w++) x[k] += lds<float>(slots + ((first + w) * K + k) * 4);
      }
    }
  }
};

template <int WIDTH, int WARPS, int THREADS, class T> DEV void forward(const LayerNormForward<T>& p) {
  using L = Layout<T, WIDTH, WARPS, THREADS>;
  STATIC_SHARED(slots, 2 * THREADS / 32 * 4);
  const int64_t row = (int64_t)blockIdx.x * L::ROWS + L::row(), start = row * p.dim + L::column();
  const bool is_row = row < p.rows;
  const int columns = p.dim - L::column();  // from this thread's first on
  const float per_dim = div_rn(1.f, (float)p.dim);

  Packed<T> x[L::CHUNKS];
  float mean[1] = {0.f}, var[1] = {0.f};
  for (int c = 0; c < L::CHUNKS; c++) {
    x[c] = is_row && c * L::STEP < columns ? load_packed(p.inp + start, c * L::STEP) : Packed<T>{};
  }
  for (int c = 0; c < L::CHUNKS; c++) {
    for (int i = 0; i < L::N; i++) mean[0] += x[c][i];
  }
  L::sum(mean, slots);
  mean[0] *= per_dim;
  for (int c = 0; c < L::CHUNKS; c++) {
    if (c * L::STEP >= columns) continue;
    for (int i = 0; i < L::N; i++) {
      const float d = x[c][i] - mean[0];
      var[0] = fma3(d, d, var[0]);
    }
  }
  L::sum(var, slots + THREADS / 32 * 4);
  const float rstd = div_rn(1.f, sqrt_rn(fma3(var[0], per_dim, p.eps)));
  if (!is_row) return;

  for (int c = 0; c < L::CHUNKS; c++) {
    if (c * L::STEP >= columns) continue;
    const Packed<T> weight = load_packed(p.weight + L::column(), c * L::STEP);
    const Packed<T> bias = load_packed(p.bias + L::column(), c * L::STEP);
    float y[L::N];
    for (int i = 0; i < L::N; i++) y[i] = fma3((x[c][i] - mean[0]) * rstd, weight[i], bias[i]);
    store_packed(p.out + start, c * L::STEP, y);
  }
  if (threadIdx.x % L::SPAN == 0) {
    store(p.mean, row, mean[0]);
    store(p.rstd, row, rstd);
  }
}

// The rows a thread is about to need, and its part of the weight, in shared memory: what it copies, 16 bytes at a time,
// only itself reads, so its own wait is all the order there is. Zeros stand in for columns and rows beyond the ends.
template <class L, class T> struct Queue {
  static constexpr int THREADS = L::ROWS * L::SPAN;
  enum { INP, GRAD_OUT, GRAD_INP, TENSORS };
  static constexpr int STAGE_BYTES = TENSORS * L::CHUNKS * THREADS * 16;
  static constexpr int STAGES = 2 * STAGE_BYTES <= 160 * 1024 ? 2 : 1;

  DEV static uint32_t address(int stage, int tensor, int chunk) {
    return dynamic_shared() + (((stage * TENSORS + tensor) * L::CHUNKS + chunk) * THREADS + threadIdx.x) * 16;
  }
  DEV static void fetch(const LayerNormBackward<T>& p, int stage, int64_t row, int columns) {
    const int64_t start = row * p.dim + L::column();
    for (int c = 0; c < L::CHUNKS; c++) {
      const int bytes = row < p.rows && c * L::STEP < columns ? 16 : 0;
      cp_async16(address(stage, INP, c), p.inp + start + c * L::STEP, bytes);
      cp_async16(address(stage, GRAD_OUT, c), p.grad_out + start + c * L::STEP, bytes);
      cp_async16(address(stage, GRAD_INP, c), p.grad_inp + start + c * L::STEP, bytes);
    }
    cp_async_commit();
  }
  // Arrives with what is fetched next.
  DEV static void fetch_weight(const LayerNormBackward<T>& p, int columns) {
    for (int c = 0; c < L::CHUNKS; c++) {
      const int bytes = c * L::STEP < columns ? 16 : 0;
      cp_async16(address(STAGES, 0, c), p.weight + L::column() + c * L::STEP, bytes);
    }
  }
  DEV static Packed<T> get(int stage, int tensor, int chunk) {
    return {lds<Vec<uint32_t, 4>>(address(stage, tensor, chunk))};
  }
  DEV static Packed<T> weight(int chunk) { return get(STAGES, 0, chunk); }
};

// With n = (inp - mean) rstd and g = grad_out weight:
// grad_inp += rstd (g - mean(g) - n mean(g n)), grad_weight += sum grad_out n, grad_bias += sum grad_out.
template <int WIDTH, int WARPS, int THREADS, class T> DEV void backward(const LayerNormBackward<T>& p) {
  using L = Layout<T, WIDTH, WARPS, THREADS>;
  using Q = Queue<L, T>;
  STATIC_SHARED(slots, 2 * 2 * THREADS / 32 * 4);
  const int columns = (int)p.dim - L::column();  // from this thread's first on
  const float per_dim = div_rn(1.f, (float)p.dim);

  float grads[2][L::CHUNKS][L::N] = {};  // of weight and bias

  const int64_t step = (int64_t)gridDim.x * L::ROWS;
  int64_t row = (int64_t)blockIdx.x * L::ROWS + L::row();
  float next_mean = row < p.rows ? load(p.mean, row) : 0.f, next_rstd = row < p.rows ? load(p.rstd, row) : 0.f;
  Q::fetch_weight(p, columns);
  Q::fetch(p, 0, row, columns);
  // All rows of a block take part in its barriers: it ends with its first row.
  for (int turn = 0; row - L::row() < p.rows; turn++, row += step) {
    const int64_t next = row + step;
    const float mean = next_mean, rstd = next_rstd;
    if (next < p.rows) {
      next_mean = load(p.mean, next);
      next_rstd = load(p.rstd, next);
    } else {
      next_mean = next_rstd = 0.f;
    }
    if constexpr (Q::STAGES == 2) Q::fetch(p, (turn + 1) % 2, next, columns);
    cp_async_wait<Q::STAGES - 1>();
    const int stage = turn % Q::STAGES;

    float means[2] = {0.f, 0.f};  // of g, of g n
    for (int c = 0; c < L::CHUNKS; c++) {
      const Packed<T> x = Q::get(stage, Q::INP, c), g = Q::get(stage, Q::GRAD_OUT, c), weight = Q::weight(c);
      for (int i = 0; i < L::N; i++) {
        const float n = (x[i] - mean) * rstd, gw = g[i] * weight[i];
        means[0] += gw;
        means[1] = fma3(gw, n, means[1]);
        grads[0][c][i] = fma3(g[i], n, grads[0][c][i]);
        grads[1][c][i] += g[i];
      }
    }
    // Rows in turn use one half of the slots or the other: with one barrier a row, a warp may be a row ahead.
    L::sum(means, slots + turn % 2 * (2 * THREADS / 32 * 4));
    means[0] *= per_dim;
    means[1] *= per_dim;
    for (int c = 0; c < L::CHUNKS; c++) {
      if (row >= p.rows || c * L::STEP >= columns) continue;
      const Packed<T> x = Q::get(stage, Q::INP, c), g = Q::get(stage, Q::GRAD_OUT, c), weight = Q::weight(c);
      const Packed<T> before = Q::get(stage, Q::GRAD_INP, c);
      float y[L::N];
      for (int i = 0; i < L::N; i++) {
        const float n = (x[i] - mean) * rstd, gw = g[i] * weight[i];
        y[i] = fma3(rstd, gw - means[0] - n * means[1], before[i]);
      }
      store_packed(p.grad_inp + row * p.dim + L::column(), c * L::STEP, y);
    }
    if constexpr (Q::STAGES == 1) Q::fetch(p, 0, next, columns);
  }
  cp_async_wait<0>();

  // The rows of a block one after another: each adds its sums to those before, the last writes them out. They meet
  // where the queue was.
  for (int turn = 0; turn < L::ROWS; turn++) {
    if (L::ROWS > 1) __syncthreads();
    if (turn != L::row()) continue;
    for (int k = 0; k < 2; k++) {
      for (int c = 0; c < L::CHUNKS; c++) {
        for (int i = 0; i < L::N; i += 4) {
          Vec<float, 4> sum = {grads[k][c][i], grads[k][c][i + 1], grads[k][c][i + 2], grads[k][c][i + 3]};
          const int vector = (k * L::CHUNKS + c) * (L::N / 4) + i / 4;
          const uint32_t at = dynamic_shared() + (vector * L::SPAN + threadIdx.x % L::SPAN) * 16;
          if (turn > 0) {
            const Vec<float, 4> others = lds<Vec<float, 4>>(at);
            for (int j = 0; j < 4; j++) sum[j] += others[j];
          }
          if (turn < L::ROWS - 1) {
            sts(at, sum);
          } else if (c * L::STEP < columns) {
            store_vec(p.partials, ((int64_t)blockIdx.x * 2 + k) * p.dim + L::column() + c * L::STEP + i, sum);
          }
        }
      }
    }
  }
}

}  // namespace layer_norm

HOT_KERNEL(layer_norm_forward_bf16_256, LayerNormForward<bf16>, 256, 4) { layer_norm::forward<256, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_bf16_512, LayerNormForward<bf16>, 256, 4) { layer_norm::forward<512, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_bf16_768, LayerNormForward<bf16>, 256, 4) { layer_norm::forward<768, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_bf16_1024, LayerNormForward<bf16>, 256, 4) { layer_norm::forward<1024, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_bf16_1280, LayerNormForward<bf16>, 256, 3) { layer_norm::forward<1280, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_bf16_2048, LayerNormForward<bf16>, 256, 4) { layer_norm::forward<2048, 2, 256>(p); }
HOT_KERNEL(layer_norm_forward_bf16_8192, LayerNormForward<bf16>, 512, 2) { layer_norm::forward<8192, 16, 512>(p); }
HOT_KERNEL(layer_norm_forward_f32_256, LayerNormForward<float>, 256, 4) { layer_norm::forward<256, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_f32_512, LayerNormForward<float>, 256, 4) { layer_norm::forward<512, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_f32_768, LayerNormForward<float>, 256, 4) { layer_norm::forward<768, 1, 256>(p); }
HOT_KERNEL(layer_norm_forward_f32_1024, LayerNormForward<float>, 256, 4) { layer_norm::forward<1024, 2, 256>(p); }
HOT_KERNEL(layer_norm_forward_f32_1280, LayerNormForward<float>, 256, 4) { layer_norm::forward<1280, 2, 256>(p); }
HOT_KERNEL(layer_norm_forward_f32_2048, LayerNormForward<float>, 256, 4) { layer_norm::forward<2048, 4, 256>(p); }
HOT_KERNEL(layer_norm_forward_f32_8192, LayerNormForward<float>, 512, 2) { layer_norm::forward<8192, 16, 512>(p); }

HOT_KERNEL(layer_norm_backward_bf16_256, LayerNormBackward<bf16>, 128, 5) { layer_norm::backward<256, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_bf16_512, LayerNormBackward<bf16>, 128, 4) { layer_norm::backward<512, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_bf16_768, LayerNormBackward<bf16>, 128, 3) { layer_norm::backward<768, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_bf16_1024, LayerNormBackward<bf16>, 128, 3) { layer_norm::backward<1024, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_bf16_1280, LayerNormBackward<bf16>, 128, 3) { layer_norm::backward<1280, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_bf16_2048, LayerNormBackward<bf16>, 128, 3) { layer_norm::backward<2048, 2, 128>(p); }
HOT_KERNEL(layer_norm_backward_bf16_8192, LayerNormBackward<bf16>, 512, 1) { layer_norm::backward<8192, 16, 512>(p); }
HOT_KERNEL(layer_norm_backward_f32_256, LayerNormBackward<float>, 128, 5) { layer_norm::backward<256, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_f32_512, LayerNormBackward<float>, 128, 4) { layer_norm::backward<512, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_f32_768, LayerNormBackward<float>, 128, 2) { layer_norm::backward<768, 1, 128>(p); }
HOT_KERNEL(layer_norm_backward_f32_1024, LayerNormBackward<float>, 128, 3) { layer_norm::backward<1024, 2, 128>(p); }
HOT_KERNEL(layer_norm_backward_f32_1280, LayerNormBackward<float>, 128, 3) { layer_norm::backward<1280, 2, 128>(p); }
HOT_KERNEL(layer_norm_backward_f32_2048, LayerNormBackward<float>, 128, 3) { layer_norm::backward<2048, 4, 128>(p); }
HOT_KERNEL(layer_norm_backward_f32_8192, LayerNormBackward<float>, 512, 1) { layer_norm::backward<8192, 16, 512>(p); }
