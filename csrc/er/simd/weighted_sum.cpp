// weighted_sum: y = sum_l a_l * x_l + b, then ReLU. Every map is read once and y is written once. Up to six maps are
// summed in registers; where there are more, a chunk of accumulators waits in the L1 cache between groups of six.
// Runs of memory are taken from the last to the first: the reduction that most often comes before runs the other way,
// and what it read last is still in the cache. Within a run memory is read forward, as prefetchers like it. Compiled
// once per instruction set.
#include "er/simd/relu_mask.h"
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1024;         // elements of an accumulator chunk, about: 4 KiB of float
constexpr int64_t kMostJoined = 4096;    // elements of planes that are joined, at most
constexpr int64_t kLeastJoined = 16;     // pixels of such a plane, at least: a vector holds parts of two at most
constexpr int64_t kRunElements = 16384;  // planar: elements of a map in a run; channels-last an item is one
constexpr int64_t kMapsAtOnce = 6;       // more streams at once than cache ways would evict each other's lines
static_assert(kChunk <= kAllLanes && kLanes<float> <= kLeastJoined);
// Rows of a bitmask are padded to 64: those of at most 64 planes that are joined, of kMostJoined elements together.
static_assert(kChunk / kLeastJoined <= 64 && kMostJoined + 64 * 64 <= kAllLanes);

// Coefficients of rows of one channel each: constant within a row.
template <typename A> struct Constant {
  const A* a[kMapsAtOnce];
  const A* b;

  struct OfRow {
    Vec<A> a[kMapsAtOnce], b;

    Vec<A> coefficient(int64_t l, int64_t, int64_t) const { return a[l]; }
    Vec<A> start(int64_t, int64_t) const { return b; }
  };
  template <int kMaps> OfRow of_row(int64_t r) const {
    OfRow row;
    for (int l = 0; l < kMaps; ++l) row.a[l] = broadcast<A>(a[l][r]);
    row.b = b == nullptr ? Vec<A>{} : broadcast<A>(b[r]);
    return row;
  }
};

// Coefficients of rows of channels: a vector for each vector of a row, the same for all rows.
template <typename A> struct PerChannel {
  const A* a[kMapsAtOnce];
  const A* b;

  Vec<A> coefficient(int64_t l, int64_t j, int64_t left) const { return load_upto<A>(a[l] + j, left); }
  Vec<A> start(int64_t j, int64_t left) const { return b == nullptr ? Vec<A>{} : load_upto<A>(b + j, left); }
  template <int> const PerChannel& of_row(int64_t) const { return *this; }
};

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

