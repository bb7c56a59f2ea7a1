// The resident and the cluster plan: an image is read once into the shared memory of a block, or of a cluster, and all
// happens there.
#include <cuda_runtime.h>

#include "macenko/cuda/clusters.h"
#include "macenko/cuda/fit_job.h"
#include "macenko/cuda/kernels.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/plan.h"
#include "macenko/cuda/reconstruct_pixels.h"
#include "macenko/cuda/select_bins.h"
#include "macenko/cuda/tail_list.h"

namespace ernet::cuda {

namespace {

// Beside the pixels. What is not used at the same time shares its place.
struct alignas(16) BlockShared {
  union {
    SumScratch sums;
    struct {
      uint32_t bins[2][kBins];
      Kept kept[2];
    };
    uint32_t list[kListedOfThread * kMostThreads];
  };
  unsigned list_length;
  double od[256];  // of 8-bit levels
  FitState state;  // of the first block; the others have copies
  Counters counters;
  union {
    struct {
      int64_t totals[kPartials];
      int64_t image_totals[kPartials];
    };
    ResolveScratch scratch;
    Transform transform;
  };
};
constexpr int64_t kBlockSharedBytes = (int64_t(sizeof(BlockShared)) + 15) / 16 * 16;
constexpr int64_t kScaledBytes = 3 * 256 * int64_t(sizeof(float));

struct ResidentJob {
  FitJob job;
  Recipe recipe;
  Output out;  // no data: a fit alone
  double od_magnitude;
  int share;  // pixels of a block; an image has fewer than 2^31 in the shared memory of a cluster
  unsigned table_shift;
  unsigned listed;       // pixels that a block lists at most
  unsigned sample_step;  // pixels from one sampled pixel to the next
};

// Pointers into a block's shared memory; `levels` has fixed-point ODs while an image is loaded, then logarithms.
struct Memory {
  BlockShared* shared;
  unsigned char* levels;
  float (*scaled)[256];
  uint8_t* pixels;
};

__device__ __forceinline__ Memory divide(unsigned char* memory, const ResidentJob& t) {
  unsigned char* levels = memory + kBlockSharedBytes;
  unsigned char* scaled = levels + (int64_t(1024) << t.table_shift);
  unsigned char* pixels = scaled + (t.out.type == OutputType::image ? 0 : kScaledBytes);
  return {reinterpret_cast<BlockShared*>(memory), levels, reinterpret_cast<float (*)[256]>(scaled), pixels};
}

template <bool kInterleaved> __device__ __forceinline__ Planes<uint8_t> local_planes(uint8_t* pixels, int share) {
  return planes_of(pixels, kInterleaved ? 1 : share);
}

__device__ __forceinline__ Planes<const uint8_t> image_planes(const Images& images, int64_t image) {
  return planes_of(static_cast<const uint8_t*>(images.data) + image * images.image_stride, images.channel_stride);
}

// Has an image's pixels in the cache when its turn comes.
template <bool kInterleaved>
__device__ __forceinline__ void prefetch(const Images& images, int64_t image, const Share& share) {
#ifdef __CUDA_ARCH__
  if (image >= images.count) return;
  const Planes<const uint8_t> planes = image_planes(images, image);
  constexpr int kPixels = kInterleaved ? 32 : kRun;  // of a cache line, about
  for (int plane = 0; plane < (kInterleaved ? 1 : 3); ++plane) {
    const uint8_t* from = plane == 0 ? planes.plane[0] : (plane == 1 ? planes.plane[1] : planes.plane[2]);
    for (int first = int(threadIdx.x) * kPixels; first < share.count; first += int(blockDim.x) * kPixels)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + int64_t(share.place(first)) * (kInterleaved ? 3 : 1)));
  }
#else
  (void)images, (void)image, (void)share;
#endif
}

