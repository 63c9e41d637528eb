// A stand-in for libcuda: device memory is the host's, a kernel is a C function, and nothing runs before somebody waits
// for it. It counts what is made and destroyed, and ends the process if something outlives its context.
#include "cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, UNAVAILABLE = 46, NO_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, CAPTURE = 900 };

typedef struct Event Event;
typedef struct Op {
    enum { CALL, RECORD, WAIT } kind;
    void (*call)(void *);
    void *data;
    size_t bytes;
    float milliseconds;
    Event *event;
    Stream *recorder;
    uint64_t ticket;
    struct Op *next;
} Op;
typedef struct { Op *first, **last; } Ops;
struct Stream { Ops ops, recorded; int capturing; char *context; struct Stream *next; };
struct Event { Stream *stream; uint64_t recorded, done; float time; int timed; };
typedef struct { const char *name; void (*call)(void *); size_t params_bytes; unsigned shared, loaded; } Function;
typedef struct { size_t bytes; char pad[248]; } Header;  // Keeps memory aligned to 256.

static char contexts[2];  // The second one stands for that of another GPU.
static __thread char *current;
static __thread int capture_mode;
static Stream legacy, *streams = &legacy;  // What NULL stands for.
static int references, live, sticky;
static size_t used;
static float now;

static void leave(const char *why) {
    fprintf(stderr, "fake libcuda: %s\n", why);
    abort();
}

// A call into a context.
#define ENTER() do { if (!current) return NO_CONTEXT; if (sticky) return sticky; } while (0)

static Stream *at(Stream *stream) {
    if (!stream) return &legacy;
    for (Stream *s = streams; s != stream; s = s->next)
        if (!s) leave("a stream is used that is not there, or no more");
    return stream;
}

// A call that spoils every capture, unless the thread says that it knows what it does.
static int unsafe_call(void) {
    int spoilt = 0;
    if (capture_mode == 2) return OK;
    for (Stream *s = streams; s; s = s->next)
        if (s->capturing) spoilt = s->capturing = 2;
    return spoilt ? CAPTURE : OK;
}

static void push(Ops *ops, Op op) {
    if (!ops->last) ops->last = &ops->first;
    Op *copy = malloc(sizeof op);
    *copy = op;
    if (op.bytes) copy->data = memcpy(malloc(op.bytes), op.data, op.bytes);
    *ops->last = copy;
    ops->last = &copy->next;
}

static int enqueue(Stream *stream, Op op) {
    ENTER();
    stream = at(stream);
    if (op.event && op.kind == RECORD) {
        if (stream->capturing) return CAPTURE;
        op.event->stream = stream;
        op.ticket = ++op.event->recorded;
    } else if (op.event) {
        op.ticket = op.event->recorded;
        op.recorder = op.event->stream;
    }
    push(stream->capturing ? &stream->recorded : &stream->ops, op);
    return OK;
}

static void step(Stream *stream) {
    Op *op = stream->ops.first;
    if (!op) leave("an event is waited for that nobody records");
    stream->ops.first = op->next;
    if (!stream->ops.first) stream->ops.last = &stream->ops.first;
    switch (op->kind) {
        case CALL: now += op->milliseconds; op->call(op->data); break;
        case RECORD: op->event->done = op->ticket; op->event->time = now; break;
        case WAIT: while (op->event->done < op->ticket) step(op->recorder); break;
    }
    if (op->bytes) free(op->data);
    free(op);
}

int fake_enqueue(Stream *stream, void (*call)(void *), const void *data, size_t bytes, float milliseconds) {
    return enqueue(stream, (Op){.kind = CALL, .call = call, .data = (void *)data, .bytes = bytes, .milliseconds = milliseconds});
}

// Start and devices.
int cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuGetErrorString(int error, const char **text) {
    *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : error == INVALID_VALUE ? "invalid argument" : NULL;
    return *text ? OK : INVALID_VALUE;
}
int cuDeviceGetCount(int *count) { return *count = 1, OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? OK : 101; }
int cuDeviceGetName(char *name, int bytes, int device) { return snprintf(name, bytes, "Fake GPU"), OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = (size_t)1 << 30, OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 16: *value = 132; return OK;
        case 75: *value = 9; return OK;
        case 76: *value = 0; return OK;
        case 97: *value = 227 << 10; return OK;
        case 115: *value = 0; return OK;
        default: return INVALID_VALUE;
    }
}

