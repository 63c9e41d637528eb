/* A trainer of another language, for sanitizers: scripts/sanitize links it with a libpixmim whose Rust is instrumented too.
 *
 * Eight threads call ops on eight contexts, then on one; each makes, uses and closes what it needs, is refused now and then,
 * and must get the bits and the sentence that a thread alone gets. With an argument it does what a sanitizer must report:
 * `race` calls that write one tensor, `overflow` a tensor described as larger than its memory, `leak` a filter nobody
 * destroys, `undefined` an overflow in C. The first three happen in the library's code: it is seen. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pixmim.h"

enum { THREADS = 8, ROUNDS = 2 };
enum { IMAGES = 3, SIDE = 16, PATCH = 4, PATCHES = 16, KEPT = 4, MASKED = 12, NUMBERS = 48, DIM = 32, HEADS = 2 };

/* Ends the program with the library's own words. */
static void expect(pixmim_status status, pixmim_status expected, const char *what) {
  if (status != expected) {
    fprintf(stderr, "%s: %s: %s\n", what, pixmim_status_name(status), pixmim_last_error());
    exit(1);
  }
}
#define OK(call) expect(call, PIXMIM_OK, #call)

/* Memory of one thread's work, which is compared as a whole. */
typedef struct {
  char *bytes;
  size_t used, size;
} arena;

static size_t size_of(int32_t dtype) {
  switch (dtype) {
    case PIXMIM_U8: return 1;
    case PIXMIM_BF16: return 2;
    case PIXMIM_F32: case PIXMIM_I32: return 4;
    default: return 8;
  }
}

/* A tensor of up to three extents (the first 0 ends them), zeros. */
static pixmim_tensor tensor(arena *arena, int32_t dtype, int64_t a, int64_t b, int64_t c) {
  const int64_t shape[3] = {a, b, c};
  int32_t ndim = b == 0 ? 1 : c == 0 ? 2 : 3;
  size_t bytes = (size_t)a * (b ? b : 1) * (c ? c : 1) * size_of(dtype);
  pixmim_tensor out;
  OK(pixmim_tensor_init(&out, arena->bytes + arena->used, dtype, PIXMIM_CPU, ndim, shape));
  arena->used += (bytes + 63) / 64 * 64;
  if (arena->used > arena->size) abort();
  return out;
}

/* The same with numbers between -1 and 1. */
static pixmim_tensor numbers(arena *arena, int64_t a, int64_t b, int64_t c) {
  pixmim_tensor out = tensor(arena, PIXMIM_F32, a, b, c);
  static const uint32_t factor = 2654435761u;
  for (int64_t i = 0; i < a * (b ? b : 1) * (c ? c : 1); i++)
    ((float *)out.data)[i] = (float)(int32_t)((uint32_t)(i + 1) * factor) / 2147483648.0f;
  return out;
}

/* Asks for the bytes, then calls. */
#define WITH_WORKSPACE(function, ...)                          \
  do {                                                         \
    size_t bytes = 0;                                          \
    OK(function(__VA_ARGS__, NULL, &bytes, NULL));             \
    void *workspace = malloc(bytes);                           \
    OK(function(__VA_ARGS__, workspace, &bytes, NULL));        \
    free(workspace);                                           \
  } while (0)

/* A step of a model of its own. */
static void learn(const pixmim_context *ctx, arena *mem, const pixmim_tensor *images, const pixmim_tensor *geometry,
                  const pixmim_tensor *samples, const pixmim_tensor *epoch) {
  pixmim_model_config config;
  config.struct_size = sizeof config;
  OK(pixmim_model_config_preset("demo", &config));
  config.image_size = SIDE, config.patch_size = PATCH, config.micro_batch = IMAGES, config.radius = 3;
  config.dim = config.decoder_dim = DIM, config.heads = config.decoder_heads = HEADS;
  config.depth = config.decoder_depth = 1;
  pixmim_model *model = NULL;
  OK(pixmim_model_create(ctx, &config, &model));
  for (int i = 0; i < 2; i++) {
    OK(pixmim_model_clear(model, NULL));
    OK(pixmim_model_forward_loss(model, images, geometry, samples, epoch, 1, NULL));
    OK(pixmim_model_backward(model, NULL));
    OK(pixmim_model_step(model, 1e-3, NULL));
  }
  pixmim_tensor told = tensor(mem, PIXMIM_F64, 2, 0, 0);
  double *numbers = told.data;
  OK(pixmim_model_outcome(model, &numbers[0], &numbers[1], NULL, NULL));
  pixmim_model_destroy(model);
}

