// Brackets of percentiles in floating-point images. In the tails float32 logarithms with a known error say which pixels
// may matter, and those few get the keys in float64 that elsewhere every pixel gets.
#include "macenko/cpu/simd/blocks.h"
#include "macenko/cpu/simd/log_coarse.h"
#include "macenko/cpu/simd/tails.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

static void scan_bracket(const double* key, const uint8_t* live, Bracket& bracket) {
  alignas(64) uint8_t inside[kBlock];
  const double low = bracket.low;
  const double high = bracket.high;
  int64_t below = 0;
  for (int i = 0; i < kBlock; ++i) {
    below += (key[i] < low) & live[i];
    inside[i] = uint8_t((key[i] >= low) & (key[i] <= high) & live[i]);
  }
  bracket.below += below;
  for (int i = 0; i < kBlock; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, inside + i, 8);
    if (eight == 0) continue;
    for (int j = i; j < i + 8; ++j) {
      if (!inside[j]) continue;
      if (bracket.inside < bracket.capacity) bracket.collected[bracket.inside] = key[j];
      ++bracket.inside;
    }
  }
}

template <class T>
static void scan_exactly(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  Block<T> block;
  alignas(64) double a[kBlock];
  alignas(64) double b[kBlock];
  alignas(64) uint8_t live[kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load(image, begin, count, block);
    block_keys(block, keys, image.scale, count, a, b, live);
    scan_bracket(a, live, first);
    scan_bracket(b, live, second);
  }
}

// coarse_log2 of a pixel's intensity from its value: four roundings more, each of 2^-24 of the intensity at most.
constexpr double kLogError = kCoarseError + 4 * 0x1p-24 / kLn2;

// A form of tails.h of coarse logarithms, raised by its error: not negative wherever the form reaches its
// limit.
struct CoarseForm {
  float w[3];
  float constant;
};

static CoarseForm coarse_form(const Form& form, double io) {
  const float infinity = __builtin_inff();
  if (!(form.limit > -1e30 && form.limit < 1e30)) return {{0, 0, 0}, form.limit > 0 ? -infinity : infinity};
  // OD = ln Io - ln 2 log2(intensity). Logarithms less the constant are below 11, so that products, sums and the
  // constant stay below 16 times the weights, and are rounded eight times.
  const double weights = sum_of_magnitudes(form.w);
  const double error = weights * (kLn2 * kLogError + 8 * 16 * 0x1p-24) + 8 * __builtin_fabs(form.limit) * 0x1p-24;
  const double sum = form.w[0] + form.w[1] + form.w[2];
  CoarseForm coarse;
  for (int k = 0; k < 3; ++k) coarse.w[k] = float(-kLn2 * form.w[k]);
  coarse.constant = float((__builtin_log(io) - kLn2 * kCoarseConstant) * sum - form.limit + error);
  return coarse;
}

// What is known of the pixels of a block without a logarithm in float64.
struct Coarse {
  alignas(64) float log2[3][kBlock];
  alignas(64) uint8_t chosen[kBlock];   // maybe tissue, if that matters, and maybe in a tail or not surely tissue
  alignas(64) uint8_t certain[kBlock];  // surely tissue
};

template <class T> static void coarse_logs(const Block<T>& block, double scale, Coarse& coarse) {
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; ++i) {
      const float level = float(block.value[k][i] * T(scale));
      coarse.log2[k][i] = coarse_log2((level > -0.5f ? level : -0.5f) + 1.0f);
    }
  }
}

// `darkest` and `brightest`: up to the one a pixel's largest logarithm is surely tissue, beyond the other surely not.
static void choose(const CoarseForm forms[2], float darkest, float brightest, Coarse& coarse) {
  const CoarseForm f = forms[0];
  const CoarseForm g = forms[1];
  for (int i = 0; i < kBlock; ++i) {
    const float r = coarse.log2[0][i];
    const float green = coarse.log2[1][i];
    const float b = coarse.log2[2][i];
    const float first = f.w[0] * r + (f.w[1] * green + (f.w[2] * b + f.constant));
    const float second = g.w[0] * r + (g.w[1] * green + (g.w[2] * b + g.constant));
    const float rg = r > green ? r : green;
    const float largest = rg > b ? rg : b;
    const bool certain = largest <= darkest;
    coarse.certain[i] = uint8_t(certain);
    coarse.chosen[i] = uint8_t((largest <= brightest) & ((first >= 0) | (second >= 0) | !certain));
  }
}

