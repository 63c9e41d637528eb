// attention_backward.cu - gradient of attention where a whole head fits into shared memory. With weights P (formed again
// from lse) and dP = dO V^T: dV = P^T dO, dS = P (dP - delta), dQ = scale dS K, dK = scale dS^T Q, where delta is a row's
// sum of P dP, which is also that of dO O.
//
// One block a head, nothing but the gradient written, no atomics: 14 T D bytes per image (16 with `out`), 10 T^2 D flops.
// A warp owns 16 or 32 keys and computes the transposes S^T = K Q^T and dP^T = V dO^T. Then P^T and dS^T lie in its
// registers just as the left operands of dV and dK want them; only dS^T goes through shared memory, in bf16, for dQ.
//
// short: the scores of 16 keys against all queries stay in registers. So delta is summed here, over the warps, `out` is
// not read, and dS^T takes the place of the values, which have been turned into operands by then.
// long: warps walk through the queries, 16 at a time; delta comes from `out` as the rows are loaded. After every CHUNK
// tiles of queries the block turns their dS^T into dQ and uses its memory again.
#include "attention/common.cuh"

namespace attention {

constexpr float UNREACHED = 1e30f;  // lse of a padded query: its weights are 2^-1e30 = 0

// A warp stores 16 rows of a part of grad_qkv through its rows of a tile. The head is found anew: its addresses would
// take registers all the way from the loads to here.
template <int COLS>
DEV void store_part(const BackwardParams<bf16>& p, int part, Tile<COLS> tile, int row, const float (&acc)[COLS / 8][4],
                    float scale, int rows) {
  const Head head(p, blockIdx.x);
  store_rows(tile, row, acc, scale, scale, head.part(p.grad_qkv, part) + row * head.qkv_stride(), head.qkv_stride(),
             rows - row, COLS);
}

template <int T, int HD> DEV void backward_short(const BackwardParams<bf16>& p) {
  constexpr int ROWS = round_up(T, 16), WARPS = ROWS / 16, LIVE = ceil_div(T, 8);
  static_assert(ROWS == HD, "dS^T of a warp's keys has the size of their values");
  const Tile<HD> q{dynamic_shared()}, k{q.base + Tile<HD>::bytes(ROWS)}, v{k.base + Tile<HD>::bytes(ROWS)};
  const Tile<HD> g{v.base + Tile<HD>::bytes(ROWS)}, ds{v.base};
  const uint32_t lse = g.base + Tile<HD>::bytes(ROWS), partial = lse + ROWS * 4;
  const Head head(p, blockIdx.x);
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
  float s[LIVE][4] = {}, dp[LIVE][4] = {};
#pragma unroll
  for (int c = 0; c < HD / 16; c++) {
    uint32_t kf[4], vf[4];
    k.a(kf, warp * 16, c * 2);
    v.a(vf, warp * 16, c * 2);
#pragma unroll
    for (int n = 0; n < ROWS / 16; n++) {
      uint32_t qf[4], gf[4];
      q.b_t(qf, n * 16, c * 2);
      g.b_t(gf, n * 16, c * 2);
      if (2 * n + 1 < LIVE) {
        mma_bf16_x2(s[2 * n], s[2 * n + 1], kf, qf);
        mma_bf16_x2(dp[2 * n], dp[2 * n + 1], vf, gf);
      } else {
        mma_bf16(s[2 * n], kf, qf[0], qf[1]);
        mma_bf16(dp[2 * n], vf, gf[0], gf[1]);
      }
    }
  }
  // A padded key scores 0, and 2^-lse may be infinite: it must not reach delta, nor dQ.
  const bool in[2] = {T % 16 == 0 || r < T, T % 16 == 0 || r + 8 < T};
  const float scale_log2 = p.scale * LOG2E;
#pragma unroll
  for (int j = 0; j < LIVE; j++) {
    const Vec<float, 2> row = lds<Vec<float, 2>>(lse + (j * 8 + t * 2) * 4);
    Vec<float, 2> sum;
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int h = 0; h < 2; h++) s[j][2 * h + e] = in[h] ? ex2(fma3(s[j][2 * h + e], scale_log2, -row[e])) : 0.f;
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
  store_part(p, 2, g, warp * 16, dv, 1.f, T);
  store_part(p, 1, g, warp * 16, dk, p.scale, T);
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
  store_part(p, 0, q, warp * 16, dq, p.scale, T);
}

// Copies rows of grad_out into a tile and writes their delta = sum(grad_out * out). A row's chunks lie with neighbouring
// lanes of one warp.
template <int THREADS, int ROWS, int COLS>
DEV void load_grad_out(Tile<COLS> tile, uint32_t delta, const BackwardParams<bf16>& p, const Head& head, int rows) {
  constexpr int CHUNKS = Tile<COLS>::CHUNKS;
  static_assert(32 % CHUNKS == 0 && ROWS * CHUNKS % 32 == 0, "whole rows, whole warps");
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int r = i / CHUNKS, c = i % CHUNKS;
    Vec<bf16, 8> g{}, o{};
    if (r < rows) {
      g = load_vec<8>(head.rows(p.grad_out), r * head.out_stride() + c * 8);
      o = load_vec<8>(head.rows(p.out), r * head.out_stride() + c * 8);
    }
    sts(tile.at(r, c), g);
    float sum = 0.f;
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fma3(to_f32(g[e]), to_f32(o[e]), sum);
#pragma unroll
    for (int step = CHUNKS / 2; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    if (c == 0) sts(delta + r * 4, sum);
  }
}

// acc += KT operands of 16 keys times f, 16 queries by chunks 2 c and 2 c + 1. The operands are kept, or read again.
template <bool KEEP, int KT, int HD>
DEV void products(float (&acc)[KT][2][4], Tile<HD> tile, int first, const uint32_t (&kept)[KT][HD / 16][4],
                  int c, const uint32_t (&f)[4]) {
#pragma unroll
  for (int i = 0; i < KT; i++) {
    if constexpr (KEEP) {
      mma_bf16_x2(acc[i][0], acc[i][1], kept[i][c], f);
    } else {
      uint32_t a[4];
      tile.a(a, first + i * 16, c * 2);
      mma_bf16_x2(acc[i][0], acc[i][1], a, f);
    }
  }
}

// A warp owns KT tiles of 16 keys. KEEP: their operands stay in registers, else they are read again for every 16 queries.
template <int T, int HD, int WARPS, int KT, int CHUNK, bool KEEP> DEV void backward_long(const BackwardParams<bf16>& p) {
  constexpr int ROWS = round_up(T, 16), TILES = ROWS / 16, KEYS = WARPS * KT * 16;
  static_assert(KEYS >= ROWS && KEYS - ROWS < KT * 16, "each warp has keys");
  const Tile<HD> q{dynamic_shared()}, g{q.base + Tile<HD>::bytes(ROWS)}, k{g.base + Tile<HD>::bytes(ROWS)};
  const Tile<HD> v{k.base + Tile<HD>::bytes(KEYS)};
  const Tile<CHUNK * 16> ds{v.base + Tile<HD>::bytes(KEYS)};
  const uint32_t lse = ds.base + Tile<CHUNK * 16>::bytes(KEYS), delta = lse + ROWS * 4;
  const Head head(p, blockIdx.x);
  const int stride = head.qkv_stride();
  load_rows<WARPS * 32, ROWS>(q, head.part(p.qkv, 0), stride, T, HD);
  load_rows<WARPS * 32, KEYS>(k, head.part(p.qkv, 1), stride, T, HD);
  load_rows<WARPS * 32, KEYS>(v, head.part(p.qkv, 2), stride, T, HD);
  cp_async_commit();
  for (int i = threadIdx.x; i < ROWS; i += WARPS * 32)
    sts(lse + i * 4, i < T ? load(head.statistic(p.lse), i) * LOG2E : UNREACHED);
  load_grad_out<WARPS * 32, ROWS>(g, delta, p, head, T);
  cp_async_wait<0>();
  __syncthreads();

  const int warp = warp_id(), l = lane_id(), t = l & 3;
  const float scale_log2 = p.scale * LOG2E;
  const int first = warp * KT * 16;  // key of this warp; the last warp may have a tile of padding
  uint32_t kf[KT][HD / 16][4], vf[KT][HD / 16][4];
  float dv[KT][HD / 8][4] = {}, dk[KT][HD / 8][4] = {};
#pragma unroll
  for (int i = 0; i < KT; i++) {
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      if (!KEEP) continue;
      k.a(kf[i][c], first + i * 16, c * 2);
      v.a(vf[i][c], first + i * 16, c * 2);
    }
  }
  for (int chunk = 0; chunk < TILES; chunk += CHUNK) {
    const int end = chunk + CHUNK < TILES ? chunk + CHUNK : TILES;
#pragma unroll 1
    for (int tile = chunk; tile < end; tile++) {
      float s[KT][2][4] = {}, dp[KT][2][4] = {};
#pragma unroll
      for (int c = 0; c < HD / 16; c++) {
        uint32_t f[4];
        q.b_t(f, tile * 16, c * 2);
        products<KEEP>(s, k, first, kf, c, f);
        g.b_t(f, tile * 16, c * 2);
        products<KEEP>(dp, v, first, vf, c, f);
      }
      uint32_t pf[KT][4], dsf[KT][4];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = tile * 16 + j * 8 + t * 2;
        const auto row_lse = lds<Vec<float, 2>>(lse + column * 4), row_delta = lds<Vec<float, 2>>(delta + column * 4);
#pragma unroll
        for (int i = 0; i < KT; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float p0 = ex2(fma3(s[i][j][2 * h], scale_log2, -row_lse[0]));
            const float p1 = ex2(fma3(s[i][j][2 * h + 1], scale_log2, -row_lse[1]));
            pf[i][2 * j + h] = pack_bf16(p0, p1);
            const uint32_t x =
                pack_bf16(p0 * (dp[i][j][2 * h] - row_delta[0]), p1 * (dp[i][j][2 * h + 1] - row_delta[1]));
            dsf[i][2 * j + h] = x;
            // A padded key scores 0, and 2^-lse may be infinite: it must not reach dQ. In dK and dV it has rows of its own.
            const int r = first + i * 16 + (l >> 2) + h * 8;
            sts(ds.at(r, (tile - chunk) * 2 + j) + t * 4, T % 16 == 0 || r < T ? x : 0u);
          }
      }
#pragma unroll
      for (int c = 0; c < HD / 16; c++) {
        uint32_t f[4];
        g.b(f, tile * 16, c * 2);
#pragma unroll
        for (int i = 0; i < KT; i++) mma_bf16_x2(dv[i][2 * c], dv[i][2 * c + 1], pf[i], f);
        q.b(f, tile * 16, c * 2);
#pragma unroll
        for (int i = 0; i < KT; i++) mma_bf16_x2(dk[i][2 * c], dk[i][2 * c + 1], dsf[i], f);
      }
    }
    __syncthreads();  // dS^T of the chunk is written; its queries are no longer read
    for (int tile = chunk + warp; tile < end; tile += WARPS) {
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
      store_part(p, 0, q, tile * 16, dq, p.scale, T);
    }
    if (end < TILES) __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < KT; i++) {
    // The values of these keys were read by this warp alone.
    store_part(p, 2, v, first + i * 16, dv[i], 1.f, T);
    store_part(p, 1, v, first + i * 16, dk[i], p.scale, T);
  }
}

}  // namespace attention

using attention::backward_long, attention::backward_short;
using AttentionBackward = attention::BackwardParams<bf16>;

HOT_KERNEL(attention_backward_50x64_bf16, AttentionBackward, 128, 4) { backward_short<50, 64>(p); }
HOT_KERNEL(attention_backward_65x80_bf16, AttentionBackward, 160, 2) { backward_short<65, 80>(p); }
HOT_KERNEL(attention_backward_197x32_bf16, AttentionBackward, 224, 2) { backward_long<197, 32, 7, 2, 7, false>(p); }
HOT_KERNEL(attention_backward_197x64_bf16, AttentionBackward, 416, 1) { backward_long<197, 64, 13, 1, 13, false>(p); }
HOT_KERNEL(attention_backward_257x32_bf16, AttentionBackward, 288, 1) { backward_long<257, 32, 9, 2, 9, true>(p); }
