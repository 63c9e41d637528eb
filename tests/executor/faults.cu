// faults.cu - kernels for the tests of the host executor: one planted fault each, and some without any.
//
// x and y hold floats; y has one for each thread of the grid unless a test says otherwise.
#include "../../kernels/common/ptx.cuh"

struct FaultParams {
  Global<const float> x;
  Global<float> y;
  int64_t n;
};

DEV int lane() { return (int)(threadIdx.x % 32); }
DEV int warp() { return (int)(threadIdx.x / 32); }
DEV uint32_t word(uint32_t i) { return dynamic_shared() + 4 * i; }

// ---- races in shared memory --------------------------------------------------------------------------------------

KERNEL(fault_missing_barrier, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 0.f);
  __syncthreads();
  sts<float>(word(threadIdx.x), 1.f);
  store(p.y, threadIdx.x, lds<float>(word(threadIdx.x ^ 32)));
}
KERNEL(fault_missing_barrier_before_overwrite, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 1.f);
  __syncthreads();
  if (warp() == 0) lds<float>(word(threadIdx.x ^ 32));
  if (warp() == 1) sts<float>(word(threadIdx.x), 2.f);
}
KERNEL(fault_two_warps_write, FaultParams, 128, 1) { sts<float>(word((uint32_t)lane()), (float)warp()); }
KERNEL(fault_ldmatrix_without_barrier, FaultParams, 128, 1) {
  for (uint32_t i = 0; i < 2; i++) {
    sts<float>(word(threadIdx.x ^ 32), 0.f);
    if (i == 0) __syncthreads();
  }
  uint32_t r[1];
  ldmatrix_x1(r, dynamic_shared() + 128 * (uint32_t)warp() + 16 * (uint32_t)(lane() % 8));
}
KERNEL(fault_missing_syncwarp, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 0.f);
  __syncwarp();
  sts<float>(word(threadIdx.x), 1.f);
  store(p.y, threadIdx.x, lds<float>(word(threadIdx.x ^ 1)));
}
KERNEL(fault_missing_syncwarp_before_overwrite, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 1.f);
  __syncwarp();
  if (lane() % 2) {
    lds<float>(word(threadIdx.x ^ 1));
  }
  __shfl_sync(~0u, 1, 0);  // keeps the lanes in step, and orders no memory
  if (lane() % 2 == 0) sts<float>(word(threadIdx.x), 2.f);
}
KERNEL(fault_two_lanes_write, FaultParams, 128, 1) { sts<float>(word(threadIdx.x / 2), 1.f); }
// The lanes of a half meet, but each reads what the other half wrote.
KERNEL(fault_syncwarp_of_the_wrong_half, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 0.f);
  __syncwarp();
  sts<float>(word(threadIdx.x), 1.f);
  __syncwarp(lane() < 16 ? 0x0000ffffu : 0xffff0000u);
  store(p.y, threadIdx.x, lds<float>(word(threadIdx.x ^ 16)));
}
// Warps 0 and 1 meet; warp 2 reads what warp 0 wrote.
KERNEL(fault_named_barrier_of_others, FaultParams, 96, 1) {
  if (warp() == 0) sts<float>(word((uint32_t)lane()), 0.f);
  __syncthreads();
  if (warp() == 0) sts<float>(word((uint32_t)lane()), 1.f);
  if (warp() < 2) named_barrier(1, 64);
  if (warp() > 0) store(p.y, threadIdx.x, lds<float>(word((uint32_t)lane())));
}
KERNEL(fault_uninitialised_shared, FaultParams, 128, 1) { store(p.y, threadIdx.x, lds<float>(word(threadIdx.x))); }

// ---- cp.async ----------------------------------------------------------------------------------------------------

