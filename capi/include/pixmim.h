/* pixmim: masked image modelling (PixMIM, MAE) as a kernel library. C99 and C++.
 *
 * Every function that can fail returns a pixmim_status; pixmim_last_error() then says in a sentence what was wrong and
 * what would be right. No function prints, exits, throws, or unwinds.
 *
 * A call enqueues its work on `stream` and returns. `stream` is a CUstream or cudaStream_t of the device's primary context
 * (NULL: the legacy default stream); on the CPU it is ignored, and the work is done when the call returns. Nothing on a GPU
 * synchronises or allocates, but for the first call of a context on a stream, the first product of a shape, and functions
 * whose comment says so: call once before capturing a graph.
 *
 * Functions with `workspace` and `workspace_bytes` are called twice: with `workspace` NULL they only write the bytes needed
 * (never 0) to `*workspace_bytes`; then with that many bytes of the context's device at `workspace`.
 *
 * A caller promises: a tensor's `data` leads to as many elements as its shape says, in the memory of its `device`, and
 * stays so until the enqueued work is done; ids on a GPU are in range, for nobody looks; a pointer to a context, filter or
 * model came from its `create` and was not destroyed. All else is checked at each call. Tensors that are written may
 * overlap no other. A context may be used by several threads at once; a model by one at a time.
 *
 * Dimension letters: B images, C = 3 channels, S pixels of a side, P pixels of a patch's side, L patches of an image,
 * K kept and M = L - K masked ones, E = 3 P P numbers of a patch, T tokens, D width, NH heads, R rows (all leading
 * dimensions as one), F width of the MLP. "Real" is f32 or f64 on the CPU, f32 or bf16 on a GPU; "wide" is f32 where real
 * is bf16, else the same. Generated from capi/src by cbindgen; do not edit. */


#ifndef PIXMIM_H
#define PIXMIM_H

#include <stddef.h>
#include <stdint.h>

// The CPU as a device; CUDA ordinals count from 0.
#define PIXMIM_CPU -1

// Major version of this header: functions and structs change their meaning only with it.
#define PIXMIM_ABI_MAJOR 1

// Minor version of this header: grows with each addition.
#define PIXMIM_ABI_MINOR 0

// Keys' cubic with a = -0.5, antialiased: Pillow's BICUBIC.
#define PIXMIM_BICUBIC 3

// Linear, antialiased: Pillow's BILINEAR.
#define PIXMIM_BILINEAR 2

// Of the state: a weight, f32 (f64 in a model of f64).
#define PIXMIM_WEIGHT 0

// Its accumulated gradient.
#define PIXMIM_GRAD 1

// Its first moment.
#define PIXMIM_EXP_AVG 2

// Its second moment.
#define PIXMIM_EXP_AVG_SQ 3

// Of the last forward pass: predicted patches (B, M, E), real, (row, column, channel).
#define PIXMIM_PRED 0

// What they were to be (B, M, E), wide, before norm_pix.
#define PIXMIM_TARGET 1

// Patches that the encoder saw (B, K) i32.
#define PIXMIM_IDS_KEEP 2

// Patches that were masked, and are predicted in this order (B, M) i32.
#define PIXMIM_IDS_MASKED 3

// Where each patch stands among kept and masked ones (B, L) i32.
#define PIXMIM_IDS_RESTORE 4

// IEEE 754 binary32.
#define PIXMIM_F32 0

// bfloat16.
#define PIXMIM_BF16 1

// IEEE 754 binary64; CPU only, but for learning rates.
#define PIXMIM_F64 2

// Unsigned byte.
#define PIXMIM_U8 3

// Signed 32-bit integer.
#define PIXMIM_I32 4

// Signed 64-bit integer.
#define PIXMIM_I64 5

// Most dimensions of a tensor.
#define PIXMIM_MAX_DIMS 6

// A device that calls run on. May be used by several threads at once.
typedef struct pixmim_context pixmim_context;

// The tables of a low-pass filter, for one size and radius on one device.
typedef struct pixmim_filter pixmim_filter;

// A masked autoencoder with its gradients, optimizer and memory. One thread uses it at a time: calls from two at once are
// refused with PIXMIM_BUSY. A call on another stream than the one before must be ordered after that by the caller, by an
// event say.
typedef struct pixmim_model pixmim_model;

// 0, or why a call failed. The values never change; new ones may be added.
typedef int32_t pixmim_status;

