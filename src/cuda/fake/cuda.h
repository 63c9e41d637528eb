// What the stand-ins for libcuda and libcublasLt share: a queue of work for each stream, done as late as the order allows,
// so that a missing event shows in the result.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct Stream Stream;

// Enqueues `call(data)`, which takes `milliseconds`. `data` is copied. Returns a CUresult.
int fake_enqueue(Stream *stream, void (*call)(void *), const void *data, size_t bytes, float milliseconds);
