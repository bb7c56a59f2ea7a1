// Order statistics near the ends of a distribution, from a list of the pixels beyond a border that a sample tells, with
// ranks shifted by the number of the others. The sample decides how much work there is, never the result: whether the
// list holds a statistic is counted, not assumed.
#pragma once

#include "macenko/steps/selection.h"

namespace ernet::macenko {

// Keys of a sample at most: the rank of a 1 % tail is then known to 0.11 % of the keys.
constexpr int64_t kSampledKeys = 8192;
// Of smaller images one pixel in so many: a larger sample would cost more than the shorter list saves.
constexpr int64_t kLeastStep = 16;
// Standard deviations of that rank between a statistic and the border: one list in some thousands misses it.
constexpr double kSampleDeviations = 3.5;

// Pixels from one sampled pixel to the next, on average.
ERNET_HOST_DEVICE int64_t sample_step(int64_t pixels) {
  const int64_t step = (pixels + kSampledKeys - 1) / kSampledKeys;
  return step > kLeastStep ? step : kLeastStep;
}

// The pixel of stratum `stratum`, at a place that depends on nothing else: no pattern of the image meets one of the
// sample.
ERNET_HOST_DEVICE int64_t sampled_pixel(int64_t stratum, int64_t step) {
  uint32_t mixed = uint32_t(stratum) * 2654435761u;
  mixed ^= mixed >> 15;
  mixed *= 2246822519u;
  return stratum * step + int64_t((uint64_t(mixed) * uint64_t(step)) >> 32);
}

// One of the two ends: the statistics sought are near the smallest keys, or near the largest.
enum class End : int32_t { low = 0, high = 1 };

// Keys from the end of the distribution to the further one of the two statistics.
ERNET_HOST_DEVICE int64_t tail_keys(const Selection& s, End end, int64_t keys) {
  return end == End::low ? s.rank_upper + 1 : keys - s.rank_lower;
}

// Whether a list of `most` keys is long enough, by what can be known before the sample.
ERNET_HOST_DEVICE bool tails_fit(const Selection selection[2], const End end[2], int64_t keys, int64_t most) {
  return keys <= most || 2 * (tail_keys(selection[0], end[0], keys) + tail_keys(selection[1], end[1], keys)) <= most;
}

// Ranks in a sample: of a key that the statistics hardly ever lie beyond on the way to the middle, and of one on the
// way to the end. `open`: the sample is too small for the former, all pixels are to be listed.
struct SampleRanks {
  int64_t border;
  int64_t inner;
  bool open;
};

ERNET_HOST_DEVICE SampleRanks sample_ranks(const Selection& s, End end, int64_t keys, int64_t sampled) {
  const double share = double(tail_keys(s, end, keys)) / double(keys);
  const double expected = share * double(sampled);
  const double spread = kSampleDeviations * sqrt(expected * (1 - share)) + 2;
  const int64_t last = sampled > 0 ? sampled - 1 : 0;
  const int64_t far = int64_t(expected + spread);
  const int64_t near = expected > spread ? int64_t(expected - spread) : 0;
  const int64_t border = far < last ? far : last;
  const int64_t inner = near < last ? near : last;
  const bool open = far >= sampled;
  return end == End::low ? SampleRanks{border, inner, open} : SampleRanks{last - border, last - inner, open};
}

constexpr double kInfinity = HUGE_VAL;

// The interval between `border` and `inner`, which the statistics are sought in first; the border is where the listed
// keys begin.
ERNET_HOST_DEVICE void set_tail_interval(double border, double inner, End end, Selection& s) {
  if (end == End::low) {
    set_interval(ordered_bits(inner), ordered_bits(border), s);
  } else {
    set_interval(ordered_bits(border), ordered_bits(inner), s);
  }
}

// What the counts of the listed keys say of the interval of a selection. `below` counts all keys below it, listed or
// not.
enum class Found : int32_t { inside, elsewhere, missed };

// Statistics outside the interval: it moves towards the end of the distribution, where every key is listed, or they are
// missed, as the keys beyond the border are not. Two that lie on both sides of a limit are the keys next to it.
ERNET_HOST_DEVICE Found place_in_tail(int64_t below, int64_t inside, End end, Selection& s) {
  const bool under = s.rank_lower < below;
  const bool over = s.rank_upper >= below + inside;
  if (!under && !over) return Found::inside;
  if (under && over) return Found::missed;
  if (under != (end == End::low)) return Found::missed;
  if (under) {
    s.edge = s.low;
    if (s.rank_upper >= below) {
      s.stage = Stage::split;
    } else {
      set_interval(ordered_bits(-kInfinity), s.low - 1, s);
    }
  } else {
    s.edge = s.high + 1;
    if (s.rank_lower < below + inside) {
      s.stage = Stage::split;
    } else {
      set_interval(s.high + 1, ordered_bits(kInfinity), s);
    }
  }
  return Found::elsewhere;
}

}  // namespace ernet::macenko
