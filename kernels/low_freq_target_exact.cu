// low_freq_target_exact.cu - PixMIM's target in f32, for any size and radius: what stands between its matrix products.
//
// The products are the driver's (cublasLt on a GPU), over as many planes as fit the workspace; see
// src/ops/low_freq_target/launch.rs. These kernels only move and combine numbers: each thread takes one, a warp
// accesses neighbours, and none is on a path that a bf16 training run takes.
#include "common/ptx.cuh"

struct LowFreqTargetCentre {
  Global<float> centred;         // (planes, S, S)
  Global<const uint8_t> pixels;  // as many, u8 or f32
  int64_t count;
};
static_assert(sizeof(LowFreqTargetCentre) == 24 && offsetof(LowFreqTargetCentre, count) == 16,
              "as in src/ops/low_freq_target/launch.rs");

struct LowFreqTargetKeep {
  Global<float> spectrum;         // (planes, 2 n, 2 n)
  int64_t count;                  // planes n n
  int64_t limit;                  // a bin is kept up to this square of twice its distance from the disc's centre
  int32_t frequencies, first;     // n, and the lowest of them
  int32_t half_bin;               // 1 if the disc is half a bin off: even sizes
  float per_pixel;                // 1 / S^2
};
static_assert(sizeof(LowFreqTargetKeep) == 40 && offsetof(LowFreqTargetKeep, per_pixel) == 36,
              "as in src/ops/low_freq_target/launch.rs");

struct LowFreqTargetGather {
  Global<float> target;              // (images, M, 3 P P)
  Global<const float> filtered;      // (images, 3, S, 2 S): a row's real parts, then its imaginary parts
  Global<const int32_t> ids_masked;  // (images, M)
  int64_t count;                     // images M 3 P P
  float mean[3], std[3];
  int32_t size, patch, grid, masked;
};
static_assert(sizeof(LowFreqTargetGather) == 72 && offsetof(LowFreqTargetGather, masked) == 68,
              "as in src/ops/low_freq_target/launch.rs");

namespace low_freq_target_exact {

// The middle of the range is taken off: a constant passes the filter, and sums of smaller numbers are more exact.
constexpr float kCentre = 0.5f;

DEV int64_t element() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }

template <class T> DEV void centre(const LowFreqTargetCentre& p) {
  const int64_t i = element();
  if (i >= p.count) return;
  const Global<const T> pixels = p.pixels.as<const T>();
  if constexpr (sizeof(T) == 1)
    store(p.centred, i, ((float)load(pixels, i) - 255 * kCentre) / 255);
  else
    store(p.centred, i, load(pixels, i) - kCentre);
}

// From [[c re, c im], [-s re, -s im]] of a bin (c, s: cosine and sine of the columns; re, im: the rows' transform), the
// spectrum X = (c - i s)(re + i im) where it is kept, as [[Re X, Im X], [Im X, -Re X]]: what the inverse multiplies.
DEV void keep(const LowFreqTargetKeep& p) {
  const int64_t i = element();
  if (i >= p.count) return;
  const int n = p.frequencies;
  const int64_t plane = i / (n * n);
  const int bin = (int)(i % (n * n)), u = bin / n, v = bin % n;
  const int64_t at = (plane * 2 * n + u) * 2 * n + v, below = (int64_t)2 * n * n;
  const int64_t down = 2 * (p.first + u) + p.half_bin, right = 2 * (p.first + v) + p.half_bin;
  const float scale = down * down + right * right <= p.limit ? p.per_pixel : 0.f;
  const float re = scale * (load(p.spectrum, at) - load(p.spectrum, at + below + n));
  const float im = scale * (load(p.spectrum, at + n) + load(p.spectrum, at + below));
  store(p.spectrum, at, re);
  store(p.spectrum, at + n, im);
  store(p.spectrum, at + below, im);
  store(p.spectrum, at + below + n, -re);
}

DEV void gather(const LowFreqTargetGather& p) {
  const int64_t i = element();
  if (i >= p.count) return;
  const int numbers = 3 * p.patch * p.patch;
  const int64_t place = i / numbers, image = place / p.masked;
  const int number = (int)(i % numbers), channel = number % 3, pixel = number / 3;
  const int id = load(p.ids_masked, place);
  const int y = id / p.grid * p.patch + pixel / p.patch, x = id % p.grid * p.patch + pixel % p.patch;
  const int64_t at = ((image * 3 + channel) * p.size + y) * 2 * p.size + x;
  const float re = load(p.filtered, at) + kCentre, im = load(p.filtered, at + p.size);
  store(p.target, i, div_rn(sqrt_rn(fma3(re, re, im * im)) - p.mean[channel], p.std[channel]));
}

}  // namespace low_freq_target_exact

KERNEL(low_freq_target_centre_u8, LowFreqTargetCentre, 256, 4) { low_freq_target_exact::centre<uint8_t>(p); }
KERNEL(low_freq_target_centre_f32, LowFreqTargetCentre, 256, 4) { low_freq_target_exact::centre<float>(p); }
KERNEL(low_freq_target_keep, LowFreqTargetKeep, 256, 4) { low_freq_target_exact::keep(p); }
KERNEL(low_freq_target_gather, LowFreqTargetGather, 256, 4) { low_freq_target_exact::gather(p); }
