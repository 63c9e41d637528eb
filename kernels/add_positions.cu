// add_positions.cu - kept tokens with their positions, and below them the mask token at every position.
//
// Reads and writes B (1 + K) + L rows; positions and mask token stay in L2. The gradient of the mask token is a sum of
// columns (linear.cu); that of the tokens is the gradient of their rows as it is.
#include "common/rows.cuh"

template <class T> struct AddPositionsForward {
  Global<T> out;                               // (B (1 + K) + L, D)
  Global<const T> inp, mask_token, pos_embed;  // (B, 1 + K, D), (D), (1 + L, D)
  Global<const int32_t> ids_keep;              // (B, K)
  uint32_t images, kept, patches, dim;
  uint32_t blocks, fill_block;  // of an image; the first of those for the last L rows
};
static_assert(sizeof(AddPositionsForward<bf16>) == 64 && offsetof(AddPositionsForward<bf16>, fill_block) == 60,
              "as in src/ops/add_positions.rs");

namespace add_positions {

template <class T> DEV void forward(const AddPositionsForward<T>& p) {
  const int64_t tokens = 1 + p.kept;
  int64_t row, position;
  Global<const T> token;
  if (blockIdx.x < p.fill_block) {
    const uint32_t t = warp_row(p.blocks);
    if (t >= tokens) return;
    const int64_t image = block_image(p.blocks);
    row = image * tokens + t;
    position = t ? 1 + load(p.ids_keep, image * p.kept + t - 1) : 0;
    token = p.inp + row * p.dim;
  } else {
    const uint32_t patch = (blockIdx.x - p.fill_block) * ROWS + threadIdx.x / 32;
    if (patch >= p.patches) return;
    row = p.images * tokens + patch;
    position = 1 + patch;
    token = p.mask_token;
  }
  sum_rows(p.out + row * p.dim, {token, p.pos_embed + position * p.dim}, p.dim);
}

}  // namespace add_positions

HOT_KERNEL(add_positions_forward_bf16, AddPositionsForward<bf16>, ROW_THREADS, 8) { add_positions::forward(p); }
HOT_KERNEL(add_positions_forward_f32, AddPositionsForward<float>, ROW_THREADS, 8) { add_positions::forward(p); }
