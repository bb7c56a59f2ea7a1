// map_dots: inner products of one map with several. Of x with all g_l that are known when its gradient is due, and for
// the block that x was made in the ReLU's bitmask and the sums of g * x and g; or of g with all maps that its block has
// read, and the sum of g. A few maps at once stream past the one, which is in the cache for the next few. Products are
// summed in the accumulation type within a tile and in double across tiles. Compiled once per instruction set.
#include "er/simd/relu_mask.h"
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kTilePixels = 64;  // channels-last: pixels of a tile
constexpr int64_t kSums = kLaterAtOnce + 2;
constexpr int64_t kSumStride = kPixelChannels + 80;  // rows of sums that begin in different sets of the cache

// What is done with dy besides.
enum class Own {
  none,
  map,      // g, and its products with x
  gradient  // g is what the products are with
};
constexpr int own_sums(Own own) { return own == Own::map ? 2 : own == Own::gradient ? 1 : 0; }
static_assert(kPlaneChunk <= kAllLanes && kPixelChannels <= kAllLanes);

// A row of x and some g: a plane or a chunk of one, or a pixel.
template <typename T> struct Row {
  const T* x;
  const T* dy;  // of the block's own g
  const T* y;   // null: g = dy
  T* g;         // where y is given, g goes there, or, if that is null, its bitmask
  bool stream;  // with non-temporal stores
  uint8_t* bits;
  const T* later[kLaterAtOnce];
  const uint8_t* later_bits[kLaterAtOnce];
  int64_t fetch_ahead;
};

template <typename T>
inline Row<T> row_at(const MapDots& args, int64_t offset, int64_t bit_offset, int64_t stride, int64_t first,
                     int64_t later) {
  // Of all maps but the first few, the inner products are with the g that these have left.
  const void* const gradient = args.g == nullptr ? args.dy : args.g;
  T* const g = at<T>(args.g, offset);
  Row<T> row = {at<T>(args.x == nullptr ? gradient : args.x, offset),
                at<T>(args.dy, offset),
                at<T>(args.y, offset),
                g,
                args.stream && stream_aligned(g) && stride % kLanes<typename Accumulate<T>::type> == 0,
                at<uint8_t>(args.bits, bit_offset),
                {},
                {},
                fetch_ahead<T>()};
  for (int64_t l = 0; l < later; ++l) {
    const uint8_t* const bits = args.later_bits == nullptr ? nullptr : args.later_bits[first + l];
    row.later[l] = at<T>(args.later[first + l], offset);
    row.later_bits[l] = bits == nullptr ? all_lanes.bits : bits + bit_offset;
  }
  return row;
}

// The row `stride` elements and `bit_stride` bytes on.
template <int kLater, Own kOwn, typename T> inline Row<T> next_row(Row<T> row, int64_t stride, int64_t bit_stride) {
  if constexpr (kOwn != Own::gradient) row.x += stride;
  if constexpr (kOwn != Own::none) {
    row.dy += stride;
    if (row.y != nullptr) {
      row.y += stride;
      row.g == nullptr ? void(row.bits += bit_stride) : void(row.g += stride);
    }
  }
  for (int l = 0; l < kLater; ++l) {
    row.later[l] += stride;
    if (row.later_bits[l] != all_lanes.bits) row.later_bits[l] += bit_stride;
  }
  return row;
}

// The work on one vector is inlined whatever the compiler thinks of so much code: out of line it takes twice as long.
template <Own kOwn, typename T, typename A>
[[gnu::always_inline]] inline Vec<A> later_g(const Row<T>& row, int l, int64_t j, int64_t left) {
  if constexpr (kOwn == Own::gradient) return load_upto<A>(row.later[l] + j, left);  // a map as it is
  __builtin_prefetch(row.later[l] + j + row.fetch_ahead, 0, 3);
  return keep_lanes(load_upto<A>(row.later[l] + j, left), load_bits<A>(row.later_bits[l], j));
}

template <Own kOwn, typename T, typename A>
[[gnu::always_inline]] inline Vec<A> own_g(const Row<T>& row, int64_t j, int64_t left) {
  const Vec<A> dy = load_upto<A>(row.dy + j, left);
  if constexpr (kOwn == Own::map) {
    __builtin_prefetch(row.dy + j + row.fetch_ahead, 0, 3);
    __builtin_prefetch(row.x + j + row.fetch_ahead, 0, 3);
  }
  if (row.y == nullptr) return dy;
  if constexpr (kOwn == Own::map) __builtin_prefetch(row.y + j + row.fetch_ahead, 0, 3);
  const uint32_t alive = lanes_alive(load_upto<A>(row.y + j, left));
  const Vec<A> g = keep_lanes(dy, alive);
  if (kOwn == Own::map && row.g == nullptr) {
    store_bits<A>(row.bits, j, alive);
  } else if (row.stream && left >= kLanes<A>) {
    stream(row.g + j, g);
  } else {
    store_upto<A>(row.g + j, g, left);
  }
  return g;
}

