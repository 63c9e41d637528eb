// api.h - the executor as Rust sees it (src/cuda/simt.rs declares the same).
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {
struct PixmimSimtOptions {
  uint32_t seed;     // 0: a fixed order of blocks, warps and lanes; else a reproducible random one
  uint32_t threads;  // OS threads; 0: one per core
  uint32_t checks;   // 1: races, uninitialised and unwaited reads, in shared and global memory
};
// Runs a kernel to its end. Returns 0, or 1 with a sentence in `text` (kernel, block, thread, line, what it did).
int pixmim_simt_launch(const char* kernel, const void* params, size_t params_bytes, uint32_t grid, uint32_t block,
                       uint32_t shared_bytes, const PixmimSimtOptions* options, char* text, size_t text_bytes);
// Memory between guard pages, filled with 0xff (NaN in bf16, f16, f32 and f64), marked as never written. `front`: the
// first byte follows a guard page; else the last byte (up to 16-byte alignment) is followed by one. Null if refused.
void* pixmim_simt_alloc(size_t bytes, const char* name, int front);
void pixmim_simt_free(void* memory);
// The host wrote these bytes (a copy, a fill, a matrix product).
void pixmim_simt_wrote(void* memory, size_t bytes);
// The host is about to read these bytes: 0, or 1 with a sentence if some were never written or lie outside a buffer.
int pixmim_simt_reads(const void* memory, size_t bytes, char* text, size_t text_bytes);
}
