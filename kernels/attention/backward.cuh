// backward.cuh - what both backward kernels share: delta, and a warp's keys with their gradients.
#pragma once
#include "common.cuh"

namespace attention {

constexpr float UNREACHED = 1e30f;  // lse of a padded query: its weights are 2^-1e30 = 0

// The block copies rows of grad_out from `first` on into a tile, and puts delta = sum(grad_out * out) of each row (0 of
// padding) beside it. The lanes of a row's chunks are neighbours in a warp.
template <int THREADS, int ROWS, int COLS>
DEV void load_grad_out(Tile<COLS> tile, uint32_t delta, const BackwardParams<bf16>& p, const Head& head, int first) {
  constexpr int CHUNKS = Tile<COLS>::CHUNKS, LANES = CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : 16;
  static_assert(ROWS * LANES % 32 == 0, "whole warps");
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * LANES; i += THREADS) {
    const int r = i / LANES, c = i % LANES;
    Vec<bf16, 8> g{}, o{};
    if (first + r < head.tokens && c * 8 < head.head_dim) {
      const int at = (first + r) * head.out_stride() + c * 8;
      g = load_vec<8>(head.rows(p.grad_out), at);
      o = load_vec<8>(head.rows(p.out), at);
    }
    if (c < CHUNKS) sts(tile.at(r, c), g);
    float sum = 0.f;
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fma3(to_f32(g[e]), to_f32(o[e]), sum);
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    if (c == 0) sts(delta + r * 4, sum);
  }
}

// A warp's KT tiles of 16 keys, from row `first` of two tiles of keys and values, and their gradients. KEEP: as
// operands they stay in registers, else they are read again for every 16 queries.
template <int HD, int KT, bool KEEP> struct Keys {
  Tile<HD> k, v;
  int first;
  uint32_t kf[KEEP ? KT : 1][HD / 16][4], vf[KEEP ? KT : 1][HD / 16][4];
  float dk[KT][HD / 8][4], dv[KT][HD / 8][4];

  DEV Keys(Tile<HD> k, Tile<HD> v, int first) : k(k), v(v), first(first), dk{}, dv{} {
#pragma unroll
    for (int i = 0; i < KT; i++)
#pragma unroll
      for (int c = 0; c < HD / 16; c++)
        if constexpr (KEEP) {
          k.a(kf[i][c], first + i * 16, c * 2);
          v.a(vf[i][c], first + i * 16, c * 2);
        }
  }

  // acc += keys (or values) times 16 rows of `columns` from `row` on, transposed.
  DEV void scores(float (&acc)[KT][2][4], Tile<HD> tile, const uint32_t (&kept)[KEEP ? KT : 1][HD / 16][4],
                  Tile<HD> columns, int row) const {
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t f[4];
      columns.b_t(f, row, c * 2);
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
  }

  // acc += P^T (or dS^T), as a left operand, times 16 rows from `row` on.
  DEV void gather(float (&acc)[KT][HD / 8][4], const uint32_t (&weights)[KT][4], Tile<HD> rows, int row) {
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t f[4];
      rows.b(f, row, c * 2);
#pragma unroll
      for (int i = 0; i < KT; i++) mma_bf16_x2(acc[i][2 * c], acc[i][2 * c + 1], weights[i], f);
    }
  }

  // Adds what 16 queries give to dK and dV, and yields their dS^T as a left operand. q and g hold the queries and their
  // grad_out from `row` on; lse (base 2) and delta are the addresses of their statistics. Rows of padded keys hold
  // nonsense, even NaN: a padded key scores 0, and 2^-lse may be infinite. The order of the products keeps few numbers
  // alive.
  DEV void meet(Tile<HD> q, Tile<HD> g, int row, uint32_t lse, uint32_t delta, float scale_log2,
                uint32_t (&dst)[KT][4]) {
    const int at = (lane_id() & 3) * 8;
    float s[KT][2][4] = {}, dp[KT][2][4] = {};
    uint32_t pt[KT][4];
    scores(s, k, kf, q, row);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const auto x = lds<Vec<float, 2>>(lse + j * 32 + at);
#pragma unroll
      for (int i = 0; i < KT; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j][e] = ex2(fma3(s[i][j][e], scale_log2, -x[e % 2]));
        pt[i][2 * j] = pack_bf16(s[i][j][0], s[i][j][1]);
        pt[i][2 * j + 1] = pack_bf16(s[i][j][2], s[i][j][3]);
      }
    }
    gather(dv, pt, g, row);
    scores(dp, v, vf, g, row);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const auto x = lds<Vec<float, 2>>(delta + j * 32 + at);
#pragma unroll
      for (int i = 0; i < KT; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j][e] *= dp[i][j][e] - x[e % 2];
        dst[i][2 * j] = pack_bf16(s[i][j][0], s[i][j][1]);
        dst[i][2 * j + 1] = pack_bf16(s[i][j][2], s[i][j][3]);
      }
    }
    gather(dk, dst, q, row);
  }
};

// A warp stores 16 rows of a part of grad_qkv, for tokens from `token` on, through its rows of a tile from `row` on.
template <int COLS>
DEV void store_part(const Head& head, int part, Global<bf16> grad_qkv, int token, Tile<COLS> tile, int row,
                    const float (&acc)[COLS / 8][4], float scale) {
  store_rows(tile, row, acc, scale, scale, head.part(grad_qkv, part) + token * head.qkv_stride(), head.qkv_stride(),
             head.tokens - token, head.head_dim);
}

}  // namespace attention
