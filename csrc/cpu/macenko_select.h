// Exact percentiles of a key over an image that is never sorted nor stored.
#pragma once

#include "cpu/macenko_image.h"
#include "macenko/order_statistic.h"

namespace ernet::cpu {

// The percentiles `percent[0]` of key a and `percent[1]` of key b among the `count` pixels that have keys.
void macenko_percentiles(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, int64_t count,
                         const double percent[2], bool nearest, bool interpolate_angles, const Strips& strips,
                         double result[2]);

}  // namespace ernet::cpu
