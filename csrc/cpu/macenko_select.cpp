#include "cpu/macenko_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace ernet::cpu {

namespace {

using macenko::Ranks;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Pixels of the sample that says where to look. Its size trades the cost of the sample against the width of the
// bracket.
constexpr int64_t kSmallSample = 1024;
constexpr int64_t kLargeSample = 8192;
// Images up to this size are collected whole.
constexpr int64_t kCollectAll = 2048;
// Half width of a bracket in standard deviations of a sampled rank. A miss costs time, never exactness.
constexpr double kBracketDeviations = 3.0;

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

// Both order statistics by counting digits of the keys' bits, from the highest: exact for any distribution, in constant
// memory.
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

// A bracket of an image, and what was collected in it.
struct Collected {
  Bracket total;
  std::vector<double> keys;
};

// Scans the image for two brackets at once.
void scan_image(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, const Bracket guess[2],
                const Strips& strips, Collected collected[2]) {
  const int64_t n = image.pixels;
  // Room for what a good bracket holds; a key that many pixels share overflows it and is found the other way.
  const int64_t tasks = n > kCollectAll ? strips.tasks : 1;
  const int64_t capacity = n > kCollectAll ? n / tasks / 16 + 512 : n;
  std::unique_ptr<double[]> room(new double[size_t(2 * tasks * capacity)]);  // left uninitialised
  std::vector<Bracket> brackets(size_t(2 * tasks));
  strips.run(tasks, [&](int64_t task) {
    for (int i = 0; i < 2; ++i) {
      Bracket& bracket = brackets[2 * task + i];
      bracket = {guess[i].low, guess[i].high, 0, 0, 0, room.get() + (2 * task + i) * capacity, capacity};
    }
    loops.scan(image, span_of_strip(n, task, tasks), keys, brackets[2 * task], brackets[2 * task + 1]);
  });
  for (int i = 0; i < 2; ++i) {
    collected[i].total = {guess[i].low, guess[i].high, 0, 0, 0, nullptr, 0};
    collected[i].keys.clear();
    for (int64_t task = 0; task < tasks; ++task) {
      const Bracket& part = brackets[2 * task + i];
      Bracket& total = collected[i].total;
      total.below += part.below;
      total.inside += part.inside;
      total.margin = std::max(total.margin, part.margin);
      const int64_t kept = std::min(part.inside, part.capacity);
      collected[i].keys.insert(collected[i].keys.end(), part.collected, part.collected + kept);
    }
  }
}

// True, and the two order statistics, if the collected keys certainly hold both.
bool select_collected(Collected& collected, const Ranks& ranks, OrderStatistics& found) {
  const Bracket& total = collected.total;
  const bool complete = total.inside == int64_t(collected.keys.size());
  if (!complete || ranks.lower < total.below || ranks.upper >= total.below + total.inside) return false;
  const auto lower = collected.keys.begin() + (ranks.lower - total.below);
  std::nth_element(collected.keys.begin(), lower, collected.keys.end());
  found.lower = *lower;
  found.upper = ranks.upper == ranks.lower ? *lower : *std::min_element(lower + 1, collected.keys.end());
  return found.lower >= total.low + total.margin && found.upper <= total.high - total.margin;
}

// Where the sample says the percentiles are; everything for small images.
void guess_brackets(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, const double percent[2],
                    Bracket guess[2]) {
  for (int i = 0; i < 2; ++i) guess[i] = {-kInfinity, kInfinity, 0, 0, 0, nullptr, 0};
  const int64_t n = image.pixels;
  if (n <= kCollectAll) return;
  const int64_t wanted = std::clamp(n / 64, kSmallSample, kLargeSample);
  const int64_t stride = (n / wanted) | 1;  // odd, so that it does not walk down the columns of an even width
  std::vector<double> sampled(size_t(2 * (n / stride + 1)));
  double* a = sampled.data();
  double* b = a + sampled.size() / 2;
  const int64_t found = loops.sample(image, {0, n}, stride, keys, a, b);
  guess_bracket(a, found, percent[0], guess[0]);
  guess_bracket(b, found, percent[1], guess[1]);
}

}  // namespace

void macenko_percentiles(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, int64_t count,
                         const double percent[2], bool nearest, bool interpolate_angles, const Strips& strips,
                         double result[2]) {
  Bracket guess[2];
  guess_brackets(loops, image, keys, percent, guess);
  bool done[2] = {false, false};
  OrderStatistics found[2];
  Ranks ranks[2];
  for (int i = 0; i < 2; ++i) ranks[i] = macenko::percentile_ranks(count, percent[i], nearest);
  // A second, wider look costs less than the radix selection.
  for (int attempt = 0; attempt < 2 && !(done[0] && done[1]); ++attempt) {
    Collected collected[2];
    scan_image(loops, image, keys, guess, strips, collected);
    for (int i = 0; i < 2; ++i) {
      if (!done[i]) done[i] = select_collected(collected[i], ranks[i], found[i]);
      const Bracket& total = collected[i].total;
      if (done[i]) {
        guess[i].low = guess[i].high = kInfinity;
      } else if (total.inside <= int64_t(collected[i].keys.size()) && total.margin < 1) {
        const double width = total.high - total.low < 1e30 ? total.high - total.low : 0.0;
        guess[i].low -= width + 8 * total.margin;
        guess[i].high += width + 8 * total.margin;
      } else {
        guess[i].low = guess[i].high = kInfinity;
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (!done[i]) found[i] = RadixSelect(loops, image, keys, i, strips).find(ranks[i]);
    if (interpolate_angles) found[i] = {macenko::angle_of_key(found[i].lower), macenko::angle_of_key(found[i].upper)};
    result[i] = macenko::interpolate(found[i].lower, found[i].upper, ranks[i].weight);
  }
}

}  // namespace ernet::cpu