// What a device is.
typedef struct pixmim_device_info {
  // sizeof(pixmim_device_info): set it in the first element.
  uint32_t struct_size;
  // PIXMIM_CPU or a CUDA ordinal.
  int32_t device;
  // Whether a context can be made for it: 1 or 0.
  int32_t usable;
  // Compute capability of a GPU: 90 is 9.0. 0 for the CPU.
  int32_t capability;
  // Streaming multiprocessors of a GPU, cores of the CPU.
  uint32_t processors;
  // 0.
  uint32_t reserved;
  // Memory of a GPU in bytes; 0 for the CPU.
  uint64_t memory_bytes;
  // Name, ended by a zero byte.
  char name[128];
} pixmim_device_info;

// How a context computes. NULL in its place means zeros.
typedef struct pixmim_context_options {
  // sizeof(pixmim_context_options).
  uint32_t struct_size;
  // On the CPU: threads; 0: one for each core.
  uint32_t threads;
  // On the CPU: 1 rounds the operands of products of f32 tensors to bf16, twice as fast where the CPU has AVX-512 BF16;
  // 0: f32 products.
  uint32_t bf16_products;
  // 0.
  uint32_t reserved;
} pixmim_context_options;

// A view of somebody's memory: it owns nothing, and a call is done with it when it returns (its data, when the enqueued
// work is done).
typedef struct pixmim_tensor {
  // sizeof(pixmim_tensor).
  uint32_t struct_size;
  // PIXMIM_F32 and so on.
  int32_t dtype;
  // PIXMIM_CPU, or the CUDA ordinal of the GPU whose memory it is.
  int32_t device;
  // Number of dimensions; 0 is a single number.
  int32_t ndim;
  // The first element. On the CPU aligned to an element, on a GPU to 16 bytes.
  void *data;
  // Extents, outermost first.
  int64_t shape[PIXMIM_MAX_DIMS];
  // Elements from an index to the next, of each dimension. Row-major without gaps is the only layout taken.
  int64_t strides[PIXMIM_MAX_DIMS];
} pixmim_tensor;

// Network and training step. Fill it with pixmim_model_config_preset, then change what is to be otherwise.
typedef struct pixmim_model_config {
  // sizeof(pixmim_model_config).
  uint32_t struct_size;
  // Of activations: PIXMIM_F32, PIXMIM_BF16 on a GPU (weights, moments and gradients are f32), PIXMIM_F64 on the CPU.
  int32_t dtype;
  // Side of the square input, in pixels (S).
  int64_t image_size;
  // Side of a patch, in pixels (P); divides image_size.
  int64_t patch_size;
  // Width of the encoder; divisible by 4 and by heads.
  int64_t dim;
  // Transformer blocks of the encoder.
  int64_t depth;
  // Attention heads of the encoder.
  int64_t heads;
  // Width of the decoder; divisible by 4 and by decoder_heads.
  int64_t decoder_dim;
  // Transformer blocks of the decoder.
  int64_t decoder_depth;
  // Attention heads of the decoder.
  int64_t decoder_heads;
  // Width of the MLPs over the width of the tokens.
  int64_t mlp_ratio;
  // Images of each call (B).
  int64_t micro_batch;
  // Side of the blocks of patches that are masked together; 1: each patch by itself.
  int64_t mask_block;
  // Seed of weights and masks, below 2^63.
  uint64_t seed;
  // Share of the patches that are masked: K = (int) (L (1 - mask_ratio)) are kept.
  double mask_ratio;
  // PixMIM: radius of the target's low-pass filter, 40 at 224 pixels. MAE, whose target is the image itself: 0 or less.
  double radius;
  // Mean of the colours, RGB on [0, 1].
  double mean[3];
  // Standard deviation of the colours.
  double std[3];
  // Decay rates of Adam's moments.
  double betas[2];
  // Adam's epsilon.
  double eps;
  // Decoupled weight decay of AdamW; biases and norms never decay.
  double weight_decay;
  // Largest gradient norm; 0: no clipping.
  double clip;
  // 1: each target patch is normalised by its own mean and variance.
  int32_t norm_pix;
  // 1: class and mask token decay too.
  int32_t decay_tokens;
  // On a GPU, 1: a step's work is recorded once and then enqueued as a whole, which changes no bit. Not for the legacy
  // default stream, nor for a stream that the caller captures: 0.
  int32_t record;
  // 0.
  int32_t reserved;
} pixmim_model_config;

// Done, or enqueued.
#define PIXMIM_OK 0

// A null or misaligned pointer, a value out of range, a struct of another version, tensors that overlap.
#define PIXMIM_INVALID 1

// A tensor of another shape than the function takes.
#define PIXMIM_SHAPE 2

