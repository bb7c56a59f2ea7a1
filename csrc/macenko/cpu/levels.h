// Floating-point images that began as bytes, as float32 in [0, 1] nearly always did: their grey levels, from which the
// loops over bytes give the fit of the 8-bit image, bit for bit, and a reconstruction in floating point.
#pragma once

#include "macenko/cpu/image.h"
#include "memory/scratch.h"

namespace ernet::cpu {

// Gives an image its `levels`, for as long as this lives, if every value of it is a whole one within rounding. Pixels
// are looked at block by block, up to the first that is not.
class WholeLevels {
 public:
  WholeLevels(Pixel type, ImageView& image, const Strips& strips);

 private:
  Scratch room_;
};

// The 8-bit image of an image with levels.
inline ImageView byte_image(const ImageView& image) {
  return {image.levels, image.pixel_stride, image.level_channel_stride, image.pixels, 1.0};
}

}  // namespace ernet::cpu
