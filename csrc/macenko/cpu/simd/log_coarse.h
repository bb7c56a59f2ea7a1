// Logarithms of intensity in float32 that are good enough to say on which side of a bracket nearly every pixel lies.
// Included by the loops, once per instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// log2(intensity) - kCoarseConstant in float32: with intensity = 2^k m, k + a polynomial of degree 5 in m. Off by at
// most kCoarseError up to 512 (every m was tried, fused and not).
constexpr double kCoarseError = 1.6e-5;
constexpr double kCoarseConstant = -2.79415369;
constexpr double kLn2 = 0.693147180559945309417;

static inline float coarse_log2(float intensity) {
  const int32_t bits = macenko::bits_as<int32_t>(intensity);
  const float exponent = float((bits >> 23) - 127);
  const float m = macenko::bits_as<float>((bits & 0x7fffff) | 0x3f800000);
  float p = 0.0439286269f;
  p = p * m - 0.409475595f;
  p = p * m + 1.61017752f;
  p = p * m - 3.52021885f;
  p = p * m + 5.06975651f;
  return p * m + exponent;
}

static inline double sum_of_magnitudes(const double row[3]) {
  return __builtin_fabs(row[0]) + __builtin_fabs(row[1]) + __builtin_fabs(row[2]);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
