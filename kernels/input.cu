// input.cu - crops of uint8 images, read once: kept patches normalised in T, and either the whole crop as planes of
// bytes or the masked patches normalised in f32.
//
// One thread block per image and row of patches. It copies the P rows of the image that it needs to shared memory,
// with 16-byte copies from aligned addresses wherever rows start (an image's first and last bytes one by one), at
// most S pixels of each: reflection folds a crop onto fewer columns, never more. Then it writes through two small
// tables: where each row of the crop lies in shared memory, and how far into the row each column does. A thread makes
// four neighbours at a time, so that a warp stores 128 bytes of a plane, 256 of bf16 patches, or 512 of f32 ones.
//
// Bytes: an image's crop once (3 S S and the ends of rows), 3 S S of planes or 4 M E of target, and K E of T.
#include "common/images.cuh"

struct InputForward {
  Global<void> patches;             // (B, K, E) in T: (channel, row, column)
  Global<float> target;             // (B, M, E): (row, column, channel); or none
  Global<uint8_t> pixels;           // (B, 3, S, S); or none
  Global<const uint8_t> images;
  Global<const int64_t> geometry;   // (B, 6)
  Global<const int32_t> ids_keep;   // (B, K), all different
  Global<const int32_t> ids_masked; // (B, M), all different; if there is a target
  float scale[3][2];                // 1 / (255 std), in two parts
  float shift[3][2];                // -mean / std, in two parts
  uint32_t kept, masked;            // K; M, or 0 without a target
  uint32_t grid;                    // patches along a side
  uint32_t patch_size;              // P
  uint32_t pitch;                   // bytes of a row in shared memory, a multiple of 16, at least 3 S + 15
  uint32_t unused;
};
static_assert(sizeof(InputForward) == 128 && offsetof(InputForward, unused) == 124, "as in src/ops/input.rs");

namespace input {

DEV int32_t reflect(int32_t i, int32_t n) {
  i = i < 0 ? -i : i;
  return i > n - 1 ? 2 * (n - 1) - i : i;
}

// The first of the columns onto which `left .. left + side` folds; there are at most `side`.
DEV int32_t first_column(int32_t left, int32_t side, int32_t width) {
  const int32_t right = left + side - 1;
  if (left <= 0 && right >= 0) return 0;
  if (right < 0) return -right;
  const int32_t folded = reflect(right, width);
  return left < folded ? left : folded;
}

// One past the last of them.
DEV int32_t end_column(int32_t left, int32_t side, int32_t width) {
  const int32_t right = left + side - 1;
  if (left <= width - 1 && right >= width - 1) return width;
  const int32_t a = reflect(left, width), b = reflect(right, width);
  return (a > b ? a : b) + 1;
}

// Where the block's row of patches lies in shared memory.
struct Rows {
  uint32_t row_at;  // P addresses, of 4 bytes
  uint32_t column;  // S offsets into a row, of 4 bytes
  uint32_t place;   // of each patch: in `kept`, or K plus that in `masked`, or -1; 4 bytes each

  DEV uint32_t row(uint32_t y) const { return lds<uint32_t>(row_at + 4 * y); }
  DEV uint32_t at(uint32_t row, uint32_t x) const { return row + lds<uint32_t>(column + 4 * x); }
};

// (byte / 255 - mean) / std. Scale and shift in two parts each leave two roundings, of the large sum and of the result:
// within 1 ulp of the exact value.
DEV float normalise(const InputForward& p, uint32_t channel, uint8_t byte) {
  const float x = (float)byte;
  return fma3(x, p.scale[channel][0], p.shift[channel][0]) + fma3(x, p.scale[channel][1], p.shift[channel][1]);
}

// Stores elements `i .. i + 4` of `n`, where `whole` says that both are multiples of 4.
template <class T> DEV void store4(Global<T> to, uint32_t i, uint32_t n, bool whole, const Vec<T, 4>& values) {
  if (whole) {
    store_vec<4>(to, i, values);
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
      if (i + j < n) store(to, i + j, values[j]);
    }
  }
}

// Elements `i .. i + 4` of `n` of the patch that starts at column `left`, in the encoder's order.
template <class T>
DEV Vec<T, 4> channel_row_column(const InputForward& p, const Rows& rows, uint32_t left, uint32_t i, uint32_t n) {
  Vec<T, 4> values = {};
  uint32_t c = i / (n / 3), y = i % (n / 3) / p.patch_size, x = i % p.patch_size, row = rows.row(y);
#pragma unroll
  for (uint32_t j = 0; j < 4; j++) {
    if (i + j >= n) break;
    if (j && ++x == p.patch_size) {
      x = 0;
      if (++y == p.patch_size) y = 0, c++;
      row = rows.row(y);
    }
    values[j] = from_f32<T>(normalise(p, c, lds<uint8_t>(rows.at(row, left + x) + c)));
  }
  return values;
}

