// sum_dots: the gradient of a channels-last map, and the inner products of the map before with the same g, in one pass.
// A few g at once; where there are more, the accumulators of a tile wait in the cache between them. Products are summed
// in the accumulation type within a tile and in double across tiles. Compiled once per instruction set.
#include "er/simd/relu_mask.h"
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kMostPixels = 64;       // of a tile
constexpr int64_t kTileElements = 32768;  // accumulators of a tile, where they wait: 128 KiB of float
constexpr int64_t kAtOnce = 4;            // more streams at once than that slow the prefetcher down
static_assert(kPixelChannels <= kAllLanes && kPixelChannels <= kTileElements);

// Some g and what goes with them, from one pixel on; all per-channel vectors from the same channel on.
template <typename T, typename A> struct Pixels {
  const T* g[kAtOnce];
  const uint8_t* bits[kAtOnce];
  const A* a[kAtOnce];
  const T* z;  // null, but of the first group
  const A* a_z;
  const A* b;
  const T* before;
  T* y;    // of the last group
  A* acc;  // between groups
  A (*sums)[kPixelChannels];
  int64_t channels;
  bool non_temporal;
  int64_t fetch_ahead;
};

template <int kG, bool kFirst, bool kLast, typename T, typename A>
inline void pixel_vector(const Pixels<T, A>& p, int64_t c, int64_t left) {
  Vec<A> acc = {};
  if constexpr (kFirst) {
    if (p.b != nullptr) acc = load_upto<A>(p.b + c, left);
    if (p.z != nullptr) acc += load_upto<A>(p.a_z + c, left) * load_upto<A>(p.z + c, left);
  } else {
    acc = load_upto<A>(p.acc + c, left);
  }
  __builtin_prefetch(p.before + c + p.fetch_ahead, 0, 3);
  const Vec<A> before = load_upto<A>(p.before + c, left);
  for (int l = 0; l < kG; ++l) {
    __builtin_prefetch(p.g[l] + c + p.fetch_ahead, 0, 3);
    const Vec<A> g = keep_lanes(load_upto<A>(p.g[l] + c, left), load_bits<A>(p.bits[l], c));
    acc += load_upto<A>(p.a[l] + c, left) * g;
    store_upto<A>(p.sums[l] + c, load_upto<A>(p.sums[l] + c, left) + g * before, left);
  }
  if constexpr (!kLast) {
    store_upto<A>(p.acc + c, acc, left);
  } else if (p.non_temporal && left >= kLanes<A>) {
    stream(p.y + c, acc);
  } else {
    store_upto<A>(p.y + c, acc, left);
  }
}

template <int kG, bool kFirst, bool kLast, typename T, typename A> void pixel(const Pixels<T, A>& p) {
  int64_t c = 0;
  for (; c + kLanes<A> <= p.channels; c += kLanes<A>) {
    pixel_vector<kG, kFirst, kLast>(p, c, static_cast<int64_t>(kLanes<A>));
  }
  if (c < p.channels) pixel_vector<kG, kFirst, kLast>(p, c, p.channels - c);
}

template <bool kFirst, typename T, typename A> inline void pixel_group(int64_t left, const Pixels<T, A>& p) {
  if (left > kAtOnce) return pixel<kAtOnce, kFirst, false>(p);
  with_number<1, kAtOnce>(left, [&](auto n) { pixel<decltype(n)::value, kFirst, true>(p); });
}

// Pixels [begin, begin + count) of an item, and all g.
template <typename T, typename A>
void tile(const SumDots& args, const ReduceItem& item, int64_t begin, int64_t count, double* partial, A* acc) {
  const MapShape& s = args.shape;
  const int64_t row_bytes = bit_row_bytes(s);
  const int64_t group = item.slab / slabs_per_group(s), width = s.groups() * s.C;
  const A* const a = static_cast<const A*>(args.a) + group * s.C + item.channel;
  A sums[kAtOnce][kPixelChannels];
  for (int64_t first = 0; first < args.num_g; first += kAtOnce) {
    const int64_t left = args.num_g - first, num_g = left < kAtOnce ? left : kAtOnce;
    for (int64_t l = 0; l < num_g; ++l) {
      for (int64_t c = 0; c < item.channels; ++c) sums[l][c] = 0;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at_pixel = item.begin + begin + i, offset = at_pixel * s.C + item.channel;
      T* const y = at<T>(args.y, offset);
      Pixels<T, A> p = {{},
                        {},
                        {},
                        at<T>(args.z, offset),
                        a + args.num_g * width,
                        at<A>(args.b, group * s.C + item.channel),
                        at<T>(args.before, offset),
                        y,
                        acc + i * item.channels,
                        sums,
                        item.channels,
                        args.stream && stream_aligned(y),
                        fetch_ahead<T>()};
      for (int64_t l = 0; l < num_g; ++l) {
        const uint8_t* const bits = args.bits[first + l];
        p.g[l] = at<T>(args.g[first + l], offset);
        p.bits[l] = bits == nullptr ? all_lanes.bits : bits + at_pixel * row_bytes + item.channel / 8;
        p.a[l] = a + (first + l) * width;
      }
      first == 0 ? pixel_group<true>(left, p) : pixel_group<false>(left, p);
    }
    for (int64_t l = 0; l < num_g; ++l) {
      double* out = partial + (first + l) * s.C;
      for (int64_t c = 0; c < item.channels; ++c) {
        out[c] = (begin == 0 ? 0 : out[c]) + static_cast<double>(sums[l][c]);
      }
    }
  }
}

template <typename T> void sum_dots(const SumDots& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  A acc[kTileElements];
  for (int64_t i = begin; i < end; ++i) {
    const ReduceItem item = reduce_item(args.shape, i);
    const int64_t fits = kTileElements / item.channels, pixels = fits < kMostPixels ? fits : kMostPixels;
    double* const partial = args.partial + item.slab * args.num_g * args.shape.C + item.channel;
    for (int64_t p = 0; p < item.count; p += pixels) {
      tile<T, A>(args, item, p, item.count - p < pixels ? item.count - p : pixels, partial, acc);
    }
  }
  if (args.stream) stream_fence();
}

}  // namespace

const MapLoops<SumDots> sum_dots_loops = {
    {sum_dots<float>, sum_dots<double>, sum_dots<bf16>, sum_dots<f16>},
    {},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
