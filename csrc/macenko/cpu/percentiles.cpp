#include "macenko/cpu/image.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "macenko/steps/order_statistic.h"

namespace ernet::cpu {

namespace {

using macenko::Ranks;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How far from the sampled rank a bracket ends, in standard deviations of it: at the first look, and at a second one
// after a miss. A miss costs time, never exactness.
constexpr double kDeviations[] = {3.5, 14};

// The interval that very probably holds the order statistics at the bracket's fraction, from sampled keys; `room` is
// for twice as many. In a tail it has no outer end: the keys there are few, and then only one end can be missed.
void guess_bracket(const MacenkoLoops& loops, const double* keys, int64_t count, double deviations, double* room,
                   Bracket& bracket) {
  if (count < 64) return;
  const double rank = bracket.fraction * double(count - 1);
  const double margin = deviations * std::sqrt(rank * (1 - bracket.fraction)) + 2;
  const auto at_rank = [&](double wanted) {
    std::copy(keys, keys + count, room);
    return loops.select(room, room + count, count, int64_t(wanted)).lower;
  };
  const double low = std::floor(rank - margin);
  const double high = std::ceil(rank + margin);
  const bool tail = in_tail(bracket), upper = bracket.fraction > 0.5;
  if (low >= 0 && (upper || !tail)) bracket.low = at_rank(low);
  if (high < double(count) && !(upper && tail)) bracket.high = at_rank(high);
}

// The order statistic of key a (0) or b (1) by counting digits of the keys' bits, from the highest: exact for any
// distribution, in constant memory.
double radix_select(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, int which,
                    const Strips& strips, int64_t rank) {
  uint64_t prefix = 0;
  uint64_t mask = 0;
  for (int top = 64; top > 0;) {
    const int shift = std::max(0, top - kRadixBits);
    const uint64_t bins = uint64_t(1) << (top - shift);
    std::vector<int64_t> partial(size_t(strips.tasks) * kRadixBins, 0);
    strips.run(strips.tasks, [&](int64_t strip) {
      const RadixPass pass = {which, shift, prefix, mask, partial.data() + strip * kRadixBins};
      loops.radix(image, span_of_strip(image.pixels, strip, strips.tasks), keys, pass);
    });
    // The last pass has fewer fresh bits: the others of a digit are the prefix's.
    std::vector<int64_t> counts(bins, 0);
    for (size_t i = 0; i < partial.size(); ++i) counts[i & (bins - 1)] += partial[i];
    uint64_t digit = 0;
    while (digit + 1 < bins && rank >= counts[digit]) rank -= counts[digit++];
    prefix |= digit << shift;
    mask |= (bins - 1) << shift;
    top = shift;
  }
  return macenko::value_of_ordered_bits(prefix);
}

// Whether only this much of a tail is to be kept: the keys from its end to the farther of the two sought.
int64_t keys_needed(const Bracket& bracket, const Ranks& ranks, int64_t count) {
  if (!in_tail(bracket)) return 0;
  return bracket.fraction > 0.5 ? count - ranks.lower : ranks.upper + 1;
}

// A bracket of an image, and what was collected in it: as many keys as there was room for.
struct Collected {
  Bracket total;
  double* keys;
  int64_t kept;
};

// Looks for both percentiles in one scan of an image after the other.
class BracketSearch {
 public:
  // `needed` keys at most are looked for in a tail.
  BracketSearch(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, const Strips& strips,
                int64_t needed)
      : loops_(loops), image_(image), keys_(keys), strips_(strips) {
    // Room for what a good bracket holds.
    const int64_t n = image.pixels;
    tasks_ = n > kCollectAll ? strips.tasks : 1;
    capacity_ = n > kCollectAll ? std::max(n / tasks_ / 16 + 512, 2 * needed) : n;
    room_.reset(new double[size_t(2 * tasks_ * capacity_)]);  // left uninitialised
  }

  void scan(const Bracket guess[2], Collected collected[2]) {
    std::vector<Bracket> brackets(size_t(2 * tasks_));
    strips_.run(tasks_, [&](int64_t task) {
      for (int i = 0; i < 2; ++i) {
        Bracket& bracket = brackets[2 * task + i];
        bracket = guess[i];
        bracket.collected = room(i, task);
        bracket.capacity = capacity_;
      }
      const PixelSpan span = span_of_strip(image_.pixels, task, tasks_);
      loops_.scan(image_, span, keys_, brackets[2 * task], brackets[2 * task + 1]);
    });
    for (int i = 0; i < 2; ++i) {
      collected[i] = {guess[i], room(i, 0), 0};
      for (int64_t task = 0; task < tasks_; ++task) add(brackets[2 * task + i], collected[i]);
    }
  }

