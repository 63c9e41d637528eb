// common.cuh - what the attention kernels share: their parameters, tiles in shared memory, operands of the tensor
// cores.
//
// qkv is (B, T, 3 D) and out (B, T, D), head h of a part in columns h HD..(h + 1) HD: a head's rows are read and
// written where they lie, with a stride, and nothing is ever transposed in memory. One block serves one head of one
// image, or a slice of it; blocks are numbered along grid.x alone, because B NH may pass the 65535 of the other two.
#pragma once
#include "../common/ptx.cuh"

namespace attention {

template <class T> struct ForwardParams {
  Global<T> out;
  Global<float> lse;  // (B, NH, T): natural logarithm of the row sums
  Global<const T> qkv;
  int tokens, heads, head_dim;
  float scale_log2;  // of products, for weights by ex2: log2(e) / sqrt(HD)
};
static_assert(sizeof(ForwardParams<bf16>) == 40 && offsetof(ForwardParams<bf16>, scale_log2) == 36,
              "as in src/ops/attention/launch.rs");

template <class T> struct BackwardParams {
  Global<T> grad_qkv;
  Global<const T> grad_out, out;
  Global<const float> lse;
  Global<const T> qkv;
  Global<float> delta;  // (B, NH, T): sum(grad_out * out) of a row; only the kernels that go in two passes use it
  int tokens, heads, head_dim;
  float scale_log2;  // of products, for weights by ex2: log2(e) / sqrt(HD)
};
static_assert(sizeof(BackwardParams<bf16>) == 64 && offsetof(BackwardParams<bf16>, scale_log2) == 60,
              "as in src/ops/attention/launch.rs");

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float MASKED = -1e30f;  // a score that weighs nothing; finite, so that no inf - inf arises

DEV constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEV constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// One head of one image. Where its sizes are known to the compiler they are given.
struct Head {
  int image, head, tokens, heads, head_dim;
  template <class P> DEV Head(const P& p, int index) : Head(p, index, p.tokens, p.head_dim) {}
  template <class P> DEV Head(const P& p, int index, int tokens, int head_dim)
      : image(index / p.heads), head(index % p.heads), tokens(tokens), heads(p.heads), head_dim(head_dim) {}
  // From a token to the next. Offsets inside an image fit 31 bits: `check` has looked.
  DEV int qkv_stride() const { return 3 * heads * head_dim; }
  DEV int out_stride() const { return heads * head_dim; }
  // First row of part 0, 1, 2 (query, key, value) in a tensor laid out as qkv.
  template <class T> DEV Global<T> part(Global<T> qkv, int part) const {
    return qkv + ((int64_t)image * tokens * qkv_stride() + (part * heads + head) * head_dim);
  }
  template <class T> DEV Global<T> rows(Global<T> out) const {
    return out + ((int64_t)image * tokens * out_stride() + head * head_dim);
  }
  template <class T> DEV Global<T> statistic(Global<T> x) const { return x + ((int64_t)image * heads + head) * tokens; }
};

DEV int warp_id() { return (int)threadIdx.x >> 5; }
DEV int lane_id() { return (int)threadIdx.x & 31; }

// Rows of COLS bf16 (a multiple of 16) in shared memory, as chunks of 16 bytes. A chunk's number is xored with bits of
// its row such that one chunk of 8 neighbouring rows fills all 32 banks: no access below has a bank conflict.
//
// An operand is 16 rows and two chunks. As mma wants them: `a` is the rows as the left factor, `a_t` their transpose;
// `b` is the rows as the right factor, `b_t` their transpose.
template <int COLS> struct Tile {
  static constexpr int CHUNKS = COLS / 8, PERIOD = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
  static_assert(COLS % 16 == 0, "operands are 16 wide");
  uint32_t base;

  static DEV constexpr int bytes(int rows) { return rows * COLS * 2; }
  static DEV constexpr uint32_t place(uint32_t row, uint32_t chunk) { return chunk ^ (row / (8 / PERIOD) % PERIOD); }
  DEV uint32_t at(uint32_t row, uint32_t chunk) const { return base + row * COLS * 2 + (place(row, chunk) << 4); }
  DEV void a(uint32_t (&f)[4], int row, int chunk SITE) const {
    const int l = lane_id();
    ldmatrix_x4(f, at(row + (l & 15), chunk + (l >> 4)) LINE);
  }
  DEV void a_t(uint32_t (&f)[4], int row, int chunk SITE) const {
    const int l = lane_id();
    ldmatrix_x4_trans(f, at(row + (l & 7) + (l >> 4) * 8, chunk + (l >> 3 & 1)) LINE);
  }
  DEV void b(uint32_t (&f)[4], int row, int chunk SITE) const {
    const int l = lane_id();
    ldmatrix_x4_trans(f, at(row + (l & 15), chunk + (l >> 4)) LINE);
  }
  DEV void b_t(uint32_t (&f)[4], int row, int chunk SITE) const {
    const int l = lane_id();
    ldmatrix_x4(f, at(row + (l & 7) + (l >> 4) * 8, chunk + (l >> 3 & 1)) LINE);
  }
};

// The block copies rows of a head into a tile; rows past `rows` and columns past `head_dim` become zero. Asynchronous.
template <int THREADS, int ROWS, int COLS>
DEV void load_rows(Tile<COLS> tile, Global<const bf16> from, int stride, int rows, int head_dim) {
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * Tile<COLS>::CHUNKS; i += THREADS) {
    const int r = i / Tile<COLS>::CHUNKS, c = i % Tile<COLS>::CHUNKS;
    const bool inside = r < rows && c * 8 < head_dim;
    cp_async16(tile.at(r, c), inside ? from + (r * stride + c * 8) : from, inside ? 16 : 0);
  }
}

