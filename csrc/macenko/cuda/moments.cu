// Moments of the tissue ODs in two passes: partial integer sums of a tile of an image, then their total. No atomics;
// integer addition makes the order irrelevant.
#include <cuda_runtime.h>

#include "macenko/cuda/kernels.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/passes.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kGroupsPerThread = 8;
static_assert(kGroupsPerThread * GroupSize<uint8_t>::value <= macenko::kMaxFixedProducts,
              "the products of one thread are summed in int64");

template <class T>
constexpr int64_t kTilePixels = int64_t(kThreads) * kGroupsPerThread * GroupSize<T>::value;

int64_t tiles(const Images& images) {
  const int64_t tile = images.type == Pixel::u8 ? kTilePixels<uint8_t> : kTilePixels<float>;
  return (images.pixels + tile - 1) / tile;
}

__device__ __forceinline__ void write_partials(const Sums& sums, int64_t* partial) {
  __shared__ SumScratch scratch;
  store_sums(sums, scratch);
  __syncthreads();
  if (threadIdx.x < kPartials) partial[threadIdx.x] = total_of_block(int(threadIdx.x), scratch);
}

template <class T, bool kInterleaved, class ToFixed>
__device__ __forceinline__ void tile_moments(const Images& images, const ToFixed& to_fixed, int64_t* partials) {
  constexpr int kPixels = GroupSize<T>::value;
  // Tiles of one image are neighbours in the grid, which has one dimension as it may be large.
  const int64_t tiles_an_image = (images.pixels + kTilePixels<T> - 1) / kTilePixels<T>;
  const int64_t image = blockIdx.x / tiles_an_image;
  const int64_t tile = blockIdx.x % tiles_an_image;
  const T* base = static_cast<const T*>(images.data) + image * images.image_stride;
  const Planes<const T> planes = {{base, base + images.channel_stride, base + 2 * images.channel_stride}};
  const bool aligned = is_aligned<const T, kInterleaved>(planes);
  Sums sums;
  for (int k = 0; k < kGroupsPerThread; ++k) {  // 48 bytes of pixels an iteration
    const int64_t first = tile * kTilePixels<T> + (int64_t(k) * kThreads + threadIdx.x) * kPixels;
    if (first >= images.pixels) break;
    const int count = images.pixels - first < kPixels ? int(images.pixels - first) : kPixels;
    PixelGroup<T, kInterleaved> group;
    load_group<T, kInterleaved>(planes, first, count, aligned, group);
    add_group<kInterleaved>(group, planes, first, count, to_fixed, sums);
  }
  write_partials(sums, partials + int64_t(blockIdx.x) * kPartials);
}

template <bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    moments_u8_kernel(const Images images, const int32_t fixed_offset, const int tissue_limit, int64_t* partials) {
  __shared__ int32_t fixed[256];
  fill_fixed_table(fixed_offset, tissue_limit, 0, fixed);
  __syncthreads();
  tile_moments<uint8_t, kInterleaved>(images, FixedOfByte{level_table(fixed, 0)}, partials);
}

template <bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    moments_f32_kernel(const Images images, const double io, const double beta, int64_t* partials) {
  tile_moments<float, kInterleaved>(images, FixedOfFloat{images.scale, 1 / io, beta}, partials);
}

// One warp an image.
__global__ void __launch_bounds__(32)
    total_kernel(const int64_t* partials, const int64_t tiles_an_image, double* moments) {
  const int64_t image = blockIdx.x;
  const int lane = int(threadIdx.x);
  if (lane >= kPartials) return;
  const int64_t* mine = partials + image * tiles_an_image * kPartials + lane;
  int64_t total = 0;
  for (int64_t tile = 0; tile < tiles_an_image; ++tile) total += mine[tile * kPartials];
  __shared__ int64_t totals[kPartials];
  totals[lane] = total;
  __syncwarp((1u << kPartials) - 1);
  if (lane != 0) return;
  double* out = moments + image * macenko::kMomentCount;
  moments_of_totals(totals, out);
  if (totals[1] > 0) out[0] = __longlong_as_double(0x7ff8000000000000LL);
}

}  // namespace

int64_t macenko_moments_workspace(const Images& images) {
  return images.count * tiles(images) * kPartials * int64_t(sizeof(int64_t));
}

cudaError_t macenko_moments(const Images& images, double io, double beta, void* workspace, double* moments,
                            cudaStream_t stream) {
  if (images.count == 0) return cudaSuccess;
  const int64_t blocks = images.count * tiles(images);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  int64_t* partials = static_cast<int64_t*>(workspace);
  const dim3 grid = {unsigned(blocks)};
  const bool interleaved = images.pixel_stride == 3;
  if (images.type == Pixel::u8) {
    const macenko::OdTable levels = macenko::make_od_table(io, beta);
    const int32_t offset = levels.fixed_offset;
    const int limit = levels.tissue_limit;
    if (interleaved) {
      ERNET_LAUNCH(moments_u8_kernel<true>, grid, kThreads, stream, images, offset, limit, partials);
    } else {
      ERNET_LAUNCH(moments_u8_kernel<false>, grid, kThreads, stream, images, offset, limit, partials);
    }
  } else if (interleaved) {
    ERNET_LAUNCH(moments_f32_kernel<true>, grid, kThreads, stream, images, io, beta, partials);
  } else {
    ERNET_LAUNCH(moments_f32_kernel<false>, grid, kThreads, stream, images, io, beta, partials);
  }
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  ERNET_LAUNCH(total_kernel, unsigned(images.count), 32, stream, partials, tiles(images), moments);
  return cudaGetLastError();
}

}  // namespace ernet::cuda
