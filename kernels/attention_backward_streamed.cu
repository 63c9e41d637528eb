// attention_backward_streamed.cu - gradient of attention for any T, in two passes (see attention_backward.cu for the
// formulas). `query`: a block owns queries, walks through keys and values, and makes dQ and, first of all, delta.
// `key`, launched after it: a block owns keys, walks through queries and makes dK and dV. The scores are formed in
// both, seven products instead of five: the price of sums in a fixed order without atomics.
#include "attention/backward.cuh"

namespace attention {

constexpr int STEP = 64;  // tokens that arrive together, while those before are worked on
constexpr int WARPS = 4, THREADS = WARPS * 32;

// HD is head_dim, rounded up to 16; a warp owns MT tiles of 16 queries.
template <int HD, int MT> DEV void backward_query(const BackwardParams<bf16>& p) {
  constexpr int QUERIES = WARPS * MT * 16;
  const Tile<HD> q{dynamic_shared()}, g{q.base + Tile<HD>::bytes(QUERIES)};
  const uint32_t stages = g.base + Tile<HD>::bytes(QUERIES), sums = stages + Tile<HD>::bytes(4 * STEP);
  const int blocks = ceil_div(p.tokens, QUERIES), steps = ceil_div(p.tokens, STEP);
  const int first = blockIdx.x % blocks * QUERIES, hd = p.head_dim, stride = 3 * p.heads * hd;
  const Head head(p, blockIdx.x / blocks);
  const auto key_tile = [&](int step) { return Tile<HD>{stages + Tile<HD>::bytes(step % 2 * 2 * STEP)}; };
  const auto value_tile = [&](int step) { return Tile<HD>{key_tile(step).base + Tile<HD>::bytes(STEP)}; };
  const auto load_step = [&](int step) {
    const int at = step * STEP;
    load_rows<THREADS, STEP>(key_tile(step), head.part(p.qkv, 1) + at * stride, stride, p.tokens - at, hd);
    load_rows<THREADS, STEP>(value_tile(step), head.part(p.qkv, 2) + at * stride, stride, p.tokens - at, hd);
    cp_async_commit();
  };
  load_rows<THREADS, QUERIES>(q, head.part(p.qkv, 0) + first * stride, stride, p.tokens - first, hd);
  cp_async_commit();
  load_step(0);
  load_grad_out<THREADS, QUERIES>(g, sums, p, head, first);
  cp_async_wait<1>();
  __syncthreads();
  const int l = lane_id(), row = warp_id() * MT * 16;
  uint32_t qf[MT][HD / 16][4], gf[MT][HD / 16][4];
  float dq[MT][HD / 8][4] = {}, lse[MT][2], delta[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++) {
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      q.a(qf[i][c], row + i * 16, c * 2);
      g.a(gf[i][c], row + i * 16, c * 2);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = row + i * 16 + h * 8 + (l >> 2), token = first + r;
      delta[i][h] = lds<float>(sums + r * 4);
      lse[i][h] = token < p.tokens ? load(head.statistic(p.lse), token) * LOG2E : UNREACHED;
      if ((l & 3) == 0 && token < p.tokens) store(head.statistic(p.delta), token, delta[i][h]);
    }
  }
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      load_step(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const Tile<HD> k = key_tile(step), v = value_tile(step);
    const int live = p.tokens - step * STEP;
#pragma unroll 1
    for (int n = 0; n < STEP; n += 16) {
      float s[MT][2][4] = {}, dp[MT][2][4] = {};
#pragma unroll
      for (int c = 0; c < HD / 16; c++) {
        uint32_t f[4];
        k.b_t(f, n, c * 2);
#pragma unroll
        for (int i = 0; i < MT; i++) mma_bf16_x2(s[i][0], s[i][1], qf[i][c], f);
        v.b_t(f, n, c * 2);
#pragma unroll
        for (int i = 0; i < MT; i++) mma_bf16_x2(dp[i][0], dp[i][1], gf[i][c], f);
      }
      uint32_t dsf[MT][4];
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float ds[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const bool inside = n + j * 8 + (l & 3) * 2 + e % 2 < live;
            const float weight = ex2(inside ? fma3(s[i][j][e], p.scale_log2, -lse[i][e / 2]) : MASKED);
            ds[e] = weight * (dp[i][j][e] - delta[i][e / 2]);
          }
          dsf[i][2 * j] = pack_bf16(ds[0], ds[1]);
          dsf[i][2 * j + 1] = pack_bf16(ds[2], ds[3]);
        }
#pragma unroll
      for (int c = 0; c < HD / 16; c++) {
        uint32_t f[4];
        k.b(f, n, c * 2);
#pragma unroll
        for (int i = 0; i < MT; i++) mma_bf16_x2(dq[i][2 * c], dq[i][2 * c + 1], dsf[i], f);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < MT; i++)
    store_part(head, 0, p.grad_qkv, first + row + i * 16, q, row + i * 16, dq[i], p.scale_log2 * LN2);
}

// A warp owns KT tiles of 16 keys.
template <int HD, int KT> DEV void backward_key(const BackwardParams<bf16>& p) {
  constexpr int KEYS = WARPS * KT * 16;
  const Tile<HD> k{dynamic_shared()}, v{k.base + Tile<HD>::bytes(KEYS)};
  const uint32_t stages = v.base + Tile<HD>::bytes(KEYS), sums = stages + Tile<HD>::bytes(4 * STEP);
  const int blocks = ceil_div(p.tokens, KEYS), steps = ceil_div(p.tokens, STEP);
  const int first = blockIdx.x % blocks * KEYS, hd = p.head_dim, stride = 3 * p.heads * hd;
  const Head head(p, blockIdx.x / blocks);
  const auto query_tile = [&](int step) { return Tile<HD>{stages + Tile<HD>::bytes(step % 2 * 2 * STEP)}; };
  const auto grad_tile = [&](int step) { return Tile<HD>{query_tile(step).base + Tile<HD>::bytes(STEP)}; };
  const auto row_sums = [&](int step) { return sums + step % 2 * 2 * STEP * 4; };  // lse, then delta
  const auto load_step = [&](int step) {
    const int at = step * STEP, out_stride = head.out_stride();
    load_rows<THREADS, STEP>(query_tile(step), head.part(p.qkv, 0) + at * stride, stride, p.tokens - at, hd);
    load_rows<THREADS, STEP>(grad_tile(step), head.rows(p.grad_out) + at * out_stride, out_stride, p.tokens - at, hd);
    cp_async_commit();
  };
  // A thread brings one statistic of a step: lse in base 2, or delta.
  static_assert(THREADS == 2 * STEP, "one number to a thread");
  const auto load_sum = [&](int step) {
    const int i = threadIdx.x % STEP, token = step * STEP + i;
    const bool is_lse = (int)threadIdx.x < STEP;
    if (token >= p.tokens) return is_lse ? UNREACHED : 0.f;
    return is_lse ? load(head.statistic(p.lse), token) * LOG2E : load(head.statistic(p.delta), token);
  };
  load_rows<THREADS, KEYS>(k, head.part(p.qkv, 1) + first * stride, stride, p.tokens - first, hd);
  load_rows<THREADS, KEYS>(v, head.part(p.qkv, 2) + first * stride, stride, p.tokens - first, hd);
  cp_async_commit();
  load_step(0);
  float sum = load_sum(0);
  cp_async_wait<1>();
  __syncthreads();
  Keys<HD, KT, (HD < 112)> keys(k, v, warp_id() * KT * 16);
  for (int step = 0; step < steps; step++) {
    sts(row_sums(step) + threadIdx.x * 4, sum);
    if (step + 1 < steps) {
      load_step(step + 1);
      sum = load_sum(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const Tile<HD> q = query_tile(step), g = grad_tile(step);
#pragma unroll 1
    for (int n = 0; n < STEP; n += 16) {
      uint32_t dst[KT][4];
      const uint32_t at = row_sums(step) + n * 4;
      keys.meet(q, g, n, at, at + STEP * 4, p.scale_log2, dst);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < KT; i++) {
    const int row = keys.first + i * 16;
    store_part(head, 2, p.grad_qkv, first + row, v, row, keys.dv[i], 1.f);
    store_part(head, 1, p.grad_qkv, first + row, v, row, keys.dk[i], p.scale_log2 * LN2);
  }
}

}  // namespace attention

using attention::backward_key, attention::backward_query;
using AttentionBackward = attention::BackwardParams<bf16>;

KERNEL(attention_backward_query_16_bf16, AttentionBackward, 128, 2) { backward_query<16, 2>(p); }
HOT_KERNEL(attention_backward_query_32_bf16, AttentionBackward, 128, 2) { backward_query<32, 2>(p); }
KERNEL(attention_backward_query_48_bf16, AttentionBackward, 128, 2) { backward_query<48, 2>(p); }
HOT_KERNEL(attention_backward_query_64_bf16, AttentionBackward, 128, 2) { backward_query<64, 2>(p); }
KERNEL(attention_backward_query_80_bf16, AttentionBackward, 128, 2) { backward_query<80, 1>(p); }
KERNEL(attention_backward_query_96_bf16, AttentionBackward, 128, 2) { backward_query<96, 1>(p); }
KERNEL(attention_backward_query_112_bf16, AttentionBackward, 128, 2) { backward_query<112, 1>(p); }
KERNEL(attention_backward_query_128_bf16, AttentionBackward, 128, 2) { backward_query<128, 1>(p); }

KERNEL(attention_backward_key_16_bf16, AttentionBackward, 128, 2) { backward_key<16, 2>(p); }
HOT_KERNEL(attention_backward_key_32_bf16, AttentionBackward, 128, 2) { backward_key<32, 2>(p); }
KERNEL(attention_backward_key_48_bf16, AttentionBackward, 128, 2) { backward_key<48, 1>(p); }
HOT_KERNEL(attention_backward_key_64_bf16, AttentionBackward, 128, 2) { backward_key<64, 1>(p); }
KERNEL(attention_backward_key_80_bf16, AttentionBackward, 128, 2) { backward_key<80, 1>(p); }
KERNEL(attention_backward_key_96_bf16, AttentionBackward, 128, 2) { backward_key<96, 1>(p); }
KERNEL(attention_backward_key_112_bf16, AttentionBackward, 128, 2) { backward_key<112, 1>(p); }
KERNEL(attention_backward_key_128_bf16, AttentionBackward, 128, 2) { backward_key<128, 1>(p); }
