// channel_moments: mean and sum of squared deviations of each channel, in one pass over memory. A tile's deviations are
// taken from a shift, the mean of its own first k values, so a large mean does not cancel the variance: those k values
// are in the tile, so (mean - shift)^2 <= var * n / k for the n values of the tile, and subtracting n (mean - shift)^2
// from the sum of squares costs at most a factor 1 + n / k of rounding errors, n / k <= 32 here and near 0 in ordinary
// data. Tiles are merged in double (Chan, Golub and LeVeque 1983). Compiled once per instruction set.
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kPlaneShift = 256;  // planar: elements whose mean is the shift
constexpr int64_t kTilePixels = 128;  // channels-last: pixels of a tile
constexpr int64_t kShiftPixels = 4;   // channels-last: pixels whose mean is the shift
static_assert(kPlaneChunk <= 32 * kPlaneShift && kTilePixels <= 32 * kShiftPixels, "n / k as stated above");

// Merges a tile of n values (shift: an approximate mean; d: sum of deviations from it; d2: of their squares) into the
// `count` values whose mean and sum of squared deviations are known.
inline void merge(double shift, double d, double d2, double n, double count, double* mean, double* m2) {
  const double inverse = 1 / n, weight = n / (count + n);
  const double tile_mean = shift + d * inverse, tile_m2 = d2 - d * d * inverse;
  const double delta = tile_mean - *mean;
  *mean += delta * weight;
  *m2 += (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * (count * weight);
}

// Sums of one channel that wait for more rows.
template <typename A> struct Sums {
  Sums() {}  // an array of them is filled as far as it is needed
  explicit Sums(A shift) : deviations{}, squares{}, shift(shift) {}

  Vec<A> deviations, squares;
  A shift;
};

template <typename T, typename A> inline A mean_of(const T* x, int64_t count) {
  Vec<A> sum = {};
  for (int64_t j = 0; j < count; j += kLanes<A>) sum += load_upto<A>(x + j, count - j);
  return static_cast<A>(sum_lanes(sum) / static_cast<double>(count));
}

template <typename T, typename A> inline void add_row(const T* x, int64_t count, Sums<A>* sums) {
  const A shift = sums->shift;
  const int64_t ahead = fetch_ahead<T>();
  Vec<A> d[2] = {sums->deviations, {}}, d2[2] = {sums->squares, {}};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
    for (int i = 0; i < 2; ++i) {
      __builtin_prefetch(x + j + i * kLanes<A> + ahead, 0, 3);
      const Vec<A> deviation = load<A>(x + j + i * kLanes<A>) - shift;
      d[i] += deviation;
      d2[i] += deviation * deviation;
    }
  }
  for (; j < count; j += kLanes<A>) {
    const Vec<A> rest = keep(load_upto<A>(x + j, count - j) - shift, count - j);
    d[0] += rest;
    d2[0] += rest * rest;
  }
  sums->deviations = d[0] + d[1];
  sums->squares = d2[0] + d2[1];
}

// A slab of whole planes: each sample's channels are one run of memory, and each channel is one tile.
template <typename T, typename A>
inline void plane_tiles(const T* x, const MapShape& s, const ReduceItem& item, double* mean, double* m2) {
  Sums<A> sums[kPlanarChannels];
  for (int64_t c = 0; c < item.channels; ++c) {
    sums[c] = Sums<A>(mean_of<T, A>(x + c * s.P, s.P < kPlaneShift ? s.P : kPlaneShift));
  }
  for (int64_t r = 0; r < item.count; ++r) {
    for (int64_t c = 0; c < item.channels; ++c) add_row<T, A>(x + (r * s.C + c) * s.P, s.P, &sums[c]);
  }
  const double n = static_cast<double>(item.count * s.P);
  for (int64_t c = 0; c < item.channels; ++c) {
    merge(static_cast<double>(sums[c].shift), sum_lanes(sums[c].deviations), sum_lanes(sums[c].squares), n, 0, mean + c,
          m2 + c);
  }
}

