/* Trains a small masked autoencoder from C, or C++, on images made in memory: the loop is yours, the step is libpixmim's.
 *
 *     scripts/install-capi /usr/local        # or any other folder, which PKG_CONFIG_PATH then names
 *     cc -O2 -o train examples/c/train.c $(pkg-config --cflags --libs pixmim) -lm
 *     ./train                                # on the CPU; `./train 0` on the first GPU
 */
#include <math.h>
#include <pixmim.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { IMAGES = 32, SIDE = 32, BYTES = IMAGES * SIDE * SIDE * 3, STEPS = 60 };

/* Every call returns a status; the sentence behind it says what was wrong and what would be right. */
static void check(pixmim_status status, int line) {
    if (status != PIXMIM_OK) {
        fprintf(stderr, "train.c:%d: %s: %s\n", line, pixmim_status_name(status), pixmim_last_error());
        exit(EXIT_FAILURE);
    }
}
#define CHECK(call) check((call), __LINE__)

/* A batch in the host's memory. A trainer whose images are on the GPU already passes them as they are. */
typedef struct {
    uint8_t images[BYTES];
    int64_t geometry[IMAGES][6], samples[IMAGES], epoch;
} batch;

/* Image i is a wave of a direction and length of its own; bytes of any RGB images will do. */
static void fill(batch *into) {
    for (int i = 0; i < IMAGES; i++) {
        uint8_t *pixel = into->images + i * SIDE * SIDE * 3;
        for (int y = 0; y < SIDE; y++)
            for (int x = 0; x < SIDE; x++)
                for (int c = 0; c < 3; c++)
                    *pixel++ = (uint8_t)(127.5 + 100 * sin(0.05 * (i % 6 * x + i / 6 * y) + c));
        /* Where it starts, its height and width, top and left of the crop, whether it is mirrored. */
        const int64_t place[6] = {i * SIDE * SIDE * 3, SIDE, SIDE, 0, 0, 0};
        memcpy(into->geometry[i], place, sizeof place);
        into->samples[i] = i;
    }
}

static pixmim_tensor on_host(void *data, int32_t dtype, int32_t ndim, const int64_t *shape) {
    pixmim_tensor tensor;
    CHECK(pixmim_tensor_init(&tensor, data, dtype, PIXMIM_CPU, ndim, shape));
    return tensor;
}

static void forward_loss(pixmim_model *model, batch *from, void *stream) {
    const int64_t bytes = BYTES, rows[2] = {IMAGES, 6}, one = 1;
    const pixmim_tensor images = on_host(from->images, PIXMIM_U8, 1, &bytes);
    const pixmim_tensor geometry = on_host(from->geometry, PIXMIM_I64, 2, rows);
    const pixmim_tensor samples = on_host(from->samples, PIXMIM_I64, 1, rows);
    const pixmim_tensor epoch = on_host(&from->epoch, PIXMIM_I64, 1, &one);
    CHECK(pixmim_model_forward_loss(model, &images, &geometry, &samples, &epoch, 1, stream));
}

int main(int argc, char **argv) {
    const int32_t device = argc > 1 ? (int32_t)strtol(argv[1], NULL, 10) : PIXMIM_CPU;
    const char *path = argc > 2 ? argv[2] : "weights.safetensors";
    void *stream = NULL; /* A cudaStream_t; NULL is the default stream. */
    if (pixmim_abi_version() >> 16 != PIXMIM_ABI_MAJOR) {
        fprintf(stderr, "libpixmim %s is not for this header\n", pixmim_version());
        return EXIT_FAILURE;
    }
    pixmim_context *context = NULL;
    CHECK(pixmim_context_create(device, NULL, &context));

    /* A preset, made smaller. */
    pixmim_model_config config;
    config.struct_size = sizeof config;
    CHECK(pixmim_model_config_preset("demo", &config));
    config.image_size = SIDE;
    config.patch_size = 4;
    config.dim = 96;
    config.depth = 2;
    config.decoder_dim = 48;
    config.decoder_depth = 1;
    config.micro_batch = IMAGES;
    config.radius = 6; /* The low-pass target of PixMIM; 0 is MAE. */
    pixmim_model *model = NULL;
    CHECK(pixmim_model_create(context, &config, &model));

    batch *images = (batch *)malloc(sizeof *images);
    if (images == NULL) return EXIT_FAILURE;
    fill(images);
    double loss = 0, grad_norm = 0;
    for (int step = 0; step < STEPS; step++) {
        images->epoch = step; /* A new epoch draws new masks. */
        CHECK(pixmim_model_clear(model, stream));
        forward_loss(model, images, stream);
        CHECK(pixmim_model_backward(model, stream));
        CHECK(pixmim_model_step(model, 2e-3, stream));
        if (step % 10 == 0 || step == STEPS - 1) {
            CHECK(pixmim_model_outcome(model, &loss, &grad_norm, NULL, stream)); /* Waits; the rest does not. */
            printf("step %2d  loss %.4f  |g| %.3f\n", step, loss, grad_norm);
        }
    }

    /* The weights, written and read again, give the same loss. */
    CHECK(pixmim_model_save(model, path, stream));
    pixmim_model *again = NULL;
    CHECK(pixmim_model_config_load(path, &config));
    CHECK(pixmim_model_load(context, path, &config, &again));
    double losses[2];
    for (int i = 0; i < 2; i++) {
        pixmim_model *of = i == 0 ? model : again;
        CHECK(pixmim_model_clear(of, stream));
        forward_loss(of, images, stream);
        CHECK(pixmim_model_outcome(of, &losses[i], NULL, NULL, stream));
    }
    printf("saved %.17g, loaded %.17g\n", losses[0], losses[1]);

    pixmim_model_destroy(again);
    pixmim_model_destroy(model);
    pixmim_context_destroy(context);
    free(images);
    return losses[0] == losses[1] ? EXIT_SUCCESS : EXIT_FAILURE;
}
