// packed.cuh - 16 bytes of numbers, the widest load and store: f32 where they are computed with, packed where they wait.
#pragma once
#include "ptx.cuh"

// Four f32 or eight bf16 in four registers, whatever T: unpacking costs one instruction a number, and half the registers
// is what it saves.
template <class T> struct Packed {
  static constexpr int N = 16 / sizeof(T);
  Vec<uint32_t, 4> words;

  DEV float operator[](int i) const {
    if constexpr (N == 4) return bits_float(words[i]);
    return i % 2 ? bf16_hi(words[i / 2]) : bf16_lo(words[i / 2]);
  }
};

// i is a multiple of N.
template <class T> DEV Packed<T> load_packed(Global<const T> p, int64_t i SITE) {
  return {load_vec<4>((p + i).template as<const uint32_t>(), 0 LINE)};
}
template <class T> DEV Packed<T> load_packed(Global<T> p, int64_t i SITE) {
  return load_packed(Global<const T>(p.raw()), i LINE);
}
template <class T> DEV void store_packed(Global<T> p, int64_t i, const float (&x)[Packed<T>::N] SITE) {
  Vec<uint32_t, 4> words;
  for (int j = 0; j < 4; j++) {
    if constexpr (Packed<T>::N == 4) {
      words[j] = float_bits(x[j]);
    } else {
      words[j] = pack_bf16(x[2 * j], x[2 * j + 1]);
    }
  }
  store_vec((p + i).template as<uint32_t>(), 0, words LINE);
}
