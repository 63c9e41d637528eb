// low_freq_target.cu - PixMIM's target from bytes, half precision on tensor cores: 224 pixels at radius 40, 448 at 80.
// Any other size or radius, f32 pixels, and f32-grade arithmetic: low_freq_target_exact.cu.
//
// Idea. Only frequencies -R .. R of an axis pass the disc, so each transform is a small matrix product. Counted from
// the image's centre, pixel u mirrors pixel -u: cosines see only what is even in u, sines only what is odd. Folding the
// image into its four quadrants' even and odd parts halves every product, and the parts of bytes less 128 are integers
// up to 512, exact in f16. 128 is a constant, which passes the filter, and is added back at the end. Per plane:
//   rows      folded pixels x table       4 planes by parity of (y, x)    (H x H) (H x Q)     H = S / 2, Q frequencies
//   columns   table x the former          spectrum, 4 planes              (Q x H) (H x Q)
//   combine   4 terms of (+-k, +-l), each kept or not: the disc is centred half a bin off, so the inverse is complex
//   columns   table x the combination     8 planes: real and imaginary    (H x Q) (Q x Q)
//   rows      the former x table          unfolded, magnitude             (H x Q) (Q x H)
// Operands f16, sums f32. Accumulators of the inverse columns become the left operand of the inverse rows in registers.
//
// The order of a table's samples within each 16 is free; it is such that the four of a lane in an m16n8k16 operand are
// neighbours: lane t of a quad reads four bytes of a row at once, and ends with four neighbouring pixels.
//
// Work split. 224: a block is an image, three planes in shared memory; warps w, w + 1, w + 2 have the same rows of the
// three channels and write them together, (row, column, channel), only where a patch is masked: full sectors, where a
// plane alone would touch each sector three times. 448: the spectrum of three planes is larger than shared memory, so
// one kernel makes the combination (a block is a plane and half of its columns) and another inverts it (a block is 64
// rows of an image); it stays in the L2 cache between them.
// Bytes of an image at 224 with 147 of 196 patches masked: 150 528 in, 451 584 out.
#include "common/ptx.cuh"

struct LowFreqTarget {
  Global<float> target;              // (B, M, 3 P P)
  Global<const uint8_t> pixels;      // (B, 3, S, S)
  Global<const int32_t> ids_masked;  // (B, M)
  Global<const f16> table;           // (2, Q, S / 2): cosines, sines
  Global<f16> combination;           // 448: (B, 3, 4, 2, 2, Q, 48): pair, slice of columns, parity; else none
  float scale[3], shift[3];          // 1 / (255 std) and -mean / std of a channel
  int32_t masked, patch, grid;       // M, P, S / P
  int32_t reciprocal;                // 2^20 / P, rounded up
};
static_assert(sizeof(LowFreqTarget) == 80 && offsetof(LowFreqTarget, reciprocal) == 76,
              "as in src/ops/low_freq_target/launch.rs");

