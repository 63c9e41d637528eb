// cast.cu - f32 to bf16, to nearest even, and back. NaN stays NaN.
//
// 6 bytes an element. A thread takes 2 x 8 elements, 16 bytes a load and a store, all loads before the first store.
#include "common/packed.cuh"

template <class To, class From> struct Cast {
  Global<To> out;
  Global<const From> inp;
  int64_t count;
};
using CastToBf16 = Cast<bf16, float>;
using CastToF32 = Cast<float, bf16>;
static_assert(sizeof(CastToF32) == 24 && offsetof(CastToF32, count) == 16, "as in src/ops/cast.rs");

namespace cast {

constexpr int THREADS = 256;
constexpr int GROUPS = 2;  // of 8 elements, for each thread
constexpr int N = 8;

template <class To, class From> DEV void forward(const Cast<To, From>& p) {
  constexpr int IN = Packed<From>::N, OUT = Packed<To>::N;
  const int64_t first = ((int64_t)blockIdx.x * GROUPS * THREADS + threadIdx.x) * N;
  Packed<From> x[GROUPS][N / IN];
  for (int g = 0; g < GROUPS; g++) {
    const int64_t at = first + g * THREADS * N;
    if (at + N > p.count) continue;
    for (int i = 0; i < N / IN; i++) x[g][i] = load_packed(p.inp, at + i * IN);
  }
  for (int g = 0; g < GROUPS; g++) {
    const int64_t at = first + g * THREADS * N;
    if (at + N <= p.count) {
      for (int i = 0; i < N / OUT; i++) {
        float y[OUT];
        for (int j = 0; j < OUT; j++) y[j] = x[g][(i * OUT + j) / IN][(i * OUT + j) % IN];
        store_packed(p.out, at + i * OUT, y);
      }
    } else {
      for (int64_t i = at; i < p.count; i++) store(p.out, i, from_f32<To>(to_f32(load(p.inp, i))));
    }
  }
}

}  // namespace cast

HOT_KERNEL(cast_to_bf16, CastToBf16, 256, 4) { cast::forward(p); }
HOT_KERNEL(cast_to_f32, CastToF32, 256, 4) { cast::forward(p); }
