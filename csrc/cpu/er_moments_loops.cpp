// channel_moments: mean and sum of squared deviations of each channel, in one pass over memory. Each tile is summed,
// then read again from cache for the deviations from its own mean, so a large mean does not cancel the variance; tiles
// are merged in double (Chan, Golub and LeVeque 1983). Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowChunk = 2048;       // planar: elements of one sample in a tile
constexpr int64_t kTileElements = 16384;  // channels-last: elements of a tile; 64 KiB of float, read twice

// Merges a tile of n values (shift: an approximate mean; d: sum of deviations from it; d2: of their squares) into the
// `count` values whose mean and sum of squared deviations are known.
inline void merge(double shift, double d, double d2, double n, double count, double* mean, double* m2) {
  const double inverse = 1 / n, weight = n / (count + n);
  const double tile_mean = shift + d * inverse, tile_m2 = d2 - d * d * inverse;
  const double delta = tile_mean - *mean;
  *mean += delta * weight;
  *m2 += (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * (count * weight);
}

// Sums, then deviations, of `rows` rows of `count` elements that lie `stride` apart, as one tile.
template <typename T, typename A>
inline void rows_tile(const T* x, int64_t stride, int64_t rows, int64_t count, double seen, double* mean, double* m2) {
  Vec<A> even = {}, odd = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* p = x + r * stride;
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
      even += load<A>(p + j);
      odd += load<A>(p + j + kLanes<A>);
    }
    for (; j < count; j += kLanes<A>) even += load_upto<A>(p + j, count - j);
  }
  const double n = static_cast<double>(rows * count);
  const A shift = static_cast<A>(sum_lanes(even + odd) / n);
  Vec<A> sum = {}, squares = {}, more_squares = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* p = x + r * stride;
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
      const Vec<A> first = load<A>(p + j) - shift, second = load<A>(p + j + kLanes<A>) - shift;
      sum += first + second;
      squares += first * first;
      more_squares += second * second;
    }
    for (; j < count; j += kLanes<A>) {
      const Vec<A> rest = keep(load_upto<A>(p + j, count - j) - shift, count - j);
      sum += rest;
      squares += rest * rest;
    }
  }
  merge(static_cast<double>(shift), sum_lanes(sum), sum_lanes(squares + more_squares), n, seen, mean, m2);
}

template <typename T, typename A>
void planar(const ChannelMoments& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t stride = s.C * s.P;
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(s, i);
    const T* x = static_cast<const T*>(args.x) + item.begin * stride + item.channel * s.P;
    double mean = 0, m2 = 0;
    if (s.P <= kRowChunk) {  // a few samples together are one tile
      rows_tile<T, A>(x, stride, item.count, s.P, 0, &mean, &m2);
    } else {  // a slab is one sample then
      for (int64_t j = 0; j < s.P; j += kRowChunk) {
        const int64_t count = s.P - j < kRowChunk ? s.P - j : kRowChunk;
        rows_tile<T, A>(x + j, 0, 1, count, static_cast<double>(j), &mean, &m2);
      }
    }
    args.partial[item.slab * 2 * s.C + item.channel] = mean;
    args.partial[(item.slab * 2 + 1) * s.C + item.channel] = m2;
  }
}

// Channels-last: four pixels at a time over all channels, so that memory is read in long runs.
template <typename T, typename A>
inline void add_sums(A* sum, const T* x, int64_t stride, int64_t pixels, int64_t channels) {
  for (int64_t r = 0; r < pixels; r += 4) {
    const int64_t rows = pixels - r < 4 ? pixels - r : 4;
    const T* p = x + r * stride;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      Vec<A> total = load_upto<A>(sum + c, channels - c);
      if (rows == 4 && channels - c >= kLanes<A>) {
        total +=
            (load<A>(p + c) + load<A>(p + stride + c)) + (load<A>(p + 2 * stride + c) + load<A>(p + 3 * stride + c));
      } else {
        for (int64_t i = 0; i < rows; ++i) total += load_upto<A>(p + i * stride + c, channels - c);
      }
      store_upto<A>(sum + c, total, channels - c);
    }
  }
}

template <typename T, typename A>
inline void add_deviations(A* d, A* d2, const A* shift, const T* x, int64_t stride, int64_t pixels, int64_t channels) {
  for (int64_t r = 0; r < pixels; r += 4) {
    const int64_t rows = pixels - r < 4 ? pixels - r : 4;
    const T* p = x + r * stride;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t left = channels - c;
      const Vec<A> middle = load_upto<A>(shift + c, left);
      Vec<A> sum = load_upto<A>(d + c, left), squares = load_upto<A>(d2 + c, left);
      if (rows == 4 && left >= kLanes<A>) {
        for (int i = 0; i < 4; ++i) {
          const Vec<A> deviation = load<A>(p + i * stride + c) - middle;
          sum += deviation;
          squares += deviation * deviation;
        }
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          const Vec<A> deviation = load_upto<A>(p + i * stride + c, left) - middle;
          sum += deviation;
          squares += deviation * deviation;
        }
      }
      store_upto<A>(d + c, sum, left);
      store_upto<A>(d2 + c, squares, left);
    }
  }
}

template <typename T, typename A>
inline void channels_tile(const T* x, int64_t stride, int64_t pixels, int64_t channels, double seen, double* mean,
                          double* m2) {
  A shift[kItemChannels], d[kItemChannels], d2[kItemChannels];
  for (int64_t c = 0; c < channels; ++c) shift[c] = d[c] = d2[c] = 0;
  add_sums(shift, x, stride, pixels, channels);
  const A inverse = A(1) / static_cast<A>(pixels);
  for (int64_t c = 0; c < channels; ++c) shift[c] *= inverse;
  add_deviations(d, d2, shift, x, stride, pixels, channels);
  for (int64_t c = 0; c < channels; ++c) {
    merge(static_cast<double>(shift[c]), static_cast<double>(d[c]), static_cast<double>(d2[c]),
          static_cast<double>(pixels), seen, mean + c, m2 + c);
  }
}

template <typename T, typename A>
void channels_last(const ChannelMoments& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(s, i);
    double* mean = args.partial + item.slab * 2 * s.C + item.channel;
    double* m2 = mean + s.C;
    for (int64_t c = 0; c < item.channels; ++c) mean[c] = m2[c] = 0;
    const int64_t tile_pixels = kTileElements / item.channels;
    for (int64_t p = 0; p < item.count; p += tile_pixels) {
      const int64_t pixels = item.count - p < tile_pixels ? item.count - p : tile_pixels;
      const T* x = static_cast<const T*>(args.x) + (item.begin + p) * s.C + item.channel;
      channels_tile<T, A>(x, s.C, pixels, item.channels, static_cast<double>(p), mean, m2);
    }
  }
}

}  // namespace

template <typename T>
void channel_moments(const ChannelMoments& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  if (args.shape.channels_last) {
    channels_last<T, A>(args, begin, end);
  } else {
    planar<T, A>(args, begin, end);
  }
}

template void channel_moments<float>(const ChannelMoments&, int64_t, int64_t);
template void channel_moments<double>(const ChannelMoments&, int64_t, int64_t);
template void channel_moments<bf16>(const ChannelMoments&, int64_t, int64_t);
template void channel_moments<f16>(const ChannelMoments&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