namespace low_freq_target {

// Sizes of a plan. Rows of shared memory are an odd number of 16-byte units: ldmatrix meets no bank twice.
template <int SIZE, int RADIUS> struct Plan {
  static constexpr int N = SIZE, H = SIZE / 2, R = RADIUS;
  static constexpr int Q = (R + 1 + 15) / 16 * 16;  // frequencies 0 .. R, padded with zeros
  static constexpr int SLICE = 48;                  // frequencies of x in work at once
  static constexpr int TILES = H / 16;              // tiles of 16 folded rows
  static constexpr int TABLE_ROW = 2 * H + 16, TABLE = Q * TABLE_ROW;
  static constexpr int ROW = 2 * SLICE + 16, FOLDED = H * ROW, PART = Q * ROW;  // planes by parity; of a spectrum
  static_assert(H % 16 == 0 && Q % SLICE == 0 && TABLE_ROW / 16 % 2 == 1 && ROW / 16 % 2 == 1, "");
};
using Plan224 = Plan<224, 40>;
using Plan448 = Plan<448, 80>;

// The sample, of 16, at position g (0 to 7) of a table; position g + 8 has the sample two further on.
DEV int sample(int g) { return g / 2 * 4 + g % 2; }

// Loads both tables, as one group of cp.async.
template <class P> DEV void load_tables(uint32_t tables, Global<const f16> from) {
  for (int i = threadIdx.x; i < 2 * P::Q * P::H / 8; i += blockDim.x)
    cp_async16(tables + i / (P::H / 8) * P::TABLE_ROW + i % (P::H / 8) * 16, from + i * 8, 16);
  cp_async_commit();
}

// Four pixels (y, 4 x .. 4 x + 3) of each quadrant, counted from the centre.
struct Quadrants {
  uint32_t low_right, low_left, high_right, high_left;  // the left ones are mirrored: last byte first
};
template <class P> DEV Quadrants quadrants(Global<const uint32_t> plane, int y, int x) {
  constexpr int WORDS = P::N / 4;
  const int low = (P::H + y) * WORDS, high = (P::H - 1 - y) * WORDS, right = WORDS / 2 + x, left = WORDS / 2 - 1 - x;
  return {load(plane, low + right), load(plane, low + left), load(plane, high + right), load(plane, high + left)};
}

// Rows: 16 folded rows of a plane to SLICE frequencies, 4 planes by parity (y even x even, eo, oe, oo) at `out`.
// The tables start at the slice's first frequency. Divided by 16, so that no sum leaves f16.
template <class P>
DEV void rows(uint32_t out, Global<const uint8_t> plane, int tile, uint32_t cosines, uint32_t sines) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Global<const uint32_t> words = plane.as<const uint32_t>();
  const uint32_t table = (lane < 16 ? cosines : sines) + lane % 8 * P::TABLE_ROW + lane / 8 % 2 * 16;
  const int y = tile * 16 + sample(g);
  float sum[4][6][4] = {};
  Quadrants next[2] = {quadrants<P>(words, y, t), quadrants<P>(words, y + 2, t)};
#pragma unroll 1
  for (int k = 0; k < P::TILES; k++) {
    uint32_t a[4][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Quadrants from = next[r];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float part[4][2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int j = 2 * half + e;
          const auto byte = [](uint32_t word, int i) { return (float)(word >> (8 * i) & 255); };
          const float low_right = byte(from.low_right, j), low_left = byte(from.low_left, 3 - j);
          const float high_right = byte(from.high_right, j), high_left = byte(from.high_left, 3 - j);
          const float even_low = low_right + low_left, odd_low = low_right - low_left;
          const float even_high = high_right + high_left, odd_high = high_right - high_left;
          part[0][e] = even_low + even_high - 512.f;  // four times 128
          part[1][e] = odd_low + odd_high;
          part[2][e] = even_low - even_high;
          part[3][e] = odd_low - odd_high;
        }
#pragma unroll
        for (int parity = 0; parity < 4; parity++) a[parity][2 * half + r] = pack_f16(part[parity][0], part[parity][1]);
      }
      if (k + 1 < P::TILES) next[r] = quadrants<P>(words, y + 2 * r, 4 * (k + 1) + t);
    }
#pragma unroll
    for (int n = 0; n < 6; n++) {
      uint32_t b[4];
      ldmatrix_x4(b, table + n * 8 * P::TABLE_ROW + k * 32);
      mma_f16(sum[0][n], a[0], b[0], b[1]);
      mma_f16(sum[1][n], a[1], b[2], b[3]);
      mma_f16(sum[2][n], a[2], b[0], b[1]);
      mma_f16(sum[3][n], a[3], b[2], b[3]);
    }
  }
#pragma unroll
  for (int parity = 0; parity < 4; parity++)
#pragma unroll
    for (int n = 0; n < 6; n++) {
      const uint32_t to = out + parity * P::FOLDED + (tile * 16 + g) * P::ROW + (n * 8 + 2 * t) * 2;
      const float* c = sum[parity][n];
      sts<uint32_t>(to, pack_f16(c[0] / 16, c[1] / 16));
      sts<uint32_t>(to + 8 * P::ROW, pack_f16(c[2] / 16, c[3] / 16));
    }
}

