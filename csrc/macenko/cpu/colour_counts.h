// Macenko fit of an image of any size from how often each 8-bit colour occurs in it: everything a fit looks at is a sum
// or an order statistic over pixels, and pixels of one colour count alike. Free of torch.
#pragma once

#include "macenko/cpu/image.h"

namespace ernet::cpu {

// One count for each colour, at red + 256 green + 65536 blue.
constexpr int64_t kColours = int64_t(1) << 24;

// Adds the pixels of an 8-bit image to `counts` [kColours].
void macenko_count_colours(const ImageView& image, int64_t* counts);

// The fit of an image with these colours, with the bits of `macenko_fit` of that image.
MacenkoImageFit macenko_fit_colours(const int64_t* counts, const MacenkoParameters& p, const macenko::OdTable& table);

}  // namespace ernet::cpu
