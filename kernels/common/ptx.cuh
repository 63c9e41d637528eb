// ptx.cuh - what every kernel is written in: types, memory, collectives, tensor-core instructions.
//
// The only file with inline PTX. Each wrapper has a device body and a host twin (kernels/simt/simt.h), so one source
// builds with nvcc and, for the host executor, with a C++ compiler. Memory is reached through these wrappers alone:
// global memory through `Global<T>`, shared memory through 32-bit addresses. That is what lets the executor check
// every access; on the device it costs nothing.
//
// Host twins take a hidden last argument, the place in the source, for messages; on the device SITE and LINE are empty.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SITE
#define LINE
#else
#include "../simt/simt.h"
#define SITE , SIMT_SITE
#define LINE , site_
#endif
#define DEV __device__ __forceinline__

// A kernel: its entry name, the struct it takes by value, threads of a block, and blocks that should fit on an SM. One
// line each, literally: build.rs finds kernels by this line. A hot kernel may not spill registers.
#ifdef __CUDACC__
#define KERNEL(name, Params, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
#else
#define KERNEL(name, Params, threads, blocks)                                                                       \
  static void name##_body(const Params& p);                                                                         \
  extern "C" const simt::Kernel pixmim_kernel_##name = {                                                            \
      #name, __FILE__, sizeof(Params), threads, [](const void* p) { name##_body(*static_cast<const Params*>(p)); }}; \
  static void name##_body([[maybe_unused]] const Params& p)
#endif
#define HOT_KERNEL KERNEL

// ---- numbers -----------------------------------------------------------------------------------------------------
struct bf16 { uint16_t bits; };  // storage only: arithmetic is in f32
struct f16 { uint16_t bits; };

template <class T, int N> struct alignas(sizeof(T) * N) Vec {
  T v[N];
  DEV T& operator[](int i) { return v[i]; }
  DEV const T& operator[](int i) const { return v[i]; }
};

DEV uint32_t float_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  return simt::bits(x);
#endif
}
DEV float bits_float(uint32_t x) {
#ifdef __CUDACC__
  return __uint_as_float(x);
#else
  return simt::unbits(x);
#endif
}
DEV uint32_t pack_bf16(float lo, float hi) {  // to nearest even; lo in bits 0-15
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return simt::f2bf(lo) | (uint32_t)simt::f2bf(hi) << 16;
#endif
}
DEV uint32_t pack_f16(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return simt::f2h(lo) | (uint32_t)simt::f2h(hi) << 16;
#endif
}
DEV float bf16_lo(uint32_t pair) { return bits_float(pair << 16); }
DEV float bf16_hi(uint32_t pair) { return bits_float(pair & 0xffff0000u); }

DEV float to_f32(float x) { return x; }
DEV float to_f32(bf16 x) { return bits_float((uint32_t)x.bits << 16); }
DEV float to_f32(f16 x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return simt::h2f(x.bits);
#endif
}
template <class T> DEV T from_f32(float x);
template <> DEV float from_f32<float>(float x) { return x; }
template <> DEV bf16 from_f32<bf16>(float x) { return bf16{(uint16_t)pack_bf16(x, 0.f)}; }
template <> DEV f16 from_f32<f16>(float x) { return f16{(uint16_t)pack_f16(x, 0.f)}; }