// Columns and combination of 16 frequencies k by 8 frequencies l (from `first`): z[pair][parity][row half]. A pair is
// 0, 1: real part, even and odd in x; 2, 3: imaginary part; the parity is that of y.
template <class P>
DEV void combine(uint32_t (&z)[4][2][2], int k_tile, int l_tile, int first, uint32_t cosines, uint32_t sines,
                 uint32_t folded) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t left = (k_tile * 16 + lane % 16) * P::TABLE_ROW + lane / 16 * 16;
  const uint32_t right = folded + lane / 16 * P::FOLDED + lane % 16 * P::ROW + l_tile * 16;
  float cc[4] = {}, cs[4] = {}, sc[4] = {}, ss[4] = {};
#pragma unroll 1
  for (int k = 0; k < P::TILES; k++) {
    uint32_t a_cos[4], a_sin[4], b_even[4], b_odd[4];
    ldmatrix_x4(a_cos, cosines + left + k * 32);
    ldmatrix_x4(a_sin, sines + left + k * 32);
    ldmatrix_x4_trans(b_even, right + k * 16 * P::ROW);
    ldmatrix_x4_trans(b_odd, right + 2 * P::FOLDED + k * 16 * P::ROW);
    mma_f16_x2(cc, cs, a_cos, b_even);
    mma_f16_x2(sc, ss, a_sin, b_odd);
  }
  const auto kept = [](int k, int l) {
    return (2 * k + 1) * (2 * k + 1) + (2 * l + 1) * (2 * l + 1) <= 4 * P::R * P::R ? 1.f : 0.f;
  };
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float value[4][2][2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int k = k_tile * 16 + g + 8 * r, l = first + l_tile * 8 + 2 * t + e, i = 2 * r + e;
      // 0 and -0 are one frequency. The 16 makes good the division in `rows`.
      const float weight = (k == 0 ? .5f : 1.f) * (l == 0 ? .5f : 1.f) * (16.f / (P::N * P::N));
      const float pp = weight * kept(k, l), nn = weight * kept(-k, -l);
      const float pn = weight * kept(k, -l), np = weight * kept(-k, l);
      // F(k, l) and F(k, -l); those of -k are their conjugates.
      const float re = cc[i] - ss[i], im = -(cs[i] + sc[i]), re_n = cc[i] + ss[i], im_n = cs[i] - sc[i];
      value[0][0][e] = (pp + nn) * re + (pn + np) * re_n;
      value[1][0][e] = (pn + np) * im_n - (pp + nn) * im;
      value[0][1][e] = -(pp + nn) * im - (pn + np) * im_n;
      value[1][1][e] = (pn + np) * re_n - (pp + nn) * re;
      value[2][0][e] = (pp - nn) * im + (pn - np) * im_n;
      value[3][0][e] = (pp - nn) * re - (pn - np) * re_n;
      value[2][1][e] = (pp - nn) * re + (pn - np) * re_n;
      value[3][1][e] = (pn - np) * im_n - (pp - nn) * im;
    }
#pragma unroll
    for (int pair = 0; pair < 4; pair++)
#pragma unroll
      for (int parity = 0; parity < 2; parity++)
        z[pair][parity][r] = pack_f16(value[pair][parity][0], value[pair][parity][1]);
  }
}

// Left operands of the inverse rows: [side][pair][16 frequencies]. Side 0 has rows H + y, side 1 rows H - 1 - y.
template <class P, int SIDES> using Columns = uint32_t[SIDES][4][P::Q / 16][4];

