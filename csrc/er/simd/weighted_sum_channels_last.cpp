// weighted_sum of channels-last maps: coefficients change along a pixel, and are the same for all pixels. Compiled once
// per instruction set.
#include "er/simd/weighted_sum.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

// Coefficients of rows of channels: a vector for each vector of a row, the same for all rows.
template <typename A> struct PerChannel {
  const A* a[kMapsAtOnce];
  const A* b;

  Vec<A> coefficient(int64_t l, int64_t j, int64_t left) const { return load_upto<A>(a[l] + j, left); }
  Vec<A> start(int64_t j, int64_t left) const { return b == nullptr ? Vec<A>{} : load_upto<A>(b + j, left); }
  template <int> const PerChannel& of_row(int64_t) const { return *this; }
};

// Channels [begin, end) of some pixels.
template <typename T, typename A>
inline void pixel_rows(const WeightedSum& args, A* acc, const PixelRange& range, const ChannelTile& tile) {
  const int64_t C = args.shape.C, row_bytes = bit_row_bytes(args.shape);
  for (int64_t pixel = range.begin; pixel < range.begin + range.count; ++pixel) {
    for (int64_t c = tile.begin; c < tile.end; c += kChunk) {
      const int64_t count = least(kChunk, tile.end - c);
      const Block block = {pixel * C + c, pixel * row_bytes + c / 8, range.group * C + c, 1, count};
      sum_maps<OneRow, PerChannel<A>, T, A>(args, acc, block, static_cast<T*>(args.y) + block.offset, args.stream);
    }
  }
}

template <typename T> void items(const WeightedSum& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  A acc[kChunk];
  while (end > begin) pixel_rows<T, A>(args, acc, sum_item(args.shape, --end), {0, args.shape.C});
}

template <typename T> void channel_tile(const WeightedSum& args, const ChannelTile& tile) {
  using A = typename Accumulate<T>::type;
  A acc[kChunk];
  pixel_rows<T, A>(args, acc, {0, 0, args.shape.N * args.shape.P}, tile);
}

}  // namespace

const MapLoops<WeightedSum> channels_last_sum_loops = {
    {items<float>, items<double>, items<bf16>, items<f16>},
    {channel_tile<float>, channel_tile<double>, channel_tile<bf16>, channel_tile<f16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
