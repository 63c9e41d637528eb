// attention_f32.cu - attention and its gradient in f32 throughout, to hold the bf16 kernels and other devices against.
//
// Plain rather than fast: a warp owns a row. Its lanes share the other side's rows for the products, put the results
// into shared memory, and then share the columns for the weighted sums. Keys, values and their like come from the
// caches.
#include "attention/common.cuh"

namespace attention {

constexpr int WARPS = 4;

// A row of a part of one head.
struct Rows {
  Global<const float> base;
  int stride, head_dim;
  DEV Global<const float> operator[](int row) const { return base + row * stride; }
};

DEV float dot(Global<const float> a, Global<const float> b, int head_dim) {
  float sum = 0.f;
  for (int d = 0; d < head_dim; d += 4) {
    const Vec<float, 4> x = load_vec<4>(a, d), y = load_vec<4>(b, d);
#pragma unroll
    for (int e = 0; e < 4; e++) sum = fma3(x[e], y[e], sum);
  }
  return sum;
}

// to = scale * sum of weights[i] rows[i], the weights in shared memory. Each lane makes some of the columns.
DEV void mix(Global<float> to, uint32_t weights, const Rows& rows, int count, float scale) {
  for (int d = lane_id(); d < rows.head_dim; d += 32) {
    float sum = 0.f;
    for (int i = 0; i < count; i++) sum = fma3(lds<float>(weights + i * 4), load(rows[i], d), sum);
    store(to, d, sum * scale);
  }
}

// What a warp of either pass works on: its row, its head, its `numbers` per token in shared memory.
struct Work {
  int row;
  Head head;
  uint32_t shared;
  template <class P> DEV Work(const P& p, int numbers)
      : row(blockIdx.x % ceil_div(p.tokens, WARPS) * WARPS + warp_id()),
        head(p, blockIdx.x / ceil_div(p.tokens, WARPS)),
        shared(dynamic_shared() + warp_id() * numbers * p.tokens * 4) {}
  DEV Rows part(Global<const float> qkv, int part) const {
    return {head.part(qkv, part), head.qkv_stride(), head.head_dim};
  }
  DEV Rows rows(Global<const float> out) const { return {head.rows(out), head.out_stride(), head.head_dim}; }
  DEV Global<float> grad(Global<float> grad_qkv, int part) const {
    return head.part(grad_qkv, part) + row * head.qkv_stride();
  }
};

DEV void forward_f32(const ForwardParams<float>& p) {
  const Work w(p, 1);
  if (w.row >= p.tokens) return;
  const Rows q = w.part(p.qkv, 0), k = w.part(p.qkv, 1), v = w.part(p.qkv, 2);
  float top = MASKED, sum = 0.f;
  for (int j = lane_id(); j < p.tokens; j += 32) {
    const float s = dot(q[w.row], k[j], p.head_dim);
    sts(w.shared + j * 4, s);
    top = max2(top, s);
  }
  // One fma, as in the gradient: weights that differ would not cancel in its sums.
  top = warp_max(top) * p.scale_log2;
  for (int j = lane_id(); j < p.tokens; j += 32) {
    const float weight = ex2(fma3(lds<float>(w.shared + j * 4), p.scale_log2, -top));
    sts(w.shared + j * 4, weight);
    sum += weight;
  }
  sum = warp_sum(sum);
  __syncwarp();
  mix(w.head.rows(p.out) + w.row * w.head.out_stride(), w.shared, v, p.tokens, div_rn(1.f, sum));
  if (lane_id() == 0) store(w.head.statistic(p.lse), w.row, (top + lg2(sum)) * LN2);
}

// dQ of a query, and its delta for the other pass.
DEV void backward_query_f32(const BackwardParams<float>& p) {
  const Work w(p, 1);
  if (w.row >= p.tokens) return;
  const Rows q = w.part(p.qkv, 0), k = w.part(p.qkv, 1), v = w.part(p.qkv, 2);
  const Rows g = w.rows(p.grad_out), o = w.rows(p.out);
  float delta = 0.f;
  for (int d = lane_id(); d < p.head_dim; d += 32) delta = fma3(load(g[w.row], d), load(o[w.row], d), delta);
  delta = warp_sum(delta);
  const float lse = load(w.head.statistic(p.lse), w.row) * LOG2E;
  for (int j = lane_id(); j < p.tokens; j += 32) {
    const float weight = ex2(fma3(dot(q[w.row], k[j], p.head_dim), p.scale_log2, -lse));
    sts(w.shared + j * 4, weight * (dot(g[w.row], v[j], p.head_dim) - delta));
  }
  __syncwarp();
  mix(w.grad(p.grad_qkv, 0), w.shared, k, p.tokens, p.scale_log2 * LN2);
  if (lane_id() == 0) store(w.head.statistic(p.delta), w.row, delta);
}

// dK and dV of a key.
DEV void backward_key_f32(const BackwardParams<float>& p) {
  const Work w(p, 2);
  if (w.row >= p.tokens) return;
  const Rows q = w.part(p.qkv, 0), k = w.part(p.qkv, 1), v = w.part(p.qkv, 2), g = w.rows(p.grad_out);
  const uint32_t weights = w.shared, grads = weights + p.tokens * 4;
  for (int i = lane_id(); i < p.tokens; i += 32) {
    const float lse = load(w.head.statistic(p.lse), i) * LOG2E, delta = load(w.head.statistic(p.delta), i);
    const float weight = ex2(fma3(dot(q[i], k[w.row], p.head_dim), p.scale_log2, -lse));
    sts(weights + i * 4, weight);
    sts(grads + i * 4, weight * (dot(g[i], v[w.row], p.head_dim) - delta));
  }
  __syncwarp();
  mix(w.grad(p.grad_qkv, 2), weights, g, p.tokens, 1.f);
  mix(w.grad(p.grad_qkv, 1), grads, q, p.tokens, p.scale_log2 * LN2);
}

}  // namespace attention

using AttentionForwardF32 = attention::ForwardParams<float>;
using AttentionBackwardF32 = attention::BackwardParams<float>;

KERNEL(attention_forward_f32, AttentionForwardF32, 128, 1) { attention::forward_f32(p); }
KERNEL(attention_backward_query_f32, AttentionBackwardF32, 128, 1) { attention::backward_query_f32(p); }
KERNEL(attention_backward_key_f32, AttentionBackwardF32, 128, 1) { attention::backward_key_f32(p); }