// Inverse columns of 16 rows, one pair, SLICE frequencies from 16 `first` on. `from` is its parity 0, parity 1 follows.
// With one side only, `flip` is the sign bits that make it side 0 (none) or side 1 (both).
template <class P, int SIDES>
DEV void inverse_columns(Columns<P, SIDES>& z, int pair, int first, int tile, uint32_t flip, uint32_t from,
                         uint32_t cosines, uint32_t sines) {
  const int lane = threadIdx.x % 32;
  const uint32_t left = (lane % 8 + lane / 16 * 8) * P::TABLE_ROW + (tile * 16 + lane / 8 % 2 * 8) * 2;
  const uint32_t right = from + lane % 16 * P::ROW + lane / 16 * 16;
  float sum[3][SIDES][2][4] = {};  // even and odd in y, one after another if there is one side
#pragma unroll 1
  for (int k = 0; k < P::Q / 16; k++) {
    uint32_t a_cos[4], a_sin[4];
    ldmatrix_x4_trans(a_cos, cosines + left + k * 16 * P::TABLE_ROW);
    ldmatrix_x4_trans(a_sin, sines + left + k * 16 * P::TABLE_ROW);
    if constexpr (SIDES == 1)
      for (uint32_t& x : a_sin) x ^= flip;
#pragma unroll
    for (int n = 0; n < 3; n++) {
      uint32_t even[4], odd[4];
      ldmatrix_x4_trans(even, right + k * 16 * P::ROW + n * 32);
      ldmatrix_x4_trans(odd, right + P::PART + k * 16 * P::ROW + n * 32);
      mma_f16_x2(sum[n][0][0], sum[n][0][1], a_cos, even);
      mma_f16_x2(sum[n][SIDES - 1][0], sum[n][SIDES - 1][1], a_sin, odd);
    }
  }
#pragma unroll
  for (int n = 0; n < 3; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float* even = &sum[n][0][half][2 * r];
        const float* odd = &sum[n][SIDES - 1][half][2 * r];
        if constexpr (SIDES == 1) {
          z[0][pair][first + n][2 * half + r] = pack_f16(even[0], even[1]);
        } else {
          z[0][pair][first + n][2 * half + r] = pack_f16(even[0] + odd[0], even[1] + odd[1]);
          z[1][pair][first + n][2 * half + r] = pack_f16(even[0] - odd[0], even[1] - odd[1]);
        }
      }
}

// What three warps, one for each channel, have made of 16 rows by 16 columns of a quadrant pair: floats
// [channel][side][row][right or left half of the image][column]. The skew of rows spreads stores over all banks.
template <int SIDES> struct Stage {
  static constexpr int SIDE = 34 * 16 + 8 * 4, CHANNEL = SIDES * SIDE + 12, BYTES = 3 * CHANNEL * 4;
  static DEV uint32_t at(uint32_t stage, int channel, int side, int row, int half, int column) {
    return stage + 4 * (channel * CHANNEL + side * SIDE + row * 34 + row / 4 * 8 + half * 16 + column);
  }
};

// Patches of an image that a block has room for.
constexpr int MOST_PATCHES = 4096;

// Place of each patch among the masked, -1: not masked. (grid grid) i32 at `places`, for the whole block.
DEV void find_places(uint32_t places, const LowFreqTarget& p, int64_t image) {
  for (int i = threadIdx.x; i < p.grid * p.grid; i += blockDim.x) sts<int32_t>(places + 4 * i, -1);
  __syncthreads();
  for (int m = threadIdx.x; m < p.masked; m += blockDim.x)
    sts<int32_t>(places + 4 * load(p.ids_masked, image * p.masked + m), m);
  __syncthreads();
}

// Inverse rows, magnitude, normalisation and store of 16 rows on SIDES sides. Three neighbouring warps call it at once,
// warp w for channel w % 3; `first_side` is the side of z[0].
template <class P, int SIDES>
DEV void inverse_rows(const LowFreqTarget& p, int64_t image, const Columns<P, SIDES>& z, int tile, int first_side,
                      uint32_t cosines, uint32_t sines, uint32_t stages, uint32_t places) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, channel = warp % 3;
  const uint32_t stage = stages + warp / 3 * Stage<SIDES>::BYTES;
  const uint32_t table = (lane < 16 ? cosines : sines) + lane % 16 * P::TABLE_ROW;
  // As a writer: one float of the 48 of a patch row's 16 pixels, of every other row.
  const int writer = threadIdx.x % 96, number = writer % 48, pixel = number / 3, colour = number % 3;
  const int numbers = 3 * p.patch * p.patch;
  const Global<float> target = p.target + image * p.masked * numbers;
  constexpr int BATCH = 4;
