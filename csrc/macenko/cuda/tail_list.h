// The passes of the listed way (macenko/steps/tails.h) over the pixels of a block in its shared memory: approximate
// keys of a sample, a list of the pixels beyond the borders, and the exact keys of those, which stay in registers.
#pragma once

#include <cuda_runtime.h>

#include "macenko/cuda/passes.h"
#include "macenko/cuda/plan.h"

namespace ernet::cuda {

// Positions of pixels in a block's shared memory.
struct PixelList {
  uint32_t* pixel;
  unsigned* length;  // may exceed `most`, what is beyond is not stored
  unsigned most;
};

// Counts approximate keys of sampled pixels in `bins`: 2 kBins of angles, or kBins of each concentration.
template <bool kInterleaved>
__device__ __forceinline__ void sample_keys(const LocalPixels& local, const ByteReader& reader, const FitState& state,
                                            int step, uint32_t (*bins)[kBins], Counters& counters) {
  constexpr int kStride = kInterleaved ? 3 : 1;
  const bool angles = macenko::counts_angles(state.phase);
  float rows[2][3];
  copy_rows(state.pass, rows);
  const float scale[2] = {angles ? float(macenko::kSampleBinsPerUnit) : state.pass.bins_per_unit[0],
                          state.pass.bins_per_unit[1]};
  int sampled = 0;
  const int strata = (local.pixels + step - 1) / step;
  for (int stratum = local.thread; stratum < strata; stratum += local.threads) {  // 1 sampled pixel an iteration
    const int pixel = int(macenko::sampled_pixel(stratum, step));
    if (pixel >= local.pixels) continue;
    const uint8_t r = local.planes.plane[0][pixel * kStride];
    const uint8_t g = local.planes.plane[1][pixel * kStride];
    const uint8_t b = local.planes.plane[2][pixel * kStride];
    if (angles && !reader.is_tissue(r, g, b)) continue;
    const FloatKeys found =
        float_keys(rows, angles, reader.log2_intensity(r), reader.log2_intensity(g), reader.log2_intensity(b));
    ++sampled;
    if (angles) {
      const int bin = bin_of(found.key[0], scale[0], 2 * kBins);
      atomicAdd(&bins[bin / kBins][bin % kBins], 1u);
    } else {
      atomicAdd(&bins[0][bin_of(found.key[0], scale[0], kBins)], 1u);
      atomicAdd(&bins[1][bin_of(found.key[1], scale[1], kBins)], 1u);
    }
  }
  add_of_warp(sampled, &counters.within[0]);
}

// Lists the pixels that either form finds. In a phase of angles the logarithms of levels that are no tissue are NaN, so
// that no form is >= 0.
template <bool kInterleaved>
__device__ __forceinline__ void list_pixels(const LocalPixels& local, const ByteReader& reader, const PassKeys& keys,
                                            const PixelList& list) {
  float form[2][4];
  for (int t = 0; t < 2; ++t) {
    for (int k = 0; k < 4; ++k) form[t][k] = keys.form[t][k];
  }
  for_each_group<uint8_t, kInterleaved>(
      local, [&](const PixelGroup<uint8_t, kInterleaved>& group, int first, int count) {
        unsigned wanted = 0;
        for (int i = 0; i < GroupSize<uint8_t>::value; ++i) {
          const float r = reader.log2_intensity(group.get(i, 0));
          const float g = reader.log2_intensity(group.get(i, 1));
          const float b = reader.log2_intensity(group.get(i, 2));
          const float low = fmaf(form[0][0], r, fmaf(form[0][1], g, fmaf(form[0][2], b, form[0][3])));
          const float high = fmaf(form[1][0], r, fmaf(form[1][1], g, fmaf(form[1][2], b, form[1][3])));
          if (low >= 0.0f || high >= 0.0f) wanted |= 1u << i;
        }
        wanted &= (1u << count) - 1;
        // By all lanes, so that the compiler adds up a warp's numbers and asks for its places once.
        unsigned slot = atomicAdd(list.length, unsigned(__popc(wanted)));
        while (wanted != 0) {  // 1 listed pixel an iteration
          if (slot < list.most) list.pixel[slot] = unsigned(first + __ffs(int(wanted)) - 1);
          wanted &= wanted - 1;
          ++slot;
        }
      });
}

// Exact keys of this thread's part of a list, as ordered bits; those that do not exist are above all others.
static_assert(kListedOfThread == 6, "as the loops over them say");
struct ListedKeys {
  unsigned long long bits[2][kListedOfThread];
};

template <bool kInterleaved>
__device__ __forceinline__ void evaluate_list(const LocalPixels& local, const ByteReader& reader, const FitState& state,
                                              const PixelList& list, ListedKeys& listed) {
  const unsigned length = *list.length < list.most ? *list.length : list.most;
  const bool angles = macenko::counts_angles(state.phase);
  double row[2][3];
  for (int t = 0; t < 2; ++t) {
    for (int k = 0; k < 3; ++k) row[t][k] = state.pass.row[t][k];
  }
  for (int k = 0; k < kListedOfThread; ++k) {  // 6 listed pixels unrolled
    const unsigned at = threadIdx.x + unsigned(k) * blockDim.x;
    listed.bits[0][k] = listed.bits[1][k] = ~0ull;
    if (at < length) {
      const ExactKeys found = exact_keys<ByteReader, kInterleaved>(local, int(list.pixel[at]), reader, row, angles);
      listed.bits[0][k] = macenko::ordered_bits(found.key[0]);
      listed.bits[1][k] = macenko::ordered_bits(found.key[1]);
    }
  }
}

// Counts the exact keys of a list in the interval of selection t.
__device__ __forceinline__ void count_listed(const unsigned long long (&listed)[kListedOfThread], int t,
                                             const Selection& s, uint32_t* bins, Counters& counters, Kept& kept) {
  const unsigned long long low = s.low;
  const unsigned long long width = s.high - low;
  const int shift = s.shift;
  int below = 0;
  int within = 0;
  for (int k = 0; k < kListedOfThread; ++k) {  // 6 listed pixels unrolled
    const unsigned long long place = listed[k] - low;
    if (place <= width) {
      ++within;
      take_inside_key(listed[k], unsigned(place >> shift), t, bins, counters, kept);
    } else {
      below += listed[k] < low;
    }
  }
  add_of_warp(below, &counters.below[t]);
  add_of_warp(within, &counters.within[t]);
}

// Takes the exact keys of a list into both selections.
__device__ __forceinline__ void take_listed(const ListedKeys& listed, const FitState& state, uint32_t (*bins)[kBins],
                                            Counters& counters, Kept* kept) {
  for (int t = 0; t < 2; ++t) {
    const Selection& s = state.selection[t];
    if (s.stage == Stage::count) {
      count_listed(listed.bits[t], t, s, bins[t], counters, kept[t]);
    } else if (s.stage == Stage::split) {
      for (int k = 0; k < kListedOfThread; ++k) take_split_key(listed.bits[t][k], s.edge, t, counters);
    }
  }
}

}  // namespace ernet::cuda
