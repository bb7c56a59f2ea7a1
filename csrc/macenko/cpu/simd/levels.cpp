// Floating-point images that began as bytes: whether values are whole grey levels within rounding.
#include "macenko/cpu/simd/planes.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// Rounded are k / 255 or k times 1 / 255, itself rounded, the scale and its product: less than four times 2^-24 or
// 2^-53 of the level.
constexpr double kSingleRounding = 0x1p-22, kDoubleRounding = 0x1p-51;

// Grey levels of a value, and how far from a whole one it may be in parts of that.
struct Level {
  double value, rounding;
};

static inline Level level_of(float value, double scale) { return {double(value) * scale, kSingleRounding}; }

// A float64 that float32 holds may have been one.
static inline Level level_of(double value, double scale) {
  return {value * scale, double(float(value)) == value ? kSingleRounding : kDoubleRounding};
}

template <class T> static bool whole_levels(const T* values, int64_t count, double scale, uint8_t* levels) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int n = int(count - begin < kBlock ? count - begin : kBlock);
    int32_t wrong = 0;
    for (int i = 0; i < n; ++i) {
      const Level level = level_of(values[begin + i], scale);
      const double from_zero = level.value > 0 ? level.value : 0;  // NaN is wrong below
      const int32_t nearest = int32_t((from_zero < 255 ? from_zero : 255) + 0.5);
      wrong |= !(__builtin_fabs(level.value - nearest) <= level.rounding * nearest);
      levels[begin + i] = uint8_t(nearest);
    }
    if (wrong) return false;
  }
  return true;
}

bool whole_levels_f32(const void* values, int64_t count, double scale, uint8_t* levels) {
  return whole_levels(static_cast<const float*>(values), count, scale, levels);
}

bool whole_levels_f64(const void* values, int64_t count, double scale, uint8_t* levels) {
  return whole_levels(static_cast<const double*>(values), count, scale, levels);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