template <Own kOwn, typename T, typename A, typename Later>
[[gnu::always_inline]] inline void plane_vector(const Row<T>& row, Later later, int64_t j, int64_t left, Vec<A>* sums) {
  Vec<A> x;
  if constexpr (kOwn == Own::gradient) {
    x = own_g<kOwn, T, A>(row, j, left);
    sums[later.value] += x;
  } else {
    x = load_upto<A>(row.x + j, left);
  }
  for (int l = 0; l < later.value; ++l) sums[l] += later_g<kOwn, T, A>(row, l, j, left) * x;
  if constexpr (kOwn == Own::map) {
    const Vec<A> g = own_g<kOwn, T, A>(row, j, left);
    sums[later.value] += g * x;
    sums[later.value + 1] += g;
  }
}

template <Own kOwn, typename T, typename A>
[[gnu::noinline]] void plane_rest(const Row<T>& row, int64_t later, int64_t j, int64_t left, Vec<A>* sums) {
  plane_vector<kOwn, T, A>(row, AnyNumber{later}, j, left, sums);
}

// Channels of one sample: planes, or a chunk of each, `stride` elements and `bit_stride` bytes apart.
template <typename T> struct Planes {
  Row<T> row;
  int64_t later, channels, count, stride, bit_stride;
};

// Adds each channel's sums to its `sums`: of the later g, then those of its own.
template <int kLater, Own kOwn, typename T, typename A> struct PlaneRows {
  static void run(const Planes<T>& p, Vec<A> (*sums)[kSums]) {
    constexpr int kOwnSums = kLater + own_sums(kOwn);
    Row<T> row = p.row;
    for (int64_t c = 0; c < p.channels; ++c) {
      Vec<A> own[kOwnSums + 1];  // none of no sums
      for (int l = 0; l < kOwnSums; ++l) own[l] = sums[c][l];
      int64_t j = 0;
      for (; j + kLanes<A> <= p.count; j += kLanes<A>) {
        plane_vector<kOwn, T, A>(row, Number<kLater>{}, j, int64_t{kLanes<A>}, own);
      }
      for (int l = 0; l < kOwnSums; ++l) sums[c][l] = own[l];
      if (j < p.count) plane_rest<kOwn, T, A>(row, p.later, j, p.count - j, sums[c]);
      row = next_row<kLater, kOwn>(row, p.stride, p.bit_stride);
    }
  }
};

// Channels-last: pixels that lie `stride` elements and `bit_stride` bytes apart, and where their sums wait.
template <typename T, typename A> struct Pixels {
  Row<T> row;
  int64_t later, stride, bit_stride, channels;
  A (*sums)[kSumStride];
};

// One vector of channels, `left` of them, of a pixel.
template <Own kOwn, typename T, typename A, typename Later>
[[gnu::always_inline]] inline void pixel_vector(const Row<T>& row, Later later, A (*sums)[kSumStride], int64_t c,
                                                int64_t left) {
  // Product and sum stand together: only then do compilers fuse them, in the rest of a row as in its whole vectors.
  const auto add = [&](int64_t row_of_sums, const Vec<A>& a, const Vec<A>& b) __attribute__((always_inline)) {
    const Vec<A> before = load_upto<A>(sums[row_of_sums] + c, left);
    store_upto<A>(sums[row_of_sums] + c, before + a * b, left);
  };
  Vec<A> g, x;
  if constexpr (kOwn != Own::none) g = own_g<kOwn, T, A>(row, c, left);
  if constexpr (kOwn == Own::gradient) {
    x = g;
  } else {
    x = load_upto<A>(row.x + c, left);
  }
  for (int l = 0; l < later.value; ++l) add(l, later_g<kOwn, T, A>(row, l, c, left), x);
  if constexpr (kOwn == Own::map) add(later.value, g, x);
  if constexpr (kOwn != Own::none) {
    A* const sum = sums[later.value + own_sums(kOwn) - 1] + c;
    store_upto<A>(sum, load_upto<A>(sum, left) + g, left);
  }
}

template <Own kOwn, typename T, typename A>
[[gnu::noinline]] void pixel_rest(const Row<T>& row, int64_t later, A (*sums)[kSumStride], int64_t c, int64_t left) {
  pixel_vector<kOwn>(row, AnyNumber{later}, sums, c, left);
}

// One pixel at a time over all channels, so that memory is read in long runs.
template <int kLater, Own kOwn, typename T, typename A> struct PixelTile {
  static void run(const Pixels<T, A>& p, int64_t pixels) {
    for (int64_t r = 0; r < pixels; ++r) {
      const Row<T> row = next_row<kLater, kOwn>(p.row, r * p.stride, r * p.bit_stride);
      int64_t c = 0;
      for (; c + kLanes<A> <= p.channels; c += kLanes<A>) {
        pixel_vector<kOwn>(row, Number<kLater>{}, p.sums, c, int64_t{kLanes<A>});
      }
      if (c < p.channels) pixel_rest<kOwn>(row, p.later, p.sums, c, p.channels - c);
    }
  }
};