// A tensor of another dtype than the function takes on this device.
#define PIXMIM_DTYPE 3

// A tensor on another device than the context's.
#define PIXMIM_DEVICE 4

// Too small a workspace.
#define PIXMIM_WORKSPACE 5

// A model that another thread is using.
#define PIXMIM_BUSY 6

// No such device, or one that cannot be used here.
#define PIXMIM_NO_DEVICE 10

// Memory that could not be had.
#define PIXMIM_OUT_OF_MEMORY 11

// The GPU, its driver or one of its libraries refused a call, or work enqueued before failed.
#define PIXMIM_GPU 12

// A file that cannot be read or written.
#define PIXMIM_IO 20

// A file that is damaged, or does not fit the model.
#define PIXMIM_CORRUPT 21

// A defect of this library; what the call wrote is undefined. Please report it.
#define PIXMIM_INTERNAL 100

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// `PIXMIM_ABI_MAJOR << 16 | PIXMIM_ABI_MINOR` of the library. Refuse another major than the header's, and a smaller minor.
uint32_t pixmim_abi_version(void);

// Version of the library and commit it was built from. Static.
const char *pixmim_version(void);

// Why no GPU can be used, in a sentence; empty if one can. Static.
const char *pixmim_no_gpu_reason(void);

// Lists the devices: the CPU first, then the GPUs. Writes at most `capacity` elements at `devices` (which may be NULL if
// `capacity` is 0) and their number in all to `*count`. Does not fail for want of a GPU.
pixmim_status pixmim_probe(struct pixmim_device_info *devices,
                           int32_t capacity,
                           int32_t *count);

// Opens a device: PIXMIM_CPU or a CUDA ordinal. On a GPU in its primary context, as PyTorch, JAX and the CUDA runtime use.
// Allocates, and loads the kernels.
pixmim_status pixmim_context_create(int32_t device,
                                    const struct pixmim_context_options *options,
                                    struct pixmim_context **out);

// Closes a device, once its work is done. NULL is let pass. Filters and models made with it may live on.
void pixmim_context_destroy(struct pixmim_context *context);

// Draws which patches are kept, by a random order of each image's patches, or of squares of `block` x `block` patches.
//
// Writes ids_keep (B, K), ids_masked (B, M) and ids_restore (B, L), i32; L = K + M is a square. Reads epoch (1) i64 and
// samples (B) i64: with `seed` they decide the order, the same on every device. He et al. 2021, section 3.
pixmim_status pixmim_random_masking_forward(const struct pixmim_context *context,
                                            const struct pixmim_tensor *ids_keep,
                                            const struct pixmim_tensor *ids_masked,
                                            const struct pixmim_tensor *ids_restore,
                                            uint64_t seed,
                                            const struct pixmim_tensor *epoch,
                                            const struct pixmim_tensor *samples,
                                            int64_t block,
                                            void *workspace,
                                            size_t *workspace_bytes,
                                            void *stream);

// As pixmim_random_masking_forward, in an order drawn elsewhere. CPU only.
//
// Reads noise (B, G) f64, a value for each of the G blocks of an image, smallest first, none NaN.
pixmim_status pixmim_random_masking_from_noise(const struct pixmim_context *context,
                                               const struct pixmim_tensor *ids_keep,
                                               const struct pixmim_tensor *ids_masked,
                                               const struct pixmim_tensor *ids_restore,
                                               const struct pixmim_tensor *noise,
                                               int64_t block,
                                               void *workspace,
                                               size_t *workspace_bytes,
                                               void *stream);

// Resamples rectangles to square crops, bit for bit as Pillow's `Image.resize` does; the same bytes on every device.
//
// Writes crops (B, S, S, 3) u8. Reads images (bytes) u8 and geometry (B, 6) i64 as pixmim_input_forward does, which reads
// the crops then; a whole image is resampled, so top and left are 0, and `interpolation` is PIXMIM_BICUBIC or
// PIXMIM_BILINEAR. On a GPU nobody looks at geometry.
pixmim_status pixmim_resize_forward(const struct pixmim_context *context,
                                    const struct pixmim_tensor *crops,
                                    const struct pixmim_tensor *images,
                                    const struct pixmim_tensor *geometry,
                                    int32_t interpolation,
                                    void *stream);

