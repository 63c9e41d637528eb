// A stand-in for libcublasLt: takes descriptors apart as strictly as the real one, and multiplies column-major matrices
// with three loops. FAKE_NO_EPILOGUES leaves out those beyond a bias. Of the algorithms it offers, the first is slow, the second refuses to run, the third is fast, and
// the fourth, the fastest, says that it cannot be used.
#include "cuda.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15, R_32F = 0, R_16BF = 14, COMPUTE_32F = 68, PEDANTIC = 69 };
enum { DEFAULT = 1, BIAS = 4, GELU_AUX_BIAS = 164, DGELU = 192, BGRADA = 256, BGRADB = 512 };
enum { WORKSPACE = 1 << 20 };

typedef struct { int32_t compute, scale, op_a, op_b, epilogue, bias_type; uint64_t bias, aux; int64_t aux_leading; } Operation;
typedef struct { int32_t type, batch; uint64_t rows, cols; int64_t leading, stride; } Layout;
typedef struct { uint64_t workspace; uint32_t reductions, aligned[4]; } Preference;
typedef struct { uint64_t data[8]; } Algorithm;
typedef struct { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; } Result;

static int handles, live;

size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtCreate(void **handle) { return handles++, *handle = malloc(1), OK; }
int cublasLtDestroy(void *handle) {
    free(handle);
    if (--handles == 0 && live) {
        fprintf(stderr, "fake libcublasLt: %d objects outlive the last handle\n", live);
        abort();
    }
    return OK;
}

static int set(void *field, size_t bytes, const void *value, size_t given) {
    return given == bytes ? (memcpy(field, value, bytes), OK) : INVALID_VALUE;
}