KERNEL(fault_missing_wait, FaultParams, 128, 1) {
  cp_async16(dynamic_shared() + 16 * threadIdx.x, p.x + 4 * threadIdx.x, 16);
  cp_async_commit();
  __syncthreads();
  store(p.y, threadIdx.x, lds<float>(word(threadIdx.x)));
  cp_async_wait<0>();
}
KERNEL(fault_wait_for_the_older_group, FaultParams, 128, 1) {
  for (uint32_t i = 0; i < 2; i++) {
    cp_async16(dynamic_shared() + 16 * (threadIdx.x + i * blockDim.x), p.x + 4 * threadIdx.x, 16);
    cp_async_commit();
  }
  cp_async_wait<1>();
  const float x = lds<float>(dynamic_shared() + 16 * threadIdx.x);  // landed
  store(p.y, threadIdx.x, x + lds<float>(dynamic_shared() + 16 * (threadIdx.x + blockDim.x)));
  cp_async_wait<0>();
}
KERNEL(fault_exit_without_wait, FaultParams, 128, 1) {
  cp_async16(dynamic_shared() + 16 * threadIdx.x, p.x + 4 * threadIdx.x, 16);
  cp_async_commit();
}
KERNEL(fault_cp_async_past_the_end, FaultParams, 128, 1) {
  cp_async16(dynamic_shared() + 16 * threadIdx.x, p.x + 4 * (int64_t)threadIdx.x + p.n, 16);
  cp_async_commit();
  cp_async_wait<0>();
}

// ---- bounds and alignment ----------------------------------------------------------------------------------------

KERNEL(fault_shared_read_past_the_end, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 1.f);
  __syncthreads();
  lds<float>(word(threadIdx.x + 1));
}
KERNEL(fault_shared_store_past_the_end, FaultParams, 128, 1) { sts<float>(word(threadIdx.x + 1), 1.f); }
KERNEL(fault_shared_store_before_the_start, FaultParams, 128, 1) { sts<float>(word(threadIdx.x) - 4, 1.f); }
KERNEL(fault_static_read_past_the_end, FaultParams, 128, 1) {
  STATIC_SHARED(table, 256);
  STATIC_SHARED(other, 256);
  sts<float>(other + 4 * (threadIdx.x % 64), 1.f);
  lds<float>(table + 256);
}
KERNEL(fault_static_store_past_the_end, FaultParams, 128, 1) {
  STATIC_SHARED(table, 256);
  sts<float>(table + 4 * (threadIdx.x + 1), 1.f);
}
KERNEL(fault_misaligned_ldmatrix, FaultParams, 128, 1) {
  sts<float>(word(threadIdx.x), 1.f);
  __syncthreads();
  uint32_t r[1];
  ldmatrix_x1(r, dynamic_shared() + 8 + 16 * (uint32_t)(lane() % 8));
}
KERNEL(fault_misaligned_shared, FaultParams, 128, 1) { sts<Vec<float, 4>>(word(4 * threadIdx.x + 2), {}); }
KERNEL(fault_load_at, FaultParams, 128, 1) { store(p.y, threadIdx.x, load(p.x, p.n)); }
KERNEL(fault_store_at, FaultParams, 128, 1) {
  if (threadIdx.x == 37) store(p.y, p.n, 1.f);
}
KERNEL(fault_misaligned_global, FaultParams, 128, 1) { load_vec<4>(p.x, 4 * (int64_t)threadIdx.x + 2); }

// ---- global memory -----------------------------------------------------------------------------------------------

KERNEL(fault_uninitialised_global, FaultParams, 128, 1) { store(p.y, threadIdx.x, load(p.x, threadIdx.x)); }
KERNEL(fault_half_a_word_written, FaultParams, 128, 1) {
  store(p.y.as<bf16>(), 2 * (int64_t)threadIdx.x, bf16{0});
  load(p.y, threadIdx.x);
}
KERNEL(fault_blocks_write_one_word, FaultParams, 128, 1) { store(p.y, threadIdx.x, (float)blockIdx.x); }
KERNEL(fault_blocks_read_and_write, FaultParams, 128, 1) {
  const int64_t mine = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t next = (mine + blockDim.x) % ((int64_t)gridDim.x * blockDim.x);
  store(p.y, mine, load(p.y, next) + 1.f);
}
KERNEL(fault_output_with_a_hole, FaultParams, 128, 1) {
  if (threadIdx.x != 7) store(p.y, threadIdx.x, 1.f);
}