template <typename T, typename A> void planar(const ChannelMoments& args, const ReduceItem& item) {
  const MapShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x) + (item.begin * s.C + item.channel) * s.P;
  double* mean = args.partial + item.slab * 2 * s.C + item.channel;
  double* m2 = mean + s.C;
  for (int64_t c = 0; c < item.channels; ++c) mean[c] = m2[c] = 0;
  if (s.P <= kPlaneChunk) return plane_tiles<T, A>(x, s, item, mean, m2);
  over_plane_chunks(s, [&](int64_t j, int64_t count) {  // large planes: the item is one of one sample
    const T* chunk = x + j;
    Sums<A> sums(mean_of<T, A>(chunk, count < kPlaneShift ? count : kPlaneShift));
    add_row<T, A>(chunk, count, &sums);
    merge(static_cast<double>(sums.shift), sum_lanes(sums.deviations), sum_lanes(sums.squares),
          static_cast<double>(count), static_cast<double>(j), mean, m2);
  });
}

// Channels-last: the mean of the first pixels.
template <typename T, typename A>
inline void pixel_shift(A* shift, const T* x, int64_t stride, int64_t pixels, int64_t channels) {
  const A inverse = A(1) / static_cast<A>(pixels);
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t r = 0; r < pixels; ++r) sum += load_upto<A>(x + r * stride + c, channels - c);
    store_upto<A>(shift + c, sum * inverse, channels - c);
  }
}

// kPixels pixels at a time over all channels, so that memory is read in long runs.
template <int kPixels, typename T, typename A>
inline void add_pixels(A* d, A* d2, const A* shift, const T* x, int64_t stride, int64_t channels) {
  const auto add_vector = [&](int64_t c, int64_t left) {
    const Vec<A> middle = load_upto<A>(shift + c, left);
    Vec<A> sum = load_upto<A>(d + c, left), squares = load_upto<A>(d2 + c, left);
    for (int i = 0; i < kPixels; ++i) {
      __builtin_prefetch(x + (kPixels + i) * stride + c, 0, 3);
      const Vec<A> deviation = load_upto<A>(x + i * stride + c, left) - middle;
      sum += deviation;
      squares += deviation * deviation;
    }
    store_upto<A>(d + c, sum, left);
    store_upto<A>(d2 + c, squares, left);
  };
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) add_vector(c, static_cast<int64_t>(kLanes<A>));
  if (c < channels) add_vector(c, channels - c);
}

template <typename T, typename A>
inline void pixel_tile(const T* x, int64_t stride, int64_t pixels, int64_t channels, double seen, double* mean,
                       double* m2) {
  A shift[kPixelChannels], d[kPixelChannels], d2[kPixelChannels];
  for (int64_t c = 0; c < channels; ++c) d[c] = d2[c] = 0;
  pixel_shift<T, A>(shift, x, stride, pixels < kShiftPixels ? pixels : kShiftPixels, channels);
  int64_t r = 0;
  for (; r + 4 <= pixels; r += 4) add_pixels<4>(d, d2, shift, x + r * stride, stride, channels);
  for (; r < pixels; ++r) add_pixels<1>(d, d2, shift, x + r * stride, stride, channels);
  for (int64_t c = 0; c < channels; ++c) {
    merge(static_cast<double>(shift[c]), static_cast<double>(d[c]), static_cast<double>(d2[c]),
          static_cast<double>(pixels), seen, mean + c, m2 + c);
  }
}

template <typename T, typename A> void channels_last(const ChannelMoments& args, const ReduceItem& item) {
  const MapShape& s = args.shape;
  double* mean = args.partial + item.slab * 2 * s.C + item.channel;
  double* m2 = mean + s.C;
  for (int64_t c = 0; c < item.channels; ++c) mean[c] = m2[c] = 0;
  for (int64_t p = 0; p < item.count; p += kTilePixels) {
    const int64_t pixels = item.count - p < kTilePixels ? item.count - p : kTilePixels;
    const T* x = static_cast<const T*>(args.x) + (item.begin + p) * s.C + item.channel;
    pixel_tile<T, A>(x, s.C, pixels, item.channels, static_cast<double>(p), mean, m2);
  }
}

template <typename T> void measure(const ChannelMoments& args, const ReduceItem& item) {
  using A = typename Accumulate<T>::type;
  args.shape.channels_last ? channels_last<T, A>(args, item) : planar<T, A>(args, item);
}

}  // namespace

const MapLoops<ChannelMoments> channel_moments_loops =
    reduction_loops<ChannelMoments, measure<float>, measure<double>, measure<bf16>, measure<f16>>;

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
