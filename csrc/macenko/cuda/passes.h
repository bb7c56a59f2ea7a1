// The passes of a fit over pixels: moments, and counts of keys. The few pixels that float32 cannot place are evaluated
// again in double precision.
#pragma once

#include <cuda_runtime.h>

#include "macenko/cuda/moment_sums.h"
#include "macenko/cuda/pixel_group.h"
#include "macenko/cuda/plan.h"
#include "macenko/cuda/readers.h"
#include "macenko/cuda/relaxed_load.h"
#include "macenko/steps/fit_state.h"

namespace ernet::cuda {

using macenko::FitState;
using macenko::kBins;
using macenko::kKeptKeys;
using macenko::PassKeys;
using macenko::Phase;
using macenko::Selection;
using macenko::Stage;

// Pixels in device memory and the threads that share them.
template <class T> struct SharedPixels {
  static constexpr bool kLocal = false;
  Planes<const T> planes;
  int64_t pixels;
  int64_t thread;
  int64_t threads;
  // Where in `planes` a pixel is, and where in the image.
  __device__ __forceinline__ int64_t source(int64_t pixel) const { return pixel; }
  __device__ __forceinline__ int64_t place(int64_t pixel) const { return pixel; }
};

// Which pixels of an image a block holds: runs in turn with the other blocks, one after the other in its memory.
struct Share {
  int rank;
  int blocks;
  int count;
  // Where in the image the pixel is that has this position in the block's memory.
  __device__ __forceinline__ int place(int position) const {
    return blocks == 1 ? position : (position / kRun * blocks + rank) * kRun + position % kRun;
  }
};

__device__ __forceinline__ Share share_of(int pixels, int rank, int blocks) {
  const int runs = (pixels + kRun - 1) / kRun;
  const int mine = (runs - rank + blocks - 1) / blocks;  // of which the last may be the image's last
  const bool has_last = runs > 0 && (runs - 1) % blocks == rank;
  return {rank, blocks, mine * kRun - (has_last ? runs * kRun - pixels : 0)};
}

// The pixels of a block by their position in its shared memory; `kLocal`: read from there, aligned to 16 bytes and
// padded to whole groups, else from the image's own memory.
template <bool kLocal_> struct BlockPixels {
  static constexpr bool kLocal = kLocal_;
  Planes<const uint8_t> planes;
  Share share;
  int pixels;  // share.count
  int thread;
  int threads;
  __device__ __forceinline__ int source(int position) const { return kLocal ? position : share.place(position); }
  __device__ __forceinline__ int place(int position) const { return share.place(position); }
};
using LocalPixels = BlockPixels<true>;

// Calls f(group, first, count) for this thread's groups of 48 bytes.
template <class T, bool kInterleaved, class Pixels, class F>
__device__ __forceinline__ void for_each_group(const Pixels& shared, const F& f) {
  using Index = decltype(shared.pixels);
  constexpr int kPixels = GroupSize<T>::value;
  const bool aligned = Pixels::kLocal || is_aligned<const T, kInterleaved>(shared.planes);
  for (Index first = shared.thread * kPixels; first < shared.pixels; first += shared.threads * kPixels) {
    const int count = shared.pixels - first < kPixels ? int(shared.pixels - first) : kPixels;
    PixelGroup<T, kInterleaved> group;
    load_group<T, kInterleaved>(shared.planes, shared.source(first), Pixels::kLocal ? kPixels : count, aligned, group);
    f(group, first, count);
  }
}

// Adds up the pixels of a group: `count` from `first` of `planes`.
template <bool kInterleaved, class ToFixed>
__device__ __forceinline__ void add_group(const PixelGroup<uint8_t, kInterleaved>& group,
                                          const Planes<const uint8_t>& planes, int64_t first, int count,
                                          const ToFixed& to_fixed, Sums& sums) {
  GroupSums added;
  if (count == GroupSize<uint8_t>::value) {
    for (int i = 0; i < GroupSize<uint8_t>::value; ++i)
      add_pixel(to_fixed(group.get(i, 0)), to_fixed(group.get(i, 1)), to_fixed(group.get(i, 2)), added, sums);
  } else {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int64_t at = (first + i) * (kInterleaved ? 3 : 1);
      add_pixel(to_fixed(planes.plane[0][at]), to_fixed(planes.plane[1][at]), to_fixed(planes.plane[2][at]), added,
                sums);
    }
  }
  add_sums(added, sums);
}