/* Some of each kind of op: rows, products, images, ids, sums, an optimizer. */
static void work(const pixmim_context *ctx, arena *mem) {
  const double mean[3] = {0.485, 0.456, 0.406}, std[3] = {0.229, 0.224, 0.225};
  pixmim_tensor keep = tensor(mem, PIXMIM_I32, IMAGES, KEPT, 0), masked = tensor(mem, PIXMIM_I32, IMAGES, MASKED, 0);
  pixmim_tensor restore = tensor(mem, PIXMIM_I32, IMAGES, PATCHES, 0);
  pixmim_tensor epoch = tensor(mem, PIXMIM_I64, 1, 0, 0), samples = tensor(mem, PIXMIM_I64, IMAGES, 0, 0);
  WITH_WORKSPACE(pixmim_random_masking_forward, ctx, &keep, &masked, &restore, 7, &epoch, &samples, 1);

  pixmim_tensor images = tensor(mem, PIXMIM_U8, 3 * SIDE * SIDE, 0, 0), geometry = tensor(mem, PIXMIM_I64, IMAGES, 6, 0);
  for (int i = 0; i < 3 * SIDE * SIDE; i++) ((unsigned char *)images.data)[i] = (unsigned char)(7 * i);
  for (int b = 0; b < IMAGES; b++) ((int64_t *)geometry.data)[6 * b + 1] = ((int64_t *)geometry.data)[6 * b + 2] = SIDE;
  pixmim_tensor patches = tensor(mem, PIXMIM_F32, IMAGES, KEPT, NUMBERS);
  pixmim_tensor pixels = tensor(mem, PIXMIM_F32, IMAGES, 3, SIDE * SIDE);
  pixels.ndim = 4, pixels.shape[2] = pixels.shape[3] = SIDE, pixels.strides[2] = SIDE, pixels.strides[3] = 1;
  OK(pixmim_input_forward(ctx, &patches, NULL, &pixels, &images, &geometry, &keep, NULL, mean, std, PATCH, NULL));

  pixmim_filter *filter = NULL;
  OK(pixmim_filter_create(ctx, SIDE, 3.0, &filter, NULL));
  pixmim_tensor target = tensor(mem, PIXMIM_F32, IMAGES, MASKED, NUMBERS);
  WITH_WORKSPACE(pixmim_low_freq_target_forward, ctx, &target, &pixels, &masked, filter, mean, std, PATCH, 0);
  pixmim_filter_destroy(filter);

  pixmim_tensor weight = numbers(mem, DIM, NUMBERS, 0), bias = numbers(mem, DIM, 0, 0), cls = numbers(mem, DIM, 0, 0);
  pixmim_tensor positions = numbers(mem, 1 + PATCHES, DIM, 0), tokens = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, DIM);
  WITH_WORKSPACE(pixmim_patch_embed_forward, ctx, &tokens, &patches, &keep, &weight, &bias, &cls, &positions);

  pixmim_tensor normed = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, DIM);
  pixmim_tensor means = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, 0), rstds = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, 0);
  OK(pixmim_layer_norm_forward(ctx, &normed, &means, &rstds, &tokens, &bias, &cls, 1e-6, NULL));
  pixmim_tensor wide = numbers(mem, 3 * DIM, DIM, 0), wide_bias = numbers(mem, 3 * DIM, 0, 0);
  pixmim_tensor qkv = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, 3 * DIM);
  OK(pixmim_linear_forward(ctx, &qkv, NULL, &normed, &wide, &wide_bias, NULL, NULL));
  pixmim_tensor mixed = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, DIM), lse = tensor(mem, PIXMIM_F32, IMAGES, HEADS, 1 + KEPT);
  WITH_WORKSPACE(pixmim_attention_forward, ctx, &mixed, &lse, &qkv);
  pixmim_tensor grad_qkv = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, 3 * DIM);
  WITH_WORKSPACE(pixmim_attention_backward, ctx, &grad_qkv, &tokens, &mixed, &lse, &qkv);
  pixmim_tensor grad_in = tensor(mem, PIXMIM_F32, IMAGES, 1 + KEPT, DIM);
  pixmim_tensor grad_weight = tensor(mem, PIXMIM_F32, 3 * DIM, DIM, 0), grad_bias = tensor(mem, PIXMIM_F32, 3 * DIM, 0, 0);
  WITH_WORKSPACE(pixmim_linear_backward, ctx, &grad_in, &grad_weight, &grad_bias, &grad_qkv, &normed, &wide, NULL);
  pixmim_tensor grad_gain = tensor(mem, PIXMIM_F32, DIM, 0, 0), grad_shift = tensor(mem, PIXMIM_F32, DIM, 0, 0);
  WITH_WORKSPACE(pixmim_layer_norm_backward, ctx, &grad_in, &grad_gain, &grad_shift, &mixed, &tokens, &means, &rstds, &bias);

  pixmim_tensor pred = numbers(mem, IMAGES, MASKED, NUMBERS), grad_pred = tensor(mem, PIXMIM_F32, IMAGES, MASKED, NUMBERS);
  pixmim_tensor loss = tensor(mem, PIXMIM_F32, 1, 0, 0), norm = tensor(mem, PIXMIM_F32, 1, 0, 0);
  WITH_WORKSPACE(pixmim_masked_mse_loss_forward_backward, ctx, &loss, &grad_pred, &pred, &target, 1, 1.0);
  pixmim_tensor grad = grad_weight;
  grad.ndim = 1, grad.shape[0] = 3 * DIM * DIM, grad.strides[0] = 1;
  WITH_WORKSPACE(pixmim_grad_norm_forward, ctx, &norm, &grad);
  pixmim_tensor coefficients = tensor(mem, PIXMIM_F32, 5, 0, 0), step = tensor(mem, PIXMIM_I64, 1, 0, 0);
  pixmim_tensor lr = tensor(mem, PIXMIM_F64, 1, 0, 0);
  *(double *)lr.data = 1e-3;
  OK(pixmim_adamw_prepare(ctx, &coefficients, &step, &lr, &loss, &norm, 1.0, 0.9, 0.95, NULL));
  pixmim_tensor param = numbers(mem, 3 * DIM * DIM, 0, 0), copy = tensor(mem, PIXMIM_BF16, 3 * DIM * DIM, 0, 0);
  pixmim_tensor first = tensor(mem, PIXMIM_F32, 3 * DIM * DIM, 0, 0), second = tensor(mem, PIXMIM_F32, 3 * DIM * DIM, 0, 0);
  OK(pixmim_adamw_update(ctx, &param, &copy, &first, &second, &grad, &coefficients, 0.9, 0.95, 1e-8, 0.05, NULL));

  learn(ctx, mem, &images, &geometry, &samples, &epoch);

  /* What is refused leaves its sentence to this thread. */
  expect(pixmim_gelu_forward(ctx, &tokens, &qkv, NULL), PIXMIM_SHAPE, "another shape");
  if (!strstr(pixmim_last_error(), "`out`")) abort();
  expect(pixmim_gelu_forward(ctx, NULL, &qkv, NULL), PIXMIM_INVALID, "no tensor");
  if (strcmp(pixmim_last_error(), "`out` is null")) abort();
}

