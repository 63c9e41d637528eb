// restore_tokens.cu - kept rows back at their places and a row for each masked place; the gradients of both.
//
// Forward copies rows, whatever their dtype: it reads B (1 + K) rows and writes B (1 + L); the L rows of `fill` stay in
// L2. Backward reads each row of grad_out once: if its image keeps the patch it is copied to where it came from, else it
// is summed with those of the other images that mask the patch. A block owns one token and 512 bytes of its row, in all
// images, which its warps take in turn, four loads each before the first is used: 64 KB an SM at four blocks. What the
// warps have summed they add up in shared memory, first to last: the order is set by the number of images alone.
#include "common/rows.cuh"

struct RestoreTokensForward {
  Global<Chunk> out;                  // (B, 1 + L, W)
  Global<const Chunk> inp, fill;      // (B, 1 + K, W), (L, W)
  Global<const int32_t> ids_restore;  // (B, L)
  uint32_t patches, kept, chunks, blocks;  // L, K, of a row, of an image
};
static_assert(sizeof(RestoreTokensForward) == 48 && offsetof(RestoreTokensForward, blocks) == 44,
              "as in src/ops/restore_tokens.rs");

template <class T> struct RestoreTokensBackward {
  Global<T> grad_inp, grad_fill;      // (B, 1 + K, W), (L, W)
  Global<const T> grad_out;           // (B, 1 + L, W)
  Global<const int32_t> ids_restore;  // (B, L)
  uint32_t images, patches, kept, width;
  uint64_t stripes;  // 512-byte pieces of a row
};
static_assert(sizeof(RestoreTokensBackward<bf16>) == 56 && offsetof(RestoreTokensBackward<bf16>, stripes) == 48,
              "as in src/ops/restore_tokens.rs");

namespace restore_tokens {

DEV void forward(const RestoreTokensForward& p) {
  const uint32_t token = warp_row(p.blocks);
  if (token > p.patches) return;
  const int64_t image = block_image(p.blocks), row = image * (1 + p.patches) + token;
  const uint32_t place = token ? 1 + load(p.ids_restore, image * p.patches + token - 1) : 0;
  const Global<const Chunk> from = place <= p.kept ? p.inp + (image * (1 + p.kept) + place) * p.chunks
                                                   : p.fill + (int64_t)(token - 1) * p.chunks;
  copy_row(p.out + row * p.chunks, from, p.chunks);
}

constexpr int WARPS = 8, UNROLL = 4;

template <class T> DEV void backward(const RestoreTokensBackward<T>& p) {
  constexpr int N = Packed<T>::N, STRIPE = 32 * N;
  STATIC_SHARED(shared, WARPS * STRIPE * 4);
  const uint32_t stripes = p.stripes, token = blockIdx.x / stripes, stripe = blockIdx.x % stripes * STRIPE;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = stripe + lane * N;
  float sum[N] = {};
  for (uint32_t first = warp; first < p.images && column < p.width; first += UNROLL * WARPS) {
    Packed<T> grad[UNROLL];
    uint32_t place[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t image = first + u * WARPS;
      if (image < p.images) {
        grad[u] = load_packed(p.grad_out + (image * (1 + p.patches) + token) * p.width, column);
        place[u] = token ? 1 + load(p.ids_restore, image * p.patches + token - 1) : 0;
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t image = first + u * WARPS;
      if (image >= p.images) continue;
      if (place[u] <= p.kept) {
        const int64_t row = image * (1 + p.kept) + place[u];
        store((p.grad_inp + row * p.width + column).template as<Packed<T>>(), 0, grad[u]);
      } else {
        for (int i = 0; i < N; i++) sum[i] += grad[u][i];
      }
    }
  }
  if (token == 0) return;  // no image masks the class token
  for (int i = 0; i < N; i += 4) {
    sts(shared + (warp * STRIPE + lane * N + i) * 4, Vec<float, 4>{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]});
  }
  __syncthreads();
  const uint32_t mine = threadIdx.x;
  if (mine < STRIPE && stripe + mine < p.width) {
    float total = 0.f;
    for (int w = 0; w < WARPS; w++) total += lds<float>(shared + (w * STRIPE + mine) * 4);
    store(p.grad_fill, (int64_t)(token - 1) * p.width + stripe + mine, from_f32<T>(total));
  }
}

}  // namespace restore_tokens

HOT_KERNEL(restore_tokens_forward, RestoreTokensForward, ROW_THREADS, 16) { restore_tokens::forward(p); }
HOT_KERNEL(restore_tokens_backward_bf16, RestoreTokensBackward<bf16>, 256, 4) { restore_tokens::backward(p); }
HOT_KERNEL(restore_tokens_backward_f32, RestoreTokensBackward<float>, 256, 4) { restore_tokens::backward(p); }
