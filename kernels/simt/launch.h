// launch.h - a grid of blocks on a pool of OS threads.
#pragma once
#include <cstdint>
#include <string>

#include "fiber.h"

namespace simt {

struct Options {
  uint32_t seed, threads;
  bool checks;
};
// Runs the grid; the finding, or an empty string.
std::string launch(const Kernel& kernel, const void* params, uint32_t grid, uint32_t block, uint32_t shared_bytes,
                   const Options& options);

void catch_signals();  // once per process

}  // namespace simt
