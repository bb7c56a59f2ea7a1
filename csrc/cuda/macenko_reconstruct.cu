// Reconstruction in one streaming pass: I' = 2^(log2 Io + sum_k M_ck log2((I_k + 1) / Io)), clipped at 255.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/macenko.h"
#include "cuda/pixel_group.h"
#include "macenko/reconstruct.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kGroupsPerThread = 2;

template <class T>
constexpr int64_t kTilePixels = int64_t(kThreads) * kGroupsPerThread * GroupSize<T>::value;

// log2((I + 1) / Io) of every level.
struct LightTable {
  float log2_light[256];
};

LightTable make_light_table(double io) {
  LightTable table;
  for (int level = 0; level < 256; ++level) table.log2_light[level] = float(log2((level + 1) / io));
  return table;
}

__device__ __forceinline__ void read_stain(const Stains& stains, int64_t image, macenko::Stain& stain,
                                           double maximum[2]) {
  const int64_t i = stains.shared ? 0 : image;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    stain.h[k] = stains.stain[6 * i + 2 * k];
    stain.e[k] = stains.stain[6 * i + 2 * k + 1];
  }
  maximum[0] = stains.maximum[2 * i];
  maximum[1] = stains.maximum[2 * i + 1];
}

__device__ __forceinline__ void image_matrix(const Stains& source, const Stains& target, int64_t image,
                                             float matrix[9]) {
  macenko::Stain from, to;
  double from_max[2], to_max[2], m[3][3];
  read_stain(source, image, from, from_max);
  read_stain(target, image, to, to_max);
  macenko::reconstruction_matrix(from, from_max, to, to_max, m);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
#pragma unroll
    for (int k = 0; k < 3; ++k) matrix[3 * c + k] = float(m[c][k]);
  }
}

// log2 of the transmitted light of a value; the other way round for the output.
struct Value8 {
  const float* table;
  __device__ __forceinline__ float log2_light(uint8_t value, bool&) const { return table[value]; }
  __device__ __forceinline__ uint8_t result(float level, bool) const { return macenko::level_of_float(level); }
};

struct ValueFloat {
  float scale, inverse_scale, inverse_io;
  __device__ __forceinline__ float log2_light(float value, bool& defined) const {
    const float level = value * scale;
    // false for NaN
    defined &= (level > -1.0f) & (level <= 3.402823466e38f);
    return log2f((level + 1.0f) * inverse_io);
  }
  __device__ __forceinline__ float result(float level, bool defined) const {
    const float clipped = level < 255.0f ? level : 255.0f;
    return defined ? clipped * inverse_scale : __int_as_float(0x7fc00000);
  }
};

template <class T, bool kInterleaved, class Value>
__device__ __forceinline__ void rebuild_tile(const Images& images, const Output& output, int64_t image, int64_t tile,
                                             const float m[9], float log2_io, const Value& value) {
  constexpr int kPixels = GroupSize<T>::value;
  const T* base = static_cast<const T*>(images.data) + image * images.image_stride;
  T* out_base = static_cast<T*>(output.data) + image * output.image_stride;
  const Planes<const T> in = {{base, base + images.channel_stride, base + 2 * images.channel_stride}};
  const Planes<T> out = {{out_base, out_base + output.channel_stride, out_base + 2 * output.channel_stride}};
  const bool aligned_in = is_aligned<const T, kInterleaved>(in);
  const bool aligned_out = is_aligned<T, kInterleaved>(out);
  for (int k = 0; k < kGroupsPerThread; ++k) {  // 48 bytes of pixels an iteration
    const int64_t first = tile * kTilePixels<T> + (int64_t(k) * kThreads + threadIdx.x) * kPixels;
    if (first >= images.pixels) break;
    const int count = images.pixels - first < kPixels ? int(images.pixels - first) : kPixels;
    PixelGroup<T, kInterleaved> group, result;
    load_group<T, kInterleaved>(in, first, count, aligned_in, group);
    result.clear();
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      bool defined = true;
      const float r = value.log2_light(group.get(i, 0), defined);
      const float g = value.log2_light(group.get(i, 1), defined);
      const float b = value.log2_light(group.get(i, 2), defined);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        const float level = exp2f(fmaf(m[3 * c], r, fmaf(m[3 * c + 1], g, fmaf(m[3 * c + 2], b, log2_io))));
        result.set(i, c, value.result(level, defined));
      }
    }
    store_group<T, kInterleaved>(out, first, count, aligned_out, result);
  }
}

template <class T>
__device__ __forceinline__ int64_t tiles_of(const Images& images) {
  return (images.pixels + kTilePixels<T> - 1) / kTilePixels<T>;
}

template <bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    reconstruct_u8_kernel(const Images images, const Stains source, const Stains target, const float log2_io,
                          const LightTable table, const Output out) {
  __shared__ float log2_light[256];
  __shared__ float matrix[9];
  static_assert(kThreads == 256, "each thread copies one entry");
  const int64_t image = blockIdx.x / tiles_of<uint8_t>(images);
  log2_light[threadIdx.x] = table.log2_light[threadIdx.x];
  if (threadIdx.x == 0) image_matrix(source, target, image, matrix);
  __syncthreads();
  rebuild_tile<uint8_t, kInterleaved>(images, out, image, blockIdx.x % tiles_of<uint8_t>(images), matrix, log2_io,
                                      Value8{log2_light});
}

template <bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    reconstruct_f32_kernel(const Images images, const Stains source, const Stains target, const double io,
                           const Output out) {
  __shared__ float matrix[9];
  const int64_t image = blockIdx.x / tiles_of<float>(images);
  if (threadIdx.x == 0) image_matrix(source, target, image, matrix);
  __syncthreads();
  const ValueFloat value = {float(images.scale), float(1 / images.scale), float(1 / io)};
  rebuild_tile<float, kInterleaved>(images, out, image, blockIdx.x % tiles_of<float>(images), matrix, log2f(float(io)),
                                    value);
}

}  // namespace

cudaError_t macenko_reconstruct(const Images& images, const Stains& source, const Stains& target, double io,
                                const Output& out, cudaStream_t stream) {
  if (images.count == 0) return cudaSuccess;
  const int64_t tile = images.type == Pixel::u8 ? kTilePixels<uint8_t> : kTilePixels<float>;
  const int64_t blocks = images.count * ((images.pixels + tile - 1) / tile);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const dim3 grid = {unsigned(blocks)};
  const bool interleaved = images.pixel_stride == 3;
  if (images.type == Pixel::u8) {
    const LightTable table = make_light_table(io);
    const float log2_io = float(log2(io));
    if (interleaved) {
      ERNET_LAUNCH(reconstruct_u8_kernel<true>, grid, kThreads, stream, images, source, target, log2_io, table, out);
    } else {
      ERNET_LAUNCH(reconstruct_u8_kernel<false>, grid, kThreads, stream, images, source, target, log2_io, table, out);
    }
  } else if (interleaved) {
    ERNET_LAUNCH(reconstruct_f32_kernel<true>, grid, kThreads, stream, images, source, target, io, out);
  } else {
    ERNET_LAUNCH(reconstruct_f32_kernel<false>, grid, kThreads, stream, images, source, target, io, out);
  }
  return cudaGetLastError();
}

}  // namespace ernet::cuda
