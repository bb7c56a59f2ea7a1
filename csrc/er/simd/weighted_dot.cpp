// weighted_dot: g = dy where y > 0, da_l = sum g * x_l, db = sum g. A few maps at once stream past g, which is made in
// registers; where there are more, a tile of it stays in cache until all have. Products are summed in the accumulation
// type within a tile and in double across tiles. Compiled once per instruction set.
#include "er/simd/relu_mask.h"
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kTileElements = 32768;  // most elements of g in a tile: 128 KiB of float
constexpr int64_t kTilePixels = 64;       // channels-last: most pixels of a tile
constexpr int64_t kPairChannels = 1024;   // channels-last: with more channels, pixels are taken in pairs
constexpr int64_t kMapsAtOnce = 4;        // more streams at once than that slow the prefetcher down
static_assert(kTileElements >= kPlanarElements && kTileElements >= kPixelChannels);

// g = dy, or dy where y > 0 and zero elsewhere; written to `out` (as T) and to `tile` (as A), which is read again.
template <typename T, typename A>
inline void mask(const T* dy, const T* y, T* out, A* tile, int64_t count, bool stream_wanted) {
  const bool non_temporal = stream_wanted && stream_aligned(out);
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    const Vec<A> g = keep_lanes(load_upto<A>(dy + j, count - j), lanes_alive(load_upto<A>(y + j, count - j)));
    if (non_temporal && count - j >= kLanes<A>) {
      stream(out + j, g);
    } else {
      store_upto<A>(out + j, g, count - j);
    }
    store_upto<A>(tile + j, g, count - j);
  }
}

// Planar: a row of some maps, a plane or a chunk of one.
template <typename T, typename A>
struct PlaneRow {
  const T* dy;  // null: g is in the tile already
  const T* y;   // null: g = dy
  A* tile;      // where g is, or, beside dy, where it is to be left; null: it is not needed
  const T* x[kMapsAtOnce];
};

// One vector, `left` elements of it. The first group of maps sums g up too.
template <int kMaps, bool kFirst, bool kTile, typename T, typename A>
inline void plane_vector(const PlaneRow<T, A>& row, int64_t j, int64_t left, Vec<A>* sums) {
  Vec<A> g;
  if constexpr (kTile) {
    g = load_upto<A>(row.tile + j, left);
  } else {
    g = load_upto<A>(row.dy + j, left);
    if (row.y != nullptr) g = keep_lanes(g, lanes_alive(load_upto<A>(row.y + j, left)));
    if (row.tile != nullptr) store_upto<A>(row.tile + j, g, left);
  }
  for (int l = 0; l < kMaps; ++l) sums[l] += g * load_upto<A>(row.x[l] + j, left);
  if constexpr (kFirst) sums[kMaps] += g;
}

template <int kMaps, bool kFirst, bool kTile, typename T, typename A>
void plane_row(const PlaneRow<T, A>& row, int64_t count, Vec<A>* sums) {
  constexpr int kSums = kMaps + kFirst;
  Vec<A> own[kSums];
  for (int l = 0; l < kSums; ++l) own[l] = sums[l];
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) {
    plane_vector<kMaps, kFirst, kTile>(row, j, static_cast<int64_t>(kLanes<A>), own);
  }
  if (j < count) plane_vector<kMaps, kFirst, kTile>(row, j, count - j, own);
  for (int l = 0; l < kSums; ++l) sums[l] = own[l];
}

template <bool kFirst, bool kTile, typename T, typename A>
inline void plane_row(int64_t maps, const PlaneRow<T, A>& row, int64_t count, Vec<A>* sums) {
  with_number<1, kMapsAtOnce>(maps, [&](auto n) { plane_row<decltype(n)::value, kFirst, kTile>(row, count, sums); });
}