// Copies this block's pixels to shared memory and sums their moments on the way. Ends with the warps' sums stored.
template <bool kInterleaved>
__device__ __forceinline__ void load_pixels(const ResidentJob& t, int64_t image, const Share& share, const Memory& m) {
  const BlockPixels<false> from = {image_planes(t.job.images, image), share, share.count, int(threadIdx.x),
                                   int(blockDim.x)};
  const Planes<uint8_t> to = local_planes<kInterleaved>(m.pixels, t.share);
  Sums sums;
  const FixedOfByte to_fixed = {level_table(m.levels, t.table_shift)};
  for_each_group<uint8_t, kInterleaved>(
      from, [&](const PixelGroup<uint8_t, kInterleaved>& group, int first, int count) {
        for (int k = 0; k < 3; ++k) {
          uint8_t* plane = kInterleaved ? to.plane[0] + 3 * first + 16 * k : to.plane[k] + first;
          *reinterpret_cast<uint4*>(plane) = group.four(k);
        }
        add_group<kInterleaved>(group, from.planes, share.place(first), count, to_fixed, sums);
      });
  store_sums(sums, m.shared->sums);
}

// The first block adds up the image's moments and starts the fit.
template <class Cluster> __device__ __forceinline__ void begin_fit(const ResidentJob& t, const Memory& m) {
  BlockShared& s = *m.shared;
  __syncthreads();
  fill_log2_table(s.od, t.table_shift, reinterpret_cast<float*>(m.levels));
  if (threadIdx.x < kPartials) s.totals[threadIdx.x] = total_of_block(int(threadIdx.x), s.sums);
  Cluster::sync();
  if (Cluster::rank() != 0) return;
  if (threadIdx.x < kPartials) {
    int64_t total = 0;
    for (unsigned r = 0; r < Cluster::size(); ++r) total += *Cluster::at_rank(&s.totals[threadIdx.x], r);
    s.image_totals[threadIdx.x] = total;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double moments[macenko::kMomentCount];
  moments_of_totals(s.image_totals, moments);
  reset_counters(s.counters);
  macenko::begin_fit(moments, s.image_totals[1], t.job.p, s.state);
}

// Counts of all blocks of the cluster, in the first of them.
struct LoadPlain {
  template <class T> __device__ __forceinline__ const T& operator()(const T& value) const { return value; }
};
using SharedCounts = Counts<BlockShared, LoadPlain>;

__device__ __forceinline__ void clear_bins(BlockShared& s) {
  for (int i = int(threadIdx.x); i < 2 * kBins; i += int(blockDim.x)) s.bins[i / kBins][i % kBins] = 0;
}

// Adds up the bins of all blocks in the first one, which calls this. Ends with a barrier of that block.
template <class Cluster> __device__ __forceinline__ void add_bins(BlockShared& s) {
  if (Cluster::size() == 1) return;
  uint4* bins = reinterpret_cast<uint4*>(s.bins);
  for (int i = int(threadIdx.x); i < 2 * kBins / 4; i += int(blockDim.x)) {
    uint4 total = bins[i];
#pragma unroll 2
    for (unsigned r = 1; r < Cluster::size(); ++r) {
      const uint4 other = *Cluster::at_rank(bins + i, r);
      total = make_uint4(total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w);
    }
    bins[i] = total;
  }
  __syncthreads();
}

// The first block resolves a pass, the others copy its state. Begins and ends with a barrier of the cluster.
template <class Cluster, bool kWithBins = true, class Resolve>
__device__ __forceinline__ void move_on(BlockShared& s, const Resolve& resolve_counts) {
  Cluster::sync();
  if (Cluster::rank() == 0) {
    if (kWithBins) add_bins<Cluster>(s);
    resolve_counts(SharedCounts{&s});
    if (threadIdx.x == 0) reset_counters(s.counters);
  }
  Cluster::sync();
  if (Cluster::rank() != 0) copy_state(*Cluster::at_rank(&s.state, 0), s.state);
}

// The exact statistics of the pixels that the state's forms find, or the finding that they are not among them.
template <class Cluster, bool kInterleaved>
__device__ __forceinline__ void search_list(const ResidentJob& t, const LocalPixels& local, const ByteReader& reader,
                                            BlockShared& s) {
  if (threadIdx.x == 0) s.list_length = 0;
  __syncthreads();
  const PixelList list = {s.list, &s.list_length, t.listed};
  list_pixels<kInterleaved>(local, reader, s.state.pass, list);
  __syncthreads();
  ListedKeys listed;
  evaluate_list<kInterleaved>(local, reader, s.state, list, listed);
  Cluster::sync();  // bins and kept keys take the place of the list
  Counters& counters = *Cluster::at_rank(&s.counters, 0);
  do {
    clear_bins(s);
    __syncthreads();
    take_listed(listed, s.state, s.bins, counters, Cluster::at_rank(s.kept, 0));
    if (threadIdx.x == 0) {
      atomicAdd(&counters.listed, static_cast<unsigned long long>(s.list_length));
      if (s.list_length > list.most) atomicAdd(&counters.overflown, 1ull);
    }
    move_on<Cluster>(s, [&](const auto& counted) { resolve_list(counted, s.state, s.scratch); });
    __syncthreads();
  } while (!s.state.missed && !macenko::selections_are_done(s.state));
}

// The way from a sample to the statistics of a list, or to where all keys are to be counted.
template <class Cluster, bool kInterleaved>
__device__ __forceinline__ void select_in_tails(const ResidentJob& t, const LocalPixels& local,
                                                const ByteReader& reader, BlockShared& s) {
  sample_keys<kInterleaved>(local, reader, s.state, int(t.sample_step), s.bins, *Cluster::at_rank(&s.counters, 0));
  move_on<Cluster>(s, [&](const auto& counted) { resolve_sample(counted, t.job.p, s.state, s.scratch); });
  search_list<Cluster, kInterleaved>(t, local, reader, s);
  if (threadIdx.x == 0) ERNET_RECORD_LIST(Cluster::rank() == 0, s.state.keys, s.list_length, s.state.missed);
  move_on<Cluster, false>(s, [&](const auto&) {
    if (threadIdx.x == 0) macenko::end_list(t.job.p, s.state);
  });
  __syncthreads();
}

// Logarithms of levels that are no tissue: NaN while angles are listed, so that they are never found.
__device__ __forceinline__ void set_logs_of_others(const ResidentJob& t, const Memory& m, bool hidden) {
  const double* od = m.shared->od;
  const float nan = __int_as_float(0x7fc00000);
  fill_levels(unsigned(t.job.p.tissue_limit + 1), t.table_shift, reinterpret_cast<float*>(m.levels),
              [&](int level) { return hidden ? nan : log2_of_od(od[level]); });
}

// From the moments to the stains, pass by pass. Ends with the finished state in every block.
template <class Cluster, bool kInterleaved>
__device__ __forceinline__ void fit_pixels(const ResidentJob& t, const LocalPixels& local, const ByteReader& reader,
                                           const Memory& m) {
  BlockShared& s = *m.shared;
  Cluster::sync();
  if (Cluster::rank() != 0) copy_state(*Cluster::at_rank(&s.state, 0), s.state);
  __syncthreads();
  bool hidden = false;
  while (s.state.phase != Phase::finished) {
    const Phase phase = s.state.phase;
    if (hidden != (phase == Phase::angle_sample)) {
      hidden = !hidden;
      set_logs_of_others(t, m, hidden);
    }
    clear_bins(s);
    __syncthreads();
    if (macenko::is_sample(phase)) {
      select_in_tails<Cluster, kInterleaved>(t, local, reader, s);
    } else {
      count_keys<ByteReader, kInterleaved>(local, reader, s.state, s.bins, *Cluster::at_rank(&s.counters, 0),
                                           Cluster::at_rank(s.kept, 0));
      move_on<Cluster>(s, [&](const auto& counted) { resolve(counted, t.job.p, s.state, s.scratch); });
      __syncthreads();
    }
  }
  if (hidden) set_logs_of_others(t, m, false);
}

template <class Cluster, bool kInterleaved>
__device__ __forceinline__ void normalize_image(const ResidentJob& t, int64_t image, const Share& share,
                                                const ByteReader& reader, const Memory& m) {
  BlockShared& s = *m.shared;
  fill_fixed_table(t.job.fixed_offset, t.job.p.tissue_limit, t.table_shift, reinterpret_cast<int32_t*>(m.levels));
  __syncthreads();
  load_pixels<kInterleaved>(t, image, share, m);
  prefetch<kInterleaved>(t.job.images, image + Cluster::clusters(), share);
  begin_fit<Cluster>(t, m);
  const Planes<uint8_t> planes = local_planes<kInterleaved>(m.pixels, t.share);
  const LocalPixels local = {
      {{planes.plane[0], planes.plane[1], planes.plane[2]}}, share, share.count, int(threadIdx.x), int(blockDim.x)};
  fit_pixels<Cluster, kInterleaved>(t, local, reader, m);
  if (threadIdx.x == 0) {
    if (Cluster::rank() == 0) write_fit(t.job.fit, image, s.state);
    if (t.out.data != nullptr) {
      make_transform(t.recipe, s.state.status == macenko::kOk, s.state.stain, s.state.maximum, t.od_magnitude, image,
                     s.transform);
    }
  }
  __syncthreads();
  if (t.out.data != nullptr) {
    const ByteValues values = {reader, m.scaled};
    reconstruct_output<ByteValues, kInterleaved>(local, values, s.transform, t.job.p.io, t.out, image,
                                                 t.job.images.pixels);
  }
  __syncthreads();  // what the block's threads have read is overwritten by the next image
}

template <class Cluster, bool kInterleaved> __device__ __forceinline__ void serve_images(const ResidentJob& t) {
  ERNET_DYNAMIC_SHARED(memory);
  const Memory m = divide(memory, t);
  for (unsigned level = threadIdx.x; level < 256; level += blockDim.x) m.shared->od[level] = t.job.od[level];
  if (t.out.type != OutputType::image) fill_scaled_table(t.out, m.scaled);
  const ByteReader reader = {level_table(m.levels, t.table_shift), m.shared->od, t.job.p.tissue_limit};
  const Share share = share_of(int(t.job.images.pixels), int(Cluster::rank()), int(Cluster::size()));
  for (int64_t image = Cluster::index(); image < t.job.images.count; image += Cluster::clusters())
    normalize_image<Cluster, kInterleaved>(t, image, share, reader, m);
  Cluster::leave();
}

template <class Cluster, bool kInterleaved>
__global__ void __launch_bounds__(kMostThreads, 1) resident_kernel(const __grid_constant__ ResidentJob t) {
  if constexpr (Cluster::kExists) serve_images<Cluster, kInterleaved>(t);
}

template <bool kInterleaved>
cudaError_t launch(const Plan& plan, const Device& device, const ResidentJob& t, cudaStream_t stream) {
  const auto kernel =
      plan.blocks == 1 ? resident_kernel<OneBlock, kInterleaved> : resident_kernel<BlockCluster, kInterleaved>;
  return launch_persistent(kernel, plan, device, t, t.job.images.count, stream);
}

}  // namespace

int64_t resident_shared_bytes(bool network) { return kBlockSharedBytes + (network ? kScaledBytes : 0); }

cudaError_t macenko_resident(const Images& images, const Parameters& parameters, const Plan& plan, const Device& device,
                             const FitResult& fit, const Recipe* recipe, const Output* out, cudaStream_t stream) {
  if (images.count == 0) return cudaSuccess;
  ResidentJob t = {make_fit_job(images, parameters, fit),
                   {},
                   {},
                   0,
                   int(pixels_of_share(images.pixels, plan.blocks)),
                   unsigned(plan.table_shift),
                   unsigned(plan.listed * plan.threads),
                   unsigned(macenko::sample_step(images.pixels))};
  t.job.p.listed = int64_t(t.listed) * plan.blocks;
  if (recipe != nullptr) t.recipe = *recipe;
  if (out != nullptr) t.out = *out;
  t.od_magnitude = fmax(fabs(t.job.od[0]), fabs(t.job.od[255]));
  return images.pixel_stride == 3 ? launch<true>(plan, device, t, stream) : launch<false>(plan, device, t, stream);
}

}  // namespace ernet::cuda
