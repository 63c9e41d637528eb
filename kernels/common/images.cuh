// images.cuh - images of bytes one after another, where they are, and how rows of them come to shared memory.
#pragma once
#include "ptx.cuh"

// An image and its crop: a row of `geometry`, as `Geometry` in src/ops/input.rs.
struct Geometry {
  int64_t offset;
  int32_t height, width, top, left;
  bool flip;

  DEV Geometry(Global<const int64_t> rows, int64_t image) {
    const Vec<int64_t, 2> a = load_vec<2>(rows, 6 * image), b = load_vec<2>(rows, 6 * image + 2),
                          c = load_vec<2>(rows, 6 * image + 4);
    offset = a[0];
    height = (int32_t)a[1];
    width = (int32_t)b[0];
    top = (int32_t)b[1];
    left = (int32_t)c[0];
    flip = c[1] != 0;
  }

  // One past its last byte.
  DEV int64_t end() const { return offset + (int64_t)3 * height * width; }
};

// A warp copies bytes `begin .. end` of `images`, part of an image, to `to + begin % 16`: 16 at a time from aligned
// addresses, the image's first and last ones one by one. What it copies is there after its wait and a barrier.
DEV void copy_row(uint32_t to, Global<const uint8_t> images, int64_t begin, int64_t end, const Geometry& image) {
  // From here on all is counted from an aligned address, and small: what a vector may read ends soon after the row.
  const int64_t aligned = begin & ~(int64_t)15;
  const auto from = images + aligned;
  const int32_t first = (int32_t)(begin - aligned), last = (int32_t)(end - aligned);
  const int32_t low = image.offset > aligned ? first : 0;
  const int32_t high = image.end() - end > 15 ? last + 15 : (int32_t)(image.end() - aligned);
  for (int32_t at = 16 * (threadIdx.x % 32); at < last; at += 16 * 32) {
    if (at >= low && at + 16 <= high) {
      cp_async16(to + at, from + at, 16);
    } else {
      for (int32_t i = at < first ? first : at; i < at + 16 && i < last; i++) sts(to + i, load(from, i));
    }
  }
}
