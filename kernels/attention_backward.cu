// attention_backward.cu - gradient of attention where a whole head fits into shared memory. With weights P (formed
// again from lse) and dP = dO V^T: dV = P^T dO, dS = P (dP - delta), dQ = scale dS K, dK = scale dS^T Q, where delta is
// a row's sum of P dP, which is also that of dO O.
//
// One block a head, nothing but the gradient written, no atomics: 14 T D bytes per image (16 with `out`), 10 T^2 D
// flops. A warp owns 16 or 32 keys and computes the transposes S^T = K Q^T and dP^T = V dO^T. Then P^T and dS^T lie in
// its registers just as the left operands of dV and dK want them; only dS^T goes through shared memory, in bf16, for
// dQ.
//
// short: the scores of 16 keys against all queries stay in registers. So delta is summed here, over the warps, `out` is
// not read, and dS^T takes the place of the values, which have been turned into operands by then.
// long: warps walk through the queries, 16 at a time; delta comes from `out` as the rows are loaded. After every CHUNK
// tiles of queries the block turns their dS^T into dQ and uses its memory again.
#include "attention/backward.cuh"

namespace attention {

template <int T, int HD> DEV void backward_short(const BackwardParams<bf16>& p) {
  constexpr int ROWS = round_up(T, 16), WARPS = ROWS / 16, LIVE = ceil_div(T, 8);
  static_assert(ROWS == HD, "dS^T of a warp's keys has the size of their values");
  const Tile<HD> q{dynamic_shared()}, k{q.base + Tile<HD>::bytes(ROWS)}, v{k.base + Tile<HD>::bytes(ROWS)};
  const Tile<HD> g{v.base + Tile<HD>::bytes(ROWS)}, ds{v.base};
  const uint32_t lse = g.base + Tile<HD>::bytes(ROWS), partial = lse + ROWS * 4;
  const Head head(p, blockIdx.x, T, HD);
  const int stride = head.qkv_stride();
  load_rows<WARPS * 32, ROWS>(k, head.part(p.qkv, 1), stride, T, HD);
  load_rows<WARPS * 32, ROWS>(q, head.part(p.qkv, 0), stride, T, HD);
  load_rows<WARPS * 32, ROWS>(v, head.part(p.qkv, 2), stride, T, HD);
  load_rows<WARPS * 32, ROWS>(g, head.rows(p.grad_out), head.out_stride(), T, HD);
  cp_async_commit();
  if ((int)threadIdx.x < ROWS) {
    const int i = threadIdx.x;
    sts(lse + i * 4, i < T ? load(head.statistic(p.lse), i) * LOG2E : UNREACHED);
  }
  cp_async_wait<0>();
  __syncthreads();

  const int warp = warp_id(), l = lane_id(), r = warp * 16 + (l >> 2), t = l & 3;
  // A padded key scores 0, and 2^-lse may be infinite: it must not reach delta, nor dQ.
  const bool in[2] = {T % 16 == 0 || r < T, T % 16 == 0 || r + 8 < T};
  float s[LIVE][4] = {}, dp[LIVE][4] = {};
  scores(s, k, warp * 16, q);
#pragma unroll
  for (int j = 0; j < LIVE; j++) {
    const Vec<float, 2> row = lds<Vec<float, 2>>(lse + (j * 8 + t * 2) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) s[j][e] = in[e / 2] ? ex2(fma3(s[j][e], p.scale_log2, -row[e % 2])) : 0.f;
  }
  scores(dp, v, warp * 16, g);
#pragma unroll
  for (int j = 0; j < LIVE; j++) {
    Vec<float, 2> sum;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      sum[e] = s[j][e] * dp[j][e] + s[j][2 + e] * dp[j][2 + e];
      for (int step = 16; step >= 4; step >>= 1) sum[e] += __shfl_xor_sync(~0u, sum[e], step);
    }
    if (l < 4) sts(partial + (warp * ROWS + j * 8 + t * 2) * 4, sum);
  }
  __syncthreads();
  uint32_t pf[ROWS / 16][4] = {}, dsf[ROWS / 16][4] = {};
#pragma unroll
  for (int j = 0; j < LIVE; j++) {
    float delta[2] = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const Vec<float, 2> sum = lds<Vec<float, 2>>(partial + (w * ROWS + j * 8 + t * 2) * 4);
      delta[0] += sum[0];
      delta[1] += sum[1];
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float p0 = s[j][2 * h], p1 = s[j][2 * h + 1];
      const uint32_t x = pack_bf16(p0 * (dp[j][2 * h] - delta[0]), p1 * (dp[j][2 * h + 1] - delta[1]));
      pf[j / 2][j % 2 * 2 + h] = pack_bf16(p0, p1);
      dsf[j / 2][j % 2 * 2 + h] = x;
      sts(ds.at(r + h * 8, j) + t * 4, x);
    }
  }
  float dv[HD / 8][4] = {}, dk[HD / 8][4] = {};
#pragma unroll
  for (int n = 0; n < ROWS / 16; n++)
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t f[4];
      g.b(f, n * 16, c * 2);
      mma_bf16_x2(dv[2 * c], dv[2 * c + 1], pf[n], f);
    }
#pragma unroll
  for (int n = 0; n < ROWS / 16; n++)
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t f[4];
      q.b(f, n * 16, c * 2);
      mma_bf16_x2(dk[2 * c], dk[2 * c + 1], dsf[n], f);
    }
  __syncthreads();  // all dS^T are written; queries and grad_out are no longer read
  store_part(Head(p, anew(blockIdx.x), T, HD), 2, p.grad_qkv, warp * 16, g, warp * 16, dv, 1.f);
  store_part(Head(p, anew(blockIdx.x), T, HD), 1, p.grad_qkv, warp * 16, g, warp * 16, dk, p.scale_log2 * LN2);
  float dq[HD / 8][4] = {};
