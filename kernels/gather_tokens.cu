// gather_tokens.cu - the masked patches' tokens side by side, and their gradients back among zeros.
//
// Copies of rows, whatever their dtype: forward reads and writes B M rows, backward reads B M and writes B (1 + L). Both
// are gathers: each row that is written asks where it comes from, so nothing is cleared first and nothing collides.
#include "common/rows.cuh"

struct GatherTokensForward {
  Global<Chunk> out;                 // (B, M, D)
  Global<const Chunk> inp;           // (B, 1 + L, D)
  Global<const int32_t> ids_masked;  // (B, M)
  uint32_t patches, masked, chunks, blocks;  // L, M, of a row, of an image
};
static_assert(sizeof(GatherTokensForward) == 40 && offsetof(GatherTokensForward, blocks) == 36,
              "as in src/ops/gather_tokens.rs");

struct GatherTokensBackward {
  Global<Chunk> grad_inp;             // (B, 1 + L, D)
  Global<const Chunk> grad_out;       // (B, M, D)
  Global<const int32_t> ids_restore;  // (B, L)
  uint32_t patches, masked, chunks, blocks;
};
static_assert(sizeof(GatherTokensBackward) == 40 && offsetof(GatherTokensBackward, blocks) == 36,
              "as in src/ops/gather_tokens.rs");

namespace gather_tokens {

DEV void forward(const GatherTokensForward& p) {
  const uint32_t m = warp_row(p.blocks);
  if (m >= p.masked) return;
  const int64_t image = block_image(p.blocks), row = image * p.masked + m;
  const int64_t from = image * (1 + p.patches) + 1 + load(p.ids_masked, row);
  copy_row(p.out + row * p.chunks, p.inp + from * p.chunks, p.chunks);
}

DEV void backward(const GatherTokensBackward& p) {
  const uint32_t token = warp_row(p.blocks);
  if (token > p.patches) return;
  const int64_t image = block_image(p.blocks);
  const Global<Chunk> grad = p.grad_inp + (image * (1 + p.patches) + token) * p.chunks;
  // Kept patches come first, then the masked ones; the class token is neither.
  const int kept = p.patches - p.masked;
  const int from = token ? load(p.ids_restore, image * p.patches + token - 1) - kept : -1;
  if (from >= 0) {
    copy_row(grad, p.grad_out + (image * p.masked + from) * p.chunks, p.chunks);
  } else {
    for (uint32_t i = threadIdx.x % 32; i < p.chunks; i += 32) store(grad, i, Chunk{});
  }
}

}  // namespace gather_tokens

HOT_KERNEL(gather_tokens_forward, GatherTokensForward, ROW_THREADS, 16) { gather_tokens::forward(p); }
HOT_KERNEL(gather_tokens_backward, GatherTokensBackward, ROW_THREADS, 16) { gather_tokens::backward(p); }