// From bytes to numbers: crops, mirrors, normalises and patchifies images.
//
// Writes patches (B, K, E), real, in (channel, row, column) order, and one of: target (B, M, E), wide, in (row, column,
// channel) order, of the patches ids_masked (B, M) i32 (MAE); or pixels (B, 3, S, S), real on [0, 1] on the CPU and u8 on a
// GPU, for pixmim_low_freq_target_forward (PixMIM). What is not wanted is NULL. Reads images (bytes) u8, RGB images
// (height, width, 3) one after another; geometry (B, 6) i64: byte where the image starts, height, width, top, left, whether
// mirrored (1 or 0); ids_keep (B, K) i32. `mean` and `std` have three numbers. On a GPU nobody looks at geometry.
pixmim_status pixmim_input_forward(const struct pixmim_context *context,
                                   const struct pixmim_tensor *patches,
                                   const struct pixmim_tensor *target,
                                   const struct pixmim_tensor *pixels,
                                   const struct pixmim_tensor *images,
                                   const struct pixmim_tensor *geometry,
                                   const struct pixmim_tensor *ids_keep,
                                   const struct pixmim_tensor *ids_masked,
                                   const double *mean,
                                   const double *std,
                                   int64_t patch_size,
                                   void *stream);

// Makes a filter for images of `size` x `size` pixels that keeps frequencies within `radius`. PixMIM has radius 40 at 224;
// the same cycles per pixel elsewhere are 40 size / 224. Allocates, and on a GPU synchronises.
pixmim_status pixmim_filter_create(const struct pixmim_context *context,
                                   int64_t size,
                                   double radius,
                                   struct pixmim_filter **out,
                                   void *stream);

// Frees a filter, once work enqueued with it is done. NULL is let pass.
void pixmim_filter_destroy(struct pixmim_filter *filter);

// PixMIM's target: images through an ideal low-pass filter, then normalised and patchified. arXiv 2303.02416, section 3.
//
// Writes target (B, M, E), wide, in (row, column, channel) order. Reads pixels (B, 3, S, S), real on [0, 1], on a GPU f32 or
// u8; ids_masked (B, M) i32; a filter of this context's device. `mean` and `std` have three numbers. `exact`: 1 for f32
// arithmetic on a GPU too; 0 filters u8 pixels of 224 (radius 40) and 448 (radius 80) in half precision, all else exactly.
pixmim_status pixmim_low_freq_target_forward(const struct pixmim_context *context,
                                             const struct pixmim_tensor *target,
                                             const struct pixmim_tensor *pixels,
                                             const struct pixmim_tensor *ids_masked,
                                             const struct pixmim_filter *filter,
                                             const double *mean,
                                             const double *std,
                                             int64_t patch_size,
                                             int32_t exact,
                                             void *workspace,
                                             size_t *workspace_bytes,
                                             void *stream);

// The loss and its gradient in one pass: mean squared error over the numbers of the masked patches.
//
// Adds `scale` times the loss to loss (1), wide, and writes grad_pred (B, M, E), real, the gradient of `scale` times the
// loss. Reads pred (B, M, E), real, and target (B, M, E), wide. `norm_pix` 1: each target patch is normalised by its own
// mean and variance first. For one loss of many calls, `scale` is one over their number.
pixmim_status pixmim_masked_mse_loss_forward_backward(const struct pixmim_context *context,
                                                      const struct pixmim_tensor *loss,
                                                      const struct pixmim_tensor *grad_pred,
                                                      const struct pixmim_tensor *pred,
                                                      const struct pixmim_tensor *target,
                                                      int32_t norm_pix,
                                                      double scale,
                                                      void *workspace,
                                                      size_t *workspace_bytes,
                                                      void *stream);

// Embeds the kept patches, adds positions, and puts the class token before them.
//
// Writes out (B, 1 + K, D). Reads patches (B, K, E), ids_keep (B, K) i32, weight (D, E), bias (D), cls_token (D), pos_embed
// (1 + L, D), all real.
pixmim_status pixmim_patch_embed_forward(const struct pixmim_context *context,
                                         const struct pixmim_tensor *out,
                                         const struct pixmim_tensor *patches,
                                         const struct pixmim_tensor *ids_keep,
                                         const struct pixmim_tensor *weight,
                                         const struct pixmim_tensor *bias,
                                         const struct pixmim_tensor *cls_token,
                                         const struct pixmim_tensor *pos_embed,
                                         void *workspace,
                                         size_t *workspace_bytes,
                                         void *stream);

