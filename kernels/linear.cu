// linear.cu - sums of columns: a layer's bias gradient. The products themselves are the driver's.
//
// Two stages, no atomics, so the order of every sum is set by the shape alone. First each block reads a slab of rows of
// one stripe of columns, once (2 bytes an element): a lane owns the columns of 16 bytes, a block's 8 warps take turns at
// the rows, four loads each before the first sum: 16 KB a block, 64 KB an SM. Its sums, one row of `partials`, are added
// up in the second stage, whose bytes are a thousandth.
#include "common/packed.cuh"

template <class T> struct LinearColumnSums {
  Global<float> partials;  // (slabs, columns)
  Global<const T> inp;     // (rows, columns)
  int64_t rows, slab_rows;
  int32_t columns, stripes;
};
static_assert(sizeof(LinearColumnSums<bf16>) == 40 && offsetof(LinearColumnSums<bf16>, stripes) == 36,
              "as in src/ops/linear/launch.rs");

struct LinearAddPartials {
  Global<float> sums, more_sums;   // the first `columns`, and as many that follow if not null
  Global<const float> partials;    // (count, all columns)
  int32_t count, columns;
};
static_assert(sizeof(LinearAddPartials) == 32 && offsetof(LinearAddPartials, columns) == 28,
              "as in src/ops/linear/launch.rs");

namespace linear {

constexpr int WARPS = 8;
constexpr int UNROLL = 4;

// What a lane reads of a row: 16 bytes, or four numbers where rows are no multiple of 16 bytes (the 588 numbers of a patch
// of 14 x 14 in bf16).
template <class T> struct Whole : Packed<T> {
  DEV static Whole read(Global<const T> p, int64_t i) { return {load_packed(p, i)}; }
};
template <class T> struct Four {
  static constexpr int N = 4;
  Vec<T, 4> x;
  DEV float operator[](int i) const { return to_f32(x[i]); }
  DEV static Four read(Global<const T> p, int64_t i) { return {load_vec<4>(p, i)}; }
};

template <class Piece, class T> DEV void column_sums(const LinearColumnSums<T>& p) {
  constexpr int N = Piece::N, STRIPE = 32 * N;
  STATIC_SHARED(shared, WARPS * STRIPE * 4);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t slab = blockIdx.x / p.stripes;
  const int stripe = blockIdx.x % p.stripes * STRIPE, column = stripe + lane * N;
  const bool owns = column < p.columns;
  int64_t row = slab * p.slab_rows + warp;
  const int64_t end = (slab + 1) * p.slab_rows < p.rows ? (slab + 1) * p.slab_rows : p.rows;
  float sums[N] = {};
  if (owns) {
    for (; row + (UNROLL - 1) * WARPS < end; row += UNROLL * WARPS) {
      Piece x[UNROLL];
      for (int u = 0; u < UNROLL; u++) x[u] = Piece::read(p.inp, (row + u * WARPS) * p.columns + column);
      for (int u = 0; u < UNROLL; u++) {
        for (int i = 0; i < N; i++) sums[i] += x[u][i];
      }
    }
    for (; row < end; row += WARPS) {
      const Piece x = Piece::read(p.inp, row * p.columns + column);
      for (int i = 0; i < N; i++) sums[i] += x[i];
    }
  }
  for (int i = 0; i < N; i += 4) {
    const Vec<float, 4> four = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
    sts(shared + (warp * STRIPE + lane * N + i) * 4, four);
  }
  __syncthreads();
  const int mine = threadIdx.x;
  if (mine < STRIPE && stripe + mine < p.columns) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; w++) sum += lds<float>(shared + (w * STRIPE + mine) * 4);
    store(p.partials, slab * p.columns + stripe + mine, sum);
  }
}

// A block owns 32 columns; its 16 warps take turns at the partial sums.
constexpr int ADD_WARPS = 16;

DEV void add_partials(const LinearAddPartials& p) {
  STATIC_SHARED(shared, ADD_WARPS * 32 * 4);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = p.more_sums ? 2 * p.columns : p.columns, column = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 8
    for (int i = warp; i < p.count; i += ADD_WARPS) sum += load(p.partials, (int64_t)i * columns + column);
  }
  sts(shared + threadIdx.x * 4, sum);
  __syncthreads();
  if (warp == 0 && column < columns) {
    sum = 0.f;
    for (int w = 0; w < ADD_WARPS; w++) sum += lds<float>(shared + (w * 32 + lane) * 4);
    const Global<float> sums = column < p.columns ? p.sums : p.more_sums;
    const int at = column < p.columns ? column : column - p.columns;
    store(sums, at, load(sums, at) + sum);
  }
}

}  // namespace linear

HOT_KERNEL(linear_column_sums_bf16, LinearColumnSums<bf16>, 256, 4) { linear::column_sums<linear::Whole<bf16>>(p); }
HOT_KERNEL(linear_column_sums_bf16_by_4, LinearColumnSums<bf16>, 256, 4) { linear::column_sums<linear::Four<bf16>>(p); }
HOT_KERNEL(linear_column_sums_f32, LinearColumnSums<float>, 256, 4) { linear::column_sums<linear::Whole<float>>(p); }
HOT_KERNEL(linear_add_partials, LinearAddPartials, 512, 2) { linear::add_partials(p); }