// Whether each chunk of 8 neighbouring rows fills all banks, which hold 8 chunks.
template <int COLS> constexpr bool has_no_conflicts() {
  for (int row = 0; row < 32; row += 8)
    for (int chunk = 0; chunk < COLS / 8; chunk++) {
      int banks = 0;
      for (int i = 0; i < 8; i++) banks |= 1 << ((row + i) * COLS / 8 + Tile<COLS>::place(row + i, chunk)) % 8;
      if (banks != 255) return false;
    }
  return true;
}
static_assert(has_no_conflicts<16>() && has_no_conflicts<32>() && has_no_conflicts<48>() && has_no_conflicts<64>() &&
              has_no_conflicts<80>() && has_no_conflicts<96>() && has_no_conflicts<112>() && has_no_conflicts<128>() &&
              has_no_conflicts<144>());

// acc += 16 rows of a tile, from `row` on, times the first 8 LIVE rows of another, transposed.
template <int LIVE, int HD> DEV void scores(float (&acc)[LIVE][4], Tile<HD> rows, int row, Tile<HD> columns) {
#pragma unroll
  for (int c = 0; c < HD / 16; c++) {
    uint32_t a[4];
    rows.a(a, row, c * 2);
#pragma unroll
    for (int n = 0; n < LIVE; n += 2) {
      uint32_t b[4];
      columns.b_t(b, n * 8, c * 2);
      if (n + 1 < LIVE) mma_bf16_x2(acc[n], acc[n + 1], a, b);
      else mma_bf16(acc[n], a, b[0], b[1]);
    }
  }
}

// A warp stores 16 rows of accumulators, rows g and g + 8 of a lane times `upper` and `lower`. They pass through the
// 16 rows of `tile` from `row` on, which are free for that, so that each lane stores 16 bytes at once.
template <int COLS>
DEV void store_rows(Tile<COLS> tile, int row, const float (&acc)[COLS / 8][4], float upper, float lower,
                    Global<bf16> to, int stride, int rows, int head_dim) {
  constexpr int CHUNKS = Tile<COLS>::CHUNKS;
  const int l = anew(lane_id()), g = l >> 2, t = l & 3;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    sts(tile.at(row + g, c) + t * 4, pack_bf16(acc[c][0] * upper, acc[c][1] * upper));
    sts(tile.at(row + g + 8, c) + t * 4, pack_bf16(acc[c][2] * lower, acc[c][3] * lower));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < CHUNKS / 2; i++) {
    const int r = (i * 32 + l) / CHUNKS, c = (i * 32 + l) % CHUNKS;
    const Vec<bf16, 8> x = lds<Vec<bf16, 8>>(tile.at(row + r, c));
    if (r < rows && c * 8 < head_dim) store_vec<8>(to, r * stride + c * 8, x);
  }
}

}  // namespace attention