// Chosen pixels, and whether each is surely tissue.
template <class T> struct Candidates {
  Block<T> block = {};
  uint8_t certain[kBlock];
  int count = 0;
};

// The scan of one range: `total` counts the pixels that have keys, `reached` those whose key is not below the bracket.
template <class T> class TailScan {
 public:
  TailScan(const Keys& keys, double scale, Bracket& first, Bracket& second)
      : keys_(keys), scale_(scale), bracket_{&first, &second} {}

  void run(const ImageView& image, PixelSpan span) {
    const bool angles = keys_.kind == KeyKind::angle;
    const CoarseForm forms[2] = {coarse_form(tail_form(keys_, 0, *bracket_[0]), keys_.io),
                                 coarse_form(tail_form(keys_, 1, *bracket_[1]), keys_.io)};
    const double limit = (__builtin_log(keys_.io) - keys_.beta) / kLn2 - kCoarseConstant;
    const double error = kLogError + 16 * 0x1p-23;
    const float infinity = __builtin_inff();
    const float darkest = angles ? float(limit - error) : infinity;
    const float brightest = angles ? float(limit + error) : infinity;
    for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
      const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
      load(image, begin, count, block_);
      coarse_logs(block_, scale_, coarse_);
      choose(forms, darkest, brightest, coarse_);
      clear_end(coarse_.chosen, count);
      clear_end(coarse_.certain, count);
      for (int i = 0; i < kBlock; ++i) total_ += coarse_.certain[i];
      gather();
    }
    examine();
    // Below a bracket of the upper tail are all pixels that do not reach it, chosen or not.
    for (int i = 0; i < 2; ++i) {
      if (bracket_[i]->fraction > 0.5) bracket_[i]->below = total_ - reached_[i];
    }
  }

 private:
  void gather() {
    for (int i = 0; i < kBlock; i += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, coarse_.chosen + i, 8);
      if (eight == 0) continue;
      for (int j = i; j < i + 8; ++j) {
        if (!coarse_.chosen[j]) continue;
        for (int k = 0; k < 3; ++k) candidates_.block.value[k][candidates_.count] = block_.value[k][j];
        candidates_.certain[candidates_.count] = coarse_.certain[j];
        if (++candidates_.count == kBlock) examine();
      }
    }
  }

  // Exact keys of the candidates.
  void examine() {
    alignas(64) double key[2][kBlock];
    alignas(64) uint8_t live[kBlock];
    const int count = candidates_.count;
    if (count == 0) return;
    block_keys(candidates_.block, keys_, scale_, count, key[0], key[1], live);
    int64_t all = 0;
    for (int i = 0; i < count; ++i) {
      all += live[i];
      total_ += live[i] & (candidates_.certain[i] ^ 1);
    }
    for (int i = 0; i < 2; ++i) {
      const int64_t before = bracket_[i]->below;
      scan_bracket(key[i], live, *bracket_[i]);
      reached_[i] += all - (bracket_[i]->below - before);
    }
    candidates_.count = 0;
  }

  const Keys& keys_;
  double scale_;
  Bracket* bracket_[2];
  Block<T> block_;
  Coarse coarse_;
  Candidates<T> candidates_;
  int64_t total_ = 0;
  int64_t reached_[2] = {0, 0};
};

template <class T>
static void scan(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  // Levels of images that have keys are at least -1/2.
  const double most = __builtin_log(2 * keys.io);
  const bool angles = keys.kind == KeyKind::angle;
  if (!in_tail(first) || !in_tail(second) || (angles && !angles_are_above_axis(keys, keys.beta, most))) {
    scan_exactly<T>(image, span, keys, first, second);
    return;
  }
  TailScan<T>(keys, image.scale, first, second).run(image, span);
}

void scan_f32(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  scan<float>(image, span, keys, first, second);
}

void scan_f64(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  scan<double>(image, span, keys, first, second);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