  // True, and the two order statistics, if the collected keys certainly hold both. Overwrites the keys.
  bool select(Collected& collected, const Ranks& ranks, Neighbours& found) {
    const Bracket& total = collected.total;
    const bool complete = total.inside == collected.kept;
    if (!complete || ranks.lower < total.below || ranks.upper >= total.below + total.inside) return false;
    if (int64_t(scratch_size_) < collected.kept) {
      scratch_size_ = collected.kept;
      scratch_.reset(new double[size_t(scratch_size_)]);
    }
    found = loops_.select(collected.keys, scratch_.get(), collected.kept, ranks.lower - total.below);
    if (ranks.upper == ranks.lower) found.upper = found.lower;
    return true;
  }

 private:
  double* room(int bracket, int64_t task) { return room_.get() + (bracket * tasks_ + task) * capacity_; }

  // Keys of all tasks end up behind each other.
  static void add(const Bracket& part, Collected& all) {
    Bracket& total = all.total;
    total.below += part.below + part.dropped;
    total.inside += part.inside;
    const int64_t kept = std::min(part.inside, part.capacity);
    double* end = all.keys + all.kept;
    if (end != part.collected) std::copy(part.collected, part.collected + kept, end);
    all.kept += kept;
  }

  const MacenkoLoops& loops_;
  const ImageView& image_;
  const Keys& keys_;
  const Strips& strips_;
  int64_t tasks_;
  int64_t capacity_;
  std::unique_ptr<double[]> room_;
  std::unique_ptr<double[]> scratch_;
  int64_t scratch_size_ = 0;
};

// Where the sample says the percentiles are; everything for small images.
void guess_brackets(const MacenkoLoops& loops, const ImageView& sample, const Keys& keys, double deviations,
                    Bracket guess[2]) {
  const int64_t n = sample.pixels;
  if (n == 0) return;
  const std::unique_ptr<double[]> room(new double[size_t(4 * n)]);
  double* a = room.get();
  double* b = a + n;
  const int64_t found = loops.keys(sample, keys, a, b);
  guess_bracket(loops, a, found, deviations, b + n, guess[0]);
  guess_bracket(loops, keys.kind == KeyKind::angle ? a : b, found, deviations, b + n, guess[1]);
}

}  // namespace

void make_room(Bracket& b) {
  if (b.inside <= b.needed) return;
  double *const end = b.collected + b.inside, *const last = b.collected + b.needed - 1;
  if (b.fraction > 0.5) {
    std::nth_element(b.collected, last, end, std::greater<double>());
    b.low = std::nextafter(*last, kInfinity);
    b.dropped += b.inside - b.needed;
  } else {
    std::nth_element(b.collected, last, end);
    b.high = std::nextafter(*last, -kInfinity);
  }
  b.inside = b.needed;
}

void macenko_percentiles(const MacenkoLoops& loops, const ImageView& image, const ImageView& sample, const Keys& keys,
                         int64_t count, const double percent[2], bool nearest, bool interpolate_angles,
                         const Strips& strips, double result[2]) {
  bool done[2] = {false, false};    // found
  bool shared[2] = {false, false};  // not to be found so: many pixels have one key
  Neighbours found[2];
  Ranks ranks[2];
  for (int i = 0; i < 2; ++i) ranks[i] = macenko::percentile_ranks(count, percent[i], nearest);
  Bracket sought[2];
  for (int i = 0; i < 2; ++i) {
    sought[i] = {-kInfinity, kInfinity, percent[i] / 100, 0, 0, nullptr, 0};
    sought[i].needed = keys_needed(sought[i], ranks[i], count);
  }
  BracketSearch search(loops, image, keys, strips, std::max(sought[0].needed, sought[1].needed));
  for (double deviations : kDeviations) {
    if ((done[0] || shared[0]) && (done[1] || shared[1])) break;
    Bracket guess[2] = {sought[0], sought[1]};
    Collected collected[2];
    guess_brackets(loops, sample, keys, deviations, guess);
    for (int i = 0; i < 2; ++i) {
      if (done[i] || shared[i]) guess[i].low = guess[i].high = guess[i].fraction > 0.5 ? kInfinity : -kInfinity;
    }
    search.scan(guess, collected);
    for (int i = 0; i < 2; ++i) {
      if (done[i] || shared[i]) continue;
      done[i] = search.select(collected[i], ranks[i], found[i]);
      shared[i] = collected[i].total.inside > collected[i].kept;
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (!done[i]) {
      found[i].lower = found[i].upper = radix_select(loops, image, keys, i, strips, ranks[i].lower);
      if (ranks[i].upper > ranks[i].lower) found[i].upper = radix_select(loops, image, keys, i, strips, ranks[i].upper);
    }
    if (interpolate_angles) found[i] = {macenko::angle_of_key(found[i].lower), macenko::angle_of_key(found[i].upper)};
    result[i] = macenko::interpolate(found[i].lower, found[i].upper, ranks[i].weight);
  }
}

}  // namespace ernet::cpu
