// weighted_dot: g = dy where y > 0, da_l = sum g * x_l, db = sum g. A tile of g stays in cache while every map streams
// past it once. Products are summed in the accumulation type within a tile and in double across tiles.
// Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowChunk = 2048;       // planar: elements of g in a tile, of one sample or of several small ones
constexpr int64_t kTileElements = 16384;  // channels-last: elements of g in a tile; 64 KiB of float

template <typename T>
inline T* at(const void* p, int64_t offset) {
  return p == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(p)) + offset;
}

// g = dy, or dy where y > 0 and zero elsewhere; written to `out` (as T) and to `tile` (as A), which is read again.
template <typename T, typename A>
inline void mask(const T* dy, const T* y, T* out, A* tile, int64_t count) {
  const Vec<A> zero = {};
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    Vec<A> g = load_upto<A>(dy + j, count - j);
    if (y != nullptr) {
      g = load_upto<A>(y + j, count - j) <= zero ? zero : g;  // a NaN in y lets g through, as torch.relu does
      store_upto<A>(out + j, g, count - j);
    }
    store_upto<A>(tile + j, g, count - j);
  }
}

// Sum of g * x, or of g alone, over rows that lie `stride` apart in x and `count` apart in g.
template <bool kProduct, typename T, typename A>
inline double dot(const A* g, const T* x, int64_t stride, int64_t rows, int64_t count) {
  Vec<A> even = {}, odd = {};
  for (int64_t r = 0; r < rows; ++r) {
    const A* gr = g + r * count;
    const T* xr = x + r * stride;
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
      const Vec<A> first = load<A>(gr + j), second = load<A>(gr + j + kLanes<A>);
      if constexpr (kProduct) {
        even += first * load<A>(xr + j);
        odd += second * load<A>(xr + j + kLanes<A>);
      } else {
        even += first;
        odd += second;
      }
    }
    for (; j < count; j += kLanes<A>) {
      const Vec<A> rest = load_upto<A>(gr + j, count - j);
      if constexpr (kProduct) {
        even += rest * load_upto<A>(xr + j, count - j);
      } else {
        even += rest;
      }
    }
  }
  return sum_lanes(even + odd);
}

template <typename T, typename A>
void planar(const WeightedDot& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1, stride = s.C * s.P;
  A tile[kRowChunk];
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(s, i);
    double* partial = args.partial + item.slab * rows * s.C + item.channel;
    for (int64_t row = 0; row < rows; ++row) partial[row * s.C] = 0;
    const int64_t start = item.begin * stride + item.channel * s.P;
    // A slab is several whole samples where they are small, else one sample in chunks.
    const int64_t chunk = s.P < kRowChunk ? s.P : kRowChunk;
    for (int64_t j = 0; j < s.P; j += chunk) {
      const int64_t count = s.P - j < chunk ? s.P - j : chunk, offset = start + j;
      for (int64_t r = 0; r < item.count; ++r) {
        const int64_t o = offset + r * stride;
        mask<T, A>(at<T>(args.dy, o), at<T>(args.y, o), at<T>(args.g, o), tile + r * count, count);
      }
      for (int64_t l = 0; l < args.num_maps; ++l) {
        partial[l * s.C] += dot<true, T, A>(tile, at<T>(args.maps[l], offset), stride, item.count, count);
      }
      partial[args.num_maps * s.C] += dot<false, A, A>(tile, tile, count, item.count, count);
    }
  }
}

// Channels-last: adds to out[c] the sum over the pixels of a tile of g * x, or of g alone; four pixels at a time over
// all channels, so that memory is read in long runs.
template <bool kProduct, typename T, typename A>
inline void channels_dot(const A* g, const T* x, const T* next, int64_t stride, int64_t pixels, int64_t channels,
                         double* out) {
  A total[kItemChannels];
  for (int64_t c = 0; c < channels; ++c) total[c] = 0;
  for (int64_t r = 0; r < pixels; r += 4) {
    const int64_t rows = pixels - r < 4 ? pixels - r : 4;
    const A* gr = g + r * channels;
    const T* xr = x + r * stride;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t left = channels - c;
      Vec<A> sum = load_upto<A>(total + c, left);
      if (rows == 4 && left >= kLanes<A>) {
        for (int i = 0; i < 4; ++i) {
          const Vec<A> gv = load<A>(gr + i * channels + c);
          sum += kProduct ? gv * load<A>(xr + i * stride + c) : gv;
          if (kProduct) __builtin_prefetch(next + (r + i) * stride + c, 0, 2);
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
        mask<T, A>(at<T>(args.dy, o), at<T>(args.y, o), at<T>(args.g, o), tile + r * item.channels, item.channels);
      }
      for (int64_t l = 0; l < args.num_maps; ++l) {
        // the tile of the next map is fetched while this one is summed; after the last map, the first of the next tile
        const T* next = l + 1 < args.num_maps ? at<T>(args.maps[l + 1], offset)
                                              : at<T>(args.dy, offset + (p + pixels < item.count ? pixels * s.C : 0));
        channels_dot<true, T, A>(tile, at<T>(args.maps[l], offset), next, s.C, pixels, item.channels,
                                 partial + l * s.C);
      }
      channels_dot<false, A, A>(tile, tile, tile, item.channels, pixels, item.channels, partial + args.num_maps * s.C);
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
}

template void weighted_dot<float>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<double>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<bf16>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<f16>(const WeightedDot&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