// Contexts.
int cuDevicePrimaryCtxRetain(char **handle, int device) {
    if (getenv("FAKE_BUSY")) return UNAVAILABLE;
    const char *first = getenv("FAKE_FIRST_CONTEXT");  // As many times it is the first one.
    return *handle = &contexts[first && references >= atoi(first)], references++, OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    if (--references == 0 && live) {
        fprintf(stderr, "%d objects: ", live);
        leave("something outlives the context");
    }
    return OK;
}
int cuCtxSetCurrent(char *handle) { return current = handle, handle ? OK : INVALID_VALUE; }
int cuCtxGetCurrent(char **handle) { return *handle = current, OK; }
int cuCtxSynchronize(void) {
    ENTER();
    int status = unsafe_call();
    if (status) return status;
    for (Stream *s = streams; s; s = s->next)
        while (s->ops.first) step(s);
    return sticky;
}

// Memory.
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    ENTER();
    const char *most = getenv("FAKE_MEMORY");
    int status = unsafe_call();
    if (status || !bytes) return status ? status : INVALID_VALUE;
    if (used + bytes > (most ? strtoull(most, NULL, 10) : (size_t)1 << 30)) return OUT_OF_MEMORY;
    Header *memory = aligned_alloc(256, (sizeof(Header) + bytes + 255) / 256 * 256);
    memory->bytes = bytes;
    memset(memory + 1, 0xFF, bytes);
    used += bytes;
    live++;
    return *address = (uintptr_t)(memory + 1), OK;
}
int cuMemGetInfo_v2(size_t *available, size_t *all) { return *available = *all = (size_t)1 << 30, OK; }
int cuMemFree_v2(uint64_t address) {
    if (!current) return NO_CONTEXT;
    if (unsafe_call()) leave("memory is freed during a capture");
    Header *memory = (Header *)(uintptr_t)address - 1;
    used -= memory->bytes;
    live--;
    memset(memory + 1, 0xFF, memory->bytes);
    return free(memory), OK;
}
typedef struct { void *dst; const void *src; size_t bytes; } Copy;
static void copy(void *data) { const Copy *c = data; memcpy(c->dst, c->src, c->bytes); }
int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    ENTER();
    const char *most = getenv("FAKE_PINNED");
    int status = unsafe_call();
    if (status || !bytes) return status ? status : INVALID_VALUE;
    if (most && bytes > strtoull(most, NULL, 10)) return OUT_OF_MEMORY;
    Header *memory = malloc(sizeof(Header) + bytes);
    memory->bytes = bytes;
    return live++, *address = memset(memory + 1, 0xFF, bytes), OK;
}
int cuMemFreeHost(void *address) {
    Header *memory = (Header *)address - 1;
    for (Stream *s = sticky ? NULL : streams; s; s = s->next)
        for (const Op *op = s->ops.first; op; op = op->next) {
            const char *src = op->kind == CALL && op->call == copy ? ((Copy *)op->data)->src : NULL;
            if (src >= (char *)address && src < (char *)address + memory->bytes) leave("pinned memory is freed before it was read");
        }
    return live--, free(memory), current ? OK : NO_CONTEXT;
}

static void clear(void *data) { const Copy *c = data; memset(c->dst, 0, c->bytes); }
static int enqueue_copy(Stream *stream, Copy c) { return fake_enqueue(stream, copy, &c, sizeof c, 0); }
int cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t bytes, Stream *stream) {
    return enqueue_copy(stream, (Copy){(void *)dst, src, bytes});
}
int cuMemcpyDtoHAsync_v2(void *dst, uint64_t src, size_t bytes, Stream *stream) {
    return enqueue_copy(stream, (Copy){dst, (const void *)src, bytes});
}
int cuMemcpyDtoDAsync_v2(uint64_t dst, uint64_t src, size_t bytes, Stream *stream) {
    return enqueue_copy(stream, (Copy){(void *)dst, (const void *)src, bytes});
}
int cuMemsetD8Async(uint64_t dst, unsigned char value, size_t bytes, Stream *stream) {
    if (value) return INVALID_VALUE;
    Copy c = {(void *)dst, NULL, bytes};
    return fake_enqueue(stream, clear, &c, sizeof c, 0);
}

