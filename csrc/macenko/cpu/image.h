// Macenko fit and reconstruction of one image on the CPU, free of torch: the steps of csrc/macenko over the loops of
// one instruction set. Results do not depend on how many threads share an image.
#pragma once

#include <cstdint>
#include <functional>

#include "macenko/cpu/kernels.h"

namespace ernet::cpu {

struct MacenkoParameters {
  double io;
  double alpha;  // percent
  double beta;
  bool nearest;
};

struct MacenkoImageFit {
  macenko::Stain stain;
  double max_concentration[2];
  int32_t status;
};

// Runs body(0) ... body(tasks - 1), maybe in parallel. `tasks` says how many tasks an image is to be cut into.
struct Strips {
  int64_t tasks;
  std::function<void(int64_t, const std::function<void(int64_t)>&)> run;
};

Strips one_strip();

inline PixelSpan span_of_strip(int64_t pixels, int64_t strip, int64_t strips) {
  const int64_t size = (pixels + strips - 1) / strips;
  const int64_t begin = strip * size < pixels ? strip * size : pixels;
  return {begin, begin + size < pixels ? begin + size : pixels};
}

// Count, sums and products of the tissue ODs in real units (macenko/od.h). Returns how many pixels hold no grey level.
int64_t macenko_moments(Pixel type, const ImageView& image, const MacenkoParameters& p, const macenko::OdTable& table,
                        const Strips& strips, double moments[macenko::kMomentCount]);

MacenkoImageFit macenko_fit(Pixel type, const ImageView& image, const MacenkoParameters& p,
                            const macenko::OdTable& table, const Strips& strips);

// What the loops need for a reconstruction with `matrix` (macenko/steps/reconstruct.h) and `shift`, but for where to
// write it.
Reconstruction make_reconstruction(Pixel type, const double matrix[3][3], const double shift[3],
                                   const macenko::OdTable& table, double io);

// Writes every result, laid out as the image, in one pass over its pixels.
void macenko_reconstruct(Pixel type, const ImageView& image, const Reconstruction* r, int results,
                         const Strips& strips);

}  // namespace ernet::cpu