static arena memory(void) {
  arena out = {NULL, 0, 1 << 18};
  if (posix_memalign((void **)&out.bytes, 64, out.size)) abort();
  memset(out.bytes, 0, out.size);
  return out;
}

static pixmim_context *context(uint32_t threads) {
  pixmim_context_options options = {sizeof options, threads, 0, 0};
  pixmim_context *out = NULL;
  OK(pixmim_context_create(PIXMIM_CPU, &options, &out));
  return out;
}

/* What each thread works on: a context of its own if this is NULL, the bits that it must get. */
typedef struct {
  const pixmim_context *shared;
  const arena *expected;
} task;

static void *run(void *argument) {
  const task *task = argument;
  for (int round = 0; round < ROUNDS; round++) {
    pixmim_context *own = task->shared ? NULL : context(2);
    arena mem = memory();
    work(own ? own : task->shared, &mem);
    if (memcmp(mem.bytes, task->expected->bytes, mem.size)) {
      fprintf(stderr, "a thread among others gets other bits than one alone\n");
      exit(1);
    }
    free(mem.bytes);
    pixmim_context_destroy(own);
  }
  return NULL;
}

static void in_threads(void *(*body)(void *), void *argument) {
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; i++)
    if (pthread_create(&threads[i], NULL, body, argument)) abort();
  for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