// Streams and events.
int cuStreamCreate(Stream **stream, unsigned flags) {
    ENTER();
    *stream = calloc(1, sizeof **stream);
    (*stream)->context = current;
    (*stream)->next = legacy.next;
    legacy.next = *stream;
    return live++, flags == 1 ? OK : INVALID_VALUE;
}
int cuStreamDestroy_v2(Stream *stream) {
    if (at(stream)->ops.first && !sticky) leave("a stream is destroyed with work in it");
    Stream *before = streams;
    while (before->next != stream) before = before->next;
    before->next = stream->next;
    return live--, free(stream), current ? OK : NO_CONTEXT;
}
int cuStreamGetCtx(Stream *stream, char **handle) { return *handle = stream ? at(stream)->context : current, OK; }
int cuStreamSynchronize(Stream *stream) {
    ENTER();
    stream = at(stream);
    if (stream->capturing) return stream->capturing = 2, CAPTURE;
    while (stream->ops.first) step(stream);
    return sticky;
}
int cuStreamIsCapturing(Stream *stream, int *status) { return *status = at(stream)->capturing, OK; }
int cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode;
    return capture_mode = *mode, *mode = before, OK;
}
int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    return enqueue(stream, (Op){.kind = WAIT, .event = event});
}
int cuEventCreate(Event **event, unsigned flags) {
    ENTER();
    *event = calloc(1, sizeof **event);
    (*event)->timed = !(flags & 2);
    return live++, OK;
}
int cuEventDestroy_v2(Event *event) { return live--, free(event), current ? OK : NO_CONTEXT; }
int cuEventRecord(Event *event, Stream *stream) { return enqueue(stream, (Op){.kind = RECORD, .event = event}); }
int cuEventSynchronize(Event *event) {
    ENTER();
    while (event->done < event->recorded) step(event->stream);
    return sticky;
}
int cuEventElapsedTime_v2(float *milliseconds, const Event *start, const Event *end) {
    if (!start->timed || !end->timed || !start->done || !end->done) return INVALID_VALUE;
    return *milliseconds = end->time - start->time, OK;
}

// Kernels.
typedef struct { uint32_t *out; uint32_t n, value; } Fill;
static void fill(void *data) {
    const Fill *p = data;
    for (uint32_t i = 0; i < p->n; i++) p->out[i] = p->value;
}
static void fail(void *data) { sticky = ILLEGAL_ADDRESS; }
static Function functions[] = {{"fill", fill, sizeof(Fill), 48 << 10, 0}, {"fail", fail, 8, 48 << 10, 0}};
int cuModuleLoadData(void **module, const void *image) {
    ENTER();
    return live++, *module = functions, OK;
}
int cuModuleUnload(void *module) { return live--, current ? OK : NO_CONTEXT; }
int cuModuleGetFunctionCount(unsigned *count, void *module) { return *count = 2, OK; }
int cuModuleEnumerateFunctions(Function **handles, unsigned count, Function *module) {
    for (unsigned i = 0; i < count; i++) handles[i] = &module[i];
    return OK;
}
int cuFuncGetName(const char **name, const Function *function) { return *name = function->name, OK; }
int cuFuncGetParamInfo(const Function *function, size_t index, size_t *offset, size_t *bytes) {
    return *offset = 0, *bytes = function->params_bytes, index == 0 ? OK : INVALID_VALUE;
}
int cuFuncLoad(Function *function) { return function->loaded = 1, OK; }
int cuFuncSetAttribute(Function *function, int attribute, int value) {
    return function->shared = value, attribute == 8 && value <= 227 << 10 ? OK : INVALID_VALUE;
}
int cuLaunchKernel(const Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream *stream, void **params, void **extra) {
    if (!gx || gy != 1 || gz != 1 || !bx || bx > 1024 || by != 1 || bz != 1 || extra) return INVALID_VALUE;
    if (shared > function->shared) return INVALID_VALUE;
    if (at(stream)->capturing && !function->loaded) return unsafe_call();
    return fake_enqueue(stream, function->call, params[0], function->params_bytes, 1);
}

// Graphs.
int cuStreamBeginCapture_v2(Stream *stream, int mode) {
    ENTER();
    if (!stream) return CAPTURE;
    if (mode != 1 || stream->capturing) return INVALID_VALUE;
    return stream->capturing = 1, OK;
}
int cuStreamEndCapture(Stream *stream, Ops **graph) {
    ENTER();
    if (!stream->capturing) return INVALID_VALUE;
    int spoilt = stream->capturing == 2;
    stream->capturing = 0;
    *graph = malloc(sizeof **graph);
    **graph = stream->recorded;
    stream->recorded = (Ops){0};
    return live++, spoilt ? (live--, *graph = NULL, 901) : OK;
}
int cuGraphInstantiateWithFlags(Ops **exec, const Ops *graph, uint64_t flags) {
    ENTER();
    *exec = calloc(1, sizeof **exec);
    for (const Op *op = graph->first; op; op = op->next) push(*exec, *op), *(*exec)->last = NULL;
    return live++, flags ? INVALID_VALUE : OK;
}
int cuGraphDestroy(Ops *graph) { return live--, free(graph), OK; }
int cuGraphLaunch(const Ops *exec, Stream *stream) {
    ENTER();
    for (const Op *op = exec->first; op; op = op->next) push(&stream->ops, *op), *stream->ops.last = NULL;
    return OK;
}
int cuGraphExecDestroy(Ops *exec) { return live--, free(exec), current ? OK : NO_CONTEXT; }