template <bool kInterleaved, class ToFixed>
__device__ __forceinline__ void add_group(const PixelGroup<float, kInterleaved>& group, const Planes<const float>&,
                                          int64_t, int count, const ToFixed& to_fixed, Sums& sums) {
  for (int i = 0; i < GroupSize<float>::value; ++i) {
    if (i < count) {
      bool invalid = false;
      const int32_t r = to_fixed(group.get(i, 0), invalid);
      const int32_t g = to_fixed(group.get(i, 1), invalid);
      const int32_t b = to_fixed(group.get(i, 2), invalid);
      sums.invalid += invalid;
      if ((r | g | b) < 0) continue;
      GroupSums added;
      add_pixel(r, g, b, added, sums);
      add_sums(added, sums);
    }
  }
}

// Approximate keys of a pixel.
struct FloatKeys {
  float key[2];
  bool certain;  // the error is within the margin of the selections
};

__device__ __forceinline__ float dot(const float row[3], float r, float g, float b) {
  return fmaf(row[0], r, fmaf(row[1], g, row[2] * b));
}

__device__ __forceinline__ FloatKeys float_keys(const float rows[2][3], bool angles, float r, float g, float b) {
  const float x = dot(rows[0], r, g, b);
  const float y = dot(rows[1], r, g, b);
  if (!angles) return {{x, y}, true};
  const float total = -(r + g + b);
  const float norm = fabsf(x) + fabsf(y);
  const float turn = 1.0f - __fdividef(x, norm);
  const float key = y < 0.0f ? -turn : turn;
  const bool on_cut = x < 0.0f && fabsf(y) <= macenko::kCutDistance * total;
  return {{key, key}, norm > macenko::kSmallestNorm * total && !on_cut};
}

struct ExactKeys {
  double key[2];
};

template <class Reader, bool kInterleaved, class Pixels, class Index>
__device__ __forceinline__ ExactKeys exact_keys(const Pixels& shared, Index pixel, const Reader& reader,
                                                const double (&row)[2][3], bool angles) {
  const Index at = pixel * (kInterleaved ? 3 : 1);
  const double r = reader.od(shared.planes.plane[0][at]);
  const double g = reader.od(shared.planes.plane[1][at]);
  const double b = reader.od(shared.planes.plane[2][at]);
  const double x = row[0][0] * r + row[0][1] * g + row[0][2] * b;
  const double y = row[1][0] * r + row[1][1] * g + row[1][2] * b;
  if (!angles) return {{x, y}};
  const double key = macenko::pseudo_angle(x, y);
  return {{key, key}};
}

__device__ __forceinline__ int bin_of(float key, float bins_per_unit, int bins) {
  const float place = key * bins_per_unit;
  return int(fminf(fmaxf(place, 0.0f), float(bins - 1)));
}

__device__ __forceinline__ int coarse_bin(float key, float bins_per_unit) { return bin_of(key, bins_per_unit, kBins); }

// Whether pixel i of a group has a key in this phase.
template <class Reader, bool kInterleaved>
__device__ __forceinline__ bool has_key(const PixelGroup<typename Reader::Value, kInterleaved>& group, int i, int count,
                                        const Reader& reader, bool angles) {
  return i < count && (!angles || reader.is_tissue(group.get(i, 0), group.get(i, 1), group.get(i, 2)));
}