// Gradients of pixmim_patch_embed_forward's parameters.
//
// Adds to grad_weight (D, E), grad_bias (D) and grad_cls_token (D), wide. Reads grad_out (B, 1 + K, D) and patches (B, K,
// E), real.
pixmim_status pixmim_patch_embed_backward(const struct pixmim_context *context,
                                          const struct pixmim_tensor *grad_weight,
                                          const struct pixmim_tensor *grad_bias,
                                          const struct pixmim_tensor *grad_cls_token,
                                          const struct pixmim_tensor *grad_out,
                                          const struct pixmim_tensor *patches,
                                          void *workspace,
                                          size_t *workspace_bytes,
                                          void *stream);

// Adds positions to the encoder's tokens and to the mask token: the rows from which pixmim_restore_tokens_forward makes the
// decoder's tokens.
//
// Writes out (B (1 + K) + L, D). Reads inp (B, 1 + K, D), ids_keep (B, K) i32, mask_token (D), pos_embed (1 + L, D), all
// real.
pixmim_status pixmim_add_positions_forward(const struct pixmim_context *context,
                                           const struct pixmim_tensor *out,
                                           const struct pixmim_tensor *inp,
                                           const struct pixmim_tensor *ids_keep,
                                           const struct pixmim_tensor *mask_token,
                                           const struct pixmim_tensor *pos_embed,
                                           void *stream);

// Gradient of the mask token; that of pixmim_add_positions_forward's `inp` is the gradient of its rows as it is.
//
// Adds to grad_mask_token (D), wide. Reads grad_fill (L, D), real: the gradient of the last L rows.
pixmim_status pixmim_add_positions_backward(const struct pixmim_context *context,
                                            const struct pixmim_tensor *grad_mask_token,
                                            const struct pixmim_tensor *grad_fill,
                                            void *workspace,
                                            size_t *workspace_bytes,
                                            void *stream);

// Puts the kept tokens back at their places, with a row of its own at each masked place ("unshuffle").
//
// Writes out (B, 1 + L, W). Reads inp (B, 1 + K, W), fill (L, W), real, and ids_restore (B, L) i32. With mask tokens that
// have their positions as `fill` this is MAE's decoder input.
pixmim_status pixmim_restore_tokens_forward(const struct pixmim_context *context,
                                            const struct pixmim_tensor *out,
                                            const struct pixmim_tensor *inp,
                                            const struct pixmim_tensor *fill,
                                            const struct pixmim_tensor *ids_restore,
                                            void *stream);

// Gradients of pixmim_restore_tokens_forward.
//
// Writes grad_inp (B, 1 + K, W) and grad_fill (L, W), the sum over the images that mask a patch. Reads grad_out (B, 1 + L,
// W), all real, and ids_restore (B, L) i32.
pixmim_status pixmim_restore_tokens_backward(const struct pixmim_context *context,
                                             const struct pixmim_tensor *grad_inp,
                                             const struct pixmim_tensor *grad_fill,
                                             const struct pixmim_tensor *grad_out,
                                             const struct pixmim_tensor *ids_restore,
                                             void *stream);

// Gathers the masked patches' tokens: all that the end of the decoder need work on.
//
// Writes out (B, M, D). Reads inp (B, 1 + L, D), real, and ids_masked (B, M) i32.
pixmim_status pixmim_gather_tokens_forward(const struct pixmim_context *context,
                                           const struct pixmim_tensor *out,
                                           const struct pixmim_tensor *inp,
                                           const struct pixmim_tensor *ids_masked,
                                           void *stream);

// Gradient of pixmim_gather_tokens_forward.
//
// Writes grad_inp (B, 1 + L, D), zero where nothing was gathered. Reads grad_out (B, M, D), real, and ids_restore (B, L)
// i32, drawn together with ids_masked.
pixmim_status pixmim_gather_tokens_backward(const struct pixmim_context *context,
                                            const struct pixmim_tensor *grad_inp,
                                            const struct pixmim_tensor *grad_out,
                                            const struct pixmim_tensor *ids_restore,
                                            void *stream);

// Makes a model with freshly drawn weights. Allocates all memory of the training; on a GPU synchronises.
pixmim_status pixmim_model_create(const struct pixmim_context *context,
                                  const struct pixmim_model_config *config,
                                  struct pixmim_model **out);

// As pixmim_model_create, with weights from disk: a checkpoint's folder (RUN/ckpt/step-..., which has moments and the count
// of updates too), or a safetensors file of MAE's names in f32. `config` must have the sizes of the weights: let
// pixmim_model_config_load fill them in. f32 and bf16 models only.
pixmim_status pixmim_model_load(const struct pixmim_context *context,
                                const char *path,
                                const struct pixmim_model_config *config,
                                struct pixmim_model **out);

