// Reconstruction in one streaming pass; and drawings of the stains, for which a block goes over its pixels once a
// result.
#include <cuda_runtime.h>

#include "macenko/cuda/kernels.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/reconstruct_pixels.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
// Pixels of a block, at least: building its tables costs about as much as a thousand pixels.
constexpr int64_t kBlockPixels = 8192;

template <class What> struct PixelJob {
  Images images;
  What what;
  double io;
  double od_magnitude;
  int64_t first_image;
  int64_t blocks_an_image;
  double od[256];

  __device__ __forceinline__ int64_t image() const { return first_image + blockIdx.x / blocks_an_image; }

  template <class T> __device__ __forceinline__ SharedPixels<T> pixels_of_thread() const {
    const T* first = static_cast<const T*>(images.data) + image() * images.image_stride;
    return {planes_of(first, images.channel_stride), images.pixels,
            blockIdx.x % blocks_an_image * kThreads + threadIdx.x, blocks_an_image * kThreads};
  }
};

struct Reconstruct {
  Recipe recipe;
  Output out;
};

struct ReconstructShared {
  float logs[256];
  float scaled[3][256];
  Transform transform;
};

// Shared memory is declared outside templates: one place for all of their kernels.
__device__ __forceinline__ ReconstructShared& reconstruct_shared() {
  ERNET_SHARED(ReconstructShared, block);
  return block;
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 3) reconstruct_kernel(const __grid_constant__ PixelJob<Reconstruct> job) {
  ReconstructShared& block = reconstruct_shared();
  const int64_t image = job.image();
  const SharedPixels<T> shared = job.template pixels_of_thread<T>();
  const Output& out = job.what.out;
  if (threadIdx.x == 0) transform_of_image(job.what.recipe, job.od_magnitude, image, block.transform);
  if constexpr (sizeof(T) == 1) {
    fill_log2_table(job.od, 0, block.logs);
    if (out.type != OutputType::image) fill_scaled_table(out, block.scaled);
    __syncthreads();
    const ByteValues values = {{level_table(block.logs, 0), job.od, 0}, block.scaled};
    reconstruct_output<ByteValues, kInterleaved>(shared, values, block.transform, job.io, out, image,
                                                 job.images.pixels);
  } else {
    __syncthreads();
    const FloatValues values = float_values(job.images.scale, job.io, out);
    reconstruct_output<FloatValues, kInterleaved>(shared, values, block.transform, job.io, out, image,
                                                  job.images.pixels);
  }
}

struct SeparateShared {
  float logs[256];
  Transform transform[3];
  float row[2][3];  // concentrations of log2((I + 1) / Io)
};

__device__ __forceinline__ SeparateShared& separate_shared() {
  ERNET_SHARED(SeparateShared, block);
  return block;
}

// Drawing t: haematoxylin, eosin, both. One thread.
__device__ __forceinline__ void prepare_drawing(const Separation& what, int64_t image, double od_magnitude, unsigned t,
                                                Transform& transform) {
  macenko::Replacement r = {};
  macenko::read_stain(what.source, image, r.from, r.from_max);
  macenko::read_stain(what.drawn, image, r.to, r.to_max);
  if (t == 1) r.to_max[0] = 0;  // constant indices keep it in registers
  if (t == 0) r.to_max[1] = 0;
  set_transform(r, od_magnitude, transform);
  transform.unchanged = false;
}

// One thread.
__device__ __forceinline__ void prepare_rows(const Separation& what, int64_t image, float (&row)[2][3]) {
  macenko::Stain from, to;
  double from_max[2], to_max[2], rows[2][3];
  macenko::read_stain(what.source, image, from, from_max);
  macenko::read_stain(what.drawn, image, to, to_max);
  macenko::concentration_rows(from, rows);
  const double minus_ln2 = -0.693147180559945309417;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const double gain = what.scaled ? to_max[t] / from_max[t] : 1;
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
__device__ __forceinline__ void separate(const PixelJob<Separation>& job, const Values& values,
                                         const SeparateShared& block) {
  using T = typename Values::Value;
  const SharedPixels<T> shared = job.template pixels_of_thread<T>();
  const int drawings = job.what.drawing[2].data == nullptr ? 2 : 3;
#pragma unroll 1
  for (int t = 0; t < drawings; ++t) {
    const Output& out = job.what.drawing[t];
    T* first = static_cast<T*>(out.data) + job.image() * out.image_stride;
    reconstruct_image<Values, kInterleaved>(shared, values, block.transform[t], job.io,
                                            planes_of(first, out.channel_stride));
  }
  if (job.what.concentrations == nullptr) return;
  write_concentrations<Values, kInterleaved>(shared, values, block.row,
                                             job.what.concentrations + 2 * job.images.pixels * job.image());
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 2) separate_kernel(const __grid_constant__ PixelJob<Separation> job) {
  SeparateShared& block = separate_shared();
  if (threadIdx.x < 3) {
    prepare_drawing(job.what, job.image(), job.od_magnitude, threadIdx.x, block.transform[threadIdx.x]);
  }
  if (threadIdx.x == 32) prepare_rows(job.what, job.image(), block.row);
  if constexpr (sizeof(T) == 1) fill_log2_table(job.od, 0, block.logs);
  __syncthreads();
  if constexpr (sizeof(T) == 1) {
    const ByteValues values = {{level_table(block.logs, 0), job.od, 0}, nullptr};
    separate<ByteValues, kInterleaved>(job, values, block);
  } else {
    const FloatValues values = float_values(job.images.scale, job.io, job.what.drawing[0]);
    separate<FloatValues, kInterleaved>(job, values, block);
  }
}

template <class What, class T, bool kInterleaved> constexpr auto pixel_kernel = separate_kernel<T, kInterleaved>;
template <class T, bool kInterleaved>
constexpr auto pixel_kernel<Reconstruct, T, kInterleaved> = reconstruct_kernel<T, kInterleaved>;

template <class What>
cudaError_t launch(const Images& images, const What& what, double io, int64_t first, cudaStream_t stream) {
  if (images.count == first) return cudaSuccess;
  PixelJob<What> job = {images, what, io, 0, first, (images.pixels + kBlockPixels - 1) / kBlockPixels, {}};
  const int64_t blocks = (images.count - first) * job.blocks_an_image;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  for (int level = 0; level < 256; ++level) job.od[level] = macenko::od_of_level(level, io);
  job.od_magnitude = fmax(fabs(job.od[0]), fabs(job.od[255]));
  const bool bytes = images.type == Pixel::u8, interleaved = images.pixel_stride == 3;
  const auto kernel = bytes ? (interleaved ? pixel_kernel<What, uint8_t, true> : pixel_kernel<What, uint8_t, false>)
                            : (interleaved ? pixel_kernel<What, float, true> : pixel_kernel<What, float, false>);
  ERNET_LAUNCH(kernel, unsigned(blocks), kThreads, stream, job);
  return cudaGetLastError();
}

}  // namespace

cudaError_t macenko_reconstruct(const Images& images, const Recipe& recipe, double io, const Output& out,
                                cudaStream_t stream, int64_t first) {
  return launch(images, Reconstruct{recipe, out}, io, first, stream);
}

cudaError_t macenko_separate(const Images& images, const Separation& what, double io, cudaStream_t stream) {
  return launch(images, what, io, 0, stream);
}

}  // namespace ernet::cuda
