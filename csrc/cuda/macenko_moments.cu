// Moments of the tissue ODs in two passes: partial integer sums of a tile of an image, then their total. No atomics;
// integer addition makes the order irrelevant.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/macenko.h"
#include "cuda/pixel_group.h"
#include "macenko/elementary.h"
#include "macenko/od.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroupsPerThread = 8;
static_assert(kGroupsPerThread * GroupSize<uint8_t>::value <= macenko::kMaxFixedProducts,
              "the products of one thread are summed in int64");

// What a tile adds up: tissue pixels, invalid pixels, 3 sums, and the low and the high 32 bits of 6 sums of products.
constexpr int kPartials = 2 + 3 + 12;

template <class T>
constexpr int64_t kTilePixels = int64_t(kThreads) * kGroupsPerThread * GroupSize<T>::value;

int64_t tiles(const Images& images) {
  const int64_t tile = images.type == Pixel::u8 ? kTilePixels<uint8_t> : kTilePixels<float>;
  return (images.pixels + tile - 1) / tile;
}

// Fixed-point OD of every level, -1 where it is below beta.
struct FixedTable {
  int32_t fixed[256];
};

FixedTable make_fixed_table(double io, double beta) {
  const macenko::OdTable levels = macenko::make_od_table(io, beta);
  FixedTable table;
  for (int level = 0; level < 256; ++level) {
    const int32_t fixed = levels.fixed[level] > 0 ? levels.fixed[level] : 0;
    table.fixed[level] = level <= levels.tissue_limit ? fixed : -1;
  }
  return table;
}

// Fixed-point OD of a value, -1 if it is no tissue; says if it is no grey level.
struct Level8 {
  const int32_t* table;
  __device__ __forceinline__ int32_t operator()(uint8_t value, bool&) const { return table[value]; }
};

struct LevelFloat {
  double scale, inverse_io, beta;
  __device__ __forceinline__ int32_t operator()(float value, bool& invalid) const {
    const double level = double(value) * scale;
    if (!macenko::is_level(level)) {
      invalid = true;
      return -1;
    }
    const double od = -macenko::log_of_normal((level + 1.0) * inverse_io);
    return od >= beta ? macenko::fixed_of_od(od) : -1;
  }
};

struct Sums {
  int64_t count = 0;
  int64_t invalid = 0;
  int64_t sum[3] = {0, 0, 0};
  int64_t product[6] = {0, 0, 0, 0, 0, 0};
};

__device__ __forceinline__ void add_pixel(int32_t r, int32_t g, int32_t b, Sums& s) {
  if ((r | g | b) < 0) return;
  s.count += 1;
  s.sum[0] += r;
  s.sum[1] += g;
  s.sum[2] += b;
  s.product[0] += int64_t(r) * r;
  s.product[1] += int64_t(r) * g;
  s.product[2] += int64_t(r) * b;
  s.product[3] += int64_t(g) * g;
  s.product[4] += int64_t(g) * b;
  s.product[5] += int64_t(b) * b;
}

__device__ __forceinline__ int64_t sum_of_warp(int64_t value) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2)
    value += __shfl_down_sync(0xffffffffu, static_cast<long long>(value), delta);
  return value;
}

// The block's total of one value a thread, valid in the first thread. `scratch` is the block's own for this value.
__device__ __forceinline__ void sum_of_block(int64_t value, int64_t* scratch) {
  const int64_t warp = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = warp;
}

__device__ __forceinline__ void write_partials(const Sums& s, int64_t* partial) {
  __shared__ int64_t scratch[kPartials][kWarps];
  sum_of_block(s.count, scratch[0]);
  sum_of_block(s.invalid, scratch[1]);
#pragma unroll
  for (int k = 0; k < 3; ++k) sum_of_block(s.sum[k], scratch[2 + k]);
#pragma unroll
  for (int k = 0; k < 6; ++k) {
    const uint64_t product = uint64_t(s.product[k]);
    sum_of_block(int64_t(product & 0xffffffffu), scratch[5 + 2 * k]);
    sum_of_block(int64_t(product >> 32), scratch[6 + 2 * k]);
  }
  __syncthreads();
  if (threadIdx.x < kPartials) {
    int64_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[threadIdx.x][w];
    partial[threadIdx.x] = total;
  }
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
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i < count) {
        bool invalid = false;
        const int32_t r = to_fixed(group.get(i, 0), invalid);
        const int32_t g = to_fixed(group.get(i, 1), invalid);
        const int32_t b = to_fixed(group.get(i, 2), invalid);
        sums.invalid += invalid;
        add_pixel(r, g, b, sums);
      }
    }
  }
  write_partials(sums, partials + int64_t(blockIdx.x) * kPartials);
}

template <bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    moments_u8_kernel(const Images images, const FixedTable table, int64_t* partials) {
  __shared__ int32_t fixed[256];
  static_assert(kThreads == 256, "each thread copies one entry");
  fixed[threadIdx.x] = table.fixed[threadIdx.x];
  __syncthreads();
  tile_moments<uint8_t, kInterleaved>(images, Level8{fixed}, partials);
}

template <bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    moments_f32_kernel(const Images images, const double io, const double beta, int64_t* partials) {
  tile_moments<float, kInterleaved>(images, LevelFloat{images.scale, 1 / io, beta}, partials);
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
  double* out = moments + image * macenko::kMomentCount;
  const double unit = 1 / macenko::kOdScale;
  if (lane == 0) {
    out[0] = totals[1] > 0 ? __longlong_as_double(0x7ff8000000000000LL) : double(total);
  } else if (lane >= 2 && lane < 5) {
    out[lane - 1] = double(total) * unit;
  } else if (lane >= 5 && (lane - 5) % 2 == 0) {
    const unsigned __int128 product = ((unsigned __int128)(uint64_t(totals[lane + 1])) << 32) + uint64_t(total);
    out[4 + (lane - 5) / 2] = double(product) * (unit * unit);
  }
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
    const FixedTable table = make_fixed_table(io, beta);
    if (interleaved) {
      ERNET_LAUNCH(moments_u8_kernel<true>, grid, kThreads, stream, images, table, partials);
    } else {
      ERNET_LAUNCH(moments_u8_kernel<false>, grid, kThreads, stream, images, table, partials);
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
