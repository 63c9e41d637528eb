// philox.cuh - Philox4x32-10 (Salmon et al. 2011): the words of src/rng.rs, which says what each may depend on.
#pragma once
#include "ptx.cuh"

namespace philox {

enum Purpose : uint32_t { kMask = 2 };  // as `Purpose` in src/rng.rs

// The random words of one (seed, epoch, sample, purpose).
struct Stream {
  uint32_t seed[2], sample, epoch, purpose;

  DEV Stream(uint64_t seed_, uint32_t epoch_, uint64_t sample_, Purpose purpose_)
      : seed{(uint32_t)seed_, (uint32_t)(seed_ >> 32)},
        sample((uint32_t)sample_),
        epoch(epoch_),
        purpose(purpose_ ^ (uint32_t)(sample_ >> 32) << 4) {}

  // Words 4 index to 4 index + 3.
  DEV Vec<uint32_t, 4> block(uint32_t index) const {
    Vec<uint32_t, 4> x{{index, sample, epoch, purpose}};
    uint32_t key0 = seed[0], key1 = seed[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
      const uint32_t hi0 = mul_hi(0xD2511F53u, x[0]), lo0 = 0xD2511F53u * x[0];
      const uint32_t hi1 = mul_hi(0xCD9E8D57u, x[2]), lo1 = 0xCD9E8D57u * x[2];
      x = {{hi1 ^ x[1] ^ key0, lo1, hi0 ^ x[3] ^ key1, lo0}};
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return x;
  }
};

}  // namespace philox