// The same in the order of the target.
DEV Vec<float, 4> row_column_channel(const InputForward& p, const Rows& rows, uint32_t left, uint32_t i, uint32_t n) {
  Vec<float, 4> values = {};
  uint32_t c = i % 3, y = i / 3 / p.patch_size, x = i / 3 % p.patch_size, at = rows.at(rows.row(y), left + x);
#pragma unroll
  for (uint32_t j = 0; j < 4; j++) {
    if (i + j >= n) break;
    if (j && ++c == 3) {
      c = 0;
      if (++x == p.patch_size) x = 0, y++;
      at = rows.at(rows.row(y), left + x);
    }
    values[j] = normalise(p, c, lds<uint8_t>(at + c));
  }
  return values;
}

template <class T> DEV void forward(const InputForward& p) {
  const uint32_t side = p.grid * p.patch_size, numbers = 3 * p.patch_size * p.patch_size;
  const int64_t image = blockIdx.x / p.grid;
  const uint32_t patch_row = blockIdx.x % p.grid;
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint32_t bytes = dynamic_shared();
  const uint32_t tables = bytes + p.patch_size * p.pitch;
  const Rows rows{tables, tables + 4 * p.patch_size, tables + 4 * (p.patch_size + side)};

  const Geometry crop(p.geometry, image);
  const int32_t first = first_column(crop.left, side, crop.width), end = end_column(crop.left, side, crop.width);
  for (uint32_t y = thread / 32; y < p.patch_size; y += threads / 32) {
    const int64_t row = reflect(crop.top + (int32_t)(patch_row * p.patch_size + y), crop.height);
    const int64_t start = crop.offset + 3 * row * crop.width;
    const uint32_t to = bytes + y * p.pitch;
    copy_row(to, p.images, start + 3 * first, start + 3 * end, crop);
    if (thread % 32 == 0) sts(rows.row_at + 4 * y, to + (uint32_t)((start + 3 * first) & 15));
  }
  cp_async_commit();
  for (uint32_t x = thread; x < side; x += threads) {
    const int32_t column = crop.left + (int32_t)(crop.flip ? side - 1 - x : x);
    sts(rows.column + 4 * x, 3 * (uint32_t)(reflect(column, crop.width) - first));
  }
  for (uint32_t x = thread; x < p.grid; x += threads) sts(rows.place + 4 * x, ~0u);
  __syncthreads();
  for (uint32_t i = thread; i < p.kept + p.masked; i += threads) {
    const int32_t id =
        i < p.kept ? load(p.ids_keep, image * p.kept + i) : load(p.ids_masked, image * p.masked + i - p.kept);
    if (id / p.grid == patch_row) sts(rows.place + 4 * (id % p.grid), i);
  }
  cp_async_wait<0>();
  __syncthreads();

  const bool whole = p.patch_size % 2 == 0;  // then rows of patches, planes and patches start at multiples of 4
  if (p.pixels) {
    const int64_t plane = (int64_t)side * side;
    const uint32_t band = p.patch_size * side;
    const auto pixels = p.pixels + (3 * image * plane + patch_row * band);
    for (uint32_t i = 4 * thread; i < band; i += 4 * threads) {
      Vec<uint8_t, 4> rgb[3] = {};
      uint32_t y = i / side, x = i % side, row = rows.row(y);
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        if (i + j >= band) break;
        if (j && ++x == side) x = 0, row = rows.row(++y);
        const uint32_t at = rows.at(row, x);
#pragma unroll
        for (uint32_t c = 0; c < 3; c++) rgb[c][j] = lds<uint8_t>(at + c);
      }
#pragma unroll
      for (uint32_t c = 0; c < 3; c++) store4(pixels + c * plane, i, band, whole, rgb[c]);
    }
  }

  const uint32_t quads = (numbers + 3) / 4;
  for (uint32_t item = thread; item < p.grid * quads; item += threads) {
    const uint32_t patch = item / quads, i = item % quads * 4;
    const uint32_t place = lds<uint32_t>(rows.place + 4 * patch);
    if (place < p.kept) {
      const auto to = p.patches.template as<T>() + (image * p.kept + place) * numbers;
      store4(to, i, numbers, whole, channel_row_column<T>(p, rows, patch * p.patch_size, i, numbers));
    } else if (place != ~0u) {
      const auto to = p.target + (image * p.masked + place - p.kept) * numbers;
      store4(to, i, numbers, whole, row_column_channel(p, rows, patch * p.patch_size, i, numbers));
    }
  }
}

}  // namespace input

HOT_KERNEL(input_forward_bf16, InputForward, 256, 5) { input::forward<bf16>(p); }
HOT_KERNEL(input_forward_f32, InputForward, 256, 5) { input::forward<float>(p); }