// Some later g, from `first` on; with those from 0 on the block's own.
struct Group {
  int64_t first, later;
  Own own;

  int64_t sums() const { return later + own_sums(own); }
  // The row of partial results of sum l.
  int64_t row(const MapDots& args, int64_t l) const { return l < later ? first + l : args.num_later + l - later; }
};

template <typename Work> inline void over_groups(const MapDots& args, const Work& work) {
  int64_t first = 0;
  do {
    const int64_t left = args.num_later - first;
    const Own own = first > 0 || args.dy == nullptr ? Own::none : args.x == nullptr ? Own::gradient : Own::map;
    work(Group{first, left < kLaterAtOnce ? left : kLaterAtOnce, own});
    first += kLaterAtOnce;
  } while (first < args.num_later);
}

// Loop<later, own, T, A>::run(...) for as many later g as there are.
template <template <int, Own, typename, typename> class Loop, typename T, typename A, typename... Arguments>
inline void run(const Group& group, Arguments... arguments) {
  with_number<0, kLaterAtOnce>(group.later, [&](auto n) {
    constexpr int later = decltype(n)::value;
    if (group.own == Own::none) return Loop<later, Own::none, T, A>::run(arguments...);
    if (group.own == Own::map) return Loop<later, Own::map, T, A>::run(arguments...);
    Loop<later, Own::gradient, T, A>::run(arguments...);
  });
}

// Planes, or chunks of planes from element j on.
template <typename T, typename A>
void planes(const MapDots& args, const ReduceItem& item, const Group& group, int64_t j, int64_t count,
            double* partial) {
  const MapShape& s = args.shape;
  const int64_t row_bytes = bit_row_bytes(s);
  Vec<A> sums[kPlanarChannels][kSums];
  for (int64_t c = 0; c < item.channels; ++c) {
    for (int64_t l = 0; l < group.sums(); ++l) sums[c][l] = Vec<A>{};
  }
  for (int64_t r = 0; r < item.count; ++r) {
    const int64_t plane = (item.begin + r) * s.C + item.channel;
    const Planes<T> p = {row_at<T>(args, plane * s.P + j, plane * row_bytes + j / 8, s.P, group.first, group.later),
                         group.later,
                         item.channels,
                         count,
                         s.P,
                         row_bytes};
    run<PlaneRows, T, A, const Planes<T>&>(group, p, sums);
  }
  for (int64_t l = 0; l < group.sums(); ++l) {
    double* out = partial + group.row(args, l) * s.C;
    for (int64_t c = 0; c < item.channels; ++c) out[c] += sum_lanes(sums[c][l]);
  }
}

template <typename T, typename A> void planar(const MapDots& args, const ReduceItem& item) {
  const MapShape& s = args.shape;
  double* partial = args.partial + item.slab * args.rows() * s.C + item.channel;
  for (int64_t row = 0; row < args.rows(); ++row) {
    for (int64_t c = 0; c < item.channels; ++c) partial[row * s.C + c] = 0;
  }
  over_plane_chunks(s, [&](int64_t j, int64_t count) {
    over_groups(args, [&](const Group& group) { planes<T, A>(args, item, group, j, count, partial); });
  });
}

template <typename T, typename A> void channels_last(const MapDots& args, const ReduceItem& item) {
  const MapShape& s = args.shape;
  const int64_t row_bytes = bit_row_bytes(s);
  double* partial = args.partial + item.slab * args.rows() * s.C + item.channel;
  A sums[kSums][kSumStride];
  for (int64_t begin = 0; begin < item.count; begin += kTilePixels) {
    const int64_t pixels = item.count - begin < kTilePixels ? item.count - begin : kTilePixels;
    const int64_t pixel = item.begin + begin;
    over_groups(args, [&](const Group& group) {
      for (int64_t l = 0; l < group.sums(); ++l) {
        for (int64_t c = 0; c < item.channels; ++c) sums[l][c] = 0;
      }
      const Pixels<T, A> p = {row_at<T>(args, pixel * s.C + item.channel, pixel * row_bytes + item.channel / 8, s.C,
                                        group.first, group.later),
                              group.later,
                              s.C,
                              row_bytes,
                              item.channels,
                              sums};
      run<PixelTile, T, A, const Pixels<T, A>&>(group, p, pixels);
      for (int64_t l = 0; l < group.sums(); ++l) {
        double* out = partial + group.row(args, l) * s.C;
        for (int64_t c = 0; c < item.channels; ++c) {
          out[c] = (begin == 0 ? 0 : out[c]) + static_cast<double>(sums[l][c]);
        }
      }
    });
  }
}

template <typename T> void dots(const MapDots& args, const ReduceItem& item) {
  using A = typename Accumulate<T>::type;
  args.shape.channels_last ? channels_last<T, A>(args, item) : planar<T, A>(args, item);
  if (args.stream) stream_fence();
}

}  // namespace

const MapLoops<MapDots> map_dots_loops = reduction_loops<MapDots, dots<float>, dots<double>, dots<bf16>, dots<f16>>;

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