// Adds the sums of `maps` maps, from `first` on, over planes, or chunks of planes from element j on: `count` elements
// of each channel of each sample. In the tile they lie one after the other.
template <typename T, typename A>
void planes_dot(const WeightedDot& args, const ReduceItem& item, int64_t j, int64_t count, int64_t first, int64_t maps,
                A* tile, double* partial) {
  const MapShape& s = args.shape;
  const bool tiled = args.num_maps > kMapsAtOnce || args.g != nullptr;
  Vec<A> sums[kPlanarChannels][kMapsAtOnce + 1] = {};
  for (int64_t r = 0; r < item.count; ++r) {
    for (int64_t c = 0; c < item.channels; ++c) {
      const int64_t offset = ((item.begin + r) * s.C + item.channel + c) * s.P + j;
      A* const own_tile = tiled ? tile + (r * item.channels + c) * count : nullptr;
      PlaneRow<T, A> row = {at<T>(args.dy, offset), at<T>(args.y, offset), own_tile, {}};
      for (int64_t l = 0; l < maps; ++l) row.x[l] = at<T>(args.maps[first + l], offset);
      if (first > 0) {
        plane_row<false, true>(maps, row, count, sums[c]);
      } else if (args.g != nullptr) {
        plane_row<true, true>(maps, row, count, sums[c]);
      } else {
        plane_row<true, false>(maps, row, count, sums[c]);
      }
    }
  }
  for (int64_t l = 0; l < maps + (first == 0); ++l) {
    double* out = partial + (l < maps ? first + l : args.num_maps) * s.C;
    for (int64_t c = 0; c < item.channels; ++c) out[c] += sum_lanes(sums[c][l]);
  }
}

template <typename T, typename A>
void planar(const WeightedDot& args, const ReduceItem& item) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  A tile[kTileElements];
  double* partial = args.partial + item.slab * rows * s.C + item.channel;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < item.channels; ++c) partial[row * s.C + c] = 0;
  }
  over_plane_chunks(s, [&](int64_t j, int64_t count) {
    const int64_t run = item.channels * count;  // a sample's part, one after the other in memory
    for (int64_t r = 0; args.g != nullptr && r < item.count; ++r) {
      const int64_t o = ((item.begin + r) * s.C + item.channel) * s.P + j;
      mask<T, A>(at<T>(args.dy, o), at<T>(args.y, o), at<T>(args.g, o), tile + r * run, run, args.stream);
    }
    for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
      const int64_t left = args.num_maps - first, maps = left < kMapsAtOnce ? left : kMapsAtOnce;
      planes_dot<T, A>(args, item, j, count, first, maps, tile, partial);
    }
  });
}

// Channels-last: some pixels of some maps, and where their sums wait.
template <typename T, typename A>
struct Pixels {
  const T* dy;
  const T* y;  // null: g = dy
  T* g;
  A* tile;                  // g again, or null; where kFirst is false it is read instead of dy and y
  const T* x[kMapsAtOnce];  // all of them start at the same element
  A (*sums)[kPixelChannels];
  int64_t stride;    // from pixel to pixel of a map
  int64_t channels;  // and of the tile
  bool stream_wanted;
};

// One vector of channels, `left` of them, of kRows pixels. The first group of maps makes g and sums it up too.
template <int kRows, int kMaps, bool kFirst, typename T, typename A>
inline void pixel_vector(const Pixels<T, A>& p, int64_t r, int64_t c, int64_t left) {
  Vec<A> g[kRows];
  for (int i = 0; i < kRows; ++i) {
    const int64_t at = (r + i) * p.stride + c, in_tile = (r + i) * p.channels + c;
    if constexpr (kFirst) {
      g[i] = load_upto<A>(p.dy + at, left);
      if (p.y != nullptr) {
        g[i] = keep_lanes(g[i], lanes_alive(load_upto<A>(p.y + at, left)));
        if (p.stream_wanted && left >= kLanes<A>) {
          stream(p.g + at, g[i]);
        } else {
          store_upto<A>(p.g + at, g[i], left);
        }
      }
      if (p.tile != nullptr) store_upto<A>(p.tile + in_tile, g[i], left);
    } else {
      g[i] = load_upto<A>(p.tile + in_tile, left);
    }
  }
  for (int l = 0; l < kMaps; ++l) {
    Vec<A> sum = load_upto<A>(p.sums[l] + c, left);
    for (int i = 0; i < kRows; ++i) sum += g[i] * load_upto<A>(p.x[l] + (r + i) * p.stride + c, left);
    store_upto<A>(p.sums[l] + c, sum, left);
  }
  if constexpr (kFirst) {
    Vec<A> sum = load_upto<A>(p.sums[kMaps] + c, left);
    for (int i = 0; i < kRows; ++i) sum += g[i];
    store_upto<A>(p.sums[kMaps] + c, sum, left);
  }
}

