// channel_moments: mean and sum of squared deviations of each channel, in one pass over memory. Each tile is summed,
// then read again from cache for the deviations from its own mean, so a large mean does not cancel the variance; tiles
// are merged in double (Chan, Golub and LeVeque 1983). Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowChunk = 2048;      // planar: elements of a tile
constexpr int64_t kTileElements = 8192;  // channels-last: elements of a tile
constexpr int64_t kChannelBlock = 512;   // channels-last: channels of a tile

// Merges a tile of n values (shift: an approximate mean; d: sum of deviations from it; d2: of their squares) into the
// running count, mean and m2.
inline void merge(double shift, double d, double d2, double n, double count, double* mean, double* m2) {
  const double tile_mean = shift + d / n, tile_m2 = d2 - d * d / n;
  const double delta = tile_mean - *mean, total = count + n;
  *mean += delta * (n / total);
  *m2 += (tile_m2 > 0 ? tile_m2 : (tile_m2 == tile_m2 ? 0 : tile_m2)) + delta * delta * (count * n / total);
}

template <typename T, typename A>
inline double row_sum(const T* x, int64_t count) {
  Vec<A> even = {}, odd = {};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
    even += load<A>(x + j);
    odd += load<A>(x + j + kLanes<A>);
  }
  for (; j < count; j += kLanes<A>) {
    even += count - j >= kLanes<A> ? load<A>(x + j) : load_part<A>(x + j, count - j);
  }
  return sum_lanes<A>(even + odd);
}

template <typename T, typename A>
inline void row_deviations(const T* x, int64_t count, A shift, double* d, double* d2) {
  Vec<A> sum = {}, squares = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) {
    const Vec<A> deviation = load<A>(x + j) - shift;
    sum += deviation;
    squares += deviation * deviation;
  }
  *d = sum_lanes<A>(sum);
  *d2 = sum_lanes<A>(squares);
  if (j < count) {
    const Vec<A> rest = load_part<A>(x + j, count - j);
    for (int64_t i = 0; i < count - j; ++i) {
      const A deviation = rest[i] - shift;
      *d += static_cast<double>(deviation);
      *d2 += static_cast<double>(deviation) * static_cast<double>(deviation);
    }
  }
}

template <typename T, typename A>
void planar(const ChannelMoments& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / s.C, c = item % s.C;
    const T* x = static_cast<const T*>(args.x) + item * s.P;
    double mean = 0, m2 = 0;
    for (int64_t j = 0; j < s.P; j += kRowChunk) {
      const int64_t count = s.P - j < kRowChunk ? s.P - j : kRowChunk;
      const A shift = static_cast<A>(row_sum<T, A>(x + j, count) / static_cast<double>(count));
      double d, d2;
      row_deviations<T, A>(x + j, count, shift, &d, &d2);
      merge(static_cast<double>(shift), d, d2, static_cast<double>(count), static_cast<double>(j), &mean, &m2);
    }
    args.partial[(n * 2) * s.C + c] = mean;
    args.partial[(n * 2 + 1) * s.C + c] = m2;
  }
}

// sum[c] += x[row][c] over the rows of a tile, four rows at a time.
template <typename T, typename A>
inline void add_sums(A* sum, const T* x, int64_t stride, int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t left = rows - r < 4 ? rows - r : 4;
    const T* xr = x + r * stride;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t count = channels - c < kLanes<A> ? channels - c : kLanes<A>;
      const bool whole = count == kLanes<A>;
      Vec<A> total = whole ? load<A>(sum + c) : load_part<A>(sum + c, count);
      for (int64_t i = 0; i < left; ++i) {
        total += whole ? load<A>(xr + i * stride + c) : load_part<A>(xr + i * stride + c, count);
      }
      whole ? store(sum + c, total) : store_part<A>(sum + c, total, count);
    }
  }
}

template <typename T, typename A>
inline void add_deviations(A* d, A* d2, const A* shift, const T* x, int64_t stride, int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t left = rows - r < 4 ? rows - r : 4;
    const T* xr = x + r * stride;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t count = channels - c < kLanes<A> ? channels - c : kLanes<A>;
      const bool whole = count == kLanes<A>;
      const Vec<A> mean = whole ? load<A>(shift + c) : load_part<A>(shift + c, count);
      Vec<A> sum = whole ? load<A>(d + c) : load_part<A>(d + c, count);
      Vec<A> squares = whole ? load<A>(d2 + c) : load_part<A>(d2 + c, count);
      for (int64_t i = 0; i < left; ++i) {
        const T* p = xr + i * stride + c;
        const Vec<A> deviation = (whole ? load<A>(p) : load_part<A>(p, count)) - mean;
        sum += deviation;
        squares += deviation * deviation;
      }
      whole ? store(d + c, sum) : store_part<A>(d + c, sum, count);
      whole ? store(d2 + c, squares) : store_part<A>(d2 + c, squares, count);
    }
  }
}

template <typename T, typename A>
void channels_last_tile(const T* x, int64_t stride, int64_t pixels, int64_t channels, double seen, double* mean,
                        double* m2) {
  A shift[kChannelBlock], d[kChannelBlock], d2[kChannelBlock];
  for (int64_t c = 0; c < channels; ++c) shift[c] = d[c] = d2[c] = 0;
  add_sums<T, A>(shift, x, stride, pixels, channels);
  const A inverse = A(1) / static_cast<A>(pixels);
  for (int64_t c = 0; c < channels; ++c) shift[c] *= inverse;
  add_deviations<T, A>(d, d2, shift, x, stride, pixels, channels);
  for (int64_t c = 0; c < channels; ++c) {
    merge(static_cast<double>(shift[c]), static_cast<double>(d[c]), static_cast<double>(d2[c]),
          static_cast<double>(pixels), seen, mean + c, m2 + c);
  }
}

template <typename T, typename A>
void channels_last(const ChannelMoments& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t block = s.C < kChannelBlock ? s.C : kChannelBlock, tile_pixels = kTileElements / block;
  for (int64_t item = begin; item < end; ++item) {
    const PixelRange range = reduce_item(s, item);
    double* mean = args.partial + item * 2 * s.C;
    double* m2 = mean + s.C;
    for (int64_t c = 0; c < 2 * s.C; ++c) mean[c] = 0;
    for (int64_t p = 0; p < range.count; p += tile_pixels) {
      const int64_t pixels = range.count - p < tile_pixels ? range.count - p : tile_pixels;
      for (int64_t c = 0; c < s.C; c += block) {
        const T* x = static_cast<const T*>(args.x) + (range.begin + p) * s.C + c;
        channels_last_tile<T, A>(x, s.C, pixels, s.C - c < block ? s.C - c : block, static_cast<double>(p), mean + c,
                                 m2 + c);
      }
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
