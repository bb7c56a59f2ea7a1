// Macenko kernels for CUDA: launchers, free of torch. They neither allocate nor wait, so they can be captured in a CUDA
// graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace ernet::cuda {

enum class Pixel : int { u8 = 0, f32 = 1 };

// RGB images of one size. Strides are in elements; pixel_stride is 1 (planar, channel_stride apart) or 3
// (channels-last).
struct Images {
  const void* data;
  Pixel type;
  int64_t count;
  int64_t pixels;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t pixel_stride;
  double scale;  // grey level of the value 1
};

// Bytes of workspace that macenko_moments needs, at a multiple of 8.
int64_t macenko_moments_workspace(const Images& images);

// Count, sums and products of the tissue ODs (macenko/od.h) of every image to `moments`, [count][10] float64. The count
// is NaN where a value is no grey level. Integer sums: the same bits for any batch, and the CPU's bits for 8-bit
// images.
cudaError_t macenko_moments(const Images& images, double io, double beta, void* workspace, double* moments,
                            cudaStream_t stream);

// Stains as [1 or count][3][2] and [1 or count][2] float64; `shared` says that one serves all images.
struct Stains {
  const double* stain;
  const double* maximum;
  bool shared;
};

// Images rebuilt with the stains of `target` in place of those of `source`, to `out` with strides in elements as in
// `images`.
struct Output {
  void* data;
  int64_t image_stride;
  int64_t channel_stride;
};
cudaError_t macenko_reconstruct(const Images& images, const Stains& source, const Stains& target, double io,
                                const Output& out, cudaStream_t stream);

}  // namespace ernet::cuda
