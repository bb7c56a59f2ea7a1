// What the loops of weighted_sum share: rows of maps, summed in registers up to six maps at once; where there are more,
// a chunk of accumulators waits in the L1 cache between groups of six.
#pragma once

#include "er/simd/relu_mask.h"
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1024;    // elements of an accumulator chunk, about: 4 KiB of float
constexpr int64_t kMapsAtOnce = 6;  // more streams at once than cache ways would evict each other's lines
static_assert(kChunk <= kAllLanes);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Some rows of `count` elements, one after the other in every map and y; their ReLU bitmasks lie `bit_stride` bytes
// apart.
template <typename T, typename A> struct Rows {
  const T* x[kMapsAtOnce];
  const uint8_t* bits[kMapsAtOnce];
  T* y;
  A* acc;  // [rows][count]
  int64_t rows, count, bit_stride, maps;
  bool first, last;  // of the groups of maps: the first starts from b, the last writes y; between them sums are in acc
  bool relu_wanted;
  bool stream_wanted;
  int64_t fetch_ahead;
};

template <bool kBits, typename T, typename A, typename Bits>
[[gnu::always_inline]] inline Vec<A> map_vector(const Rows<T, A>& rows, const Bits& bits, int l, int64_t j,
                                                int64_t left) {
  const Vec<A> x = load_upto<A>(rows.x[l] + j, left);
  __builtin_prefetch(rows.x[l] + j + rows.fetch_ahead, 0, 3);
  if constexpr (kBits) return keep_lanes(x, bits(l));
  return x;
}

// The vector from element j on, `left` elements of it. bits(l): which lanes of map l count.
template <bool kBits, typename Coefficients, typename Bits, typename T, typename A, typename Maps>
[[gnu::always_inline]] inline void sum_vector(const Rows<T, A>& rows, const Coefficients& k, const Bits& bits,
                                              Maps maps, int64_t j, int64_t left) {
  Vec<A> sum = rows.first ? k.start(j, left) : load_upto<A>(rows.acc + j, left);
  for (int l = 0; l < maps.value; ++l) sum += k.coefficient(l, j, left) * map_vector<kBits>(rows, bits, l, j, left);
  if (!rows.last) return store_upto<A>(rows.acc + j, sum, left);
  if (rows.relu_wanted) sum = relu<A>(sum);
  if (rows.stream_wanted && left >= kLanes<A>) return stream(rows.y + j, sum);
  store_upto<A>(rows.y + j, sum, left);
}

// Less than a vector, at the end of a row.
template <bool kBits, typename Coefficients, typename Bits, typename T, typename A>
[[gnu::noinline]] void sum_rest(const Rows<T, A>& rows, const Coefficients& k, const Bits& bits, int64_t j,
                                int64_t left) {
  sum_vector<kBits>(rows, k, bits, AnyNumber{rows.maps}, j, left);
}

// The bits of the vector from element j of a row on, which begins where a vector may.
template <typename T, typename A> struct RowBits {
  const Rows<T, A>& row;
  int64_t j;

  uint32_t operator()(int l) const { return load_bits<A>(row.bits[l], j); }
};

// One row.
template <int kMaps, bool kBits> struct OneRow {
  template <typename Coefficients, typename T, typename A>
  static void run(const Rows<T, A>& row, const Coefficients& k) {
    const auto& row_k = k.template of_row<kMaps>(0);
    int64_t j = 0;
    for (; j + kLanes<A> <= row.count; j += kLanes<A>) {
      sum_vector<kBits>(row, row_k, RowBits<T, A>{row, j}, Number<kMaps>{}, j, int64_t{kLanes<A>});
    }
    if (j < row.count) sum_rest<kBits>(row, row_k, RowBits<T, A>{row, j}, j, row.count - j);
  }
};

// A group of 1 to kMapsAtOnce maps.
template <template <int, bool> class Loop, bool kBits, typename Coefficients, typename T, typename A>
inline void sum_group(const Rows<T, A>& rows, const Coefficients& k) {
  with_number<1, kMapsAtOnce>(rows.maps, [&](auto n) { Loop<decltype(n)::value, kBits>::run(rows, k); });
}

// Rows of every map.
struct Block {
  int64_t offset;   // of the first element, in a map
  int64_t bits;     // of its bits, in bytes
  int64_t channel;  // of the first coefficient
  int64_t rows, count;
};

// All maps over a block, into y.
template <template <int, bool> class Loop, bool kBits, typename Coefficients, typename T, typename A>
inline void sum_maps(const WeightedSum& args, A* acc, const Block& block, T* y, bool stream_wanted) {
  const MapShape& s = args.shape;
  const A* a = static_cast<const A*>(args.a) + block.channel;
  const A* b = args.b == nullptr ? nullptr : static_cast<const A*>(args.b) + block.channel;
  for (int64_t first = 0; first < args.num_maps; first += kMapsAtOnce) {
    const int64_t left = args.num_maps - first, maps = left < kMapsAtOnce ? left : kMapsAtOnce;
    Rows<T, A> rows = {{},
                       {},
                       y,
                       acc,
                       block.rows,
                       block.count,
                       bit_row_bytes(s),
                       maps,
                       first == 0,
                       left <= kMapsAtOnce,
                       args.relu,
                       stream_wanted && stream_aligned(y),
                       fetch_ahead<T>()};
    Coefficients k = {{}, b};
    for (int64_t l = 0; l < maps; ++l) {
      rows.x[l] = static_cast<const T*>(args.maps[first + l]) + block.offset;
      if constexpr (kBits) {
        const uint8_t* const bits = args.bits[first + l];
        rows.bits[l] = bits == nullptr ? all_lanes.bits : bits + block.bits;
      }
      k.a[l] = a + (first + l) * s.groups() * s.C;
    }
    sum_group<Loop, kBits>(rows, k);
  }
}

template <template <int, bool> class Loop, typename Coefficients, typename T, typename A>
inline void sum_maps(const WeightedSum& args, A* acc, const Block& block, T* y, bool stream_wanted) {
  if (args.bits == nullptr) return sum_maps<Loop, false, Coefficients, T, A>(args, acc, block, y, stream_wanted);
  sum_maps<Loop, true, Coefficients, T, A>(args, acc, block, y, stream_wanted);
}

}  // namespace
}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
