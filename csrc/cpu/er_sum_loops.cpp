// weighted_sum: y = sum_l a_l * x_l + b, then ReLU. Every map is read once and y is written once. Up to six maps are
// summed in registers; where there are more, a chunk of accumulators waits in the L1 cache between groups of six.
// Runs of memory are taken from the last to the first: the reduction that most often comes before runs the other way,
// and what it read last is still in the cache. Within a run memory is read forward, as prefetchers like it. Compiled
// once per instruction set.
#include "cpu/er_tables.h"
#include "cpu/lane_bits.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1024;         // elements of an accumulator chunk: 4 KiB of float
constexpr int64_t kRunElements = 16384;  // planar: elements of a map in a run; channels-last an item is one
static_assert(kChunk <= kAllLanes);
constexpr int64_t kMapsAtOnce = 6;  // more streams at once than cache ways would evict each other's lines

// Coefficients of a row of one channel: constant.
template <typename A>
struct Constant {
  const A* a[kMapsAtOnce];
  const A* b;

  Vec<A> coefficient(int64_t l, int64_t, int64_t) const { return broadcast<A>(*a[l]); }
  Vec<A> start(int64_t, int64_t) const { return b == nullptr ? Vec<A>{} : broadcast<A>(*b); }
};

// Coefficients of a row of channels: a vector for each vector of the row.
template <typename A>
struct PerChannel {
  const A* a[kMapsAtOnce];
  const A* b;

  Vec<A> coefficient(int64_t l, int64_t j, int64_t left) const { return load_upto<A>(a[l] + j, left); }
  Vec<A> start(int64_t j, int64_t left) const { return b == nullptr ? Vec<A>{} : load_upto<A>(b + j, left); }
};

template <typename T, typename A>
struct Row {
  const T* x[kMapsAtOnce];
  const uint8_t* bits[kMapsAtOnce];
  T* y;
  A* acc;
  int64_t count;
  bool relu_wanted;
  bool stream_wanted;
};

// One vector, `left` elements of it: the first group of maps starts from b, the last one writes y.
template <int kMaps, bool kFirst, bool kLast, bool kBits, typename Coefficients, typename T, typename A>
inline void sum_vector(const Row<T, A>& row, const Coefficients& k, int64_t j, int64_t left) {
  Vec<A> sum = kFirst ? k.start(j, left) : load_upto<A>(row.acc + j, left);
  for (int l = 0; l < kMaps; ++l) {
    Vec<A> x = load_upto<A>(row.x[l] + j, left);
    __builtin_prefetch(row.x[l] + j + kFetchAhead<T>, 0, 2);
    if constexpr (kBits) x = keep_lanes(x, load_bits<A>(row.bits[l], j));
    sum += k.coefficient(l, j, left) * x;
  }
  if constexpr (kLast) {
    if (row.relu_wanted) sum = relu<A>(sum);
    if (row.stream_wanted && left >= kLanes<A>) return stream(row.y + j, sum);
    store_upto<A>(row.y + j, sum, left);
  } else {
    store_upto<A>(row.acc + j, sum, left);
  }
}

template <int kMaps, bool kFirst, bool kLast, bool kBits, typename Coefficients, typename T, typename A>
void sum_row(const Row<T, A>& row, const Coefficients& k) {
  int64_t j = 0;
  for (; j + kLanes<A> <= row.count; j += kLanes<A>) {
    sum_vector<kMaps, kFirst, kLast, kBits>(row, k, j, static_cast<int64_t>(kLanes<A>));
  }
  if (j < row.count) sum_vector<kMaps, kFirst, kLast, kBits>(row, k, j, row.count - j);
}

// The last group holds 1 to kMapsAtOnce maps; those before are full.
template <bool kFirst, bool kBits, typename Coefficients, typename T, typename A>
inline void sum_last_group(int64_t maps, const Row<T, A>& row, const Coefficients& k) {
  static_assert(kMapsAtOnce == 6, "one case for each possible number of maps");
  switch (maps) {
    case 1:
      return sum_row<1, kFirst, true, kBits>(row, k);
    case 2:
      return sum_row<2, kFirst, true, kBits>(row, k);
    case 3:
      return sum_row<3, kFirst, true, kBits>(row, k);
    case 4:
      return sum_row<4, kFirst, true, kBits>(row, k);
    case 5:
      return sum_row<5, kFirst, true, kBits>(row, k);
    default:
      return sum_row<6, kFirst, true, kBits>(row, k);
  }
}

// Where a row's elements, coefficients and bits are: at these many elements and bytes of each map and its bits, and at
// this channel of the coefficients.
struct Place {
  int64_t offset, bits, channel;
};