// ---- barriers and collectives ------------------------------------------------------------------------------------

KERNEL(fault_barrier_in_a_branch, FaultParams, 128, 1) {
  if (lane() < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
KERNEL(fault_barrier_for_some, FaultParams, 128, 1) {
  if (warp() == 0) __syncthreads();
  store(p.y, threadIdx.x, 1.f);
}
KERNEL(fault_early_exit, FaultParams, 128, 1) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
KERNEL(fault_lane_leaves, FaultParams, 128, 1) {
  if (lane() == 3) return;
  store(p.y, threadIdx.x, warp_sum(1.f));
}
KERNEL(fault_deadlock, FaultParams, 128, 1) { named_barrier(1 + warp(), 64); }
KERNEL(fault_barrier_against_shuffle, FaultParams, 128, 1) {
  if (lane() < 16) {
    __syncthreads();
  } else {
    __shfl_sync(~0u, 1, 0);
  }
}
KERNEL(fault_different_collectives, FaultParams, 128, 1) {
  if (lane() < 16) {
    __shfl_sync(~0u, 1, 0);
  } else {
    __ballot_sync(~0u, 1);
  }
}
KERNEL(fault_overlapping_masks, FaultParams, 128, 1) { __syncwarp(lane() < 16 ? 0x0001ffffu : 0xffff0000u); }
KERNEL(fault_outside_its_mask, FaultParams, 128, 1) { __syncwarp(0x0000ffffu); }
KERNEL(fault_shuffle_from_outside, FaultParams, 128, 1) {
  if (lane() < 16) __shfl_sync(0x0000ffffu, 1, 20);
}
KERNEL(fault_mixed_named_barrier, FaultParams, 128, 1) { named_barrier(2, warp() == 0 ? 64 : 128); }

// ---- what the hardware catches -----------------------------------------------------------------------------------

KERNEL(fault_raw_pointer, FaultParams, 128, 1) { *const_cast<volatile float*>(p.y.raw() + p.n) = 1.f; }
static int recurse(int depth) {
  volatile char frame[1024];
  frame[depth % 1024] = (char)depth;
  return depth < 0 ? 0 : recurse(depth + 1) + frame[(depth + 1) % 1024];
}
KERNEL(fault_stack_overflow, FaultParams, 128, 1) { store(p.y, threadIdx.x, (float)recurse((int)p.n)); }
KERNEL(fault_division_by_zero, FaultParams, 128, 1) {
  store(p.y, threadIdx.x, (float)((int)threadIdx.x / (int)p.n));
}

// ---- without faults ----------------------------------------------------------------------------------------------

// Every feature at once, in ways that look like faults and are none. 128 threads; x: 512 floats; y: 128 floats.
KERNEL(sound_everything, FaultParams, 128, 1) {
  STATIC_SHARED(halves, 1024);
  STATIC_SHARED(sums, 64);
  const int64_t base = (int64_t)blockIdx.x * blockDim.x;
  const uint32_t tile = dynamic_shared(), t = threadIdx.x;  // 128 rows of 16 bytes, twice

  // Two groups of copies; the second has only 8 bytes, the rest is zero.
  cp_async16(tile + 16 * t, p.x + 4 * (int64_t)t, 16);
  cp_async_commit();
  cp_async16(tile + 2048 + 16 * t, p.x + 4 * (int64_t)t, 8);
  cp_async_commit();
  cp_async_wait<1>();
  float sum = lds<float>(tile + 16 * t + 4);  // its own copy needs no barrier
  cp_async_wait<0>();
  __syncthreads();
  const Vec<float, 4> row = lds<Vec<float, 4>>(tile + 2048 + 16 * (t ^ 32));
  sum += row[0] + 2.f * row[1] + 3.f * row[2] + 4.f * row[3];

  // Threads of one word, each with its half; bytes of one half.
  sts<bf16>(halves + 2 * t, from_f32<bf16>((float)t));
  sts<uint8_t>(halves + 256 + t, (uint8_t)t);
  __syncthreads();
  sum += to_f32(lds<bf16>(halves + 2 * (127 - t))) + (float)lds<uint8_t>(halves + 256 + (t ^ 33));

  // Hand-over inside a warp, and inside its halves.
  __syncthreads();
  sts<float>(tile + 4 * t, sum);
  __syncwarp();
  sum += lds<float>(tile + 4 * (t ^ 31));
  __syncwarp();
  sts<float>(tile + 4 * t, sum);
  const uint32_t half = lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  __syncwarp(half);
  sum += lds<float>(tile + 4 * (t ^ 15));
  __syncwarp(half);
  sts<float>(tile + 4 * t, sum);

  // Warp 0 and 1 meet under one number, 2 and 3 under another, three times over.
  for (int i = 0; i < 3; i++) {
    named_barrier(1 + warp() / 2, 64);
    const float other = lds<float>(tile + 4 * (t ^ 32));
    named_barrier(1 + warp() / 2, 64);
    sum += 0.5f * other;
    sts<float>(tile + 4 * t, sum);
  }
  __syncthreads();

  // Collectives.
  sum += warp_sum(sum) + quad_max(sum) + __shfl_xor_sync(half, sum, 5) + __shfl_up_sync(~0u, sum, 3, 8);
  if (lane() >= 16) sum += __shfl_down_sync(0xffff0000u, sum, 2, 16);
  sum += (float)__popc(__ballot_sync(half, (int)t & 1));
  sum += (float)__any_sync(~0u, t == 40) + (float)__all_sync(~0u, t < 96);
  sum += (float)__reduce_max_sync(half, (int)t) - (float)__reduce_add_sync(~0u, t);

  // Tensor cores on the first 512 bytes of the tile, as bf16.
  uint32_t a[4], b[4], b2[2], b1[1];
  ldmatrix_x4(a, tile + 16 * (uint32_t)lane());
  ldmatrix_x4_trans(b, tile + 512 + 16 * (uint32_t)lane());
  ldmatrix_x2_trans(b2, tile + 16 * (uint32_t)(lane() % 16));
  ldmatrix_x1(b1, tile + 16 * (uint32_t)(lane() % 8));
  for (uint32_t& r : a) r &= 0x3fff3fff;  // below 2: no infinities
  for (uint32_t& r : b) r &= 0x3fff3fff;
  float c0[4] = {}, c1[4] = {};
  mma_bf16_x2(c0, c1, a, b);
  mma_bf16(c0, a, b2[0] & 0x3fff3fff, b1[0] & 0x3fff3fff);
  for (uint32_t& r : a) r &= 0x3c003c00;
  for (uint32_t& r : b) r &= 0x3c003c00;
  mma_f16_x2(c0, c1, a, b);
  sum += c0[0] + c0[1] - c0[2] * c1[0] + c1[3];
  if (lane() == 0) sts<float>(sums + 4 * (uint32_t)warp(), sum);
  __syncthreads();
  store(p.y, base + t, sum + lds<float>(sums + 4 * (t % 4)));
}
// Two blocks in one word, each with its half; everybody reads x.
KERNEL(sound_blocks_share_a_word, FaultParams, 128, 1) {
  const int64_t i = (int64_t)threadIdx.x * gridDim.x + blockIdx.x;
  store(p.y.as<bf16>(), i, from_f32<bf16>(load(p.x, threadIdx.x) + (float)blockIdx.x));
}
KERNEL(sound_copy, FaultParams, 128, 1) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) store(p.y, i, load(p.x, i));
}