// Frees a model, once its work is done; the stream it was last used on must be alive. NULL is let pass.
void pixmim_model_destroy(struct pixmim_model *model);

// Writes the weights as a safetensors file, in place of what is at `path`: a reader sees the old file or the new one. Waits.
pixmim_status pixmim_model_save(const struct pixmim_model *model,
                                const char *path,
                                void *stream);

// Draws masks, reads the images, and adds to the loss theirs over `micro_batches`, which are the calls of one step.
//
// Reads images (bytes) u8, geometry (B, 6) i64 and samples (B) i64 as pixmim_input_forward and pixmim_random_masking_forward
// do, and epoch (1) i64. Each may be in the host's memory or the device's; from the host geometry is checked, on a GPU nobody
// looks at it. From the device nothing waits, and a stream being captured captures it if a call before had as many bytes of
// images; the graph is good until a call has more.
pixmim_status pixmim_model_forward_loss(struct pixmim_model *model,
                                        const struct pixmim_tensor *images,
                                        const struct pixmim_tensor *geometry,
                                        const struct pixmim_tensor *samples,
                                        const struct pixmim_tensor *epoch,
                                        int64_t micro_batches,
                                        void *stream);

// Adds the gradient of the loss that pixmim_model_forward_loss, which must have come right before, has added.
pixmim_status pixmim_model_backward(struct pixmim_model *model, void *stream);

// Updates the weights by the accumulated gradient, unless the loss, the gradient's norm or its square is not finite. The
// gradient and the loss stay: pixmim_model_clear comes before the next step.
pixmim_status pixmim_model_step(struct pixmim_model *model,
                                double lr,
                                void *stream);

// As pixmim_model_step, with the learning rate (1) f64 in the device's memory, or the host's: so that a captured step can
// be replayed with another.
pixmim_status pixmim_model_step_with(struct pixmim_model *model,
                                     const struct pixmim_tensor *lr,
                                     void *stream);

// Sets the gradients and the loss to zero: at the start of a step, or to give one up.
pixmim_status pixmim_model_clear(struct pixmim_model *model, void *stream);

// Waits, and tells the mean loss since pixmim_model_clear, and of the last step the gradient's norm before clipping and
// whether the weights changed (1 or 0). What is NULL is not wanted.
pixmim_status pixmim_model_outcome(const struct pixmim_model *model,
                                   double *loss,
                                   double *grad_norm,
                                   int32_t *updated,
                                   void *stream);

// Fills in a config, whose struct_size is set, from a preset: "demo", "tiny", "small", "base", "large", "huge" or
// "pixmim-vit-b-300e", which are ViTs of these sizes with PixMIM's target; dtype is f32.
pixmim_status pixmim_model_config_preset(const char *name,
                                         struct pixmim_model_config *config);

// Overwrites in a filled config what weights on disk tell, the paths being as for pixmim_model_load: the network's sizes,
// and, unless others than pixmim wrote them, heads, target and colours.
pixmim_status pixmim_model_config_load(const char *path,
                                       struct pixmim_model_config *config);

// Writes the number of weights.
pixmim_status pixmim_model_state_count(const struct pixmim_model *model, int64_t *count);

// Tells of a weight, and of its gradient and moments: its name, as MAE has it, which lives as long as the model; and a
// tensor of its shape and dtype on the model's device, to which only data is lacking. What is NULL is not wanted.
pixmim_status pixmim_model_state_info(const struct pixmim_model *model,
                                      int64_t index,
                                      const char **name,
                                      struct pixmim_tensor *like);

// Copies a tensor of the state to `out`, of its dtype and shape. To the host it waits; to the device it does not.
pixmim_status pixmim_model_state_get(const struct pixmim_model *model,
                                     int32_t kind,
                                     int64_t index,
                                     const struct pixmim_tensor *out,
                                     void *stream);

// Replaces a tensor of the state by `inp`, of its dtype and shape, on the host or the device. A weight's rounded copy
// follows.
pixmim_status pixmim_model_state_set(struct pixmim_model *model,
                                     int32_t kind,
                                     int64_t index,
                                     const struct pixmim_tensor *inp,
                                     void *stream);

// Lends all gradients as one vector in the model's memory, with zeros between them, until the model is destroyed: to sum
// them over processes between pixmim_model_backward and pixmim_model_step, say.
pixmim_status pixmim_model_grads(struct pixmim_model *model,
                                 struct pixmim_tensor *out);

// Writes the number of updates done, which Adam's bias correction counts. Waits.
pixmim_status pixmim_model_updates_get(const struct pixmim_model *model, int64_t *updates, void *stream);

