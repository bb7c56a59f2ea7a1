// weighted_sum of planar maps: coefficients are constant along a plane. Small planes are joined, so that vectors are
// full and begin where cache lines do. Compiled once per instruction set.
#include "er/simd/weighted_sum.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kMostJoined = 4096;    // elements of planes that are joined, at most
constexpr int64_t kLeastJoined = 16;     // pixels of such a plane, at least: a vector holds parts of two at most
constexpr int64_t kRunElements = 16384;  // of a map in a run
static_assert(kLanes<float> <= kLeastJoined);
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

// The bits of the vector from any element of a row on.
template <typename T, typename A> struct JoinedBits {
  const Rows<T, A>& rows;
  int64_t bit_row, j;

  uint32_t operator()(int l) const { return load_bits_from<A>(rows.bits[l] + bit_row, j); }
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

template <typename T> void items(const WeightedSum& args, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const MapShape& s = args.shape;
  A acc[kMostJoined];
  const Planes planes = planes_of<T, A>(s);
  const int64_t fit = kRunElements / (planes.at_once * s.P), run = planes.at_once * (fit > 0 ? fit : 1);
  for (int64_t first; end > begin; end = first) {
    first = (end - 1) / run * run;
    if (first < begin) first = begin;
    planar<T, A>(args, planes, acc, first, end);
  }
}

template <typename T> void channel_tile(const WeightedSum& args, const ChannelTile& tile) {
  using A = typename Accumulate<T>::type;
  const MapShape& s = args.shape;
  A acc[kMostJoined];
  const Planes planes = planes_of<T, A>(s);
  for (int64_t n = 0; n < s.N; ++n) planar<T, A>(args, planes, acc, n * s.C + tile.begin, n * s.C + tile.end);
}

}  // namespace

const MapLoops<WeightedSum> planar_sum_loops = {
    {items<float>, items<double>, items<bf16>, items<f16>},
    {channel_tile<float>, channel_tile<double>, channel_tile<bf16>, channel_tile<f16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
