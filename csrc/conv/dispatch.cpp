// Which instruction set takes the gradients of convolution weights, and how pixels are cut into blocks.
#include <algorithm>

#include "conv/kernels.h"

namespace ernet::cpu {

namespace {
// About. At 112 x 112 to 7 x 7 pixels blocks of 64 to 192 were within a tenth of the best.
constexpr int64_t kBlockPixels = 128, kBlockPixelsOfOne = 64;
}  // namespace

PixelBlock pixel_block(const ConvShape& s) {
  const int64_t pixels = s.out_height * s.out_width, wanted = s.kernel == 1 ? kBlockPixelsOfOne : kBlockPixels;
  if (2 * pixels <= wanted) return {std::min(s.N, wanted / pixels), s.out_height};
  const int64_t blocks = (pixels + wanted - 1) / wanted;
  return {1, std::max<int64_t>(1, (s.out_height + blocks - 1) / blocks)};
}

int64_t scratch_floats(const ConvShape& s, int64_t channels) {
  const PixelBlock block = pixel_block(s);
  const int64_t x_pixels = s.copied_height(block.rows) * s.copied_width();
  return block.samples * (x_pixels * copied_channels(channels) + block.rows * s.out_width * copied_channels(s.K));
}

const ConvLoops& conv_loops() {
  static const ConvLoops* const selected = [] {
    switch (selected_isa()) {
#ifdef ERNET_HAS_AVX512
      case Isa::avx512: return &isa_avx512::conv_loops;
#endif
#ifdef ERNET_HAS_AVX2
      case Isa::avx2: return &isa_avx2::conv_loops;
#endif
      default: return &isa_portable::conv_loops;
    }
  }();
  return *selected;
}

}  // namespace ernet::cpu
