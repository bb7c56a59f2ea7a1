// The operator on convolutions: schema, argument checks and the CPU implementation. ernet_fast/er/convolution.py has
// the autograd and the fake kernel.
#include <algorithm>
#include <vector>

#include "conv/kernels.h"
#include "er/feature_maps.h"
#include "memory/scratch.h"

namespace ernet {
namespace {

using cpu::ConvShape;

const float* channels_last_map(const Tensor& map, const char* name) {
  STD_TORCH_CHECK(map.dim() == 4, "ernet: ", name, " must have 4 dimensions [N, C, H, W]; got ", shape_text(map));
  STD_TORCH_CHECK(map.is_cpu(), "ernet: ", name, " must be on the CPU here");
  STD_TORCH_CHECK(map.scalar_type() == ScalarType::Float, "ernet: ", name, " must be float32");
  STD_TORCH_CHECK(is_channels_last(map), "ernet: ", name, " must be channels-last");
  return static_cast<const float*>(map.const_data_ptr());
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// Channels of x for each thread, in whole tiles.
int64_t channel_grain(const ConvShape& s, int64_t tile) {
  const int64_t operations = s.N * s.out_height * s.out_width * s.K * s.kernel * s.kernel * tile;
  return std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, operations));
}

Tensor conv_weight_gradient(const Tensor& dy, const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && padding >= 0 && padding < kernel, "ernet: kernel ", kernel, ", stride ",
                  stride, " and padding ", padding, " must be positive, and the padding less than the kernel");
  const float* const x_data = channels_last_map(x, "x");
  const float* const dy_data = channels_last_map(dy, "dy");
  const ConvShape shape = {x.size(0),  x.size(2),  x.size(3), x.size(1), dy.size(2),
                           dy.size(3), dy.size(1), kernel,    stride,    padding};
  STD_TORCH_CHECK(dy.size(0) == shape.N && shape.height + 2 * padding >= kernel &&
                      shape.width + 2 * padding >= kernel &&
                      shape.out_height == output_size(shape.height, kernel, stride, padding) &&
                      shape.out_width == output_size(shape.width, kernel, stride, padding),
                  "ernet: dy ", shape_text(dy), " is no gradient of a convolution of x ", shape_text(x));
  const cpu::ConvLoops& loops = cpu::conv_loops();
  STD_TORCH_CHECK(shape.C % loops.channel_tile == 0, "ernet: x has ", shape.C, " channels; expected a multiple of ",
                  loops.channel_tile);
  const Tensor dw = torch::stable::new_empty(x, {shape.K, kernel, kernel, shape.C});
  const cpu::ConvWeightGradient args = {shape, x_data, dy_data, data_of<float>(dw)};
  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * loops.channel_tile, last = end * loops.channel_tile;
    cpu::Scratch memory;
    const size_t floats = static_cast<size_t>(cpu::scratch_floats(shape, last - first) + cpu::kCacheLine);
    float* const scratch = static_cast<float*>(memory.take(floats * sizeof(float)));
    const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(scratch) / sizeof(float)) % cpu::kCacheLine;
    loops.weight_gradient(args, first, last, scratch + (off == 0 ? 0 : cpu::kCacheLine - off));
  };
  torch::stable::parallel_for(0, shape.C / loops.channel_tile, channel_grain(shape, loops.channel_tile), work);
  // [K, C, kernel, kernel], channels-last
  return torch::stable::transpose(torch::stable::transpose(dw, 2, 3), 1, 2);
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def("conv_weight_gradient(Tensor dy, Tensor x, int kernel, int stride, int padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) { m.impl("conv_weight_gradient", TORCH_BOX(&ernet::conv_weight_gradient)); }
