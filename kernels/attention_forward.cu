// attention_forward.cu - out = softmax(q k^T scale) v of each head, and the logarithm of each row's sum.
//
// Per image 8 T D bytes are read and written and 4 T^2 D flops computed. At T = 50 that is 25 flops a byte: memory is
// the bound, and all that counts is to read qkv once, as it lies, and to keep many heads in flight.
//
// whole: one block a head, of which all queries, keys and values lie in shared memory. A warp takes 16 queries; their
// scores against all keys stay in registers, so there is one maximum, one pass of exponentials, no rescaling, and the
// weights feed the second product as they are. T is a constant: padding is masked when the kernel is compiled.
//
// streamed: any T. A block takes 64 or 128 queries of a head and walks through the keys, 64 at a time, the next ones
// on their way meanwhile; maximum and sum of a row are carried along (Dao et al. 2022, arXiv:2205.14135).
#include "attention/common.cuh"

namespace attention {

// Turns scores of 16 queries by 8 keys into weights, half a left operand. m is the row maxima times scale_log2.
DEV void weigh(float (&s)[4], float scale_log2, const float (&m)[2], float (&sum)[2], uint32_t& upper,
               uint32_t& lower) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    s[e] = ex2(fma3(s[e], scale_log2, -m[e / 2]));
    sum[e / 2] += s[e];
  }
  upper = pack_bf16(s[0], s[1]);
  lower = pack_bf16(s[2], s[3]);
}

// A lane holds rows g and g + 8 of a tile of 16 queries; the first lane of a quad stores their statistic.
DEV void store_lse(Global<float> lse, int row, int rows, const float (&m)[2], const float (&sum)[2]) {
  const int g = lane_id() >> 2;
  if ((lane_id() & 3) != 0) return;
  if (row + g < rows) store(lse, row + g, (m[0] + lg2(sum[0])) * LN2);
  if (row + g + 8 < rows) store(lse, row + g + 8, (m[1] + lg2(sum[1])) * LN2);
}

template <int T, int HD, int WARPS> DEV void forward_whole(const ForwardParams<bf16>& p) {
  constexpr int ROWS = round_up(T, 16), TILES = ROWS / 16, LIVE = ceil_div(T, 8);
  const Tile<HD> q{dynamic_shared()}, k{q.base + Tile<HD>::bytes(ROWS)}, v{k.base + Tile<HD>::bytes(ROWS)};
  const Head head(p, blockIdx.x, T, HD);
  load_rows<WARPS * 32, ROWS>(q, head.part(p.qkv, 0), head.qkv_stride(), T, HD);
  load_rows<WARPS * 32, ROWS>(k, head.part(p.qkv, 1), head.qkv_stride(), T, HD);
  load_rows<WARPS * 32, ROWS>(v, head.part(p.qkv, 2), head.qkv_stride(), T, HD);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const int t = lane_id() & 3;
  // The warp that has one tile more than the others changes from block to block: all schedulers of the SM share it.
  for (int tile = (warp_id() + blockIdx.x) % WARPS; tile < TILES; tile += WARPS) {
    float s[LIVE][4] = {}, m[2] = {MASKED, MASKED};
    scores(s, q, tile * 16, k);
#pragma unroll
    for (int n = 0; n < LIVE; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (n * 8 + 8 > T && n * 8 + t * 2 + e % 2 >= T) s[n][e] = MASKED;
        m[e / 2] = max2(m[e / 2], s[n][e]);
      }
    float sum[2] = {0.f, 0.f}, o[HD / 8][4] = {};
    for (int r = 0; r < 2; r++) m[r] = quad_max(m[r]) * p.scale_log2;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      uint32_t w[4] = {};
      weigh(s[2 * n], p.scale_log2, m, sum, w[0], w[1]);
      if (2 * n + 1 < LIVE) weigh(s[2 * n + 1], p.scale_log2, m, sum, w[2], w[3]);
#pragma unroll
      for (int c = 0; c < HD / 16; c++) {
        uint32_t vf[4];
        v.b(vf, n * 16, c * 2);
        mma_bf16_x2(o[2 * c], o[2 * c + 1], w, vf);
      }
    }
    for (int r = 0; r < 2; r++) sum[r] = quad_sum(sum[r]);
    const Head again(p, anew(blockIdx.x), T, HD);  // not kept in registers all the way
    store_lse(again.statistic(p.lse), tile * 16, T, m, sum);
    // These queries were read by this warp alone: their place in shared memory is free.
    store_rows(q, tile * 16, o, 1.f / sum[0], 1.f / sum[1], again.rows(p.out) + tile * 16 * again.out_stride(),
               again.out_stride(), T - tile * 16, HD);
  }
}

constexpr int KEYS = 64;  // in flight and in work, each


