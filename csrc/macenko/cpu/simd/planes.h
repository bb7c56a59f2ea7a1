// Blocks as planes, of whatever a pixel is made of. Included by the loops, once per instruction set, and therefore
// static throughout.
#pragma once

#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// Pixels at a time: everything about a block stays in the first-level cache.
constexpr int kBlock = 512;
static_assert(kBlock <= macenko::kMaxFixedProducts, "products of one block are summed in int64");

// Adds up the first n fixed-point ODs and their products.
template <int kStride> static void add_fixed(const int32_t od[3][kStride], int n, MomentSums& sums) {
  int64_t sum[3] = {0, 0, 0};
  int64_t product[6] = {0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; ++i) {
    const int64_t r = od[0][i];
    const int64_t g = od[1][i];
    const int64_t b = od[2][i];
    sum[0] += r;
    sum[1] += g;
    sum[2] += b;
    product[0] += r * r;
    product[1] += r * g;
    product[2] += r * b;
    product[3] += g * g;
    product[4] += g * b;
    product[5] += b * b;
  }
  for (int k = 0; k < 3; ++k) sums.sum[k] += sum[k];
  for (int k = 0; k < 6; ++k) sums.product[k] += uint64_t(product[k]);
}

// Writes a block to an image laid out as `image`.
template <class T>
static void store(const ImageView& image, int64_t begin, int count, void* out, const T (&value)[3][kBlock]) {
  T* data = static_cast<T*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int c = 0; c < 3; ++c) __builtin_memcpy(data + c * image.channel_stride, value[c], size_t(count) * sizeof(T));
  } else {
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < 3; ++c) data[3 * i + c] = value[c][i];
    }
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