// ---- for comparison with the published tables --------------------------------------------------------------------

// One warp: 4 registers of A, 2 of B and 4 of C per lane in x; 4 of D per lane in y. n is 1 for f16.
KERNEL(layout_mma, FaultParams, 32, 1) {
  const int64_t at = 10 * (int64_t)threadIdx.x;
  uint32_t r[6];
  float c[4];
  for (int i = 0; i < 6; i++) r[i] = float_bits(load(p.x, at + i));
  for (int i = 0; i < 4; i++) c[i] = load(p.x, at + 6 + i);
  const uint32_t a[4] = {r[0], r[1], r[2], r[3]};
  if (p.n) {
    mma_f16(c, a, r[4], r[5]);
  } else {
    mma_bf16(c, a, r[4], r[5]);
  }
  for (int i = 0; i < 4; i++) store(p.y, 4 * (int64_t)threadIdx.x + i, c[i]);
}
// Four 8x8 matrices of 16 bits in x (128 words); y: per lane the 4 + 4 + 2 + 2 + 1 registers of x4, x4.trans, x2,
// x2.trans and x1.
KERNEL(layout_ldmatrix, FaultParams, 32, 1) {
  for (uint32_t i = 0; i < 4; i++) sts<float>(word(4 * threadIdx.x + i), load(p.x, 4 * threadIdx.x + i));
  __syncthreads();
  const uint32_t rows = dynamic_shared();
  uint32_t r[4], s[4], u[2], v[2], w[1];
  ldmatrix_x4(r, rows + 16 * threadIdx.x);
  ldmatrix_x4_trans(s, rows + 16 * threadIdx.x);
  ldmatrix_x2(u, rows + 16 * (threadIdx.x % 16));
  ldmatrix_x2_trans(v, rows + 16 * (threadIdx.x % 16));
  ldmatrix_x1(w, rows + 16 * (threadIdx.x % 8));
  const uint32_t all[13] = {r[0], r[1], r[2], r[3], s[0], s[1], s[2], s[3], u[0], u[1], v[0], v[1], w[0]};
  for (int i = 0; i < 13; i++) store(p.y, 13 * (int64_t)threadIdx.x + i, bits_float(all[i]));
}
// Per lane, 8 values: four shuffles, with width 8 where they have one, a vote, and three partial ones.
KERNEL(layout_shuffle, FaultParams, 32, 1) {
  const int l = lane();
  const uint32_t odd = 0xaaaaaaaau, mine = l % 2 ? odd : ~odd;
  const float out[8] = {(float)__shfl_sync(~0u, l, 3, 8),
                        (float)__shfl_xor_sync(~0u, l, 12, 8),
                        (float)__shfl_up_sync(~0u, l, 3, 8),
                        (float)__shfl_down_sync(~0u, l, 3, 8),
                        (float)__shfl_xor_sync(mine, l, 6),
                        (float)__shfl_down_sync(mine, (double)l, 2),
                        (float)__popc(__ballot_sync(mine, l < 11)),
                        (float)__reduce_add_sync(mine, l)};
  for (int i = 0; i < 8; i++) store(p.y, 8 * (int64_t)l + i, out[i]);
}
// y[i] = x[i] as f16 (bits), as bf16 (bits), 2^x, log2 x.
KERNEL(layout_convert, FaultParams, 128, 1) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const float x = load(p.x, i);
  store(p.y, 6 * i, bits_float(pack_f16(x, -x)));
  store(p.y, 6 * i + 1, bits_float(pack_bf16(x, -x)));
  store(p.y, 6 * i + 2, to_f32(from_f32<f16>(x)));
  store(p.y, 6 * i + 3, to_f32(from_f32<bf16>(x)));
  store(p.y, 6 * i + 4, ex2(x));
  store(p.y, 6 * i + 5, lg2(x));
}
