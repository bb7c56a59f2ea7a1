// weighted_dot: g = dy where y > 0, da_l = sum g * x_l, db = sum g. A tile of g stays in cache while every map streams
// past it once. Products are summed in the accumulation type within a tile and in double across tiles.
// Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowChunk = 1024;      // planar: elements of g at a time
constexpr int64_t kTileElements = 8192;  // channels-last: elements of g at a time
constexpr int64_t kChannelBlock = 512;   // channels-last: channels of a tile

// g = dy, or dy where y > 0 and zero elsewhere; written to `out` (as T) and to `tile` (as A), which may be read again.
template <typename T, typename A>
inline void mask(const T* dy, const T* y, T* out, A* tile, int64_t count) {
  const Vec<A> zero = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) {
    Vec<A> g = load<A>(dy + j);
    if (y != nullptr) {
      g = load<A>(y + j) <= zero ? zero : g;  // a NaN in y lets g through, as torch.relu does
      store(out + j, g);
    }
    store(tile + j, g);
  }
  if (j < count) {
    Vec<A> g = load_part<A>(dy + j, count - j);
    if (y != nullptr) {
      g = load_part<A>(y + j, count - j) <= zero ? zero : g;
      store_part<A>(out + j, g, count - j);
    }
    store_part<A>(tile + j, g, count - j);
  }
}

template <typename A>
inline double sum(const A* g, int64_t count) {
  Vec<A> even = {}, odd = {};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
    even += load<A>(g + j);
    odd += load<A>(g + j + kLanes<A>);
  }
  for (; j < count; j += kLanes<A>) {
    even += count - j >= kLanes<A> ? load<A>(g + j) : load_part<A>(g + j, count - j);
  }
  return sum_lanes<A>(even + odd);
}

template <typename T, typename A>
inline double dot(const A* g, const T* x, int64_t count) {
  Vec<A> even = {}, odd = {};
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
    even += load<A>(g + j) * load<A>(x + j);
    odd += load<A>(g + j + kLanes<A>) * load<A>(x + j + kLanes<A>);
  }
  for (; j < count; j += kLanes<A>) {
    even += count - j >= kLanes<A> ? load<A>(g + j) * load<A>(x + j)
                                   : load_part<A>(g + j, count - j) * load_part<A>(x + j, count - j);
  }
  return sum_lanes<A>(even + odd);
}

template <typename T>
inline T* at(const void* p, int64_t offset) {
  return p == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(p)) + offset;
}

template <typename T, typename A>
void planar(const WeightedDot& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  A tile[kRowChunk];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / s.C, c = item % s.C;
    double* partial = args.partial + n * rows * s.C + c;
    for (int64_t row = 0; row < rows; ++row) partial[row * s.C] = 0;
    for (int64_t j = 0; j < s.P; j += kRowChunk) {
      const int64_t count = s.P - j < kRowChunk ? s.P - j : kRowChunk, offset = item * s.P + j;
      mask<T, A>(at<T>(args.dy, offset), at<T>(args.y, offset), at<T>(args.g, offset), tile, count);
      for (int64_t l = 0; l < args.num_maps; ++l) {
        partial[l * s.C] += dot<T, A>(tile, at<T>(args.maps[l], offset), count);
      }
      partial[args.num_maps * s.C] += sum<A>(tile, count);
    }
  }
}

// acc[c] += sum over rows of g[row][c] * x[row][c], four rows at a time; without x, of g alone.
template <typename T, typename A>
inline void add_rows(A* acc, const A* g, int64_t g_stride, const T* x, int64_t x_stride, int64_t rows,
                     int64_t channels) {
  int64_t r = 0;
  for (; r < rows; r += 4) {
    const int64_t left = rows - r < 4 ? rows - r : 4;
    const A* gr = g + r * g_stride;
    const T* xr = x == nullptr ? nullptr : x + r * x_stride;
    int64_t c = 0;
    if (left == 4) {
      for (; c + kLanes<A> <= channels; c += kLanes<A>) {
        Vec<A> total = load<A>(acc + c);
        for (int i = 0; i < 4; ++i) {
          const Vec<A> gv = load<A>(gr + i * g_stride + c);
          total += xr == nullptr ? gv : gv * load<A>(xr + i * x_stride + c);
        }
        store(acc + c, total);
      }
    }
    for (; c < channels; c += kLanes<A>) {
      const int64_t count = channels - c < kLanes<A> ? channels - c : kLanes<A>;
      Vec<A> total = load_part<A>(acc + c, count);
      for (int64_t i = 0; i < left; ++i) {
        const Vec<A> gv = load_part<A>(gr + i * g_stride + c, count);
        total += xr == nullptr ? gv : gv * load_part<A>(xr + i * x_stride + c, count);
      }
      store_part<A>(acc + c, total, count);
    }
  }
}

template <typename T, typename A>
void channels_last_tile(const WeightedDot& args, int64_t pixel, int64_t pixels, int64_t c, int64_t channels,
                        double* partial) {
  const MapShape& s = args.shape;
  A tile[kTileElements], acc[kChannelBlock];
  const int64_t offset = pixel * s.C + c;
  for (int64_t r = 0; r < pixels; ++r) {
    const int64_t o = offset + r * s.C;
    mask<T, A>(at<T>(args.dy, o), at<T>(args.y, o), at<T>(args.g, o), tile + r * channels, channels);
  }
  for (int64_t l = 0; l <= args.num_maps; ++l) {
    for (int64_t i = 0; i < channels; ++i) acc[i] = 0;
    const T* x = l < args.num_maps ? at<T>(args.maps[l], offset) : nullptr;
    add_rows<T, A>(acc, tile, channels, x, s.C, pixels, channels);
    double* out = partial + l * s.C + c;
    for (int64_t i = 0; i < channels; ++i) out[i] += static_cast<double>(acc[i]);
  }
}

template <typename T, typename A>
void channels_last(const WeightedDot& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t rows = args.num_maps + 1;
  const int64_t block = s.C < kChannelBlock ? s.C : kChannelBlock;
  for (int64_t item = begin; item < end; ++item) {
    const PixelRange range = reduce_item(s, item);
    double* partial = args.partial + item * rows * s.C;
    for (int64_t i = 0; i < rows * s.C; ++i) partial[i] = 0;
    const int64_t tile_pixels = kTileElements / block;
    for (int64_t p = 0; p < range.count; p += tile_pixels) {
      const int64_t pixels = range.count - p < tile_pixels ? range.count - p : tile_pixels;
      for (int64_t c = 0; c < s.C; c += block) {
        channels_last_tile<T, A>(args, range.begin + p, pixels, c, s.C - c < block ? s.C - c : block, partial);
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
}

template void weighted_dot<float>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<double>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<bf16>(const WeightedDot&, int64_t, int64_t);
template void weighted_dot<f16>(const WeightedDot&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