// Sets the number of updates done, 0 or more: to go on from a state that was kept elsewhere.
pixmim_status pixmim_model_updates_set(struct pixmim_model *model, int64_t updates, void *stream);

// Tells shape and dtype of PIXMIM_PRED and so on, as pixmim_model_state_info does.
pixmim_status pixmim_model_output_info(const struct pixmim_model *model,
                                       int32_t which,
                                       struct pixmim_tensor *like,
                                       void *stream);

// Copies PIXMIM_PRED and so on of the last pixmim_model_forward_loss to `out`, of their dtype and shape: for pictures. To the
// host it waits.
pixmim_status pixmim_model_output_get(const struct pixmim_model *model,
                                      int32_t which,
                                      const struct pixmim_tensor *out,
                                      void *stream);

// Why the last failing call of this thread failed, in a sentence; empty if none has. UTF-8, valid until the next call of
// this thread that fails.
const char *pixmim_last_error(void);

// The name of a status, as in this header. Static.
const char *pixmim_status_name(pixmim_status status);

// Fills in `*out`: a tensor of `ndim` extents at `shape`, row-major without gaps.
pixmim_status pixmim_tensor_init(struct pixmim_tensor *out,
                                 void *data,
                                 int32_t dtype,
                                 int32_t device,
                                 int32_t ndim,
                                 const int64_t *shape);

// Fills in `*out` from a `DLTensor` of DLPack, which is only looked at: ownership stays where it is. A managed tensor, of
// either kind, holds one as `dl_tensor`. CPU and CUDA memory (pinned memory is the CPU's), row-major without gaps.
pixmim_status pixmim_tensor_from_dlpack(struct pixmim_tensor *out,
                                        const void *dl_tensor);

// Layer normalization of rows, as torch.nn.LayerNorm.
//
// Writes out (.., D), real, mean and rstd (..), wide. Reads inp (.., D), weight (D) and bias (D), real. On a GPU D is a
// multiple of 8, at most 8192.
pixmim_status pixmim_layer_norm_forward(const struct pixmim_context *context,
                                        const struct pixmim_tensor *out,
                                        const struct pixmim_tensor *mean,
                                        const struct pixmim_tensor *rstd,
                                        const struct pixmim_tensor *inp,
                                        const struct pixmim_tensor *weight,
                                        const struct pixmim_tensor *bias,
                                        double eps,
                                        void *stream);

// Gradients of pixmim_layer_norm_forward.
//
// Adds to grad_inp (.., D), real, as that is the residual stream's, and to grad_weight (D) and grad_bias (D), wide. Reads
// grad_out (.., D), inp (.., D), weight (D), real, mean and rstd (..), wide, from forward.
pixmim_status pixmim_layer_norm_backward(const struct pixmim_context *context,
                                         const struct pixmim_tensor *grad_inp,
                                         const struct pixmim_tensor *grad_weight,
                                         const struct pixmim_tensor *grad_bias,
                                         const struct pixmim_tensor *grad_out,
                                         const struct pixmim_tensor *inp,
                                         const struct pixmim_tensor *mean,
                                         const struct pixmim_tensor *rstd,
                                         const struct pixmim_tensor *weight,
                                         void *workspace,
                                         size_t *workspace_bytes,
                                         void *stream);

// Self-attention over packed queries, keys and values: softmax(q k^T / sqrt(D / NH)) v, unmasked, without dropout.
//
// Writes out (B, T, D), real, and lse (B, NH, T), wide, which backward reads and which says the number of heads. Reads qkv
// (B, T, 3 D), real, as timm packs it: (3, NH, D / NH) in each row. On a GPU T is at most 1024, D / NH 8 to 128.
pixmim_status pixmim_attention_forward(const struct pixmim_context *context,
                                       const struct pixmim_tensor *out,
                                       const struct pixmim_tensor *lse,
                                       const struct pixmim_tensor *qkv,
                                       void *workspace,
                                       size_t *workspace_bytes,
                                       void *stream);

// Gradient of pixmim_attention_forward.
//
// Writes grad_qkv (B, T, 3 D). Reads grad_out (B, T, D), out and lse from forward, and qkv (B, T, 3 D).
pixmim_status pixmim_attention_backward(const struct pixmim_context *context,
                                        const struct pixmim_tensor *grad_qkv,
                                        const struct pixmim_tensor *grad_out,
                                        const struct pixmim_tensor *out,
                                        const struct pixmim_tensor *lse,
                                        const struct pixmim_tensor *qkv,
                                        void *workspace,
                                        size_t *workspace_bytes,
                                        void *stream);

