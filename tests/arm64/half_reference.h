// Conversions between float and float16, one number at a time by integer arithmetic: what those of simd/vec.h are held
// against.
#pragma once

#include <cstdint>
#include <cstring>

namespace half_reference {

using std::memcpy;

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // inf, nan
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x0400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // zero and subnormal numbers: magnitude * 2^-24 is exact
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t float_to_half(float value) {  // round to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // nan
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520 rounds to infinity
  if (magnitude < 0x38800000u) {                                               // below 2^-14: subnormal
    float absolute;
    memcpy(&absolute, &magnitude, 4);
    const float shifted = absolute + 0.5f;  // aligns the bits of value * 2^24 at the end of the significand
    uint32_t shifted_bits;
    memcpy(&shifted_bits, &shifted, 4);
    return static_cast<uint16_t>(sign | (shifted_bits - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace half_reference