#pragma unroll 1
  for (int step = 0; step < P::TILES; step++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum[SIDES][4][4] = {};
#pragma unroll
      for (int side = 0; side < SIDES; side++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[side][0][i] = 128.f;  // taken off in `rows`
#pragma unroll
      for (int k = 0; k < P::Q / 16; k++) {
        uint32_t b[4];
        const uint32_t at = table + k * 16 * P::TABLE_ROW + step * 32 + half * 16;
        // Lanes 0-15 address the cosines, 16-31 the sines.
        ldmatrix_x4_trans(b, at);
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
          mma_f16(sum[side][0], z[side][0][k], b[0], b[1]);
          mma_f16(sum[side][1], z[side][1][k], b[2], b[3]);
          mma_f16(sum[side][2], z[side][2][k], b[0], b[1]);
          mma_f16(sum[side][3], z[side][3][k], b[2], b[3]);
        }
      }
#pragma unroll
      for (int side = 0; side < SIDES; side++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          Vec<float, 2> right, left;
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int i = 2 * r + e;
            const auto value = [&](float re, float im) {
              return fma3(sqrt_approx(fma3(re, re, im * im)), p.scale[channel], p.shift[channel]);
            };
            right[e] = value(sum[side][0][i] + sum[side][1][i], sum[side][2][i] + sum[side][3][i]);
            left[1 - e] = value(sum[side][0][i] - sum[side][1][i], sum[side][2][i] - sum[side][3][i]);
          }
          const int row = sample(g) + 2 * r, column = 4 * t + 2 * half;
          sts(Stage<SIDES>::at(stage, channel, side, row, 0, column), right);
          sts(Stage<SIDES>::at(stage, channel, side, row, 1, 14 - column), left);
        }
    }
    named_barrier(1 + warp / 3, 96);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int x = pixel + (half == 0 ? P::H + 16 * step : P::H - 16 - 16 * step);
      const int patch_column = x * p.reciprocal >> 20, in_column = x - patch_column * p.patch;
#pragma unroll
      for (int side = 0; side < SIDES; side++)
#pragma unroll 1
        for (int rows = writer / 48; rows < 16; rows += 2 * BATCH) {
          // All loads of a batch are under way before the first store.
          float value[BATCH];
          int at[BATCH];
#pragma unroll
          for (int i = 0; i < BATCH; i++) {
            const int row = rows + 2 * i, from_centre = tile * 16 + row;
            const int y = first_side + side == 0 ? P::H + from_centre : P::H - 1 - from_centre;
            const int patch_row = y * p.reciprocal >> 20, in_row = y - patch_row * p.patch;
            value[i] = lds<float>(Stage<SIDES>::at(stage, colour, side, row, half, pixel));
            const int place = lds<int32_t>(places + 4 * (patch_row * p.grid + patch_column));
            at[i] = place < 0 ? -1 : place * numbers + (in_row * p.patch + in_column) * 3 + colour;
          }
#pragma unroll
          for (int i = 0; i < BATCH; i++)
            if (at[i] >= 0) store(target, at[i], value[i]);
        }
    }
    named_barrier(1 + warp / 3, 96);
  }
}

// ---- 224: an image ------------------------------------------------------------------------------------------------
template <class P> struct Image {
  static constexpr int WARPS = 12, UNITS = 3 * P::TILES;  // a unit is 16 folded rows of a channel
  static constexpr int K_TILES = P::Q / 16, L_TILES = P::Q / 8, BINS = 3 * K_TILES * L_TILES;
  static constexpr int ROUNDS = (BINS + WARPS - 1) / WARPS;
  // The combination overwrites the folded rows it is made of.
  static constexpr int FOLDED = 2 * P::TABLE, STAGES = FOLDED + 3 * 8 * P::PART;
  static constexpr int PLACES = STAGES + WARPS / 3 * Stage<2>::BYTES;
  static constexpr int BYTES = PLACES + 4 * MOST_PATCHES;
  static_assert(P::Q == P::SLICE && FOLDED + 3 * 4 * P::FOLDED <= PLACES && BYTES <= 227 * 1024, "");
};

