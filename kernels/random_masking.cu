// random_masking.cu - the shuffle of each image's patches, as src/ops/random_masking.rs defines it.
//
// One thread block per image. Every block of patches gets a random word (Philox, the same as on the CPU) above its id
// in a 64-bit key; a bitonic sort in shared memory orders the keys, so equal words keep the order of their ids. Then
// one warp adds up where each block of patches starts, since those at the image's edge may be cut, and all threads
// write.
//
// Bytes: 8 L written per image. The work is the sort: log2(G) (log2(G) + 1) / 2 steps of G / 2 exchanges.
#include "common/philox.cuh"

struct RandomMaskingForward {
  Global<int32_t> ids_keep;       // (B, K)
  Global<int32_t> ids_masked;     // (B, M)
  Global<int32_t> ids_restore;    // (B, L)
  Global<const int64_t> epoch;    // (1)
  Global<const int64_t> samples;  // (B)
  uint64_t seed;
  uint32_t kept;    // K
  uint32_t grid;    // patches along a side of the image
  uint32_t block;   // patches along a side of a block
  uint32_t blocks;  // blocks along a side of the image
  uint32_t slots;   // blocks of an image, up to the next power of two, at least 4: keys in shared memory
  uint32_t unused;
};
static_assert(sizeof(RandomMaskingForward) == 72 && offsetof(RandomMaskingForward, unused) == 68,
              "as in src/ops/random_masking.rs");

namespace random_masking {

// Sorts `slots` keys at `keys`, ascending; all threads call it, and see the result.
DEV void sort(uint32_t keys, uint32_t slots) {
  // Exchanges over at most this distance stay within the 64 keys of one warp, which need a barrier of the warp only.
  constexpr uint32_t kWarpStride = 32;
  uint32_t last_stride = slots;
  for (uint32_t size = 2; size <= slots; size *= 2) {
    for (uint32_t stride = size / 2; stride; stride /= 2) {
      if (stride > kWarpStride || last_stride > kWarpStride) __syncthreads();
      else __syncwarp();
      last_stride = stride;
      for (uint32_t pair = threadIdx.x; pair < slots / 2; pair += blockDim.x) {
        const uint32_t low = 2 * pair - (pair & (stride - 1));
        const uint32_t a_at = keys + 8 * low, b_at = a_at + 8 * stride;
        const uint64_t a = lds<uint64_t>(a_at), b = lds<uint64_t>(b_at);
        const bool ascending = (low & size) == 0;
        if ((a > b) == ascending) {
          sts(a_at, b);
          sts(b_at, a);
        }
      }
    }
  }
  __syncthreads();
}

DEV void forward(const RandomMaskingForward& p) {
  const uint32_t keys = dynamic_shared();
  const uint32_t count = p.blocks * p.blocks, patches = p.grid * p.grid;
  const int64_t image = blockIdx.x;

  const philox::Stream words(p.seed, (uint32_t)load(p.epoch, 0), (uint64_t)load(p.samples, image), philox::kMask);
  for (uint32_t i = 4 * threadIdx.x; i < p.slots; i += 4 * blockDim.x) {
    const Vec<uint32_t, 4> word = words.block(i / 4);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
      // Slots beyond the last id come last: no id is as large.
      const uint64_t key = (uint64_t)word[j] << 32 | (i + j);
      sts(keys + 8 * (i + j), i + j < count ? key : ~(uint64_t)0);
    }
  }
  sort(keys, p.slots);

  // The word has served: in its place goes where the block's patches start.
  const auto width = [&](uint32_t x) { return x + p.block < p.grid ? p.block : p.grid - x; };
  if (threadIdx.x < 32) {
    const uint32_t lane = threadIdx.x;
    uint32_t before = 0;
    for (uint32_t first = 0; first < count; first += 32) {
      const uint32_t at = keys + 8 * (first + lane);
      uint32_t id = 0, size = 0;
      if (first + lane < count) {
        id = (uint32_t)lds<uint64_t>(at);
        size = width(id % p.blocks * p.block) * width(id / p.blocks * p.block);
      }
      uint32_t end = before + size;
#pragma unroll
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, end - before, step);
        if (lane >= step) end += other;
      }
      if (first + lane < count) sts(at, (uint64_t)(end - size) << 32 | id);
      before = __shfl_sync(~0u, end, 31);
    }
  }
  __syncthreads();

  const auto keep = p.ids_keep + image * p.kept, masked = p.ids_masked + image * (patches - p.kept);
  const auto restore = p.ids_restore + image * patches;
  const uint32_t area = p.block * p.block;
  for (uint32_t i = threadIdx.x; i < count * area; i += blockDim.x) {
    const uint64_t key = lds<uint64_t>(keys + 8 * (i / area));
    const uint32_t id = (uint32_t)key, start = (uint32_t)(key >> 32);
    const uint32_t left = id % p.blocks * p.block, top = id / p.blocks * p.block;
    const uint32_t x = i % area / p.block, y = i % area % p.block;  // down the columns first
    if (x >= width(left) || y >= width(top)) continue;
    const uint32_t place = start + x * width(top) + y;
    const uint32_t patch = (top + y) * p.grid + left + x;
    store(restore, patch, (int32_t)place);
    if (place < p.kept) store(keep, place, (int32_t)patch);
    else store(masked, place - p.kept, (int32_t)patch);
  }
}

}  // namespace random_masking

KERNEL(random_masking_forward, RandomMaskingForward, 1024, 1) { random_masking::forward(p); }