// The bits of the vector from element j of a row on, which begins where a vector may (OneRow), or anywhere (Joined).
template <typename T, typename A> struct RowBits {
  const Rows<T, A>& row;
  int64_t j;

  uint32_t operator()(int l) const { return load_bits<A>(row.bits[l], j); }
};
template <typename T, typename A> struct JoinedBits {
  const Rows<T, A>& rows;
  int64_t bit_row, j;

  uint32_t operator()(int l) const { return load_bits_from<A>(rows.bits[l] + bit_row, j); }
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

// Rows of one channel each that lie one after the other, of at least a vector, as one row: in a vector with the end of
// one and the start of the next, so are their coefficients and bits.
template <int kMaps, bool kBits> struct Joined {
  template <typename T, typename A> static void run(const Rows<T, A>& rows, const Constant<A>& k) {
    using OfRow = typename Constant<A>::OfRow;
    constexpr Number<kMaps> maps;
    OfRow now = k.template of_row<kMaps>(0);
    int64_t element = 0, j = 0;  // j: of the row
    for (int64_t r = 0; r < rows.rows; ++r) {
      JoinedBits<T, A> bits = {rows, r * rows.bit_stride, j};
      for (; bits.j + kLanes<A> <= rows.count; bits.j += kLanes<A>, element += kLanes<A>) {
        sum_vector<kBits>(rows, now, bits, maps, element, int64_t{kLanes<A>});
      }
      const int64_t rest = rows.count - bits.j;
      if (r + 1 == rows.rows) {
        if (rest > 0) sum_rest<kBits>(rows, now, bits, element, rest);
        return;
      }
      const OfRow next = k.template of_row<kMaps>(r + 1);
      j = 0;
      if (rest > 0) {
        const LaneMask<A> first = first_lanes<A>(rest);
        OfRow both;
        for (int l = 0; l < kMaps; ++l) both.a[l] = first ? now.a[l] : next.a[l];
        both.b = first ? now.b : next.b;
        const JoinedBits<T, A> bits_of_next = {rows, bits.bit_row + rows.bit_stride, 0};
        const auto bits_of_both = [&](int l) { return (bits(l) & ((1u << rest) - 1)) | bits_of_next(l) << rest; };
        sum_vector<kBits>(rows, both, bits_of_both, maps, element, int64_t{kLanes<A>});
        element += kLanes<A>;
        j = kLanes<A> - rest;
      }
      now = next;
    }
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

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How planes are taken: so many of one sample at once, and joined, where each would begin elsewhere in a cache line.
struct Planes {
  int64_t together;  // planes that are whole cache lines
  bool joined;
  int64_t at_once;
};

template <typename T, typename A> inline Planes planes_of(const MapShape& s) {
  Planes planes = {1, false, 1};
  while (planes.together * s.P * static_cast<int64_t>(sizeof(T)) % 64 != 0) planes.together *= 2;
  const int64_t elements = planes.together * s.P;
  planes.joined = planes.together > 1 && s.P >= kLeastJoined && elements <= kMostJoined;
  if (planes.joined) planes.at_once = elements < kChunk ? kChunk / elements * planes.together : planes.together;
  return planes;
}

// Planes [begin, end), which lie one after the other.
template <typename T, typename A>
inline void planar(const WeightedSum& args, const Planes& planes, A* acc, int64_t begin, int64_t end) {
  const MapShape& s = args.shape;
  const int64_t row_bytes = bit_row_bytes(s);
  for (int64_t item = begin, rows; item < end; item += rows) {
    const int64_t next = item / planes.at_once * planes.at_once + planes.at_once;  // where whole lines begin
    rows = least(least(end, next), item + s.C - item % s.C) - item;
    const int64_t channel = s.per_sample ? item : item % s.C;
    for (int64_t j = 0, count; j < s.P; j += count) {
      T* const y = static_cast<T*>(args.y) + item * s.P + j;
      count = planes.joined ? s.P : least(kChunk, s.P - j);
      const Block block = {item * s.P + j, item * row_bytes + j / 8, channel, rows, count};
      planes.joined ? sum_maps<Joined, Constant<A>, T, A>(args, acc, block, y, args.stream)
                    : sum_maps<OneRow, Constant<A>, T, A>(args, acc, block, y, args.stream);
    }
  }
}

// Channels [begin, end) of some pixels.
template <typename T, typename A>
inline void pixel_rows(const WeightedSum& args, A* acc, const PixelRange& range, const ChannelTile& tile) {
  const int64_t C = args.shape.C, row_bytes = bit_row_bytes(args.shape);
  for (int64_t pixel = range.begin; pixel < range.begin + range.count; ++pixel) {
    for (int64_t c = tile.begin; c < tile.end; c += kChunk) {
      const int64_t count = least(kChunk, tile.end - c);
      const Block block = {pixel * C + c, pixel * row_bytes + c / 8, range.group * C + c, 1, count};
      sum_maps<OneRow, PerChannel<A>, T, A>(args, acc, block, static_cast<T*>(args.y) + block.offset, args.stream);
    }
  }
}

template <typename T> void weighted_sum(const WeightedSum& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const MapShape& s = args.shape;
  A acc[kMostJoined];
  if (s.channels_last) {
    while (end > begin) pixel_rows<T, A>(args, acc, sum_item(s, --end), {0, s.C});
  } else {
    const Planes planes = planes_of<T, A>(s);
    const int64_t fit = kRunElements / (planes.at_once * s.P), run = planes.at_once * (fit > 0 ? fit : 1);
    for (int64_t first; end > begin; end = first) {
      first = (end - 1) / run * run;
      if (first < begin) first = begin;
      planar<T, A>(args, planes, acc, first, end);
    }
  }
  if (args.stream) stream_fence();
}

template <typename T> void channel_tile(const WeightedSum& args, const ChannelTile& tile) {
  using A = typename Accumulate<T>::type;
  const MapShape& s = args.shape;
  A acc[kMostJoined];
  if (s.channels_last) {
    pixel_rows<T, A>(args, acc, {0, 0, s.N * s.P}, tile);
  } else {
    const Planes planes = planes_of<T, A>(s);
    for (int64_t n = 0; n < s.N; ++n) planar<T, A>(args, planes, acc, n * s.C + tile.begin, n * s.C + tile.end);
  }
  if (args.stream) stream_fence();
}

}  // namespace

const MapLoops<WeightedSum> weighted_sum_loops = {
    {weighted_sum<float>, weighted_sum<double>, weighted_sum<bf16>, weighted_sum<f16>},
    {channel_tile<float>, channel_tile<double>, channel_tile<bf16>, channel_tile<f16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
