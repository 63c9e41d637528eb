// numbers.h - conversions and special functions: fixed arithmetic, so the bits do not depend on the C library.
#pragma once
#include <immintrin.h>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

inline uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
inline float unbits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// To nearest even. A NaN becomes 0x7fff, as on the device.
inline uint16_t f2bf(float x) {
  const uint32_t u = bits(x);
  if (x != x) return 0x7fff;
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline uint16_t f2h(float x) {
  if (x != x) return 0x7fff;
  return (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0);
}
inline float h2f(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }

// ex2.approx.ftz: 2^x within 2.4e-7 (relative); subnormal results are zero.
inline float ex2(float x) {
  if (x != x) return x;
  if (x >= 128.f) return INFINITY;
  if (x < -126.f) return 0.f;
  const float n = std::floor(x + 0.5f), f = x - n;  // |f| <= 1/2: the polynomial is the series of 2^f
  float p = 1.5403530e-4f;
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f}) p = p * f + c;
  const int e = (int)n;
  const float y = e == 128 ? p * 0x1p127f * 2.f : p * unbits((uint32_t)(e + 127) << 23);
  return y < FLT_MIN ? 0.f : y;
}

// lg2.approx.ftz: log2 by the series of atanh in f64; subnormal arguments count as zero.
inline float lg2(float x) {
  if (!(x >= FLT_MIN)) return x > -FLT_MIN && x < FLT_MIN ? -INFINITY : NAN;
  if (x > FLT_MAX) return x;
  int e = (int)(bits(x) >> 23) - 127;
  double m = unbits((bits(x) & 0x7fffff) | 0x3f800000);  // 1 <= m < 2
  if (m > 1.4142135623730951) m *= 0.5, e++;
  const double s = (m - 1) / (m + 1), q = s * s;
  double p = 0;
  for (double c : {1. / 15, 1. / 13, 1. / 11, 1. / 9, 1. / 7, 1. / 5, 1. / 3, 1.}) p = p * q + c;
  return (float)(e + 2.8853900817779268 * s * p);  // 2 / ln 2
}

}  // namespace simt
