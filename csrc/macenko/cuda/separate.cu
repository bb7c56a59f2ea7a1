// Haematoxylin and eosin of each image, as images and as concentrations. A block goes over its pixels once for each
// result; from the second time on they come from the first-level cache.
#include <cuda_runtime.h>

#include "macenko/cuda/kernels.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/reconstruct_pixels.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockPixels = 8192;

struct SeparateJob {
  Images images;
  Separation what;
  double io;
  double od_magnitude;
  int64_t blocks_an_image;
  int drawings;
  double od[256];
};

struct SeparateShared {
  float logs[256];
  Transform transform[3];
  float row[2][3];  // concentrations of log2((I + 1) / Io)
};

// Shared memory is declared outside templates, so that the emulator can fill it with garbage.
__device__ __forceinline__ SeparateShared& separate_shared() {
  __shared__ SeparateShared block;
  return block;
}

// Drawing t: haematoxylin, eosin, both. One thread.
__device__ __forceinline__ void prepare_drawing(const SeparateJob& job, int64_t image, unsigned t,
                                                Transform& transform) {
  macenko::Stain from, to;
  double from_max[2], to_max[2];
  read_stain(job.what.source, image, from, from_max);
  read_stain(job.what.drawn, image, to, to_max);
  const double drawn_max[2] = {t == 1 ? 0 : to_max[0], t == 0 ? 0 : to_max[1]};
  const double no_shift[2] = {0, 0};
  set_transform(from, from_max, to, drawn_max, no_shift, job.od_magnitude, transform);
  transform.unchanged = false;
}

// One thread.
__device__ __forceinline__ void prepare_rows(const SeparateJob& job, int64_t image, float (&row)[2][3]) {
  macenko::Stain from, to;
  double from_max[2], to_max[2], rows[2][3];
  read_stain(job.what.source, image, from, from_max);
  read_stain(job.what.drawn, image, to, to_max);
  macenko::concentration_rows(from, rows);
  const double minus_ln2 = -0.693147180559945309417;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const double gain = job.what.scaled ? to_max[t] / from_max[t] : 1;
#pragma unroll
    for (int k = 0; k < 3; ++k) row[t][k] = float(minus_ln2 * rows[t][k] * gain);
  }
}

// The concentrations of this thread's pixels, [2][pixels].
template <class Values, bool kInterleaved>
__device__ __forceinline__ void write_concentrations(const SharedPixels<typename Values::Value>& shared,
                                                     const Values& values, const float (&row)[2][3], float* out) {
  using T = typename Values::Value;
  constexpr int kPixels = GroupSize<T>::value;
  const bool aligned = ((reinterpret_cast<uintptr_t>(out) | uintptr_t(4 * shared.pixels)) & 15) == 0;
  for_each_group<T, kInterleaved>(shared, [&](const PixelGroup<T, kInterleaved>& group, int64_t first, int count) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      float* to = out + t * shared.pixels + first;
      float amount[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        bool defined = true;
        const float r = values.log2_intensity(group.get(i, 0), defined);
        const float g = values.log2_intensity(group.get(i, 1), defined);
        const float b = values.log2_intensity(group.get(i, 2), defined);
        amount[i] = defined ? dot(row[t], r, g, b) : __int_as_float(0x7fc00000);
      }
#pragma unroll
      for (int i = 0; i < kPixels; i += 4) {
        if (aligned && count == kPixels) {
          store_wide(reinterpret_cast<float4*>(to + i),
                     make_float4(amount[i], amount[i + 1], amount[i + 2], amount[i + 3]));
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (i + k < count) to[i + k] = amount[i + k];
          }
        }
      }
    }
  });
}

template <class Values, bool kInterleaved>
__device__ __forceinline__ void separate(const SharedPixels<typename Values::Value>& shared, const Values& values,
                                         const SeparateShared& block, const SeparateJob& job, int64_t image) {
  using T = typename Values::Value;
#pragma unroll 1
  for (int t = 0; t < job.drawings; ++t) {
    const Output& out = job.what.drawing[t];
    T* base = static_cast<T*>(out.data) + image * out.image_stride;
    const Planes<T> planes = {{base, base + out.channel_stride, base + 2 * out.channel_stride}};
    reconstruct_image<Values, kInterleaved>(shared, values, block.transform[t], job.io, planes);
  }
  if (job.what.concentrations == nullptr) return;
  write_concentrations<Values, kInterleaved>(shared, values, block.row,
                                             job.what.concentrations + 2 * job.images.pixels * image);
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 2) separate_kernel(const __grid_constant__ SeparateJob job) {
  SeparateShared& block = separate_shared();
  const int64_t image = blockIdx.x / job.blocks_an_image;
  const int64_t part = blockIdx.x % job.blocks_an_image;
  const T* base = static_cast<const T*>(job.images.data) + image * job.images.image_stride;
  const SharedPixels<T> shared = {{{base, base + job.images.channel_stride, base + 2 * job.images.channel_stride}},
                                  job.images.pixels,
                                  part * kThreads + threadIdx.x,
                                  job.blocks_an_image * kThreads};
  if (threadIdx.x < 3) prepare_drawing(job, image, threadIdx.x, block.transform[threadIdx.x]);
  if (threadIdx.x == 32) prepare_rows(job, image, block.row);
  if constexpr (sizeof(T) == 1) fill_log2_table(job.od, 0, block.logs);
  __syncthreads();
  if constexpr (sizeof(T) == 1) {
    const ByteValues values = {{level_table(block.logs, 0), job.od, 0}, nullptr};
    separate<ByteValues, kInterleaved>(shared, values, block, job, image);
  } else {
    const FloatValues values = float_values(job.images.scale, job.io, job.what.drawing[0]);
    separate<FloatValues, kInterleaved>(shared, values, block, job, image);
  }
}

template <class T, bool kInterleaved>
cudaError_t launch(const SeparateJob& job, cudaStream_t stream) {
  const auto kernel = separate_kernel<T, kInterleaved>;
  const unsigned grid = unsigned(job.images.count * job.blocks_an_image);
  ERNET_LAUNCH(kernel, grid, kThreads, stream, job);
  return cudaGetLastError();
}

}  // namespace

cudaError_t macenko_separate(const Images& images, const Separation& what, double io, cudaStream_t stream) {
  if (images.count == 0) return cudaSuccess;
  SeparateJob job = {
      images, what, io, 0, (images.pixels + kBlockPixels - 1) / kBlockPixels, what.drawing[2].data == nullptr ? 2 : 3,
      {}};
  if (images.count * job.blocks_an_image > 0x7fffffff) return cudaErrorInvalidValue;
  for (int level = 0; level < 256; ++level) job.od[level] = macenko::od_of_level(level, io);
  job.od_magnitude = fmax(fabs(job.od[0]), fabs(job.od[255]));
  const bool interleaved = images.pixel_stride == 3;
  if (images.type == Pixel::u8) {
    return interleaved ? launch<uint8_t, true>(job, stream) : launch<uint8_t, false>(job, stream);
  }
  return interleaved ? launch<float, true>(job, stream) : launch<float, false>(job, stream);
}

}  // namespace ernet::cuda
