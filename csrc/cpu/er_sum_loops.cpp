// weighted_sum: y = sum_l a_l * x_l + b, then ReLU. Every map is read once and y is written once, in one pass over
// chunks whose accumulators stay in the L1 cache. Compiled once per instruction set.
#include "cpu/er_loops.h"
#include "cpu/er_tables.h"
#include "cpu/vec.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1024;    // elements of an accumulator chunk: 4 KiB of float
constexpr int64_t kMapsAtOnce = 6;  // more streams at once than cache ways would evict each other's lines

// One row of constant coefficients: acc[j] (+)= sum_l a[l] * x[l][j].
template <typename T, typename A>
struct PlanarRow {
  const T* x[kMapsAtOnce];
  A a[kMapsAtOnce];
  int64_t maps;

  Vec<A> at(Vec<A> acc, int64_t j) const {
    for (int64_t l = 0; l < maps; ++l) acc += a[l] * load<A>(x[l] + j);
    return acc;
  }
  Vec<A> part(Vec<A> acc, int64_t j, int64_t count) const {
    for (int64_t l = 0; l < maps; ++l) acc += a[l] * load_part<A>(x[l] + j, count);
    return acc;
  }
};

// One pixel of channels: acc[c] (+)= sum_l a[l][c] * x[l][c].
template <typename T, typename A>
struct ChannelRow {
  const T* x[kMapsAtOnce];
  const A* a[kMapsAtOnce];
  int64_t maps;

  Vec<A> at(Vec<A> acc, int64_t j) const {
    for (int64_t l = 0; l < maps; ++l) acc += load<A>(a[l] + j) * load<A>(x[l] + j);
    return acc;
  }
  Vec<A> part(Vec<A> acc, int64_t j, int64_t count) const {
    for (int64_t l = 0; l < maps; ++l) acc += load_part<A>(a[l] + j, count) * load_part<A>(x[l] + j, count);
    return acc;
  }
};

// Adds one row of maps to a row of accumulators; the last group of maps applies the ReLU and writes y.
template <typename Row, typename T, typename A>
inline void accumulate(const Row& row, A* acc, int64_t count, bool last, bool relu_wanted, T* y) {
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) {
    Vec<A> sum = row.at(load<A>(acc + j), j);
    if (!last) {
      store(acc + j, sum);
    } else {
      store(y + j, relu_wanted ? relu<A>(sum) : sum);
    }
  }
  if (j < count) {
    const int64_t left = count - j;
    Vec<A> sum = row.part(load_part<A>(acc + j, left), j, left);
    if (!last) {
      store_part<A>(acc + j, sum, left);
    } else {
      store_part<A>(y + j, relu_wanted ? relu<A>(sum) : sum, left);
    }
  }
}

template <typename A>
inline void fill(A* acc, const A* b, A value, int64_t count) {
  for (int64_t j = 0; j < count; ++j) acc[j] = b != nullptr ? b[j] : value;
}

template <typename T, typename A>
void planar(const WeightedSum& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const A* a = static_cast<const A*>(args.a);
  const A* b = static_cast<const A*>(args.b);
  A acc[kChunk];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c = item % s.C, group = s.per_sample ? item / s.C : 0;
    for (int64_t j = 0; j < s.P; j += kChunk) {
      const int64_t count = s.P - j < kChunk ? s.P - j : kChunk, offset = item * s.P + j;
      fill<A>(acc, nullptr, b != nullptr ? b[group * s.C + c] : A(0), count);
      for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
        PlanarRow<T, A> row;
        row.maps = args.num_maps - first < kMapsAtOnce ? args.num_maps - first : kMapsAtOnce;
        for (int64_t l = 0; l < row.maps; ++l) {
          row.x[l] = static_cast<const T*>(args.maps[first + l]) + offset;
          row.a[l] = a[((first + l) * s.groups() + group) * s.C + c];
        }
        accumulate(row, acc, count, first + row.maps == args.num_maps, args.relu, static_cast<T*>(args.y) + offset);
      }
    }
  }
}

template <typename T, typename A>
void channels_last(const WeightedSum& args, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const A* a = static_cast<const A*>(args.a);
  const A* b = static_cast<const A*>(args.b);
  A acc[kChunk];
  for (int64_t item = begin; item < end; ++item) {
    const PixelRange range = sum_item(s, item);
    for (int64_t pixel = range.begin; pixel < range.begin + range.count; ++pixel) {
      for (int64_t c = 0; c < s.C; c += kChunk) {
        const int64_t count = s.C - c < kChunk ? s.C - c : kChunk, offset = pixel * s.C + c;
        fill<A>(acc, b != nullptr ? b + range.group * s.C + c : nullptr, A(0), count);
        for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
          ChannelRow<T, A> row;
          row.maps = args.num_maps - first < kMapsAtOnce ? args.num_maps - first : kMapsAtOnce;
          for (int64_t l = 0; l < row.maps; ++l) {
            row.x[l] = static_cast<const T*>(args.maps[first + l]) + offset;
            row.a[l] = a + ((first + l) * s.groups() + range.group) * s.C + c;
          }
          accumulate(row, acc, count, first + row.maps == args.num_maps, args.relu, static_cast<T*>(args.y) + offset);
        }
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
}

template void weighted_sum<float>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum<double>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum<bf16>(const WeightedSum&, int64_t, int64_t);
template void weighted_sum<f16>(const WeightedSum&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
