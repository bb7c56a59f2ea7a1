// Exact percentiles of a key over an image that is never sorted nor stored.
#pragma once

#include "macenko/cpu/image.h"
#include "macenko/steps/order_statistic.h"

namespace ernet::cpu {

// Images up to this size are ordered whole.
constexpr int64_t kCollectAll = 2048;

// The percentiles `percent[0]` of key a and `percent[1]` of key b among the `count` pixels that have keys. `sample` are
// some pixels of the image that say where to look; none if the image is not to be sampled.
void macenko_percentiles(const MacenkoLoops& loops, const ImageView& image, const ImageView& sample, const Keys& keys,
                         int64_t count, const double percent[2], bool nearest, bool interpolate_angles,
                         const Strips& strips, double result[2]);

}  // namespace ernet::cpu