template <class Reader, bool kInterleaved>
__device__ __forceinline__ FloatKeys keys_of_group(const PixelGroup<typename Reader::Value, kInterleaved>& group, int i,
                                                   const Reader& reader, const float rows[2][3], bool angles) {
  if (Reader::kExactOnly) return {{0, 0}, false};
  return float_keys(rows, angles, reader.log2_intensity(group.get(i, 0)), reader.log2_intensity(group.get(i, 1)),
                    reader.log2_intensity(group.get(i, 2)));
}

__device__ __forceinline__ void copy_rows(const PassKeys& keys, float rows[2][3]) {
  for (int t = 0; t < 2; ++t) {
    for (int k = 0; k < 3; ++k) rows[t][k] = keys.log2_row[t][k];
  }
}

// Counts approximate keys: one histogram of angles, two of concentrations. `bins` is in shared memory.
template <class Reader, bool kInterleaved, bool kAngles, class Pixels>
__device__ __forceinline__ void coarse_pass(const Pixels& shared, const Reader& reader, const PassKeys& keys,
                                            uint32_t (*bins)[kBins]) {
  using T = typename Reader::Value;
  float rows[2][3];
  copy_rows(keys, rows);
  const float scale[2] = {keys.bins_per_unit[0], keys.bins_per_unit[1]};
  for_each_group<T, kInterleaved>(shared, [&](const PixelGroup<T, kInterleaved>& group, auto first, int count) {
    unsigned doubtful = 0;
    for (int i = 0; i < GroupSize<T>::value; ++i) {
      if (has_key<Reader, kInterleaved>(group, i, count, reader, kAngles)) {
        const FloatKeys found = keys_of_group<Reader, kInterleaved>(group, i, reader, rows, kAngles);
        if (found.certain) {
          atomicAdd(&bins[0][coarse_bin(found.key[0], scale[0])], 1u);
          if (!kAngles) atomicAdd(&bins[1][coarse_bin(found.key[1], scale[1])], 1u);
        } else {
          doubtful |= 1u << i;
        }
      }
    }
    while (doubtful != 0) {
      const int i = __ffs(int(doubtful)) - 1;
      doubtful &= doubtful - 1;
      const ExactKeys found = exact_keys<Reader, kInterleaved>(shared, first + i, reader, keys.row, kAngles);
      atomicAdd(&bins[0][coarse_bin(float(found.key[0]), scale[0])], 1u);
      if (!kAngles) atomicAdd(&bins[1][coarse_bin(float(found.key[1]), scale[1])], 1u);
    }
  });
}

// What a pass finds, for the two selections of an image.
struct Counters {
  unsigned long long below[2];     // keys below the interval
  unsigned long long largest[2];   // key below the edge, and
  unsigned long long smallest[2];  // key from the edge on, as ordered bits
  unsigned inside[2];              // keys in the interval, or more than kKeptKeys
  unsigned long long within[2];    // keys in the interval, of a list; keys of a sample
  unsigned long long listed;       // pixels
  unsigned long long overflown;    // lists that were too short
};
using Kept = unsigned long long[kKeptKeys];

__device__ __forceinline__ void reset_counters(Counters& counters) {
  counters = {{0, 0}, {0, 0}, {~0ull, ~0ull}, {0, 0}, {0, 0}, 0, 0};
}

__device__ __forceinline__ void take_split_key(unsigned long long bits, unsigned long long edge, int t,
                                               Counters& counters) {
  // Looking first keeps threads from queueing for an address that they would not change.
  if (bits < edge) {
    if (bits > relaxed_load(&counters.largest[t])) atomicMax(&counters.largest[t], bits);
  } else if (bits < relaxed_load(&counters.smallest[t])) {
    atomicMin(&counters.smallest[t], bits);
  }
}

