// Brackets of percentiles. In the tails approximate logarithms with a known error, float32 or for 8-bit images 16 bits,
// say which pixels may matter, and those few get the keys in float64 that elsewhere every pixel gets.
#include "macenko/cpu/simd/blocks.h"
#include "macenko/cpu/simd/log_coarse.h"
#include "macenko/cpu/simd/u8.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// Which of kFlags flags, each 0 or 1, are set.
constexpr int kFlags = 32;
static inline uint32_t flags_set(const uint8_t* flags) {
#if defined(__AVX2__)
  const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(flags));
  return uint32_t(_mm256_movemask_epi8(_mm256_cmpgt_epi8(all, _mm256_setzero_si256())));
#else
  uint32_t set = 0;
  for (int i = 0; i < kFlags; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, flags + i, 8);
    for (int j = i; eight != 0 && j < i + 8; ++j) set |= uint32_t(flags[j]) << j;
  }
  return set;
#endif
}

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
  for (int i = 0; i < kBlock; i += kFlags) {
    for (uint32_t set = flags_set(inside + i); set != 0; set &= set - 1) {
      if (bracket.inside == bracket.capacity && bracket.needed > 0) make_room(bracket);
      if (bracket.inside < bracket.capacity) bracket.collected[bracket.inside] = key[i + __builtin_ctz(set)];
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

  float operator()(float red, float green, float blue) const {
    return w[0] * red + (w[1] * green + (w[2] * blue + constant));
  }
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
struct Known {
  alignas(64) uint8_t chosen[kBlock];   // maybe tissue, if that matters, and maybe in a tail or not surely tissue
  alignas(64) uint8_t certain[kBlock];  // surely tissue; of 8-bit images the chosen ones all are
  int tissue;                           // how many surely are
};

// Says of the pixels of floating-point images what is known of them.
template <class T> class Chooser {
 public:
  Chooser(const ImageView& image, const Keys& keys, const Form forms[3]) : image_(image) {
    for (int i = 0; i < 3; ++i) forms_[i] = coarse_form(forms[i], keys.io);
    const double limit = (__builtin_log(keys.io) - keys.beta) / kLn2 - kCoarseConstant;
    const double error = kLogError + 16 * 0x1p-23;
    const bool angles = keys.kind == KeyKind::angle;
    darkest_ = angles ? float(limit - error) : __builtin_inff();
    brightest_ = angles ? float(limit + error) : __builtin_inff();
  }

  void operator()(int64_t begin, int count, Known& known) {
    load(image_, begin, count, block_);
    for (int k = 0; k < 3; ++k) {
      for (int i = 0; i < kBlock; ++i) {
        const float level = float(block_.value[k][i] * T(image_.scale));
        log2_[k][i] = coarse_log2((level > -0.5f ? level : -0.5f) + 1.0f);
      }
    }
    const CoarseForm f = forms_[0], g = forms_[1], axis = forms_[2];
    for (int i = 0; i < kBlock; ++i) {
      const float red = log2_[0][i], green = log2_[1][i], blue = log2_[2][i];
      const float rg = red > green ? red : green;
      const float largest = rg > blue ? rg : blue;
      const bool certain = largest <= darkest_;
      const bool reaches = (f(red, green, blue) >= 0) | (g(red, green, blue) >= 0) | (axis(red, green, blue) >= 0);
      known.certain[i] = uint8_t(certain);
      known.chosen[i] = uint8_t((largest <= brightest_) & (reaches | !certain));
    }
    clear_end(known.chosen, count);
    clear_end(known.certain, count);
    known.tissue = 0;
    for (int i = 0; i < kBlock; ++i) known.tissue += known.certain[i];
  }

 private:
  const ImageView& image_;
  CoarseForm forms_[3];
  float darkest_;    // up to this one a pixel's largest logarithm is surely tissue,
  float brightest_;  // beyond this one surely not
  Block<T> block_;
  alignas(64) float log2_[3][kBlock];
};

// Of 8-bit images, from words that are kept or made anew.
template <> class Chooser<uint8_t> {
 public:
  Chooser(const ImageView& image, const Keys& keys, const Form forms[3])
      : image_(image), table_(*keys.table), angles_(keys.kind == KeyKind::angle), origin_(word_origin(keys.io)) {
    for (int i = 0; i < 3; ++i) forms_[i] = word_form(forms[i], keys.io);
    const int limit = table_.tissue_limit;
    brightest_ = !angles_ ? INT16_MAX : limit < 0 ? INT16_MIN : word_of(table_.fixed[limit], origin_);
  }

  void operator()(int64_t begin, int count, Known& known) {
    const int16_t* words = image_.words + begin;
    int64_t stride = image_.pixels;
    if (image_.words == nullptr) {
      load_levels(image_, begin, count, block_);
      fixed_densities(block_, count, table_, fixed_);
      words_of(fixed_, count, origin_, made_, kBlock);
      words = made_;
      stride = kBlock;
    }
    angles_ ? choose<true>(words, stride, count, known) : choose<false>(words, stride, count, known);
    clear_end(known.chosen, count);
  }

 private:
  template <bool kAngles> void choose(const int16_t* words, int64_t stride, int count, Known& known) const {
    const WordForm f = forms_[0], g = forms_[1], axis = forms_[2];
    const int16_t brightest = brightest_;
    const int16_t *const reds = words, *const greens = words + stride, *const blues = words + 2 * stride;
    int16_t all = 0;
    for (int i = 0; i < count; ++i) {
      const int16_t red = reds[i], green = greens[i], blue = blues[i];
      int16_t short_of = int16_t(f(red, green, blue) & g(red, green, blue));  // negative where both are
      int16_t tissue = -1;
      if constexpr (kAngles) {
        short_of = int16_t(short_of & axis(red, green, blue));
        const int16_t rg = red > green ? red : green;
        tissue = int16_t(-((rg > blue ? rg : blue) <= brightest));
      }
      all = int16_t(all - tissue);
      known.certain[i] = 1;
      known.chosen[i] = uint8_t(tissue & (short_of >= 0));
    }
    known.tissue = all;
  }

  const ImageView& image_;
  const OdTable& table_;
  WordForm forms_[3];
  bool angles_;
  int32_t origin_;
  int16_t brightest_;
  ByteBlock block_;
  alignas(64) int32_t fixed_[3][kBlock];
  alignas(64) int16_t made_[3 * kBlock];
};

// Chosen pixels, and whether each is surely tissue.
template <class T> struct Candidates {
  Block<T> block = {};
  uint8_t certain[kBlock];
  int count = 0;
};

// The scan of one range: `total` counts the pixels that have keys, `reached` those whose key is not below the bracket.
template <class T> class TailScan {
 public:
  TailScan(const ImageView& image, const Keys& keys, Bracket& first, Bracket& second)
      : image_(image), keys_(keys), bracket_{&first, &second} {}

  void run(PixelSpan span) {
    constexpr Form never = {{0, 0, 0}, 1e300};
    const Form forms[3] = {tail_form(keys_, 0, *bracket_[0]), tail_form(keys_, 1, *bracket_[1]),
                           keys_.kind == KeyKind::angle ? axis_form(keys_) : never};
    Chooser<T> choose(image_, keys_, forms);
    for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
      const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
      choose(begin, count, known_);
      total_ += known_.tissue;
      gather(begin);
    }
    examine();
    // Below a bracket of the upper tail are all pixels that do not reach it, chosen or not.
    for (int i = 0; i < 2; ++i) {
      if (bracket_[i]->fraction > 0.5) bracket_[i]->below = total_ - reached_[i];
    }
  }

 private:
  void gather(int64_t begin) {
    const T* const data = static_cast<const T*>(image_.data) + begin * image_.pixel_stride;
    for (int i = 0; i < kBlock; i += kFlags) {
      for (uint32_t set = flags_set(known_.chosen + i); set != 0; set &= set - 1) {
        const int j = i + __builtin_ctz(set);
        const T* const pixel = data + j * image_.pixel_stride;
        const int n = candidates_.count++;
        for (int k = 0; k < 3; ++k) candidates_.block.value[k][n] = pixel[k * image_.channel_stride];
        candidates_.certain[n] = known_.certain[j];
        if (n + 1 == kBlock) examine();
      }
    }
  }

  // Exact keys of the candidates.
  void examine() {
    alignas(64) double key[2][kBlock];
    alignas(64) uint8_t live[kBlock];
    const int count = candidates_.count;
    if (count == 0) return;
    block_keys(candidates_.block, keys_, image_.scale, count, key[0], key[1], live);
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

  const ImageView& image_;
  const Keys& keys_;
  Bracket* bracket_[2];
  Known known_;
  Candidates<T> candidates_;
  int64_t total_ = 0;
  int64_t reached_[2] = {0, 0};
};

template <class T>
static void scan(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  if (in_tail(first) && in_tail(second)) {
    TailScan<T>(image, keys, first, second).run(span);
  } else {
    scan_exactly<T>(image, span, keys, first, second);
  }
}

void scan_bytes(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  scan<uint8_t>(image, span, keys, first, second);
}

void scan_f32(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  scan<float>(image, span, keys, first, second);
}

void scan_f64(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  scan<double>(image, span, keys, first, second);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
