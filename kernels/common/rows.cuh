// rows.cuh - what kernels that move rows of tokens share: a warp takes a row, a block neighbouring rows of one image.
#pragma once
#include "packed.cuh"

// 16 bytes, whatever they hold: a copy need not know.
using Chunk = Vec<uint32_t, 4>;

constexpr int ROWS = 4, ROW_THREADS = 32 * ROWS;  // of a block; as in src/ops/mod.rs

// The image of this block, and the row of this warp in it, if there is one: `blocks` are those of an image.
DEV uint32_t block_image(uint32_t blocks) { return blockIdx.x / blocks; }
DEV uint32_t warp_row(uint32_t blocks) { return blockIdx.x % blocks * ROWS + threadIdx.x / 32; }

// Goes over a row's chunks, those of a lane 32 apart: BATCH loads are under way before the first store.
template <uint32_t BATCH, class Load, class Store> DEV void for_each_chunk(uint32_t chunks, Load load, Store store) {
  for (uint32_t i = threadIdx.x % 32; i < chunks; i += 32 * BATCH) {
    decltype(load(i)) x[BATCH];
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++) {
      if (i + 32 * j < chunks) x[j] = load(i + 32 * j);
    }
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++) {
      if (i + 32 * j < chunks) store(i + 32 * j, x[j]);
    }
  }
}

DEV void copy_row(Global<Chunk> out, Global<const Chunk> inp, uint32_t chunks) {
  for_each_chunk<4>(chunks, [&](uint32_t i) { return load(inp, i); },
                    [&](uint32_t i, const Chunk& x) { store(out, i, x); });
}

// out = the sum of COUNT rows, in f32 from first to last, rounded once.
template <class T, int COUNT>
DEV void sum_rows(Global<T> out, const Global<const T> (&rows)[COUNT], uint32_t dim) {
  constexpr int N = Packed<T>::N;
  struct Loaded { Packed<T> x[COUNT]; };
  for_each_chunk<2>(
      dim / N,
      [&](uint32_t i) {
        Loaded loaded;
        for (int r = 0; r < COUNT; r++) loaded.x[r] = load_packed(rows[r], (int64_t)i * N);
        return loaded;
      },
      [&](uint32_t i, const Loaded& loaded) {
        float sum[N];
        for (int j = 0; j < N; j++) {
          sum[j] = loaded.x[0][j];
          for (int r = 1; r < COUNT; r++) sum[j] += loaded.x[r][j];
        }
        store_packed(out, (int64_t)i * N, sum);
      });
}
