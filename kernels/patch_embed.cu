// patch_embed.cu - what is left of embedding patches when the driver has made the product.
//
// add_bias reads B K rows of the product and writes B (1 + K) rows: bias and position added, the class token before them.
// split_rows, for the backward pass, lays the patches' gradients side by side, as the product for grad_weight needs them,
// and the class tokens' below: B (1 + K) rows read and written, whatever their dtype.
#include "common/rows.cuh"

template <class T> struct PatchEmbedAddBias {
  Global<T> out;                                        // (B, 1 + K, D)
  Global<const T> product, bias, cls_token, pos_embed;  // (B, K, D), (D), (D), (1 + L, D)
  Global<const int32_t> ids_keep;                       // (B, K)
  uint64_t kept;
  uint32_t dim, blocks;  // blocks of an image
};
static_assert(sizeof(PatchEmbedAddBias<bf16>) == 64 && offsetof(PatchEmbedAddBias<bf16>, blocks) == 60,
              "as in src/ops/patch_embed.rs");

struct PatchEmbedSplitRows {
  Global<Chunk> out;        // (B K + B, D)
  Global<const Chunk> inp;  // (B, 1 + K, D)
  uint32_t images, kept, chunks, blocks;
};
static_assert(sizeof(PatchEmbedSplitRows) == 32 && offsetof(PatchEmbedSplitRows, blocks) == 28,
              "as in src/ops/patch_embed.rs");

namespace patch_embed {

template <class T> DEV void add_bias(const PatchEmbedAddBias<T>& p) {
  const uint32_t t = warp_row(p.blocks);
  if (t > p.kept) return;
  const int64_t image = block_image(p.blocks);
  const Global<T> out = p.out + (image * (1 + p.kept) + t) * p.dim;
  if (t == 0) {
    sum_rows(out, {p.cls_token, p.pos_embed}, p.dim);
  } else {
    const int64_t patch = image * p.kept + t - 1, position = 1 + load(p.ids_keep, patch);
    sum_rows(out, {p.product + patch * p.dim, p.bias, p.pos_embed + position * p.dim}, p.dim);
  }
}

DEV void split_rows(const PatchEmbedSplitRows& p) {
  const uint32_t t = warp_row(p.blocks);
  if (t > p.kept) return;
  const int64_t image = block_image(p.blocks);
  const int64_t into = t ? image * p.kept + t - 1 : (int64_t)p.images * p.kept + image;
  copy_row(p.out + into * p.chunks, p.inp + (image * (1 + p.kept) + t) * p.chunks, p.chunks);
}

}  // namespace patch_embed

HOT_KERNEL(patch_embed_add_bias_bf16, PatchEmbedAddBias<bf16>, ROW_THREADS, 8) { patch_embed::add_bias(p); }
HOT_KERNEL(patch_embed_add_bias_f32, PatchEmbedAddBias<float>, ROW_THREADS, 8) { patch_embed::add_bias(p); }
HOT_KERNEL(patch_embed_split_rows, PatchEmbedSplitRows, ROW_THREADS, 16) { patch_embed::split_rows(p); }