// A key in the interval of selection t, in its bin.
__device__ __forceinline__ void take_inside_key(unsigned long long bits, unsigned bin, int t, uint32_t* bins,
                                                Counters& counters, Kept& kept) {
  atomicAdd(&bins[bin], 1u);
  if (relaxed_load(&counters.inside[t]) <= unsigned(kKeptKeys)) {
    const unsigned slot = atomicAdd(&counters.inside[t], 1u);
    if (slot < unsigned(kKeptKeys)) kept[slot] = bits;
  }
}

// One exact key of selection t.
__device__ __forceinline__ void take_key(double key, int t, const Selection& s, uint32_t* bins, Counters& counters,
                                         Kept* kept, int& below) {
  if (s.stage == Stage::done) return;
  const uint64_t bits = macenko::ordered_bits(key);
  if (s.stage == Stage::split) return take_split_key(bits, s.edge, t, counters);
  if (bits < s.low) {
    ++below;
  } else if (bits <= s.high) {
    take_inside_key(bits, unsigned((bits - s.low) >> s.shift), t, bins, counters, kept[t]);
  }
}

__device__ __forceinline__ void add_of_warp(int count, unsigned long long* total) {
  const int sum = sum_of_warp(count);
  if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(total, static_cast<unsigned long long>(sum));
}

// Counts exact keys in the intervals of both selections. Float32 tells which pixels need an exact key.
template <class Reader, bool kInterleaved, bool kAngles, class Pixels>
__device__ __forceinline__ void exact_pass(const Pixels& shared, const Reader& reader, const FitState& state,
                                           uint32_t (*bins)[kBins], Counters& counters, Kept* kept) {
  using T = typename Reader::Value;
  const PassKeys& keys = state.pass;
  float rows[2][3];
  copy_rows(keys, rows);
  const macenko::Window window[2] = {keys.window[0], keys.window[1]};
  int below[2] = {0, 0};
  for_each_group<T, kInterleaved>(shared, [&](const PixelGroup<T, kInterleaved>& group, auto first, int count) {
    unsigned wanted = 0;
    for (int i = 0; i < GroupSize<T>::value; ++i) {
      if (has_key<Reader, kInterleaved>(group, i, count, reader, kAngles)) {
        const FloatKeys found = keys_of_group<Reader, kInterleaved>(group, i, reader, rows, kAngles);
        const bool near = (found.key[0] >= window[0].low && found.key[0] <= window[0].high) ||
                          (found.key[1] >= window[1].low && found.key[1] <= window[1].high);
        if (near || !found.certain) {
          wanted |= 1u << i;
        } else {
          below[0] += found.key[0] < window[0].low;
          below[1] += found.key[1] < window[1].low;
        }
      }
    }
    while (wanted != 0) {
      const int i = __ffs(int(wanted)) - 1;
      wanted &= wanted - 1;
      const ExactKeys found = exact_keys<Reader, kInterleaved>(shared, first + i, reader, keys.row, kAngles);
      take_key(found.key[0], 0, state.selection[0], bins[0], counters, kept, below[0]);
      take_key(found.key[1], 1, state.selection[1], bins[1], counters, kept, below[1]);
    }
  });
  for (int t = 0; t < 2; ++t) add_of_warp(below[t], &counters.below[t]);
}

// The pass of the image's phase.
template <class Reader, bool kInterleaved, class Pixels>
__device__ __forceinline__ void count_keys(const Pixels& shared, const Reader& reader, const FitState& state,
                                           uint32_t (*bins)[kBins], Counters& counters, Kept* kept) {
  switch (state.phase) {
    case Phase::angle_coarse: return coarse_pass<Reader, kInterleaved, true>(shared, reader, state.pass, bins);
    case Phase::angle_exact: return exact_pass<Reader, kInterleaved, true>(shared, reader, state, bins, counters, kept);
    case Phase::concentration_coarse: return coarse_pass<Reader, kInterleaved, false>(shared, reader, state.pass, bins);
    case Phase::concentration_exact:
      return exact_pass<Reader, kInterleaved, false>(shared, reader, state, bins, counters, kept);
    default: return;
  }
}

}  // namespace ernet::cuda
