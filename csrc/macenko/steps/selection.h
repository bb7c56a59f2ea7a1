// Two neighbouring order statistics of keys that are never stored: rounds of counting narrow an interval of the keys'
// ordered bits until it holds few keys, which are then compared. Exact for any distribution; every step here is serial
// arithmetic on a few numbers, the counting is the caller's.
#pragma once

#include "macenko/steps/order_statistic.h"

namespace ernet::macenko {

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
// Keys of an interval that are kept; a round with more of them narrows the interval by their counts instead.
constexpr int kKeptKeys = 256;
// 64 bits by kBinBits, and one round for neighbours that fall into different bins.
constexpr int kMaxRounds = (64 + kBinBits - 1) / kBinBits + 1;

enum class Stage : int32_t {
  count = 0,  // keys in [low, high] are counted by bins of 2^shift, and kept if they are few
  split = 1,  // the statistics are the largest key below `edge` and the smallest one from it
  done = 2,
};

struct Selection {
  int64_t rank_lower;
  int64_t rank_upper;  // rank_lower or the next
  double weight;
  uint64_t low;  // ordered bits: both statistics are in [low, high]
  uint64_t high;
  uint64_t edge;
  uint64_t lower;  // the statistics, once done
  uint64_t upper;
  int32_t shift;
  Stage stage;
};

ERNET_HOST_DEVICE void begin_selection(int64_t count, double percent, bool nearest, Selection& s) {
  const Ranks ranks = percentile_ranks(count, percent, nearest);
  s.rank_lower = ranks.lower;
  s.rank_upper = ranks.upper;
  s.weight = ranks.weight;
  s.low = s.high = s.edge = s.lower = s.upper = 0;
  s.shift = 0;
  s.stage = Stage::count;
}

ERNET_HOST_DEVICE void set_interval(uint64_t low, uint64_t high, Selection& s) {
  s.low = low;
  s.high = high;
  s.shift = 0;
  while (((high - low) >> s.shift) >= uint64_t(kBins)) ++s.shift;
}

ERNET_HOST_DEVICE void finish_selection(uint64_t lower, uint64_t upper, Selection& s) {
  s.lower = lower;
  s.upper = upper;
  s.stage = Stage::done;
}

// Narrows the interval to the bins that hold the statistics.
ERNET_HOST_DEVICE void narrow(int bin_of_lower, int bin_of_upper, Selection& s) {
  const uint64_t low = s.low + (uint64_t(bin_of_lower) << s.shift);
  const uint64_t start = s.low + (uint64_t(bin_of_upper) << s.shift);
  const uint64_t rest = (uint64_t(1) << s.shift) - 1;
  const uint64_t high = s.high - start < rest ? s.high : start + rest;
  if (bin_of_lower != bin_of_upper) {
    s.edge = start;
    s.stage = Stage::split;
  } else if (s.shift == 0) {
    finish_selection(low, low, s);
  }
  set_interval(low, high, s);
}

// A first round may count approximate keys in bins of width 1 / bins_per_unit, the outermost of them unbounded: the
// interval that holds the exact statistics if no key is off by more than `margin`.
ERNET_HOST_DEVICE void narrow_approximate(int bin_of_lower, int bin_of_upper, double bins_per_unit, double margin,
                                          Selection& s) {
  const double low = bin_of_lower / bins_per_unit;
  const double high = (bin_of_upper + 1) / bins_per_unit;
  const double rounding = 0x1p-22;  // of the product with bins_per_unit in float32
  const double least = low - margin - low * rounding;
  const double greatest = high + margin + high * rounding;
  const double infinity = HUGE_VAL;
  set_interval(ordered_bits(bin_of_lower == 0 ? -infinity : least),
               ordered_bits(bin_of_upper == kBins - 1 ? infinity : greatest), s);
}

// Float32 keys outside this window belong to exact keys outside the interval on the same side.
struct Window {
  float low;
  float high;
};

ERNET_HOST_DEVICE Window window_of(const Selection& s, double margin) {
  if (s.stage == Stage::done) return {HUGE_VALF, -HUGE_VALF};
  const double low = value_of_ordered_bits(s.low);
  const double high = value_of_ordered_bits(s.high);
  const double rounding = 0x1p-22;  // of the conversion below
  return {float(low - margin - fabs(low) * rounding), float(high + margin + fabs(high) * rounding)};
}

}  // namespace ernet::macenko