// A fully connected layer: inp weight^T + bias, then GELU, or with a residual added.
//
// Writes out (.., N). Reads inp (.., K), weight (N, K), bias (N). With pre (.., N): out is gelu of the product and its
// bias, and pre, which is written, is what GELU was given. With residual (.., N): it is added. Either or both are NULL. All
// real.
pixmim_status pixmim_linear_forward(const struct pixmim_context *context,
                                    const struct pixmim_tensor *out,
                                    const struct pixmim_tensor *pre,
                                    const struct pixmim_tensor *inp,
                                    const struct pixmim_tensor *weight,
                                    const struct pixmim_tensor *bias,
                                    const struct pixmim_tensor *residual,
                                    void *stream);

// Gradients of the product and its bias in pixmim_linear_forward.
//
// Writes grad_inp (.., K), real, unless it is NULL; with pre (.., K), what GELU was given in the layer before, it is the
// gradient of pre. Adds to grad_weight (N, K) and grad_bias (N), wide. Reads grad_out (.., N), inp (.., K), weight (N, K),
// real.
pixmim_status pixmim_linear_backward(const struct pixmim_context *context,
                                     const struct pixmim_tensor *grad_inp,
                                     const struct pixmim_tensor *grad_weight,
                                     const struct pixmim_tensor *grad_bias,
                                     const struct pixmim_tensor *grad_out,
                                     const struct pixmim_tensor *inp,
                                     const struct pixmim_tensor *weight,
                                     const struct pixmim_tensor *pre,
                                     void *workspace,
                                     size_t *workspace_bytes,
                                     void *stream);

// GELU in its exact form. Writes out, reads inp: any one shape, real.
pixmim_status pixmim_gelu_forward(const struct pixmim_context *context,
                                  const struct pixmim_tensor *out,
                                  const struct pixmim_tensor *inp,
                                  void *stream);

// Gradient of pixmim_gelu_forward. Writes grad_inp, reads grad_out and inp: any one shape, real.
pixmim_status pixmim_gelu_backward(const struct pixmim_context *context,
                                   const struct pixmim_tensor *grad_inp,
                                   const struct pixmim_tensor *grad_out,
                                   const struct pixmim_tensor *inp,
                                   void *stream);

// L2 norm of all gradients. Writes norm (1), not finite if any gradient is not; reads grad (N), both wide.
pixmim_status pixmim_grad_norm_forward(const struct pixmim_context *context,
                                       const struct pixmim_tensor *norm,
                                       const struct pixmim_tensor *grad,
                                       void *workspace,
                                       size_t *workspace_bytes,
                                       void *stream);

// Decides whether a step of AdamW is taken, counts it, and works out what is the same for all parameters.
//
// Writes coefficients (5), wide. Counts up step (1) i64 if the step is taken: if loss, grad_norm and its square are finite.
// Reads lr (1) f64, loss (1) and grad_norm (1), wide. `clip`: gradients are scaled down to this norm; 0: never.
pixmim_status pixmim_adamw_prepare(const struct pixmim_context *context,
                                   const struct pixmim_tensor *coefficients,
                                   const struct pixmim_tensor *step,
                                   const struct pixmim_tensor *lr,
                                   const struct pixmim_tensor *loss,
                                   const struct pixmim_tensor *grad_norm,
                                   double clip,
                                   double beta1,
                                   double beta2,
                                   void *stream);

// One update of parameters by AdamW, as torch.optim.AdamW; nothing changes if the step is not taken.
//
// Updates param, exp_avg and exp_avg_sq (N), wide, and writes copy (N) bf16, param rounded, unless it is NULL. Reads grad
// (N), wide, and coefficients (5) from pixmim_adamw_prepare.
pixmim_status pixmim_adamw_update(const struct pixmim_context *context,
                                  const struct pixmim_tensor *param,
                                  const struct pixmim_tensor *copy,
                                  const struct pixmim_tensor *exp_avg,
                                  const struct pixmim_tensor *exp_avg_sq,
                                  const struct pixmim_tensor *grad,
                                  const struct pixmim_tensor *coefficients,
                                  double beta1,
                                  double beta2,
                                  double eps,
                                  double weight_decay,
                                  void *stream);

// From f32 to bf16 or back, to nearest, ties to even. Writes out, reads inp: any one shape.
pixmim_status pixmim_cast_forward(const struct pixmim_context *context,
                                  const struct pixmim_tensor *out,
                                  const struct pixmim_tensor *inp,
                                  void *stream);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PIXMIM_H */
