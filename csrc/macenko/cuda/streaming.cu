// The streaming plan of a fit: every kernel reads the images once and moves each on by one phase, which the last of an
// image's blocks decides.
#include <cuda_runtime.h>

#include "macenko/cuda/fit_job.h"
#include "macenko/cuda/kernels.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/select_bins.h"

namespace ernet::cuda {

namespace {

constexpr int kThreads = 256;
// Blocks of a launch to aim at: a few for each multiprocessor of a large GPU.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kLeastBlockPixels = 4096;
// Products of one thread are summed in int64.
constexpr int64_t kMostBlockPixels = int64_t(kThreads) * macenko::kMaxFixedProducts;
// Images up to this size have counts that a few rounds narrow to kept keys; what is left is finished by one block.
constexpr int64_t kSmallPixels = 1 << 16;
constexpr int64_t kMediumPixels = 1 << 24;

// Blocks that a multiprocessor holds while they count keys: as many as there are registers for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kByteBlocks = 2;
#else
constexpr int kByteBlocks = 3;
#endif
constexpr int kFloatBlocks = 2;

// An image's part of the workspace.
struct ImageWork {
  FitState state;
  Counters counters;
  unsigned arrived;
  unsigned long long totals[kPartials];
  unsigned long long bins[2][kBins];
  Kept kept[2];
};

struct StreamingJob {
  FitJob job;
  ImageWork* work;
  int64_t first_image;
  int64_t blocks_an_image;
  bool until_finished;
};

// Counts of all blocks of an image, read past the first-level cache.
struct LoadFresh {
  template <class T> __device__ __forceinline__ T operator()(const T& value) const { return relaxed_load(&value); }
};
using GlobalCounts = Counts<ImageWork, LoadFresh>;

// True in the block of an image that arrives last, for all its threads; the others' writes are visible then.
__device__ __forceinline__ bool is_last_block(unsigned* arrived, int64_t blocks) {
  ERNET_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == unsigned(blocks - 1);
  __syncthreads();
  const bool result = last;
  if (result) {
    __threadfence();
    if (threadIdx.x == 0) atomicExch(arrived, 0u);
  }
  __syncthreads();
  return result;
}

template <class T> __device__ __forceinline__ SharedPixels<T> pixels_of_block(const StreamingJob& s, int64_t image) {
  const Images& images = s.job.images;
  const T* first = static_cast<const T*>(images.data) + (s.first_image + image) * images.image_stride;
  return {planes_of(first, images.channel_stride), images.pixels,
          (blockIdx.x - image * s.blocks_an_image) * kThreads + threadIdx.x, s.blocks_an_image * kThreads};
}

// Shared memory is declared outside templates: one place for all of their kernels.
struct BeginShared {
  SumScratch scratch;
  int32_t fixed[256];
};

__device__ __forceinline__ BeginShared& begin_shared() {
  ERNET_SHARED(BeginShared, block);
  return block;
}

template <class T, bool kInterleaved>
__device__ __forceinline__ Sums sums_of_thread(const StreamingJob& s, const SharedPixels<T>& shared) {
  Sums sums;
  const auto add_all = [&](const auto& to_fixed) {
    for_each_group<T, kInterleaved>(shared, [&](const PixelGroup<T, kInterleaved>& group, int64_t first, int count) {
      add_group<kInterleaved>(group, shared.planes, first, count, to_fixed, sums);
    });
  };
  if constexpr (sizeof(T) == 1) {
    int32_t* fixed = begin_shared().fixed;
    fill_fixed_table(s.job.fixed_offset, s.job.p.tissue_limit, 0, fixed);
    __syncthreads();
    add_all(FixedOfByte{level_table(fixed, 0)});
  } else {
    add_all(FixedOfFloat{s.job.images.scale, 1 / s.job.p.io, s.job.p.beta});
  }
  return sums;
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) begin_kernel(const __grid_constant__ StreamingJob s) {
  SumScratch& scratch = begin_shared().scratch;
  const int64_t image = blockIdx.x / s.blocks_an_image;
  ImageWork& work = s.work[image];
  store_sums(sums_of_thread<T, kInterleaved>(s, pixels_of_block<T>(s, image)), scratch);
  __syncthreads();
  if (threadIdx.x < kPartials) {
    const int64_t total = total_of_block(int(threadIdx.x), scratch);
    atomicAdd(&work.totals[threadIdx.x], static_cast<unsigned long long>(total));
  }
  if (!is_last_block(&work.arrived, s.blocks_an_image)) return;
  if (threadIdx.x != 0) return;
  int64_t totals[kPartials];
  for (int k = 0; k < kPartials; ++k) totals[k] = int64_t(relaxed_load(&work.totals[k]));
  double moments[macenko::kMomentCount];
  moments_of_totals(totals, moments);
  reset_counters(work.counters);
  macenko::begin_fit(moments, totals[1], s.job.p, work.state);
  if (work.state.phase == Phase::finished) write_fit(s.job.fit, s.first_image + image, work.state);
}

struct AdvanceShared {
  FitState state;
  ResolveScratch scratch;
  uint32_t bins[2][kBins];
  float logs[256];
};

__device__ __forceinline__ AdvanceShared& advance_shared() {
  ERNET_SHARED(AdvanceShared, block);
  return block;
}

__device__ __forceinline__ void add_bins(const uint32_t (*bins)[kBins], ImageWork& work) {
  for (int i = int(threadIdx.x); i < 2 * kBins; i += kThreads) {
    const uint32_t count = bins[i / kBins][i % kBins];
    if (count != 0) atomicAdd(&work.bins[i / kBins][i % kBins], static_cast<unsigned long long>(count));
  }
}

// The last block of an image moves its fit on and clears the counts for the next pass.
__device__ __forceinline__ void move_on(const StreamingJob& s, int64_t image, AdvanceShared& block) {
  ImageWork& work = s.work[image];
  resolve(GlobalCounts{&work}, s.job.p, block.state, block.scratch);
  for (int i = int(threadIdx.x); i < 2 * kBins; i += kThreads) work.bins[i / kBins][i % kBins] = 0;
  if (threadIdx.x == 0) {
    reset_counters(work.counters);
    if (block.state.phase == Phase::finished) write_fit(s.job.fit, s.first_image + image, block.state);
  }
  copy_state(block.state, work.state);
  __threadfence();
  __syncthreads();
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 1 ? kByteBlocks : kFloatBlocks)
    advance_kernel(const __grid_constant__ StreamingJob s) {
  using Reader = std::conditional_t<sizeof(T) == 1, ByteReader, FloatReader>;
  AdvanceShared& block = advance_shared();
  const int64_t image = blockIdx.x / s.blocks_an_image;
  ImageWork& work = s.work[image];
  if (work.state.phase == Phase::finished) return;
  copy_state(work.state, block.state);
  Reader reader;
  if constexpr (sizeof(T) == 1) {
    fill_log2_table(s.job.od, 0, block.logs);
    reader = {level_table(block.logs, 0), s.job.od, s.job.p.tissue_limit};
  } else {
    reader = {s.job.images.scale, 1 / s.job.p.io, s.job.p.beta};
  }
  const SharedPixels<T> shared = pixels_of_block<T>(s, image);
  do {
    for (int i = int(threadIdx.x); i < 2 * kBins; i += kThreads) block.bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    count_keys<Reader, kInterleaved>(shared, reader, block.state, block.bins, work.counters, work.kept);
    __syncthreads();
    add_bins(block.bins, work);
    if (!is_last_block(&work.arrived, s.blocks_an_image)) return;
    move_on(s, image, block);
  } while (s.until_finished && block.state.phase != Phase::finished);
}

using Kernel = void (*)(StreamingJob);

struct Kernels {
  Kernel begin, advance;
};

template <class T, bool kInterleaved>
constexpr Kernels kernels = {begin_kernel<T, kInterleaved>, advance_kernel<T, kInterleaved>};

Kernels kernels_of(const Images& images) {
  const bool interleaved = images.pixel_stride == 3;
  if (images.type == Pixel::u8) return interleaved ? kernels<uint8_t, true> : kernels<uint8_t, false>;
  return interleaved ? kernels<float, true> : kernels<float, false>;
}

cudaError_t launch(Kernel kernel, const StreamingJob& s, int64_t images, cudaStream_t stream) {
  ERNET_LAUNCH(kernel, unsigned(images * s.blocks_an_image), kThreads, stream, s);
  return cudaGetLastError();
}

// Images whose pixels fit in the cache together, and half of it for what else there is.
int64_t images_at_a_time(const Images& images, int64_t cache_bytes) {
  const int64_t image_bytes = 3 * images.pixels * (images.type == Pixel::u8 ? 1 : 4) + int64_t(sizeof(ImageWork));
  int64_t group = cache_bytes / 2 / image_bytes;
  group = group < 1 ? 1 : group;
  return group < images.count ? group : images.count;
}

int64_t blocks_an_image(int64_t pixels, int64_t images) {
  const int64_t wanted = kBlocks / images > 0 ? kBlocks / images : 1;
  const int64_t most = (pixels + kLeastBlockPixels - 1) / kLeastBlockPixels;
  const int64_t least = (pixels + kMostBlockPixels - 1) / kMostBlockPixels;
  const int64_t blocks = wanted < most ? wanted : most;
  return blocks > least ? blocks : least;
}

// Passes that all images take together: coarse and exact ones, of which larger images need more.
int passes(int64_t pixels) {
  if (pixels <= kSmallPixels) return 4;
  return pixels <= kMediumPixels ? 6 : 2 + 2 * macenko::kMaxRounds;
}

cudaError_t fit_group(StreamingJob s, int64_t images, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(s.work, 0, size_t(images) * sizeof(ImageWork), stream);
  if (error != cudaSuccess) return error;
  s.blocks_an_image = blocks_an_image(s.job.images.pixels, images);
  if (images * s.blocks_an_image > 0x7fffffff) return cudaErrorInvalidValue;
  const Kernels kernels = kernels_of(s.job.images);
  error = launch(kernels.begin, s, images, stream);
  const int count = passes(s.job.images.pixels);
  for (int pass = 0; pass < count && error == cudaSuccess; ++pass) error = launch(kernels.advance, s, images, stream);
  if (error != cudaSuccess) return error;
  s.blocks_an_image = 1;
  s.until_finished = true;
  return launch(kernels.advance, s, images, stream);
}

}  // namespace

int64_t macenko_streaming_workspace(const Images& images, int64_t cache_bytes) {
  return images_at_a_time(images, cache_bytes) * int64_t(sizeof(ImageWork));
}

cudaError_t macenko_streaming(const Images& images, const Parameters& parameters, int64_t cache_bytes, void* workspace,
                              const FitResult& fit, const Recipe* recipe, const Output* out, cudaStream_t stream) {
  if (images.count == 0) return cudaSuccess;
  StreamingJob s = {make_fit_job(images, parameters, fit), static_cast<ImageWork*>(workspace), 0, 1, false};
  const int64_t group = images_at_a_time(images, cache_bytes);
  for (int64_t first = 0; first < images.count; first += group) {
    const int64_t count = images.count - first < group ? images.count - first : group;
    s.first_image = first;
    cudaError_t error = fit_group(s, count, stream);
    if (error == cudaSuccess && recipe != nullptr) {
      Recipe fitted = *recipe;
      fitted.source = {fit.stain, fit.maximum, false};
      fitted.status = fit.status;
      Images part = images;
      part.count = first + count;
      error = macenko_reconstruct(part, fitted, parameters.io, *out, stream, first);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace ernet::cuda
