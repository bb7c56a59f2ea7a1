// What the ER loops of one instruction set share; table.cpp gathers them in its ErLoops.
#pragma once

#include "er/kernels.h"
#include "er/streaming.h"
#include "simd/vec.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

extern const MapLoops<WeightedSum> planar_sum_loops;
extern const MapLoops<WeightedSum> channels_last_sum_loops;
extern const MapLoops<WeightedSum> weighted_sum_loops;  // either
extern const MapLoops<MapDots> map_dots_loops;
extern const MapLoops<SumDots> sum_dots_loops;
extern const MapLoops<ChannelMoments> channel_moments_loops;
extern const VectorLoops<float> vector_loops_f32;
extern const VectorLoops<double> vector_loops_f64;

template <typename T> inline T* at(const void* p, int64_t offset) {
  return p == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(p)) + offset;
}

// work(Number<count>), for loops that are unrolled: kLeast <= count <= kMost.
template <int kValue> struct Number {
  static constexpr int value = kValue;
};
// The same where one function does for any number: the rest of a row that is less than a vector.
struct AnyNumber {
  int64_t value;
};
template <int kLeast, int kMost, typename Work> inline void with_number(int64_t count, const Work& work) {
  if constexpr (kLeast < kMost) {
    if (count < kMost) return with_number<kLeast, kMost - 1>(count, work);
  }
  work(Number<kMost>{});
}

// How far ahead, in elements, a map that streams past is fetched.
template <typename T> inline int64_t fetch_ahead() {
  return fetch_ahead_bytes.load(std::memory_order_relaxed) / static_cast<int64_t>(sizeof(T));
}

// work(first element, count) for what a planar reduction takes of its planes at once: all of them, of several channels
// and samples where they are small, or chunks of the one plane of the item.
template <typename Work> inline void over_plane_chunks(const MapShape& s, const Work& work) {
  const int64_t chunk = s.P < kPlaneChunk ? s.P : kPlaneChunk;
  for (int64_t j = 0; j < s.P; j += chunk) work(j, s.P - j < chunk ? s.P - j : chunk);
}

// The loops of a reduction from `work`, which does one item.
template <typename Arguments, void (*work)(const Arguments&, const ReduceItem&)>
void over_items(const Arguments& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) work(args, reduce_item(args.shape, i));
}

template <typename Arguments, void (*work)(const Arguments&, const ReduceItem&)>
void over_channel_tile(const Arguments& args, const ChannelTile& tile) {
  const MapShape& s = args.shape;
  const int64_t rows = s.groups() * slabs_per_group(s), width = reduce_channels(s);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = tile.begin; c < tile.end; c += width) {
      work(args, slab_item(s, row, c, tile.end - c < width ? tile.end - c : width));
    }
  }
}

// The table of a reduction, for each storage type.
template <typename Arguments, void (*f32)(const Arguments&, const ReduceItem&),
          void (*f64)(const Arguments&, const ReduceItem&), void (*b16)(const Arguments&, const ReduceItem&),
          void (*h16)(const Arguments&, const ReduceItem&)>
constexpr MapLoops<Arguments> reduction_loops = {
    {over_items<Arguments, f32>, over_items<Arguments, f64>, over_items<Arguments, b16>, over_items<Arguments, h16>},
    {over_channel_tile<Arguments, f32>, over_channel_tile<Arguments, f64>, over_channel_tile<Arguments, b16>,
     over_channel_tile<Arguments, h16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