template <class P> DEV void image(const LowFreqTarget& p) {
  using I = Image<P>;
  const uint32_t cosines = dynamic_shared(), sines = cosines + P::TABLE, folded = cosines + I::FOLDED;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t image = blockIdx.x;
  load_tables<P>(cosines, p.table);
  find_places(cosines + I::PLACES, p, image);
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll 1
  for (int unit = warp; unit < I::UNITS; unit += I::WARPS) {
    const int channel = unit % 3;
    rows<P>(folded + channel * 4 * P::FOLDED, p.pixels + (image * 3 + channel) * P::N * P::N, unit / 3, cosines, sines);
  }
  __syncthreads();
  // The combination waits in registers until all of the rows have been read.
  uint32_t z[I::ROUNDS][4][2][2];
#pragma unroll
  for (int round = 0; round < I::ROUNDS; round++) {
    const int bin = warp + I::WARPS * round, in_plane = bin % (I::K_TILES * I::L_TILES);
    if (bin < I::BINS)
      combine<P>(z[round], in_plane / I::L_TILES, in_plane % I::L_TILES, 0, cosines, sines,
                 folded + bin / (I::K_TILES * I::L_TILES) * 4 * P::FOLDED);
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < I::ROUNDS; round++) {
    const int bin = warp + I::WARPS * round, in_plane = bin % (I::K_TILES * I::L_TILES);
    if (bin < I::BINS)
#pragma unroll
      for (int part = 0; part < 8; part++) {
        const uint32_t to = folded + (bin / (I::K_TILES * I::L_TILES) * 8 + part) * P::PART +
                            (in_plane / I::L_TILES * 16 + g) * P::ROW + (in_plane % I::L_TILES * 8 + 2 * t) * 2;
        sts<uint32_t>(to, z[round][part / 2][part % 2][0]);
        sts<uint32_t>(to + 8 * P::ROW, z[round][part / 2][part % 2][1]);
      }
  }
  __syncthreads();
#pragma unroll 1
  for (int unit = warp; unit < I::UNITS; unit += I::WARPS) {
    Columns<P, 2> columns;
#pragma unroll
    for (int pair = 0; pair < 4; pair++)
      inverse_columns<P, 2>(columns, pair, 0, unit / 3, 0, folded + (unit % 3 * 8 + pair * 2) * P::PART, cosines,
                            sines);
    inverse_rows<P, 2>(p, image, columns, unit / 3, 0, cosines, sines, cosines + I::STAGES, cosines + I::PLACES);
  }
}

// ---- 448: a kernel forth, a kernel back -----------------------------------------------------------------------------
// Block: a plane and SLICE of its frequencies of x.
template <class P> struct Forth {
  static constexpr int WARPS = 12, FOLDED = 2 * P::TABLE, BYTES = FOLDED + 4 * P::FOLDED;
  static_assert(BYTES <= 227 * 1024, "");
};
template <class P> DEV void forth(const LowFreqTarget& p) {
  constexpr int SLICES = P::Q / P::SLICE, L_TILES = P::SLICE / 8, BINS = P::Q / 16 * L_TILES;
  const uint32_t cosines = dynamic_shared(), sines = cosines + P::TABLE, folded = cosines + Forth<P>::FOLDED;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int slice = blockIdx.x % SLICES, first = slice * P::SLICE;
  const int64_t plane = blockIdx.x / SLICES;
  load_tables<P>(cosines, p.table);
  cp_async_wait<0>();
  __syncthreads();
  const uint32_t ahead = first * P::TABLE_ROW;
#pragma unroll 1
  for (int tile = warp; tile < P::TILES; tile += Forth<P>::WARPS)
    rows<P>(folded, p.pixels + plane * P::N * P::N, tile, cosines + ahead, sines + ahead);
  __syncthreads();
  const Global<uint32_t> out = p.combination.as<uint32_t>();
#pragma unroll 1
  for (int bin = warp; bin < BINS; bin += Forth<P>::WARPS) {
    uint32_t z[4][2][2];
    combine<P>(z, bin / L_TILES, bin % L_TILES, first, cosines, sines, folded);
#pragma unroll
    for (int part = 0; part < 8; part++) {
      const int64_t of = ((plane * 4 + part / 2) * SLICES + slice) * 2 + part % 2;
      const int64_t at = (of * P::Q + bin / L_TILES * 16 + g) * (P::SLICE / 2) + bin % L_TILES * 4 + t;
      store(out, at, z[part / 2][part % 2][0]);
      store(out, at + 8 * (P::SLICE / 2), z[part / 2][part % 2][1]);
    }
  }
}

