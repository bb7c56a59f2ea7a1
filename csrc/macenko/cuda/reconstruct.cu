// Reconstruction in one streaming pass: each pixel is read once and written once.
#include <cuda_runtime.h>

#include "macenko/cuda/kernels.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/reconstruct_pixels.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
// Pixels of a block, at least: building its tables costs about as much as a thousand pixels.
constexpr int64_t kBlockPixels = 8192;

struct ReconstructJob {
  Images images;
  Recipe recipe;
  Output out;
  double io;
  double od_magnitude;
  int64_t blocks_an_image;
  double od[256];
};

struct ReconstructShared {
  float logs[256];
  float scaled[3][256];
  Transform transform;
};

// Shared memory is declared outside templates, so that the emulator can fill it with garbage.
__device__ __forceinline__ ReconstructShared& reconstruct_shared() {
  __shared__ ReconstructShared block;
  return block;
}

template <class Values, bool kInterleaved>
__device__ __forceinline__ void reconstruct_output(const SharedPixels<typename Values::Value>& shared,
                                                   const Values& values, const Transform& t, const ReconstructJob& job,
                                                   int64_t image) {
  using T = typename Values::Value;
  const int64_t network = 3 * job.images.pixels * image;
  switch (job.out.type) {
    case OutputType::image: {
      T* base = static_cast<T*>(job.out.data) + image * job.out.image_stride;
      const Planes<T> out = {{base, base + job.out.channel_stride, base + 2 * job.out.channel_stride}};
      return reconstruct_image<Values, kInterleaved>(shared, values, t, job.io, out);
    }
    case OutputType::f32:
      return reconstruct_network<Values, kInterleaved>(shared, values, t, job.io,
                                                       static_cast<float*>(job.out.data) + network);
    case OutputType::bf16:
      return reconstruct_network<Values, kInterleaved>(shared, values, t, job.io,
                                                       static_cast<Bfloat16*>(job.out.data) + network);
    case OutputType::f16:
      return reconstruct_network<Values, kInterleaved>(shared, values, t, job.io,
                                                       static_cast<Half*>(job.out.data) + network);
  }
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 3) reconstruct_kernel(const __grid_constant__ ReconstructJob job) {
  ReconstructShared& block = reconstruct_shared();
  const int64_t image = blockIdx.x / job.blocks_an_image;
  const int64_t part = blockIdx.x % job.blocks_an_image;
  const T* base = static_cast<const T*>(job.images.data) + image * job.images.image_stride;
  const SharedPixels<T> shared = {{{base, base + job.images.channel_stride, base + 2 * job.images.channel_stride}},
                                  job.images.pixels,
                                  part * kThreads + threadIdx.x,
                                  job.blocks_an_image * kThreads};
  if (threadIdx.x == 0) transform_of_image(job.recipe, job.od_magnitude, image, block.transform);
  if constexpr (sizeof(T) == 1) {
    fill_log2_table(job.od, 0, block.logs);
    if (job.out.type != OutputType::image) fill_scaled_table(job.out, block.scaled);
    __syncthreads();
    const ByteValues values = {{level_table(block.logs, 0), job.od, 0}, block.scaled};
    reconstruct_output<ByteValues, kInterleaved>(shared, values, block.transform, job, image);
  } else {
    __syncthreads();
    const FloatValues values = float_values(job.images.scale, job.io, job.out);
    reconstruct_output<FloatValues, kInterleaved>(shared, values, block.transform, job, image);
  }
}

}  // namespace

cudaError_t macenko_reconstruct(const Images& images, const Recipe& recipe, double io, const Output& out,
                                cudaStream_t stream) {
  if (images.count == 0) return cudaSuccess;
  ReconstructJob job = {images, recipe, out, io, 0, (images.pixels + kBlockPixels - 1) / kBlockPixels, {}};
  const int64_t blocks = images.count * job.blocks_an_image;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  for (int level = 0; level < 256; ++level) job.od[level] = macenko::od_of_level(level, io);
  job.od_magnitude = fmax(fabs(job.od[0]), fabs(job.od[255]));
  const unsigned grid = unsigned(blocks);
  const bool interleaved = images.pixel_stride == 3;
  if (images.type == Pixel::u8) {
    if (interleaved) {
      const auto kernel = reconstruct_kernel<uint8_t, true>;
      ERNET_LAUNCH(kernel, grid, kThreads, stream, job);
    } else {
      const auto kernel = reconstruct_kernel<uint8_t, false>;
      ERNET_LAUNCH(kernel, grid, kThreads, stream, job);
    }
  } else if (interleaved) {
    const auto kernel = reconstruct_kernel<float, true>;
    ERNET_LAUNCH(kernel, grid, kThreads, stream, job);
  } else {
    const auto kernel = reconstruct_kernel<float, false>;
    ERNET_LAUNCH(kernel, grid, kThreads, stream, job);
  }
  return cudaGetLastError();
}

}  // namespace ernet::cuda
