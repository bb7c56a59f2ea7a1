// weighted_sum: y = sum_l a_l * x_l + b, then ReLU. Every map is read once and y is written once. Up to six maps are
// summed in registers; where there are more, a chunk of accumulators waits in the L1 cache between groups of six.
// Items run from the last to the first: the reduction that most often comes before runs the other way, and what it read
// last is still in the cache.
// Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1024;    // elements of an accumulator chunk: 4 KiB of float
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
  T* y;
  A* acc;
  int64_t count;
  bool relu_wanted;
  bool stream_wanted;
};

// One vector, `left` elements of it: the first group of maps starts from b, the last one writes y.
template <int kMaps, bool kFirst, bool kLast, typename Coefficients, typename T, typename A>
inline void sum_vector(const Row<T, A>& row, const Coefficients& k, int64_t j, int64_t left) {
  Vec<A> sum = kFirst ? k.start(j, left) : load_upto<A>(row.acc + j, left);
  for (int l = 0; l < kMaps; ++l) sum += k.coefficient(l, j, left) * load_upto<A>(row.x[l] + j, left);
  if constexpr (kLast) {
    if (row.relu_wanted) sum = relu<A>(sum);
    if (row.stream_wanted && left >= kLanes<A>) return stream(row.y + j, sum);
    store_upto<A>(row.y + j, sum, left);
  } else {
    store_upto<A>(row.acc + j, sum, left);
  }
}

template <int kMaps, bool kFirst, bool kLast, typename Coefficients, typename T, typename A>
void sum_row(const Row<T, A>& row, const Coefficients& k) {
  int64_t j = 0;
  for (; j + kLanes<A> <= row.count; j += kLanes<A>) {
    sum_vector<kMaps, kFirst, kLast>(row, k, j, static_cast<int64_t>(kLanes<A>));
  }
  if (j < row.count) sum_vector<kMaps, kFirst, kLast>(row, k, j, row.count - j);
}

// The last group holds 1 to kMapsAtOnce maps; those before are full.
template <bool kFirst, typename Coefficients, typename T, typename A>
inline void sum_last_group(int64_t maps, const Row<T, A>& row, const Coefficients& k) {
  static_assert(kMapsAtOnce == 6, "one case for each possible number of maps");
  switch (maps) {
    case 1:
      return sum_row<1, kFirst, true>(row, k);
    case 2:
      return sum_row<2, kFirst, true>(row, k);
    case 3:
      return sum_row<3, kFirst, true>(row, k);
    case 4:
      return sum_row<4, kFirst, true>(row, k);
    case 5:
      return sum_row<5, kFirst, true>(row, k);
    default:
      return sum_row<6, kFirst, true>(row, k);
  }
}

// All maps over one row of at most kChunk elements at `offset`; `channel` is where its coefficients are.
template <typename Coefficients, typename T, typename A>
inline void sum_maps(const WeightedSum& args, A* acc, int64_t offset, int64_t count, int64_t channel) {
  const MapShape& s = args.shape;
  const A* a = static_cast<const A*>(args.a) + channel;
  const A* b = args.b == nullptr ? nullptr : static_cast<const A*>(args.b) + channel;
  for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
    const int64_t left = args.num_maps - first, maps = left < kMapsAtOnce ? left : kMapsAtOnce;
    T* const y = static_cast<T*>(args.y) + offset;
    Row<T, A> row = {{}, y, acc, count, args.relu, args.stream && stream_aligned(y)};
    Coefficients k = {{}, b};
    for (int64_t l = 0; l < maps; ++l) {
      row.x[l] = static_cast<const T*>(args.maps[first + l]) + offset;
      k.a[l] = a + (first + l) * s.groups() * s.C;
    }
    if (left > kMapsAtOnce) {
      first == 0 ? sum_row<kMapsAtOnce, true, false>(row, k) : sum_row<kMapsAtOnce, false, false>(row, k);
    } else {
      first == 0 ? sum_last_group<true>(maps, row, k) : sum_last_group<false>(maps, row, k);
    }
  }
}

template <typename T, typename A>
void planar(const WeightedSum& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  A acc[kChunk];
  for (int64_t item = end; item-- > begin;) {
    const int64_t channel = s.per_sample ? item : item % s.C;
    for (int64_t j = 0; j < s.P; j += kChunk) {
      const int64_t count = s.P - j < kChunk ? s.P - j : kChunk;
      sum_maps<Constant<A>, T, A>(args, acc, item * s.P + j, count, channel);
    }
  }
}

template <typename T, typename A>
void channels_last(const WeightedSum& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  A acc[kChunk];
  for (int64_t item = end; item-- > begin;) {
    const PixelRange range = sum_item(s, item);
    for (int64_t pixel = range.begin; pixel < range.begin + range.count; ++pixel) {
      for (int64_t c = 0; c < s.C; c += kChunk) {
        const int64_t count = s.C - c < kChunk ? s.C - c : kChunk;
        sum_maps<PerChannel<A>, T, A>(args, acc, pixel * s.C + c, count, range.group * s.C + c);
      }
    }
  }
}

}  // namespace

template <typename T>
void weighted_sum(const WeightedSum& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  if (args.shape.channels_last) {
    channels_last<T, A>(args, begin, end);
  } else {
    planar<T, A>(args, begin, end);
  }
  if (args.stream) stream_fence();
}

template void weighted_sum<float>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum<double>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum<bf16>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum<f16>(const WeightedSum&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
