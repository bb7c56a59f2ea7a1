// weighted_dot: g = dy where y > 0, da_l = sum g * x_l, db = sum g. A tile of g stays in cache while every map streams
// past it once. Products are summed in the accumulation type within a tile and in double across tiles.
// Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kTileElements = 32768;  // most elements of g in a tile: 128 KiB of float
constexpr int64_t kTilePixels = 64;       // channels-last: most pixels of a tile
constexpr int64_t kPairChannels = 1024;   // channels-last: with more channels, pixels are taken in pairs
constexpr int64_t kMapsAtOnce = 4;        // channels-last: more streams at once than that slow the prefetcher down
constexpr int64_t kPlaneChunk = 8192;     // planar: most elements of one plane in a tile
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line
static_assert(kTileElements >= kPlanarElements && kTileElements >= kPixelChannels);

template <typename T>
inline T* at(const void* p, int64_t offset) {
  return p == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(p)) + offset;
}

// g = dy, or dy where y > 0 and zero elsewhere; written to `out` (as T) and to `tile` (as A), which is read again.
template <typename T, typename A>
inline void mask(const T* dy, const T* y, T* out, A* tile, const T* next, int64_t count, bool stream_wanted) {
  const Vec<A> zero = {};
  const bool past_cache = stream_wanted && stream_aligned(out);
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    Vec<A> g = load_upto<A>(dy + j, count - j);
    if (y != nullptr) {
      g = load_upto<A>(y + j, count - j) <= zero ? zero : g;  // a NaN in y lets g through, as torch.relu does
      if (past_cache && count - j >= kLanes<A>) {
        stream(out + j, g);
      } else {
        store_upto<A>(out + j, g, count - j);
      }
    }
    store_upto<A>(tile + j, g, count - j);
    __builtin_prefetch(next + j, 0, 2);
  }
}

// Fetches `count` >= 1 elements at p: all lines but perhaps the last.
template <int64_t kCount, typename T>
inline void fetch(const T* p) {
  for (int64_t k = 0; k < kCount; k += kLine<T>) __builtin_prefetch(p + k, 0, 2);
}

// Adds a row's g * x, or g alone where kProduct is false, to a vector of sums. Meanwhile the row at `next` is fetched.
template <bool kProduct, typename T, typename A>
inline void row_dot(const A* g, const T* x, const T* next, int64_t count, Vec<A>* sums) {
  Vec<A> even = *sums, odd = {};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
    const Vec<A> first = load<A>(g + j), second = load<A>(g + j + kLanes<A>);
    if constexpr (kProduct) {
      even += first * load<A>(x + j);
      odd += second * load<A>(x + j + kLanes<A>);
    } else {
      even += first;
      odd += second;
    }
    fetch<2 * kLanes<A>>(next + j);
  }
  for (; j < count; j += kLanes<A>) {
    const Vec<A> rest = load_upto<A>(g + j, count - j);
    if constexpr (kProduct) {
      even += rest * load_upto<A>(x + j, count - j);
    } else {
      even += rest;
    }
    fetch<kLanes<A>>(next + j);
  }
  *sums = even + odd;
}

// Adds to out[c] the sums over planes, or chunks of planes: `count` elements of each channel of each sample. In g they
// lie one after the other; in x and next, channels lie P and samples C * P elements apart.
template <bool kProduct, typename T, typename A>
inline void planes_dot(const A* g, const T* x, const T* next, const MapShape& s, const ReduceItem& item, int64_t count,
                       double* out) {
  Vec<A> sums[kPlanarChannels] = {};
  for (int64_t r = 0; r < item.count; ++r) {
    for (int64_t c = 0; c < item.channels; ++c) {
      const int64_t offset = (r * s.C + c) * s.P;
      row_dot<kProduct, T, A>(g + (r * item.channels + c) * count, x + offset, next + offset, count, &sums[c]);
    }
  }
  for (int64_t c = 0; c < item.channels; ++c) out[c] += sum_lanes(sums[c]);
}

template <typename T, typename A>
void planar(const WeightedDot& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  A tile[kTileElements];
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(s, i);
    double* partial = args.partial + item.slab * rows * s.C + item.channel;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < item.channels; ++c) partial[row * s.C + c] = 0;
    }
    const int64_t start = (item.begin * s.C + item.channel) * s.P;
    // Whole planes, of several channels and samples where they are small; one plane in chunks where it is large.
    const int64_t chunk = s.P < kPlaneChunk ? s.P : kPlaneChunk;
    for (int64_t j = 0; j < s.P; j += chunk) {
      const int64_t count = s.P - j < chunk ? s.P - j : chunk, run = item.channels * count, offset = start + j;
      for (int64_t r = 0; r < item.count; ++r) {  // in chunks there is one channel: a sample's part is one run
        const int64_t o = offset + r * s.C * s.P;
        mask<T, A>(at<T>(args.dy, o), at<T>(args.y, o), at<T>(args.g, o), tile + r * run, at<T>(args.maps[0], o), run,
                   args.stream);
      }
      const int64_t after = offset + run;  // most often the next tile
      for (int64_t l = 0; l < args.num_maps; ++l) {
        const T* next = l + 1 < args.num_maps ? at<T>(args.maps[l + 1], offset) : at<T>(args.dy, after);
        planes_dot<true, T, A>(tile, at<T>(args.maps[l], offset), next, s, item, count, partial + l * s.C);
      }
      const T* next = at<T>(args.y == nullptr ? args.dy : args.y, after);
      planes_dot<false, T, A>(tile, next, next, s, item, count, partial + args.num_maps * s.C);
    }
  }
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
  const Vec<A> zero = {};
  Vec<A> g[kRows];
  for (int i = 0; i < kRows; ++i) {
    const int64_t at = (r + i) * p.stride + c, in_tile = (r + i) * p.channels + c;
    if constexpr (kFirst) {
      g[i] = load_upto<A>(p.dy + at, left);
      if (p.y != nullptr) {
        g[i] = load_upto<A>(p.y + at, left) <= zero ? zero : g[i];  // a NaN in y lets g through, as torch.relu does
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
  static_assert(kMapsAtOnce == 4, "one case for each possible number of maps");
  switch (maps) {
    case 1:
      return pixels_dot<1, kFirst>(p, pixels);
    case 2:
      return pixels_dot<2, kFirst>(p, pixels);
    case 3:
      return pixels_dot<3, kFirst>(p, pixels);
    default:
      return pixels_dot<4, kFirst>(p, pixels);
  }
}

template <typename T, typename A>
void channels_last(const WeightedDot& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  const bool tiled = args.num_maps > kMapsAtOnce;
  A tile[kTileElements];
  A sums[kMapsAtOnce + 1][kPixelChannels];
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(s, i);
    double* partial = args.partial + item.slab * rows * s.C + item.channel;
    const int64_t in_cache = tiled ? kTileElements / item.channels : kTilePixels;
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
}

}  // namespace

template <typename T>
void weighted_dot(const WeightedDot& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  if (args.shape.channels_last) {
    channels_last<T, A>(args, begin, end);
  } else {
    planar<T, A>(args, begin, end);
  }
  if (args.stream) stream_fence();
}

template void weighted_dot<float>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<double>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<bf16>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<f16>(const WeightedDot&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