// A warp holds MT tiles of 16 queries. HD is head_dim, rounded up to 16.
template <int HD, int MT> DEV void forward_streamed(const ForwardParams<bf16>& p) {
  constexpr int WARPS = 4, QUERIES = WARPS * MT * 16;
  const Tile<HD> q{dynamic_shared()};
  const int blocks = ceil_div(p.tokens, QUERIES), steps = ceil_div(p.tokens, KEYS);
  const int first = blockIdx.x % blocks * QUERIES, hd = p.head_dim;
  const Head head(p, blockIdx.x / blocks);
  const int stride = head.qkv_stride();
  const auto key_tile = [&](int step) { return Tile<HD>{q.base + Tile<HD>::bytes(QUERIES + step % 2 * 2 * KEYS)}; };
  const auto value_tile = [&](int step) { return Tile<HD>{key_tile(step).base + Tile<HD>::bytes(KEYS)}; };
  const auto load_step = [&](int step) {
    const int at = step * KEYS;
    load_rows<WARPS * 32, KEYS>(key_tile(step), head.part(p.qkv, 1) + at * stride, stride, p.tokens - at, hd);
    load_rows<WARPS * 32, KEYS>(value_tile(step), head.part(p.qkv, 2) + at * stride, stride, p.tokens - at, hd);
    cp_async_commit();
  };
  load_rows<WARPS * 32, QUERIES>(q, head.part(p.qkv, 0) + first * stride, stride, p.tokens - first, hd);
  load_step(0);
  const int t = lane_id() & 3, row = warp_id() * MT * 16;
  float o[MT][HD / 8][4] = {}, sum[MT][2] = {}, top[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++) top[i][0] = top[i][1] = MASKED;
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      load_step(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const Tile<HD> k = key_tile(step), v = value_tile(step);
    float s[MT][KEYS / 16][2][4] = {};
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t qf[MT][4];
#pragma unroll
      for (int i = 0; i < MT; i++) q.a(qf[i], row + i * 16, c * 2);
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        uint32_t kf[4];
        k.b_t(kf, n * 16, c * 2);
#pragma unroll
        for (int i = 0; i < MT; i++) mma_bf16_x2(s[i][n][0], s[i][n][1], qf[i], kf);
      }
    }
    const int live = p.tokens - step * KEYS;
    if (live < KEYS) {
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
          for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              if (n * 16 + j * 8 + t * 2 + e % 2 >= live) s[i][n][j][e] = MASKED;
    }
    uint32_t w[MT][KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < MT; i++) {
      float m[2] = {top[i][0], top[i][1]};
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) m[e / 2] = max2(m[e / 2], s[i][n][j][e]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        m[r] = quad_max(m[r]);
        const float shrink = ex2((top[i][r] - m[r]) * p.scale_log2);
        top[i][r] = m[r];
        m[r] *= p.scale_log2;
        sum[i][r] *= shrink;
#pragma unroll
        for (int c = 0; c < HD / 8; c++) {
          o[i][c][2 * r] *= shrink;
          o[i][c][2 * r + 1] *= shrink;
        }
      }
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
        weigh(s[i][n / 2][n % 2], p.scale_log2, m, sum[i], w[i][n / 2][n % 2 * 2], w[i][n / 2][n % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
      for (int c = 0; c < HD / 16; c++) {
        uint32_t vf[4];
        v.b(vf, n * 16, c * 2);
#pragma unroll
        for (int i = 0; i < MT; i++) mma_bf16_x2(o[i][2 * c], o[i][2 * c + 1], w[i][n], vf);
      }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < MT; i++) {
    const int at = first + row + i * 16;
    float m[2];
    for (int r = 0; r < 2; r++) {
      m[r] = top[i][r] * p.scale_log2;
      sum[i][r] = quad_sum(sum[i][r]);
    }
    store_lse(head.statistic(p.lse), at, p.tokens, m, sum[i]);
    store_rows(q, row + i * 16, o[i], 1.f / sum[i][0], 1.f / sum[i][1], head.rows(p.out) + at * head.out_stride(),
               head.out_stride(), p.tokens - at, hd);
  }
}

}  // namespace attention

using attention::forward_streamed, attention::forward_whole;
using AttentionForward = attention::ForwardParams<bf16>;

HOT_KERNEL(attention_forward_50x64_bf16, AttentionForward, 128, 5) { forward_whole<50, 64, 4>(p); }
HOT_KERNEL(attention_forward_65x80_bf16, AttentionForward, 160, 3) { forward_whole<65, 80, 5>(p); }
HOT_KERNEL(attention_forward_197x32_bf16, AttentionForward, 128, 3) { forward_whole<197, 32, 4>(p); }
HOT_KERNEL(attention_forward_197x64_bf16, AttentionForward, 128, 2) { forward_whole<197, 64, 4>(p); }
HOT_KERNEL(attention_forward_257x32_bf16, AttentionForward, 128, 2) { forward_whole<257, 32, 4>(p); }

KERNEL(attention_forward_16_bf16, AttentionForward, 128, 2) { forward_streamed<16, 2>(p); }
HOT_KERNEL(attention_forward_32_bf16, AttentionForward, 128, 2) { forward_streamed<32, 2>(p); }
KERNEL(attention_forward_48_bf16, AttentionForward, 128, 2) { forward_streamed<48, 2>(p); }
HOT_KERNEL(attention_forward_64_bf16, AttentionForward, 128, 2) { forward_streamed<64, 2>(p); }
KERNEL(attention_forward_80_bf16, AttentionForward, 128, 2) { forward_streamed<80, 1>(p); }
KERNEL(attention_forward_96_bf16, AttentionForward, 128, 2) { forward_streamed<96, 1>(p); }
KERNEL(attention_forward_112_bf16, AttentionForward, 128, 2) { forward_streamed<112, 1>(p); }
KERNEL(attention_forward_128_bf16, AttentionForward, 128, 2) { forward_streamed<128, 1>(p); }
