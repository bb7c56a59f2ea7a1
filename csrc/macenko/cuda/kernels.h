// Macenko kernels for CUDA: launchers, free of torch. They neither allocate nor wait, so they can be captured in a CUDA
// graph. Every result is the same to the bit whatever the plan, the batch and the order of threads.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "macenko/steps/reconstruct.h"

namespace ernet::cuda {

using macenko::FitResult;
using macenko::Parameters;
using macenko::Recipe;
using macenko::Stains;

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

// Where reconstructed images go: in the images' own type and layout, with strides in elements as in `images`, or as the
// input of a network, [count][pixels][3] of (value / range - mean) / std.
enum class OutputType : int { image = 0, f32 = 1, bf16 = 2, f16 = 3 };
struct Output {
  void* data;
  int64_t image_stride;
  int64_t channel_stride;
  OutputType type;
  double range;
  double mean[3];
  double std[3];
};

// The images from `first` on.
cudaError_t macenko_reconstruct(const Images& images, const Recipe& recipe, double io, const Output& out,
                                cudaStream_t stream, int64_t first = 0);

// Images drawn with haematoxylin of `drawn` alone, eosin alone, and (with data) both; and, if not null, the
// concentrations [count][2][pixels] in units of `source`, under `scaled` times the ratio of the maxima.
struct Separation {
  Stains source;
  Stains drawn;
  bool scaled;
  Output drawing[3];
  float* concentrations;
};

cudaError_t macenko_separate(const Images& images, const Separation& what, double io, cudaStream_t stream);

// The streaming plan: the fit, in groups of images that stay in a cache of `cache_bytes`, and, if `recipe` and `out`
// are not null, the reconstruction of each group from the stains found, not those of `recipe->source`. The workspace is
// at a multiple of 16.
int64_t macenko_streaming_workspace(const Images& images, int64_t cache_bytes);
cudaError_t macenko_streaming(const Images& images, const Parameters& parameters, int64_t cache_bytes, void* workspace,
                              const FitResult& fit, const Recipe* recipe, const Output* out, cudaStream_t stream);

struct Device;
struct Plan;

// The resident or the cluster plan (macenko/cuda/plan.h), to the same effect. One launch; cudaErrorInvalidConfiguration
// if the device, or the part of it that this process has, holds not a single cluster of this size.
cudaError_t macenko_resident(const Images& images, const Parameters& parameters, const Plan& plan, const Device& device,
                             const FitResult& fit, const Recipe* recipe, const Output* out, cudaStream_t stream);

}  // namespace ernet::cuda
