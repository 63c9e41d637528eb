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

// A warp's KT tiles of 16 keys, from row `first` of two tiles of keys and values, and their gradients. KEEP: as operands
// they stay in registers, else they are read again for every 16 queries.
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

  // acc += keys (or values) by columns 16 c.. times f.
  DEV void product(float (&acc)[KT][2][4], Tile<HD> tile, const uint32_t (&kept)[KEEP ? KT : 1][HD / 16][4], int c,
                   const uint32_t (&f)[4]) const {
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

  // P^T and dS^T by 16 queries, as left operands. q and g hold the queries and their grad_out from `row` on; lse (base 2)
  // and delta are the addresses of the 16 queries' statistics. Rows of padded keys hold nonsense, even NaN: a padded key
  // scores 0, and 2^-lse may be infinite.
  DEV void weigh(Tile<HD> q, Tile<HD> g, int row, uint32_t lse, uint32_t delta, float scale_log2, uint32_t (&pf)[KT][4],
                 uint32_t (&dsf)[KT][4]) const {
    float s[KT][2][4] = {}, dp[KT][2][4] = {};
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t f[4];
      q.b_t(f, row, c * 2);
      product(s, k, kf, c, f);
      g.b_t(f, row, c * 2);
      product(dp, v, vf, c, f);
    }
    const int t = lane_id() & 3;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const auto row_lse = lds<Vec<float, 2>>(lse + (j * 8 + t * 2) * 4);
      const auto row_delta = lds<Vec<float, 2>>(delta + (j * 8 + t * 2) * 4);
#pragma unroll
      for (int i = 0; i < KT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float p0 = ex2(fma3(s[i][j][2 * h], scale_log2, -row_lse[0]));
          const float p1 = ex2(fma3(s[i][j][2 * h + 1], scale_log2, -row_lse[1]));
          pf[i][2 * j + h] = pack_bf16(p0, p1);
          dsf[i][2 * j + h] =
              pack_bf16(p0 * (dp[i][j][2 * h] - row_delta[0]), p1 * (dp[i][j][2 * h + 1] - row_delta[1]));
        }
    }
  }

  // dV += P^T dO, dK += dS^T Q.
  DEV void accumulate(Tile<HD> q, Tile<HD> g, int row, const uint32_t (&pf)[KT][4], const uint32_t (&dsf)[KT][4]) {
#pragma unroll
    for (int c = 0; c < HD / 16; c++) {
      uint32_t f[4];
      g.b(f, row, c * 2);
#pragma unroll
      for (int i = 0; i < KT; i++) mma_bf16_x2(dv[i][2 * c], dv[i][2 * c + 1], pf[i], f);
      q.b(f, row, c * 2);
#pragma unroll
      for (int i = 0; i < KT; i++) mma_bf16_x2(dk[i][2 * c], dk[i][2 * c + 1], dsf[i], f);
    }
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