// All maps over one row of at most kChunk elements, into y.
template <bool kBits, typename Coefficients, typename T, typename A>
inline void sum_maps(const WeightedSum& args, A* acc, const Place& place, int64_t count, T* y, bool stream_wanted) {
  const MapShape& s = args.shape;
  const A* a = static_cast<const A*>(args.a) + place.channel;
  const A* b = args.b == nullptr ? nullptr : static_cast<const A*>(args.b) + place.channel;
  for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
    const int64_t left = args.num_maps - first, maps = left < kMapsAtOnce ? left : kMapsAtOnce;
    Row<T, A> row = {{}, {}, y, acc, count, args.relu, stream_wanted && stream_aligned(y)};
    Coefficients k = {{}, b};
    for (int64_t l = 0; l < maps; ++l) {
      row.x[l] = static_cast<const T*>(args.maps[first + l]) + place.offset;
      if constexpr (kBits) {
        const uint8_t* const bits = args.bits[first + l];
        row.bits[l] = bits == nullptr ? all_lanes.bits : bits + place.bits;
      }
      k.a[l] = a + (first + l) * s.groups() * s.C;
    }
    if (left > kMapsAtOnce) {
      first == 0 ? sum_row<kMapsAtOnce, true, false, kBits>(row, k) : sum_row<kMapsAtOnce, false, false, kBits>(row, k);
    } else {
      first == 0 ? sum_last_group<true, kBits>(maps, row, k) : sum_last_group<false, kBits>(maps, row, k);
    }
  }
}

template <typename Coefficients, typename T, typename A>
inline void sum_maps(const WeightedSum& args, A* acc, const Place& place, int64_t count, T* y, bool stream_wanted) {
  if (args.bits == nullptr) return sum_maps<false, Coefficients, T, A>(args, acc, place, count, y, stream_wanted);
  sum_maps<true, Coefficients, T, A>(args, acc, place, count, y, stream_wanted);
}

template <typename T, typename A>
inline void planar_row(const WeightedSum& args, A* acc, int64_t item, T* y, bool stream_wanted) {
  const MapShape& s = args.shape;
  const int64_t channel = s.per_sample ? item : item % s.C, bits = item * bit_row_bytes(s);
  for (int64_t j = 0; j < s.P; j += kChunk) {
    const int64_t count = s.P - j < kChunk ? s.P - j : kChunk;
    sum_maps<Constant<A>, T, A>(args, acc, {item * s.P + j, bits + j / 8, channel}, count, y + j, stream_wanted);
  }
}

// How many planes together are whole cache lines.
template <typename T>
inline int64_t planes_of_lines(const MapShape& s) {
  int64_t planes = 1;
  while (planes * s.P * static_cast<int64_t>(sizeof(T)) % 64 != 0) planes *= 2;
  return planes;
}

// Planes [begin, end), which lie one after the other. Past the cache go whole lines alone; planes that are none, of 7x7
// or 14x14 pixels, are first gathered to some that are.
template <typename T, typename A>
inline void planes(const WeightedSum& args, A* acc, int64_t begin, int64_t end) {
  constexpr int64_t kGathered = 16384 / sizeof(T);
  const int64_t P = args.shape.P, together = planes_of_lines<T>(args.shape);
  const bool gather = args.stream && together > 1 && together * P <= kGathered;
  alignas(64) T gathered[kGathered];
  for (int64_t item = begin; item < end;) {
    T* const y = static_cast<T*>(args.y) + item * P;
    if (!(gather && item + together <= end && stream_aligned(y))) {
      planar_row<T, A>(args, acc, item++, y, args.stream);
      continue;
    }
    for (int64_t i = 0; i < together; ++i) planar_row<T, A>(args, acc, item + i, gathered + i * P, false);
    for (int64_t j = 0; j < together * P; j += kLanes<A>) stream(y + j, load<A>(gathered + j));
    item += together;
  }
}

// Channels [begin, end) of some pixels.
template <typename T, typename A>
inline void pixel_rows(const WeightedSum& args, A* acc, const PixelRange& range, const Strip& strip) {
  const int64_t C = args.shape.C, row_bytes = bit_row_bytes(args.shape);
  for (int64_t pixel = range.begin; pixel < range.begin + range.count; ++pixel) {
    for (int64_t c = strip.begin; c < strip.end; c += kChunk) {
      const int64_t count = strip.end - c < kChunk ? strip.end - c : kChunk;
      const Place place = {pixel * C + c, pixel * row_bytes + c / 8, range.group * C + c};
      sum_maps<PerChannel<A>, T, A>(args, acc, place, count, static_cast<T*>(args.y) + place.offset, args.stream);
    }
  }
}

}  // namespace

template <typename T>
void weighted_sum(const WeightedSum& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const MapShape& s = args.shape;
  A acc[kChunk];
  const int64_t run = s.channels_last || s.P > kRunElements ? 1 : kRunElements / s.P;
  for (int64_t first; end > begin; end = first) {
    first = end - begin > run ? end - run : begin;
    if (s.channels_last) {
      pixel_rows<T, A>(args, acc, sum_item(s, first), {0, s.C});
    } else {
      planes<T, A>(args, acc, first, end);
    }
  }
  if (args.stream) stream_fence();
}

template <typename T>
void weighted_sum_strip(const WeightedSum& args, const Strip& strip) {
  using A = typename Accumulate<T>::type;
  const MapShape& s = args.shape;
  A acc[kChunk];
  if (s.channels_last) {
    pixel_rows<T, A>(args, acc, {0, 0, s.N * s.P}, strip);
  } else {
    for (int64_t n = 0; n < s.N; ++n) planes<T, A>(args, acc, n * s.C + strip.begin, n * s.C + strip.end);
  }
  if (args.stream) stream_fence();
}

template void weighted_sum<float>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum_strip<float>(const WeightedSum&, const Strip&);
template void weighted_sum<double>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum_strip<double>(const WeightedSum&, const Strip&);
template void weighted_sum<bf16>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum_strip<bf16>(const WeightedSum&, const Strip&);
template void weighted_sum<f16>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum_strip<f16>(const WeightedSum&, const Strip&);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