/* All threads write the same tensor, each in a context of its own: nothing orders them. */
static void *race(void *argument) {
  (void)argument;
  pixmim_context *own = context(1);
  static float from[64], into[64];
  const int64_t shape[1] = {64};
  pixmim_tensor out, inp;
  OK(pixmim_tensor_init(&out, into, PIXMIM_F32, PIXMIM_CPU, 1, shape));
  OK(pixmim_tensor_init(&inp, from, PIXMIM_F32, PIXMIM_CPU, 1, shape));
  OK(pixmim_gelu_forward(own, &out, &inp, NULL));
  pixmim_context_destroy(own);
  return NULL;
}

/* The last element lies behind the memory. */
static void overflow(const pixmim_context *ctx) {
  const int64_t shape[1] = {65};
  float *from = calloc(65, sizeof *from), *into = calloc(64, sizeof *into);
  pixmim_tensor out, inp;
  OK(pixmim_tensor_init(&out, into, PIXMIM_F32, PIXMIM_CPU, 1, shape));
  OK(pixmim_tensor_init(&inp, from, PIXMIM_F32, PIXMIM_CPU, 1, shape));
  OK(pixmim_gelu_forward(ctx, &out, &inp, NULL));
  free(from);
  free(into);
}

static void leak(const pixmim_context *ctx) {
  pixmim_filter *filter = NULL;
  OK(pixmim_filter_create(ctx, SIDE, 3.0, &filter, NULL));
}

/* In C, which has its own sanitizer. */
static void undefined(int count) {
  volatile int most = 2147483647;
  most += count;
}

int main(int argc, char **argv) {
  const char *planted = argc > 1 ? argv[1] : "";
  /* What is made once in a process is made here, by one thread: who waits for that is in the uninstrumented part of the
   * standard library. */
  pixmim_context *alone = context(1);
  arena expected = memory();
  work(alone, &expected);
  pixmim_context_destroy(alone);

  pixmim_context *ctx = context(2);
  if (!strcmp(planted, "race")) in_threads(race, NULL);
  if (!strcmp(planted, "overflow")) overflow(ctx);
  if (!strcmp(planted, "leak")) leak(ctx);
  if (!strcmp(planted, "undefined")) undefined(argc);
  if (!*planted) {
    task own = {NULL, &expected}, shared = {ctx, &expected};
    in_threads(run, &own);
    in_threads(run, &shared);
    printf("%d threads on %d contexts and on one: the bits of one thread\n", THREADS, THREADS);
  }
  free(expected.bytes);
  pixmim_context_destroy(ctx);
  return 0;
}