// ---- arithmetic --------------------------------------------------------------------------------------------------
DEV float max2(float a, float b) {
#ifdef __CUDACC__
  return fmaxf(a, b);
#else
  return a > b || b != b ? a : b;
#endif
}
DEV float min2(float a, float b) { return -max2(-a, -b); }
DEV float fma3(float a, float b, float c) {  // one rounding
#ifdef __CUDACC__
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
DEV float ex2(float x) {  // 2^x to 2 ulp; subnormal results are zero
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::ex2(x);
#endif
}
DEV float lg2(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::lg2(x);
#endif
}
DEV float sqrt_rn(float x) {
#ifdef __CUDACC__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
DEV float sqrt_approx(float x) {  // to 2^-23 of itself; subnormal numbers are zero
#ifdef __CUDACC__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_sqrtf(x);
#endif
}
DEV float div_rn(float a, float b) {
#ifdef __CUDACC__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
// f64, rounded after each operation: no sum and product become one instruction, as they may where + and * are written.
DEV double add_rn(double a, double b) {
#ifdef __CUDACC__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
DEV double mul_rn(double a, double b) {
#ifdef __CUDACC__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
DEV double div_rn(double a, double b) {
#ifdef __CUDACC__
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}
DEV float rcp(float x) {  // 1 / x to 1 ulp
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}
// x, without the compiler knowing: what follows from it is computed anew here rather than kept in registers since an
// earlier use.
DEV int anew(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}
DEV uint32_t mul_hi(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __umulhi(a, b);
#else
  return (uint32_t)((uint64_t)a * b >> 32);
#endif
}

// ---- global memory -----------------------------------------------------------------------------------------------
// A pointer that cannot be dereferenced: only `load` and `store` reach what it points to. As a kernel's parameter it is
// eight bytes, as `DevPtr` in Rust.
template <class T> class Global {
  T* p_;

 public:
  Global() = default;
  DEV explicit Global(T* p) : p_(p) {}
  DEV Global operator+(int64_t i) const { return Global(p_ + i); }
  DEV explicit operator bool() const { return p_ != nullptr; }
  // For cp.async and the wrappers below; kernels have no other use for it. A pointer chosen from two would else pass
  // for a generic one, whose loads find out anew each time which memory they are of.
  DEV T* raw() const {
#ifdef __CUDACC__
    __builtin_assume(__isGlobal(p_));
#endif
    return p_;
  }
  template <class U> DEV Global<U> as() const { return Global<U>(reinterpret_cast<U*>(p_)); }
};
template <class T> DEV T load(Global<const T> p, int64_t i SITE) {
#ifdef __CUDACC__
  return p.raw()[i];
#else
  return simt::load(p.raw() + i LINE);
#endif
}
template <class T> DEV T load(Global<T> p, int64_t i SITE) {
#ifdef __CUDACC__
  return p.raw()[i];
#else
  return simt::load(p.raw() + i LINE);
#endif
}
template <class T> DEV void store(Global<T> p, int64_t i, T value SITE) {
#ifdef __CUDACC__
  p.raw()[i] = value;
#else
  simt::store(p.raw() + i, value LINE);
#endif
}
// N neighbours at once, in one instruction: i is a multiple of N, N elements fill 4, 8 or 16 bytes.
template <int N, class T> DEV Vec<T, N> load_vec(Global<const T> p, int64_t i SITE) {
#ifdef __CUDACC__
  return *reinterpret_cast<const Vec<T, N>*>(p.raw() + i);
#else
  return simt::load(reinterpret_cast<const Vec<T, N>*>(p.raw() + i) LINE);
#endif
}
template <int N, class T> DEV Vec<T, N> load_vec(Global<T> p, int64_t i SITE) {
  return load_vec<N>(Global<const T>(p.raw()), i LINE);
}
template <int N, class T> DEV void store_vec(Global<T> p, int64_t i, const Vec<T, N>& value SITE) {
#ifdef __CUDACC__
  *reinterpret_cast<Vec<T, N>*>(p.raw() + i) = value;
#else
  simt::store(reinterpret_cast<Vec<T, N>*>(p.raw() + i), value LINE);
#endif
}

// ---- shared memory -----------------------------------------------------------------------------------------------
// Addresses are bytes in the block's shared window. `dynamic_shared()` is where the launch's dynamic part starts
// (aligned to 1024); STATIC_SHARED(name, bytes) declares `name` as the address of a
// fixed piece (aligned to 16).
#ifdef __CUDACC__
DEV uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared_bytes[];
  return (uint32_t)__cvta_generic_to_shared(dynamic_shared_bytes);
}
#define STATIC_SHARED(name, bytes)                 \
  __shared__ __align__(16) uint8_t name##_bytes[bytes]; \
  const uint32_t name = (uint32_t)__cvta_generic_to_shared(name##_bytes)
#else
DEV uint32_t dynamic_shared() { return simt::dynamic_shared(); }
#define STATIC_SHARED(name, bytes)  \
  static const char name##_key = 0; \
  const uint32_t name = simt::static_shared(&name##_key, #name, bytes)
#endif

// T is trivially copyable, of 1, 2, 4, 8 or 16 bytes; the address is a multiple of its size.
template <class T> DEV T lds(uint32_t address SITE) {
#ifdef __CUDACC__
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
  T value;
  if constexpr (sizeof(T) == 1) {
    uint32_t x;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    const uint8_t y = (uint8_t)x;
    memcpy(&value, &y, 1);
  } else if constexpr (sizeof(T) == 2) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    memcpy(&value, &x, 2);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    memcpy(&value, &x, 4);
  } else if constexpr (sizeof(T) == 8) {
    uint32_t x[2];
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address) : "memory");
    memcpy(&value, x, 8);
  } else {
    uint32_t x[4];
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
    memcpy(&value, x, 16);
  }
  return value;
#else
  return simt::lds<T>(address LINE);
#endif
}
template <class T> DEV void sts(uint32_t address, T value SITE) {
#ifdef __CUDACC__
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
  if constexpr (sizeof(T) == 1) {
    uint8_t x;
    memcpy(&x, &value, 1);
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"((uint32_t)x) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    uint16_t x;
    memcpy(&x, &value, 2);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t x;
    memcpy(&x, &value, 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint32_t x[2];
    memcpy(x, &value, 8);
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(x[0]), "r"(x[1]) : "memory");
  } else {
    uint32_t x[4];
    memcpy(x, &value, 16);
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
#else
  simt::sts<T>(address, value LINE);
#endif
}

// 16 bytes from global to shared memory; the first `bytes` (0 to 16) come from `src`, the rest is zero. `src` must be
// aligned to 16 and is not read where bytes is 0. Visible to this thread after its wait, to others after a barrier too.
template <class T> DEV void cp_async16(uint32_t dst, Global<T> src, int bytes SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src.raw()), "r"(bytes) : "memory");
#else
  simt::cp_async16(dst, src.raw(), bytes LINE);
#endif
}
DEV void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}
// Waits until at most KEEP of this thread's newest groups are under way.
#ifdef __CUDACC__
template <int KEEP> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory"); }
#else
template <int KEEP> DEV void cp_async_wait() { simt::cp_async_wait(KEEP); }
#endif

// ---- barriers, votes, shuffles, reductions -------------------------------------------------------------------------
// __syncthreads, __syncwarp, __shfl_{,xor_,up_,down_}sync, __ballot_sync, __any_sync, __all_sync have CUDA's names.
// A barrier of `threads` threads (a multiple of 32) under a number of 1 to 15; 0 is __syncthreads.
DEV void named_barrier(int number, int threads SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#else
  simt::named_barrier(number, threads LINE);
#endif
}
// Butterflies, largest step first; every lane gets the result. On the host one collective that adds in the same order.
#ifdef __CUDACC__
#define PIXMIM_BUTTERFLY(name, first, expr)                                  \
  DEV float name(float a) {                                                  \
    _Pragma("unroll") for (int step = first; step; step >>= 1) {             \
      const float b = __shfl_xor_sync(~0u, a, step);                         \
      a = expr;                                                              \
    }                                                                        \
    return a;                                                                \
  }
PIXMIM_BUTTERFLY(warp_sum, 16, a + b)
PIXMIM_BUTTERFLY(warp_max, 16, max2(a, b))
PIXMIM_BUTTERFLY(quad_sum, 2, a + b)
PIXMIM_BUTTERFLY(quad_max, 2, max2(a, b))
#undef PIXMIM_BUTTERFLY
#else
DEV float warp_sum(float x SITE) { return simt::reduce(x, 31, [](float a, float b) { return a + b; } LINE); }
DEV float warp_max(float x SITE) { return simt::reduce(x, 31, [](float a, float b) { return max2(a, b); } LINE); }
DEV float quad_sum(float x SITE) { return simt::reduce(x, 3, [](float a, float b) { return a + b; } LINE); }
DEV float quad_max(float x SITE) { return simt::reduce(x, 3, [](float a, float b) { return max2(a, b); } LINE); }
#endif

// ---- tensor cores ------------------------------------------------------------------------------------------------
// ldmatrix: lanes 0-7 give the row addresses (16 bytes each, aligned) of the first 8x8 matrix of 16-bit numbers, lanes
// 8-15 of the second, and so on. Lane t gets row t/4, columns 2(t%4) and 2(t%4)+1 of each (of its transpose: _trans).
DEV void ldmatrix_x4(uint32_t (&r)[4], uint32_t address SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#else
  simt::ldmatrix<4>(r, address, false LINE);
#endif
}
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#else
  simt::ldmatrix<4>(r, address, true LINE);
#endif
}
DEV void ldmatrix_x2(uint32_t (&r)[2], uint32_t address SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
#else
  simt::ldmatrix<2>(r, address, false LINE);
#endif
}
DEV void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
#else
  simt::ldmatrix<2>(r, address, true LINE);
