// resize.cu - rectangles of bytes resampled to S x S crops, to the bit as src/ops/resize/cpu.rs and Pillow have them.
//
// A thread block makes a tile of 32 x 32 pixels of a crop, from the rows of the rectangle that the tile's windows reach,
// 32 at a time. It copies them to shared memory, sums each over the windows of the tile's 32 columns (a warp takes a
// row, a lane a column) and rounds that to bytes; what these bytes add to the tile's 32 rows goes to sums in registers.
// It holds at most 128 pixels of a row at a time, and 32 of a window: sums of whole numbers may be cut anywhere, so that
// a rectangle of any size fits.
//
// Each block computes the weights it needs, in f64. To give the bits of the CPU they take + - * / alone, in the CPU's
// order, each rounded by itself: a fused multiply-add would move some fixed-point weight by one, and some byte with it.
//
// Bytes: a rectangle once and what tiles share of it (from L2), 3 S S of crop.
#include "common/images.cuh"

struct ResizeForward {
  Global<uint8_t> crops;           // (B, S, S, 3)
  Global<const uint8_t> images;
  Global<const int64_t> geometry;  // (B, 6)
  uint32_t side;                   // S
  uint32_t tiles;                  // along a side
  uint32_t bicubic;                // 1, or 0: bilinear
  uint32_t unused;
};
static_assert(sizeof(ResizeForward) == 40 && offsetof(ResizeForward, unused) == 36, "as in src/ops/resize.rs");

namespace resize {

constexpr int32_t WARPS = 8, THREADS = 32 * WARPS;
constexpr int32_t TILE = 32;                     // pixels of a side; as in src/ops/resize.rs
constexpr int32_t ROWS = 32, COLUMNS = 128;      // of a rectangle, in shared memory at a time
constexpr int32_t TAPS = 32;                     // of a window, likewise; at least ROWS
constexpr int32_t PITCH = 3 * COLUMNS + 16;      // bytes of a row there: it starts anywhere in 16
constexpr int32_t WORDS = 3 * TILE / 4;          // of a row of the tile
constexpr int32_t OWN_ROWS = ROWS / WARPS, OWN_WORDS = TILE * WORDS / THREADS;  // of a warp; of a thread
constexpr int32_t FRACTION_BITS = 22;
constexpr int32_t HALF = 1 << (FRACTION_BITS - 1);

DEV int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
DEV int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

DEV uint8_t to_byte(int32_t sum) { return (uint8_t)smaller(larger(sum >> FRACTION_BITS, 0), 255); }

// How one axis is resampled: `Windows` of the CPU.
struct Axis {
  double scale;    // inputs to an output
  double shrink;   // outputs to an input, at most 1
  double support;  // half a window, in inputs
  int32_t inputs;
  int32_t taps;    // no window has more inputs
  bool bicubic;

  DEV Axis(int32_t inputs, uint32_t outputs, bool bicubic) : inputs(inputs), bicubic(bicubic) {
    scale = div_rn((double)inputs, (double)outputs);
    const double stretch = scale > 1. ? scale : 1.;
    shrink = div_rn(1., stretch);
    support = mul_rn(bicubic ? 2. : 1., stretch);
    taps = 2 * (int32_t)support + 3;
  }

  // Of output `i`, in inputs.
  DEV double centre(int32_t i) const { return mul_rn(add_rn((double)i, 0.5), scale); }
  DEV int32_t first(double centre) const {
    const double from = add_rn(add_rn(centre, -support), 0.5);
    return from > 0. ? (int32_t)from : 0;
  }
  DEV int32_t end(double centre) const { return smaller((int32_t)add_rn(add_rn(centre, support), 0.5), inputs); }

  // Of input `i`, before weights are made to add up to 1.
  DEV double weight(int32_t i, double centre) const {
    double x = mul_rn(add_rn(add_rn((double)i, -centre), 0.5), shrink);
    x = x < 0. ? -x : x;
    if (!bicubic) return x < 1. ? add_rn(1., -x) : 0.;
    if (x < 1.) return add_rn(mul_rn(mul_rn(add_rn(mul_rn(1.5, x), -2.5), x), x), 1.);
    if (x < 2.) return mul_rn(add_rn(mul_rn(add_rn(mul_rn(add_rn(x, -5.), x), 8.), x), -4.), -0.5);
    return 0.;
  }
};

// The windows of a tile's 32 columns, or rows, in shared memory.
struct Windows {
  static constexpr uint32_t BYTES = TILE * (8 + 8 + 4 + 4);
  const Axis& axis;
  uint32_t at;

