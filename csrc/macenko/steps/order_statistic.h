// Which order statistics a percentile needs, and a key that orders pixels as their angles do without an atan2 each.
#pragma once

#include "macenko/steps/host_device.h"

namespace ernet::macenko {

// A percentile is value[lower] + weight (value[upper] - value[lower]) of the sorted values; upper is lower or lower
// + 1.
struct Ranks {
  int64_t lower;
  int64_t upper;
  double weight;
};

// `nearest`: k = 1 + round(0.01 q (n - 1)) with halves to even; else linear interpolation as numpy.percentile does it.
ERNET_HOST_DEVICE Ranks percentile_ranks(int64_t count, double percent, bool nearest) {
  if (nearest) {
    const int64_t rank = int64_t(rint(0.01 * percent * double(count - 1)));
    return {rank, rank, 0.0};
  }
  const double position = double(count - 1) * (percent / 100);
  const int64_t lower = int64_t(floor(position));
  if (lower >= count - 1) return {count - 1, count - 1, 0.0};
  return {lower, lower + 1, position - double(lower)};
}

// Rounds as NumPy does: from the nearer end.
ERNET_HOST_DEVICE double interpolate(double lower, double upper, double weight) {
  const double step = upper - lower;
  return weight < 0.5 ? lower + step * weight : upper - step * (1 - weight);
}

// Increases with atan2(y, x) from -2 to 2; a quarter turn is 1. The angle of (0, 0) is 0, as atan2 has it.
ERNET_HOST_DEVICE double pseudo_angle(double x, double y) {
  const double norm = fabs(x) + fabs(y);
  const double turn = 1 - x / (norm > 0 ? norm : 1);
  const double key = y < 0 ? -turn : turn;
  return norm > 0 ? key : 0;
}

// The angle in (-pi, pi] whose pseudo-angle is `key`.
ERNET_HOST_DEVICE double angle_of_key(double key) {
  const double x = 1 - fabs(key);
  const double y = 1 - fabs(x);
  return atan2(key < 0 ? -y : y, x);
}

// An unsigned integer that orders as the double does (no NaN), for radix selection, and back.
ERNET_HOST_DEVICE uint64_t ordered_bits(double value) {
  const uint64_t bits = bits_as<uint64_t>(value);
  return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

ERNET_HOST_DEVICE double value_of_ordered_bits(uint64_t ordered) {
  return bits_as<double>(ordered >> 63 ? ordered & ~(uint64_t(1) << 63) : ~ordered);
}

}  // namespace ernet::macenko
