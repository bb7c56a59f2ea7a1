// weighted_dot: g = dy where y > 0, da_l = sum g * x_l, db = sum g. A tile of g stays in cache while every map streams
// past it once. Products are summed in the accumulation type within a tile and in double across tiles.
// Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kTileElements = 32768;  // elements of g in a tile; 64 KiB of float
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

// Channels-last: adds to out[c] the sum over the pixels of a tile of g * x, or of g alone; four pixels at a time over
// all channels, so that memory is read in long runs. Meanwhile the tile at `next` is fetched.
template <bool kProduct, typename T, typename A>
inline void pixels_dot(const A* g, const T* x, const T* next, int64_t stride, int64_t pixels, int64_t channels,
                       double* out) {
  A total[kPixelChannels];
  for (int64_t c = 0; c < channels; ++c) total[c] = 0;
  for (int64_t r = 0; r < pixels; r += 4) {
    const int64_t rows = pixels - r < 4 ? pixels - r : 4;
    const A* gr = g + r * channels;
    const T *xr = x + r * stride, *nr = next + r * stride;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t left = channels - c;
      Vec<A> sum = load_upto<A>(total + c, left);
      if (rows == 4 && left >= kLanes<A>) {
        for (int i = 0; i < 4; ++i) {
          const Vec<A> gv = load<A>(gr + i * channels + c);
          sum += kProduct ? gv * load<A>(xr + i * stride + c) : gv;
          fetch<kLanes<A>>(nr + i * stride + c);
        }
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          const Vec<A> gv = load_upto<A>(gr + i * channels + c, left);
          sum += kProduct ? gv * load_upto<A>(xr + i * stride + c, left) : gv;
        }
      }
      store_upto<A>(total + c, sum, left);
    }
  }
  for (int64_t c = 0; c < channels; ++c) out[c] += static_cast<double>(total[c]);
}

template <typename T, typename A>
void channels_last(const WeightedDot& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  A tile[kTileElements];
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(s, i);
    double* partial = args.partial + item.slab * rows * s.C + item.channel;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < item.channels; ++c) partial[row * s.C + c] = 0;
    }
    const int64_t tile_pixels = kTileElements / item.channels;
    for (int64_t p = 0; p < item.count; p += tile_pixels) {
      const int64_t pixels = item.count - p < tile_pixels ? item.count - p : tile_pixels;
      const int64_t offset = (item.begin + p) * s.C + item.channel;
      for (int64_t r = 0; r < pixels; ++r) {
        const int64_t o = offset + r * s.C;
        mask<T, A>(at<T>(args.dy, o), at<T>(args.y, o), at<T>(args.g, o), tile + r * item.channels,
                   at<T>(args.maps[0], o), item.channels, args.stream);
      }
      const int64_t after = offset + pixels * s.C;  // most often the next tile
      for (int64_t l = 0; l < args.num_maps; ++l) {
        const T* next = l + 1 < args.num_maps ? at<T>(args.maps[l + 1], offset) : at<T>(args.dy, after);
        pixels_dot<true, T, A>(tile, at<T>(args.maps[l], offset), next, s.C, pixels, item.channels, partial + l * s.C);
      }
      const T* next = at<T>(args.y == nullptr ? args.dy : args.y, after);
      pixels_dot<false, T, A>(tile, next, next, s.C, pixels, item.channels, partial + args.num_maps * s.C);
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