  DEV uint32_t centre(int32_t i) const { return at + 8 * i; }
  DEV uint32_t sum(int32_t i) const { return at + 8 * (TILE + i); }
  DEV uint32_t begin(int32_t i) const { return at + 4 * (4 * TILE + i); }
  DEV uint32_t end(int32_t i) const { return at + 4 * (5 * TILE + i); }
  DEV int32_t first(int32_t i) const { return lds<int32_t>(begin(i)); }
  DEV int32_t last(int32_t i) const { return lds<int32_t>(end(i)); }  // one past it

  // The tile's window `i` is that of `output`.
  DEV void set(int32_t i, int32_t output) const {
    const double at_centre = axis.centre(output);
    const int32_t from = axis.first(at_centre), to = axis.end(at_centre);
    double total = 0.;
#pragma unroll 1
    for (int32_t k = from; k < to; k++) total = add_rn(total, axis.weight(k, at_centre));
    sts(centre(i), at_centre);
    sts(sum(i), total);
    sts(begin(i), from);
    sts(end(i), to);
  }

  // Writes weights for the inputs `from .. to`, of which no window has more than TAPS: 32 neighbours are those that the
  // windows have for their k-th such input.
  DEV void weigh(uint32_t weights, int32_t from, int32_t to) const {
    const int32_t count = TILE * smaller(axis.taps, to - from);
#pragma unroll 1
    for (int32_t slot = threadIdx.x; slot < count; slot += THREADS) {
      const int32_t i = slot % TILE, k = larger(first(i), from) + slot / TILE;
      if (k >= smaller(last(i), to)) continue;
      const double share = div_rn(axis.weight(k, lds<double>(centre(i))), lds<double>(sum(i)));
      const double fixed = mul_rn(share, (double)(1 << FRACTION_BITS));
      sts(weights + 4 * slot, (int32_t)add_rn(fixed, fixed < 0. ? -0.5 : 0.5));
    }
  }
};

DEV void forward(const ResizeForward& p) {
  STATIC_SHARED(source, ROWS * PITCH);               // rows of the rectangle
  STATIC_SHARED(squeezed, ROWS * 4 * WORDS);         // the same after the horizontal pass
  STATIC_SHARED(across_weights, 4 * TILE * TAPS);
  STATIC_SHARED(down_weights, 4 * TILE * TAPS);
  STATIC_SHARED(windows, 2 * Windows::BYTES);

  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t image = blockIdx.x / (p.tiles * p.tiles);
  const int32_t top = blockIdx.x / p.tiles % p.tiles * TILE, left = blockIdx.x % p.tiles * TILE;
  const int32_t side = p.side, height = smaller(TILE, side - top), width = smaller(TILE, side - left);
  const Geometry rectangle(p.geometry, image);
  const Axis axes[2] = {{rectangle.width, p.side, p.bicubic != 0}, {rectangle.height, p.side, p.bicubic != 0}};
  const Windows across{axes[0], windows}, down{axes[1], windows + Windows::BYTES};
  // Where the tile is cut off by the crop's edge, its last column and row stand for the ones beyond.
  if (warp == 0) {
    const int32_t x = left + smaller(lane, width - 1);
    across.set(lane, rectangle.flip ? side - 1 - x : x);
  } else if (warp == 1) {
    down.set(lane, top + smaller(lane, height - 1));
  }
  __syncthreads();
  const int32_t leftmost = rectangle.flip ? width - 1 : 0;
  const int32_t first_column = across.first(leftmost), end_column = across.last(width - 1 - leftmost);
  const int32_t first_row = down.first(0), end_row = down.last(height - 1);
  const int32_t step = axes[0].taps <= TAPS ? COLUMNS : TAPS;
  const bool in_one = end_column - first_column <= step;

  int32_t sums[OWN_WORDS][4];
#pragma unroll
  for (auto& word : sums) word[0] = word[1] = word[2] = word[3] = HALF;

  for (int32_t row = first_row; row < end_row; row += ROWS) {
    const int32_t rows = smaller(ROWS, end_row - row);
    int32_t pixels[OWN_ROWS][3];
#pragma unroll
    for (auto& pixel : pixels) pixel[0] = pixel[1] = pixel[2] = HALF;
    for (int32_t column = first_column; column < end_column; column += step) {
      const int32_t columns = smaller(step, end_column - column);
      // Byte of `images` at which a row's columns start.
      const auto start = [&](int32_t y) {
        return rectangle.offset + 3 * ((int64_t)(row + y) * rectangle.width + column);
      };
      __syncthreads();  // nobody reads any more what was there
      for (int32_t y = warp; y < rows; y += WARPS) {
        copy_row(source + y * PITCH, p.images, start(y), start(y) + 3 * columns, rectangle);
      }
      cp_async_commit();
      if (row == first_row || !in_one) across.weigh(across_weights, column, column + columns);
      if (column == first_column) down.weigh(down_weights, row, row + rows);
      cp_async_wait<0>();
      __syncthreads();
      const int32_t from = larger(across.first(lane), column);
      const int32_t taps = smaller(across.last(lane), column + columns) - from;
      uint32_t at[OWN_ROWS];
#pragma unroll
      for (int32_t i = 0; i < OWN_ROWS; i++) {
        const int32_t y = smaller(warp + i * WARPS, rows - 1);
        at[i] = source + y * PITCH + (uint32_t)(start(y) & 15) + 3 * (from - column);
      }
      for (int32_t k = 0; k < taps; k++) {
        const int32_t weight = lds<int32_t>(across_weights + 4 * (TILE * k + lane));
#pragma unroll
        for (int32_t i = 0; i < OWN_ROWS; i++) {
#pragma unroll
          for (int32_t c = 0; c < 3; c++) pixels[i][c] += weight * lds<uint8_t>(at[i] + 3 * k + c);
        }
      }
    }
#pragma unroll
    for (int32_t i = 0; i < OWN_ROWS; i++) {
      const int32_t y = warp + i * WARPS;
      if (y >= rows) continue;
#pragma unroll
      for (int32_t c = 0; c < 3; c++) sts(squeezed + 4 * WORDS * y + 3 * lane + c, to_byte(pixels[i][c]));
    }
    __syncthreads();
#pragma unroll
    for (int32_t j = 0; j < OWN_WORDS; j++) {
      const int32_t item = threadIdx.x + j * THREADS, y = item / WORDS;
      const int32_t from = larger(down.first(y), row), taps = smaller(down.last(y), row + rows) - from;
      const uint32_t at = squeezed + 4 * (WORDS * (from - row) + item % WORDS);
      for (int32_t k = 0; k < taps; k++) {
        const int32_t weight = lds<int32_t>(down_weights + 4 * (TILE * k + y));
        const uint32_t word = lds<uint32_t>(at + 4 * WORDS * k);
#pragma unroll
        for (int32_t b = 0; b < 4; b++) sums[j][b] += weight * (int32_t)(word >> 8 * b & 255);
      }
    }
  }

  const auto tile = p.crops + 3 * (image * side * side + (int64_t)top * side + left);
  const bool whole = side % 4 == 0;  // then every row of the tile starts at a word, and ends at one
#pragma unroll
  for (int32_t j = 0; j < OWN_WORDS; j++) {
    const int32_t item = threadIdx.x + j * THREADS, y = item / WORDS, byte = 4 * (item % WORDS);
    if (y >= height || byte >= 3 * width) continue;
    Vec<uint8_t, 4> bytes;
#pragma unroll
    for (int32_t b = 0; b < 4; b++) bytes[b] = to_byte(sums[j][b]);
    const auto to = tile + (int64_t)3 * y * side;
    if (whole) {
      store_vec<4>(to, byte, bytes);
    } else {
#pragma unroll
      for (int32_t b = 0; b < 4; b++) {
        if (byte + b < 3 * width) store(to, byte + b, bytes[b]);
      }
    }
  }
}

}  // namespace resize

HOT_KERNEL(resize_forward, ResizeForward, 256, 3) { resize::forward(p); }
