// The loop templates of one instruction set, gathered by er_tables_loops.cpp into its ErLoops table.
#pragma once

#include "er/kernels.h"
#include "simd/vec.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

template <typename T>
void weighted_sum(const WeightedSum& args, int64_t begin, int64_t end);
template <typename T>
void weighted_dot(const WeightedDot& args, int64_t begin, int64_t end);
template <typename T>
void weighted_dot_strip(const WeightedDot& args, const Strip& strip);
template <typename T>
void channel_moments(const ChannelMoments& args, int64_t begin, int64_t end);
template <typename T>
void weighted_sum_strip(const WeightedSum& args, const Strip& strip);
template <typename T>
void map_dots(const MapDots& args, int64_t begin, int64_t end);
template <typename T>
void sum_dots(const SumDots& args, int64_t begin, int64_t end);
template <typename T>
void map_dots_strip(const MapDots& args, const Strip& strip);
template <typename T>
void channel_moments_strip(const ChannelMoments& args, const Strip& strip);

template <typename T>
inline T* at(const void* p, int64_t offset) {
  return p == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(p)) + offset;
}

// How far ahead, in elements, a map that streams past is fetched. The hardware's own prefetching ends with each page of
// 4 KiB, which most maps that others have made consist of.
template <typename T>
constexpr int64_t kFetchAhead = 2048 / sizeof(T);

// work(first element, count) for what a planar reduction takes of its planes at once: all of them, of several channels
// and samples where they are small, or chunks of the one plane of the item.
template <typename Work>
inline void over_plane_chunks(const MapShape& s, const Work& work) {
  const int64_t chunk = s.P < kPlaneChunk ? s.P : kPlaneChunk;
  for (int64_t j = 0; j < s.P; j += chunk) work(j, s.P - j < chunk ? s.P - j : chunk);
}

// The items of a reduction that make up a strip: work(item) for each.
template <typename Work>
inline void over_strip(const MapShape& s, const Strip& strip, const Work& work) {
  const int64_t rows = s.groups() * slabs_per_group(s), width = reduce_channels(s);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = strip.begin; c < strip.end; c += width) {
      work(slab_item(s, row, c, strip.end - c < width ? strip.end - c : width));
    }
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
