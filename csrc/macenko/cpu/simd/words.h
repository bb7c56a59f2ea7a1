// Logarithms of 8-bit levels in 16 bits, and linear forms of them with a known error: what tells nearly every pixel of
// a tail from the others. Included by the loops, once per instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/simd/tails.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// ln((I + 1) / 16) in units of 1 / kWordScale, which fills 16 bits whatever Io is: rounded from the fixed-point OD of
// the level, and off by half a unit and a thousandth.
constexpr int kWordShift = 11;
constexpr double kWordScale = macenko::kOdScale / (1 << kWordShift);
constexpr double kLargestWord = 2.7725887222397811 * kWordScale + 1;

static inline int32_t word_origin(double io) {
  return int32_t(__builtin_rint(__builtin_log(io / 16) * macenko::kOdScale)) + (1 << (kWordShift - 1));
}
static inline int16_t word_of(int32_t fixed_od, int32_t origin) { return int16_t((origin - fixed_od) >> kWordShift); }

// The product of two 16-bit numbers and 2^-15, rounded; one instruction where there is one.
static inline int16_t rounded_product(int16_t a, int16_t b) { return int16_t(((int32_t(a) * b >> 14) + 1) >> 1); }

// Three rounded products of words, and a constant: not negative wherever the form reaches its limit.
struct WordForm {
  int16_t w[3];
  int16_t constant;

  int16_t operator()(int16_t red, int16_t green, int16_t blue) const {
    return int16_t(constant + rounded_product(red, w[0]) + rounded_product(green, w[1]) + rounded_product(blue, w[2]));
  }
};

// With w the weight of an OD and G the gain, W = -w G 2^15 rounded times a word is off by 1/2 |word| 2^-15 < 0.35, a
// rounded product by 1/2, and the word's own rounding makes |w| G / 2: less than 3 in all.
constexpr double kFormError = 4;                        // the rest is for the rounding of exact keys in float64
constexpr double kSumOfWeights = 16300 / kLargestWord;  // G sum |w|: products and the constant stay within 2^14
constexpr double kMostConstant = 16383;
static_assert(kSumOfWeights < 1, "weights are 16-bit fractions");

static inline WordForm word_form(const Form& form, double io) {
  const double sum = __builtin_fabs(form.w[0]) + __builtin_fabs(form.w[1]) + __builtin_fabs(form.w[2]);
  const bool usable = sum > 1e-30 && form.limit > -1e30 && form.limit < 1e30;
  const double gain = usable ? kSumOfWeights / sum : 0;
  WordForm words;
  for (int k = 0; k < 3; ++k) words.w[k] = int16_t(__builtin_rint(-form.w[k] * gain * 32768));
  const double offset = __builtin_log(io / 16) * (form.w[0] + form.w[1] + form.w[2]) - form.limit;
  double constant = usable ? __builtin_ceil(gain * kWordScale * offset) + kFormError : -form.limit;
  constant = constant < kMostConstant ? constant : kMostConstant;
  constant = constant > -kMostConstant ? constant : -kMostConstant;
  words.constant = int16_t(constant);
  return words;
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