#endif
}
DEV void ldmatrix_x1(uint32_t (&r)[1], uint32_t address SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
#else
  simt::ldmatrix<1>(r, address, false LINE);
#endif
}
// c (16x8, f32) += a (16x16) b (16x8): mma.sync m16n8k16. With g = lane/4, t = lane%4: c holds rows g, g+8 at columns
// 2t, 2t+1; a holds (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); b holds (2t.., g), (2t+8.., g); pairs low
// first.
DEV void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 SITE) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t b[2] = {b0, b1};
  float* const tiles[1] = {c};
  simt::mma<1>(tiles, a, b, false LINE);
#endif
}
DEV void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 SITE) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t b[2] = {b0, b1};
  float* const tiles[1] = {c};
  simt::mma<1>(tiles, a, b, true LINE);
#endif
}
// Two neighbouring n8 tiles; b is one ldmatrix_x4. Two instructions on the device, one collective on the host.
DEV void mma_bf16_x2(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4] SITE) {
#ifdef __CUDACC__
  mma_bf16(c0, a, b[0], b[1]);
  mma_bf16(c1, a, b[2], b[3]);
#else
  float* const tiles[2] = {c0, c1};
  simt::mma<2>(tiles, a, b, false LINE);
#endif
}
DEV void mma_f16_x2(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4] SITE) {
#ifdef __CUDACC__
  mma_f16(c0, a, b[0], b[1]);
  mma_f16(c1, a, b[2], b[3]);
#else
  float* const tiles[2] = {c0, c1};
  simt::mma<2>(tiles, a, b, true LINE);
#endif
}