int cublasLtMatmulDescCreate(Operation **operation, int compute, int scale) {
    *operation = calloc(1, sizeof **operation);
    **operation = (Operation){.compute = compute, .scale = scale, .epilogue = 1, .bias_type = -1};
    return live++, OK;
}
int cublasLtMatmulDescDestroy(Operation *operation) { return live--, free(operation), OK; }
int cublasLtMatmulDescSetAttribute(Operation *o, int attribute, const void *value, size_t bytes) {
    switch (attribute) {
        case 3: return set(&o->op_a, 4, value, bytes);
        case 4: return set(&o->op_b, 4, value, bytes);
        case 7: return set(&o->epilogue, 4, value, bytes);
        case 8: return set(&o->bias, 8, value, bytes);
        case 11: return set(&o->aux, 8, value, bytes);
        case 12: return set(&o->aux_leading, 8, value, bytes);
        case 26: return set(&o->bias_type, 4, value, bytes);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t cols, int64_t leading) {
    if (leading < (int64_t)rows) return INVALID_VALUE;
    *layout = calloc(1, sizeof **layout);
    **layout = (Layout){.type = type, .batch = 1, .rows = rows, .cols = cols, .leading = leading};
    return live++, OK;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { return live--, free(layout), OK; }
int cublasLtMatrixLayoutSetAttribute(Layout *l, int attribute, const void *value, size_t bytes) {
    switch (attribute) {
        case 5: return set(&l->batch, 4, value, bytes);
        case 6: return set(&l->stride, 8, value, bytes);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatmulPreferenceCreate(Preference **p) { return live++, *p = calloc(1, sizeof **p), OK; }
int cublasLtMatmulPreferenceDestroy(Preference *p) { return live--, free(p), OK; }
int cublasLtMatmulPreferenceSetAttribute(Preference *p, int attribute, const void *value, size_t bytes) {
    switch (attribute) {
        case 1: return set(&p->workspace, 8, value, bytes);
        case 3: return set(&p->reductions, 4, value, bytes);
        case 5: case 6: case 7: case 8: return set(&p->aligned[attribute - 5], 4, value, bytes);
        default: return INVALID_VALUE;
    }
}

// Whether the shapes and types go together, and there is an algorithm for them.
static int judge(const Operation *o, const Layout *a, const Layout *b, const Layout *c, const Layout *d) {
    uint64_t m = o->op_a ? a->cols : a->rows, k = o->op_a ? a->rows : a->cols;
    uint64_t n = o->op_b ? b->rows : b->cols, k_b = o->op_b ? b->cols : b->rows;
    if (k != k_b || d->rows != m || d->cols != n || memcmp(c, d, sizeof *c)) return INVALID_VALUE;
    if (a->batch != d->batch || b->batch != d->batch || o->scale != R_32F) return INVALID_VALUE;
    int f32 = a->type == R_32F, e = o->epilogue, aux = e == GELU_AUX_BIAS || e == DGELU, sums = e == BGRADA || e == BGRADB;
    int bias = e == BIAS || e == GELU_AUX_BIAS || sums;
    if (!aux && !bias && e != DEFAULT) return INVALID_VALUE;
    if (a->type != b->type || (f32 && d->type != R_32F) || (!f32 && o->compute != COMPUTE_32F)) return NOT_SUPPORTED;
    if (bias && (o->compute == PEDANTIC || o->bias_type != d->type)) return NOT_SUPPORTED;
    if ((aux || sums) && getenv("FAKE_NO_EPILOGUES")) return NOT_SUPPORTED;
    if (aux && (d->type != R_16BF || d->batch != 1)) return NOT_SUPPORTED;
    if (aux ? o->aux_leading % 8 || o->aux_leading < (int64_t)d->rows : o->aux_leading != 0) return INVALID_VALUE;
    if (bias != (o->bias != 0) || aux != (o->aux != 0)) return INVALID_VALUE;
    return o->bias % 16 || o->aux % 16 ? INVALID_VALUE : OK;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, const Operation *o, const Layout *a, const Layout *b, const Layout *c,
                                   const Layout *d, const Preference *p, int most, Result *results, int *found) {
    int status = judge(o, a, b, c, d);
    if (status) return status;
    if (p->reductions != 2 || p->workspace < WORKSPACE || most < 4) return INVALID_VALUE;
    for (int i = 0; i < 4; i++) {
        results[i] = (Result){.workspace = i == 2 ? WORKSPACE : 0, .state = i == 3 ? NOT_SUPPORTED : OK};
        results[i].algorithm.data[0] = i;
        for (int x = 0; x < 4; x++) results[i].algorithm.data[1 + x] = p->aligned[x];
        // As much as these are aligned now, the algorithm expects of them.
        results[i].algorithm.data[5] = o->bias & -o->bias;
        results[i].algorithm.data[6] = o->aux & -o->aux;
    }
    return *found = 4, OK;
}

int cublasLtMatmulAlgoCheck(void *handle, const Operation *o, const Layout *a, const Layout *b, const Layout *c,
                            const Layout *d, const Algorithm *algorithm, Result *result) {
    int status = judge(o, a, b, c, d);
    *result = (Result){.workspace = algorithm->data[0] == 2 ? WORKSPACE : 0};
    return status ? status : algorithm->data[0] > 2 ? INVALID_VALUE : OK;
}

static float load(uint64_t address, int type, int64_t index) {
    if (type == R_32F) return ((const float *)address)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)address)[index] << 16;
    float value;
    return memcpy(&value, &bits, 4), value;
}
static void store(uint64_t address, int type, int64_t index, float value) {
    if (type == R_32F) {
        ((float *)address)[index] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t *)address)[index] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static float gelu(float x) { return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }
static float gelu_slope(float x) {
    float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

typedef struct { Operation o; Layout a, b, d; uint64_t A, B, C, D; float alpha, beta; void *workspace; size_t bytes; } Product;
static void multiply(void *data) {
    const Product *p = data;
    memset(p->workspace, 0xFF, p->bytes);
    uint64_t depth = p->o.op_a ? p->a.rows : p->a.cols;
    for (uint64_t col = 0; p->o.epilogue == BGRADB && col < p->d.cols; col++) {
        float sum = 0;
        for (uint64_t k = 0; k < depth; k++)
            sum += load(p->B, p->b.type, p->o.op_b ? col + k * p->b.leading : k + col * p->b.leading);
        store(p->o.bias, p->o.bias_type, col, sum);
    }
    for (uint64_t row = 0; p->o.epilogue == BGRADA && row < p->d.rows; row++) {
        float sum = 0;
        for (uint64_t k = 0; k < depth; k++)
            sum += load(p->A, p->a.type, p->o.op_a ? k + row * p->a.leading : row + k * p->a.leading);
        store(p->o.bias, p->o.bias_type, row, sum);
    }
    for (int64_t i = 0; i < p->d.batch; i++)
        for (uint64_t col = 0; col < p->d.cols; col++)
            for (uint64_t row = 0; row < p->d.rows; row++) {
                float sum = 0;
                for (uint64_t k = 0; k < depth; k++) {
                    uint64_t at_a = p->o.op_a ? k + row * p->a.leading : row + k * p->a.leading;
                    uint64_t at_b = p->o.op_b ? col + k * p->b.leading : k + col * p->b.leading;
                    sum += load(p->A, p->a.type, i * p->a.stride + at_a) * load(p->B, p->b.type, i * p->b.stride + at_b);
                }
                int64_t at = i * p->d.stride + row + col * p->d.leading;
                float value = p->alpha * sum;
                if (p->beta != 0) value += p->beta * load(p->C, p->d.type, at);
                if (p->o.epilogue == BIAS || p->o.epilogue == GELU_AUX_BIAS) value += load(p->o.bias, p->o.bias_type, row);
                int64_t at_aux = row + col * p->o.aux_leading;
                if (p->o.epilogue == DGELU) value *= gelu_slope(load(p->o.aux, p->d.type, at_aux));
                if (p->o.epilogue == GELU_AUX_BIAS) {
                    store(p->o.aux, p->d.type, at_aux, value);
                    value = gelu(value);
                }
                store(p->D, p->d.type, at, value);
            }
}

int cublasLtMatmul(void *handle, const Operation *o, const float *alpha, uint64_t A, const Layout *a, uint64_t B,
                   const Layout *b, const float *beta, uint64_t C, const Layout *c, uint64_t D, const Layout *d,
                   const Algorithm *algorithm, void *workspace, size_t bytes, Stream *stream) {
    int status = judge(o, a, b, c, d), which = algorithm->data[0];
    if (status || which == 1) return status ? status : NOT_SUPPORTED;
    uint64_t addresses[4] = {A, B, C, D};
    for (int i = 0; i < 4; i++)
        if (!algorithm->data[1 + i] || addresses[i] % algorithm->data[1 + i]) return INVALID_VALUE;
    if (o->bias && o->bias % algorithm->data[5] || o->aux && o->aux % algorithm->data[6]) return INVALID_VALUE;
    if (bytes < (which == 2 ? WORKSPACE : 0)) return INVALID_VALUE;
    Product p = {*o, *a, *b, *d, A, B, C, D, *alpha, *beta, workspace, bytes};
    return fake_enqueue(stream, multiply, &p, sizeof p, which == 0 ? 3 : which == 2 ? 1 : 0.5f) ? 14 : OK;
}