template <int kRows, int kMaps, bool kFirst, typename T, typename A>
inline void pixel_rows(const Pixels<T, A>& p, int64_t r) {
  int64_t c = 0;
  for (; c + kLanes<A> <= p.channels; c += kLanes<A>) {
    pixel_vector<kRows, kMaps, kFirst>(p, r, c, static_cast<int64_t>(kLanes<A>));
  }
  if (c < p.channels) pixel_vector<kRows, kMaps, kFirst>(p, r, c, p.channels - c);
}

// One pixel at a time over all channels, so that memory is read in long runs; two where the sums of so many channels
// would leave the L1 cache between them.
template <int kMaps, bool kFirst, typename T, typename A>
void pixels_dot(const Pixels<T, A>& p, int64_t pixels) {
  int64_t r = 0;
  for (; p.channels > kPairChannels && r + 2 <= pixels; r += 2) pixel_rows<2, kMaps, kFirst>(p, r);
  for (; r < pixels; ++r) pixel_rows<1, kMaps, kFirst>(p, r);
}

template <bool kFirst, typename T, typename A>
inline void pixels_dot(int64_t maps, const Pixels<T, A>& p, int64_t pixels) {
  with_number<1, kMapsAtOnce>(maps, [&](auto n) { pixels_dot<decltype(n)::value, kFirst>(p, pixels); });
}

template <typename T, typename A>
void channels_last(const WeightedDot& args, const ReduceItem& item) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  const bool tiled = args.num_maps > kMapsAtOnce;
  A tile[kTileElements];
  A sums[kMapsAtOnce + 1][kPixelChannels];
  double* partial = args.partial + item.slab * rows * s.C + item.channel;
  const int64_t width = s.C < kPixelChannels ? s.C : kPixelChannels;  // a channel tile is cut as whole pixels are
  const int64_t in_cache = tiled ? kTileElements / width : kTilePixels;
  const int64_t tile_pixels = in_cache < kTilePixels ? in_cache : kTilePixels;
  for (int64_t p = 0; p < item.count; p += tile_pixels) {
    const int64_t pixels = item.count - p < tile_pixels ? item.count - p : tile_pixels;
    const int64_t offset = (item.begin + p) * s.C + item.channel;
    T* const g = at<T>(args.g, offset);
    Pixels<T, A> part = {at<T>(args.dy, offset),
                         at<T>(args.y, offset),
                         g,
                         tiled ? tile : nullptr,
                         {},
                         sums,
                         s.C,
                         item.channels,
                         args.stream && stream_aligned(g) && s.C % kLanes<A> == 0};
    for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
      const int64_t left = args.num_maps - first, maps = left < kMapsAtOnce ? left : kMapsAtOnce;
      for (int64_t l = 0; l < maps; ++l) part.x[l] = at<T>(args.maps[first + l], offset);
      const int64_t sum_rows = first == 0 ? maps + 1 : maps;
      for (int64_t l = 0; l < sum_rows; ++l) {
        for (int64_t c = 0; c < item.channels; ++c) sums[l][c] = 0;
      }
      first == 0 ? pixels_dot<true>(maps, part, pixels) : pixels_dot<false>(maps, part, pixels);
      for (int64_t l = 0; l < sum_rows; ++l) {
        double* out = partial + (l < maps ? first + l : args.num_maps) * s.C;
        for (int64_t c = 0; c < item.channels; ++c) {
          out[c] = (p == 0 ? 0 : out[c]) + static_cast<double>(sums[l][c]);
        }
      }
    }
  }
}

template <typename T>
void dot(const WeightedDot& args, const ReduceItem& item) {
  using A = typename Accumulate<T>::type;
  args.shape.channels_last ? channels_last<T, A>(args, item) : planar<T, A>(args, item);
  if (args.stream) stream_fence();
}

}  // namespace

const MapLoops<WeightedDot> weighted_dot_loops = {
    {over_items<WeightedDot, dot<float>>, over_items<WeightedDot, dot<double>>, over_items<WeightedDot, dot<bf16>>,
     over_items<WeightedDot, dot<f16>>},
    {over_channel_tile<WeightedDot, dot<float>>, over_channel_tile<WeightedDot, dot<double>>,
     over_channel_tile<WeightedDot, dot<bf16>>, over_channel_tile<WeightedDot, dot<f16>>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
