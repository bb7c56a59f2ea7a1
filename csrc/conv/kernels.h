// The gradient of a convolution's weight, channels-last float maps, free of torch. One function per instruction set.
//
//   dw[k][u][v][c] = sum over samples and output pixels (i, j) of dy[n][i][j][k] * x[n][i * s + u - p][j * s + v -
//   p][c]
//
// where x is zero outside. A GEMM for each (u, v) over all output pixels, whose operands are copied once a block of
// pixels and used for all of them.
#pragma once

#include <stdint.h>

#include "simd/isa.h"

namespace ernet::cpu {

struct ConvShape {
  int64_t N, height, width, C;       // of x [N][height][width][C]
  int64_t out_height, out_width, K;  // of dy [N][out_height][out_width][K]
  int64_t kernel, stride, padding;   // of both axes

  // A kernel of one pixel reads every `stride`-th pixel alone, and only these are copied.
  int64_t copied_stride() const { return kernel == 1 ? 1 : stride; }
  int64_t copied_width() const { return (out_width - 1) * copied_stride() + kernel; }
  int64_t copied_height(int64_t rows) const { return (rows - 1) * copied_stride() + kernel; }
};

struct ConvWeightGradient {
  ConvShape shape;
  const float* x;
  const float* dy;
  float* dw;  // [K][kernel][kernel][C]
};

// A block of output pixels: some rows of one sample, or some whole samples. Products are summed within a block in
// registers, and blocks one after the other in dw: by shape alone, so results do not depend on threads.
struct PixelBlock {
  int64_t samples, rows;
};
PixelBlock pixel_block(const ConvShape& shape);

// Floats between the pixels of a copied block of `channels`: one cache line more than these take, because pixels that
// lie a power of two apart share a few sets of the cache.
constexpr int64_t kCacheLine = 16;
inline int64_t copied_channels(int64_t channels) {
  return (channels + kCacheLine - 1) / kCacheLine * kCacheLine + kCacheLine;
}
// Floats of scratch memory that channels [begin, end) of x need.
int64_t scratch_floats(const ConvShape& shape, int64_t channels);

struct ConvLoops {
  int64_t channel_tile;  // C must be a multiple of it, and so must begin and end be
  // dw of channels [begin, end) of x. `scratch`: scratch_floats(), aligned to a cache line.
  void (*weight_gradient)(const ConvWeightGradient&, int64_t begin, int64_t end, float* scratch);
};

namespace isa_portable {
extern const ConvLoops conv_loops;
}
namespace isa_avx2 {
extern const ConvLoops conv_loops;
}
namespace isa_avx512 {
extern const ConvLoops conv_loops;
}

const ConvLoops& conv_loops();

}  // namespace ernet::cpu
