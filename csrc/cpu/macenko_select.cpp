#include "cpu/macenko_select.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace ernet::cpu {

namespace {

using macenko::Ranks;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Pixels of the sample that says where to look. Its size trades the cost of the sample against the width of the bracket.
constexpr int64_t kSmallSample = 1024;
constexpr int64_t kLargeSample = 8192;
// Images up to this size are collected whole.
constexpr int64_t kCollectAll = 2048;
// Half width of a bracket in standard deviations of a sampled rank. A miss costs time, never exactness.
constexpr double kBracketDeviations = 4.0;

// The interval that very probably holds the order statistics around `percent`, from sampled keys (which are reordered).
void guess_bracket(double* keys, int64_t count, double percent, Bracket& bracket) {
  bracket.low = -kInfinity;
  bracket.high = kInfinity;
  if (count < 64) return;
  const double fraction = percent / 100;
  const double rank = fraction * double(count - 1);
  const double margin = kBracketDeviations * std::sqrt(double(count) * fraction * (1 - fraction)) + 2;
  const int64_t high = int64_t(std::ceil(rank + margin));
  const int64_t low = int64_t(std::floor(rank - margin));
  double* end = keys + count;
  if (high < count) {
    std::nth_element(keys, keys + high, end);
    bracket.high = keys[high];
    end = keys + high;
  }
  if (low >= 0) {
    std::nth_element(keys, keys + std::min(low, int64_t(end - keys) - 1), end);
    bracket.low = keys[std::min(low, int64_t(end - keys) - 1)];
  }
}

struct OrderStatistics {
  double lower;
  double upper;
};

// Both order statistics by counting digits of the keys' bits, from the highest: exact for any distribution, in constant memory.
class RadixSelect {
 public:
  RadixSelect(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, int which, const Strips& strips)
      : loops_(loops), image_(image), keys_(keys), which_(which), strips_(strips) {}

  OrderStatistics find(const Ranks& ranks) {
    const double lower = at_rank(ranks.lower);
    return {lower, ranks.upper == ranks.lower ? lower : at_rank(ranks.upper)};
  }

 private:
  double at_rank(int64_t rank) {
    uint64_t prefix = 0;
    uint64_t mask = 0;
    for (int top = 64; top > 0;) {
      const int shift = std::max(0, top - kRadixBits);
      const std::vector<int64_t> counts = digits(shift, prefix, mask);
      const uint64_t bins = uint64_t(1) << (top - shift);
      uint64_t digit = 0;
      while (digit + 1 < bins && rank >= counts[digit]) rank -= counts[digit++];
      prefix |= digit << shift;
      mask |= (bins - 1) << shift;
      top = shift;
    }
    return macenko::value_of_ordered_bits(prefix);
  }

  // The last pass has fewer than kRadixBits fresh bits; the mask keeps the others equal to those of the prefix.
  std::vector<int64_t> digits(int shift, uint64_t prefix, uint64_t mask) {
    std::vector<int64_t> partial(size_t(strips_.tasks) * kRadixBins, 0);
    strips_.run(strips_.tasks, [&](int64_t strip) {
      const RadixPass pass = {which_, shift, prefix, mask, partial.data() + strip * kRadixBins};
      loops_.radix(image_, span_of_strip(image_.pixels, strip, strips_.tasks), keys_, pass);
    });
    const uint64_t fresh = ~mask >> shift & (kRadixBins - 1);
    std::vector<int64_t> counts(kRadixBins, 0);
    for (size_t i = 0; i < partial.size(); ++i) counts[(i % kRadixBins) & fresh] += partial[i];
    return counts;
  }

  const MacenkoLoops& loops_;
  const ImageView& image_;
  const Keys& keys_;
  int which_;
  const Strips& strips_;
};

// True, and the two order statistics, if the collected keys hold both ranks.
bool select_collected(std::vector<double>& collected, int64_t below, int64_t inside, const Ranks& ranks, OrderStatistics& found) {
  const bool complete = inside == int64_t(collected.size());
  if (!complete || ranks.lower < below || ranks.upper >= below + inside) return false;
  const auto lower = collected.begin() + (ranks.lower - below);
  std::nth_element(collected.begin(), lower, collected.end());
  found.lower = *lower;
  found.upper = ranks.upper == ranks.lower ? *lower : *std::min_element(lower + 1, collected.end());
  return true;
}

}  // namespace

void macenko_percentiles(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, int64_t count,
                         const double percent[2], bool nearest, bool interpolate_angles, const Strips& strips,
                         double result[2]) {
  const int64_t n = image.pixels;
  Bracket guess[2] = {};
  guess[0].low = guess[1].low = -kInfinity;
  guess[0].high = guess[1].high = kInfinity;
  if (n > kCollectAll) {
    const int64_t wanted = std::clamp(n / 64, kSmallSample, kLargeSample);
    const int64_t stride = (n / wanted) | 1;  // odd, so that it does not walk down the columns of an even width
    std::vector<double> sampled(size_t(2 * (n / stride + 1)));
    double* a = sampled.data();
    double* b = a + sampled.size() / 2;
    const int64_t found = loops.sample(image, {0, n}, stride, keys, a, b);
    guess_bracket(a, found, percent[0], guess[0]);
    guess_bracket(b, found, percent[1], guess[1]);
  }
  // Room for what a good bracket holds; a key that many pixels share overflows it and goes the other way.
  const int64_t tasks = n > kCollectAll ? strips.tasks : 1;
  const int64_t capacity = n > kCollectAll ? n / tasks / 16 + 512 : n;
  std::vector<double> room(size_t(2 * tasks * capacity));
  std::vector<Bracket> brackets(size_t(2 * tasks));
  strips.run(tasks, [&](int64_t task) {
    for (int i = 0; i < 2; ++i) {
      brackets[2 * task + i] = guess[i];
      brackets[2 * task + i].collected = room.data() + (2 * task + i) * capacity;
      brackets[2 * task + i].capacity = capacity;
    }
    loops.scan(image, span_of_strip(n, task, tasks), keys, brackets[2 * task], brackets[2 * task + 1]);
  });
  for (int i = 0; i < 2; ++i) {
    int64_t below = 0;
    int64_t inside = 0;
    std::vector<double> collected;
    for (int64_t task = 0; task < tasks; ++task) {
      const Bracket& bracket = brackets[2 * task + i];
      below += bracket.below;
      inside += bracket.inside;
      collected.insert(collected.end(), bracket.collected, bracket.collected + std::min(bracket.inside, bracket.capacity));
    }
    const Ranks ranks = macenko::percentile_ranks(count, percent[i], nearest);
    OrderStatistics found;
    if (!select_collected(collected, below, inside, ranks, found)) {
      found = RadixSelect(loops, image, keys, i, strips).find(ranks);
    }
    if (interpolate_angles) found = {macenko::angle_of_key(found.lower), macenko::angle_of_key(found.upper)};
    result[i] = macenko::interpolate(found.lower, found.upper, ranks.weight);
  }
}

}  // namespace ernet::cpu
