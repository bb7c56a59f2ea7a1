// Reconstruction straight into a network's input: (I' / range - mean) / std as float32, bfloat16 or float16, channels
// last.
#pragma once

#include "macenko/cpu/image.h"

namespace ernet::cpu {

enum class NetworkType : int { f32, bf16, f16 };

struct NetworkInput {
  void* data;  // [pixels, 3]
  NetworkType type;
  double range;  // the value of the image that stands for 1
  double mean[3];
  double std[3];
};

// The values of `macenko_reconstruct` (8-bit ones truncated), scaled; the image is read once and the result written
// once.
void macenko_reconstruct_scaled(Pixel type, const ImageView& image, const Reconstruction& r, const Strips& strips,
                                const NetworkInput& out);

// The image itself, scaled.
void macenko_scaled(Pixel type, const ImageView& image, const Strips& strips, const NetworkInput& out);

}  // namespace ernet::cpu