// Block: 4 tiles of 16 rows of an image, a warp for each and each channel.
template <class P> struct Back {
  static constexpr int WARPS = 12, STRIPS = 2 * P::TILES / 4;
  static constexpr int CHUNK = 3 * 2 * P::PART;  // both parities of a pair and slice, of three channels
  static constexpr int CHUNKS = 2 * P::TABLE, BYTES = CHUNKS + 2 * CHUNK;
  static constexpr int STAGES = CHUNKS, PLACES = STAGES + WARPS / 3 * Stage<1>::BYTES;  // once the chunks are used
  static_assert(2 * P::TILES % 4 == 0 && PLACES + 4 * MOST_PATCHES <= BYTES && BYTES <= 227 * 1024, "");
};
template <class P> DEV void load_chunk(const LowFreqTarget& p, int64_t image, int chunk, uint32_t to) {
  constexpr int UNITS = P::SLICE / 8, SLICES = P::Q / P::SLICE;  // 16-byte units of a row
#pragma unroll 1
  for (int i = threadIdx.x; i < 3 * 2 * P::Q * UNITS; i += blockDim.x) {
    const int row = i / UNITS, channel = row / (2 * P::Q);  // rows of both parities of three channels
    const int64_t from = (((image * 3 + channel) * 4 * SLICES + chunk) * 2 * P::Q + row % (2 * P::Q)) * P::SLICE;
    cp_async16(to + row * P::ROW + i % UNITS * 16, p.combination + from + i % UNITS * 8, 16);
  }
  cp_async_commit();
}
template <class P> DEV void back(const LowFreqTarget& p) {
  using K = Back<P>;
  constexpr int SLICES = P::Q / P::SLICE;
  const uint32_t cosines = dynamic_shared(), sines = cosines + P::TABLE, chunks = cosines + K::CHUNKS;
  const int warp = threadIdx.x / 32, channel = warp % 3;
  const int64_t image = blockIdx.x / K::STRIPS;
  const int tile = blockIdx.x % K::STRIPS * 4 + warp / 3, side = tile / P::TILES;
  load_tables<P>(cosines, p.table);
  load_chunk<P>(p, image, 0, chunks);
  Columns<P, 1> columns;
#pragma unroll
  for (int chunk = 0; chunk < 4 * SLICES; chunk++) {
    const bool more = chunk + 1 < 4 * SLICES;
    if (more) load_chunk<P>(p, image, chunk + 1, chunks + (chunk + 1) % 2 * K::CHUNK);
    if (more) cp_async_wait<1>(); else cp_async_wait<0>();
    __syncthreads();
    inverse_columns<P, 1>(columns, chunk / SLICES, chunk % SLICES * 3, tile % P::TILES, side ? 0x80008000u : 0u,
                          chunks + chunk % 2 * K::CHUNK + channel * 2 * P::PART, cosines, sines);
    __syncthreads();
  }
  find_places(cosines + K::PLACES, p, image);
  inverse_rows<P, 1>(p, image, columns, tile % P::TILES, side, cosines, sines, cosines + K::STAGES,
                     cosines + K::PLACES);
}

static_assert(Image<Plan224>::BYTES == 224320 && Forth<Plan448>::BYTES == 189440 && Back<Plan448>::BYTES == 218112,
              "as in src/ops/low_freq_target/launch.rs");
}  // namespace low_freq_target

HOT_KERNEL(low_freq_target_224, LowFreqTarget, 384, 1) { low_freq_target::image<low_freq_target::Plan224>(p); }
HOT_KERNEL(low_freq_target_448_forth, LowFreqTarget, 384, 1) { low_freq_target::forth<low_freq_target::Plan448>(p); }
HOT_KERNEL(low_freq_target_448_back, LowFreqTarget, 384, 1) { low_freq_target::back<low_freq_target::Plan448>(p); }