#pragma unroll
  for (int n = 0; n < ROWS / 16; n++) {
    uint32_t a[4];
    ds.a_t(a, n * 16, warp * 2);
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t kf[4];
      k.b(kf, n * 16, c * 2);
      mma_bf16_x2(dq[2 * c], dq[2 * c + 1], a, kf);
    }
  }
  store_part(Head(p, anew(blockIdx.x), T, HD), 0, p.grad_qkv, warp * 16, q, warp * 16, dq, p.scale_log2 * LN2);
}

// A warp owns KT tiles of 16 keys.
template <int T, int HD, int WARPS, int KT, int CHUNK, bool KEEP>
DEV void backward_long(const BackwardParams<bf16>& p) {
  constexpr int ROWS = round_up(T, 16), TILES = ROWS / 16, KEYS = WARPS * KT * 16;
  static_assert(KEYS >= ROWS && KEYS - ROWS < KT * 16, "each warp has keys, the last one perhaps a tile of padding");
  const Tile<HD> q{dynamic_shared()}, g{q.base + Tile<HD>::bytes(ROWS)}, k{g.base + Tile<HD>::bytes(ROWS)};
  const Tile<HD> v{k.base + Tile<HD>::bytes(KEYS)};
  const Tile<CHUNK * 16> ds{v.base + Tile<HD>::bytes(KEYS)};
  const uint32_t lse = ds.base + Tile<CHUNK * 16>::bytes(KEYS), delta = lse + ROWS * 4;
  {
    const Head head(p, blockIdx.x, T, HD);
    // Heads are found anew wherever they are needed: kept, their addresses would take registers.
    load_rows<WARPS * 32, ROWS>(q, head.part(p.qkv, 0), head.qkv_stride(), T, HD);
    load_rows<WARPS * 32, KEYS>(k, head.part(p.qkv, 1), head.qkv_stride(), T, HD);
    load_rows<WARPS * 32, KEYS>(v, head.part(p.qkv, 2), head.qkv_stride(), T, HD);
    cp_async_commit();
    for (int i = threadIdx.x; i < ROWS; i += WARPS * 32)
      sts(lse + i * 4, i < T ? load(head.statistic(p.lse), i) * LOG2E : UNREACHED);
    load_grad_out<WARPS * 32, ROWS>(g, delta, p, head, 0);
  }
  cp_async_wait<0>();
  __syncthreads();

  Keys<HD, KT, KEEP> keys(k, v, warp_id() * KT * 16);
  for (int chunk = 0; chunk < TILES; chunk += CHUNK) {
    const int end = chunk + CHUNK < TILES ? chunk + CHUNK : TILES;
#pragma unroll 1
    for (int tile = chunk; tile < end; tile++) {
      uint32_t dst[KT][4];
      keys.meet(q, g, tile * 16, lse + tile * 64, delta + tile * 64, p.scale_log2, dst);
      const int l = anew(threadIdx.x) & 31;
#pragma unroll
      for (int i = 0; i < KT; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          // Padded keys must not reach dQ. In dK and dV they have rows of their own, which are not stored.
          const int r = keys.first + i * 16 + (l >> 2) + e % 2 * 8;
          sts(ds.at(r, (tile - chunk) * 2 + e / 2) + (l & 3) * 4, T % 16 == 0 || r < T ? dst[i][e] : 0u);
        }
    }
    __syncthreads();  // dS^T of the chunk is written; its queries are no longer read
    for (int tile = chunk + (anew(threadIdx.x) >> 5); tile < end; tile += WARPS) {
      float dq[HD / 8][4] = {};
#pragma unroll 1
      for (int n = 0; n < TILES; n++) {
        uint32_t a[4];
        ds.a_t(a, n * 16, (tile - chunk) * 2);
#pragma unroll
        for (int c = 0; c < HD / 16; c++) {
          uint32_t f[4];
          k.b(f, n * 16, c * 2);
          mma_bf16_x2(dq[2 * c], dq[2 * c + 1], a, f);
        }
      }
      store_part(Head(p, anew(blockIdx.x), T, HD), 0, p.grad_qkv, tile * 16, q, tile * 16, dq, p.scale_log2 * LN2);
    }
    if (end < TILES) __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < KT; i++) {
    // The values of these keys were read by this warp alone.
    const int key = keys.first + i * 16;
    store_part(Head(p, anew(blockIdx.x), T, HD), 2, p.grad_qkv, key, v, key, keys.dv[i], 1.f);
    store_part(Head(p, anew(blockIdx.x), T, HD), 1, p.grad_qkv, key, v, key, keys.dk[i], p.scale_log2 * LN2);
  }
}

}  // namespace attention

using attention::backward_long, attention::backward_short;
using AttentionBackward = attention::BackwardParams<bf16>;

HOT_KERNEL(attention_backward_50x64_bf16, AttentionBackward, 128, 4) { backward_short<50, 64>(p); }
HOT_KERNEL(attention_backward_65x80_bf16, AttentionBackward, 160, 2) { backward_short<65, 80>(p); }
HOT_KERNEL(attention_backward_197x32_bf16, AttentionBackward, 224, 2) { backward_long<197, 32, 7, 2, 7, false>(p); }
HOT_KERNEL(attention_backward_197x64_bf16, AttentionBackward, 416, 1) { backward_long<197, 64, 13, 1, 7, false>(p); }
HOT_KERNEL(attention_backward_257x32_bf16, AttentionBackward, 288, 1) { backward_long<257, 32, 9, 2, 9, true>(p); }
