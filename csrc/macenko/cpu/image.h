// Macenko fit and reconstruction of one image on the CPU, free of torch but for its 16-bit types: the steps of
// csrc/macenko over the loops of one instruction set. Results do not depend on how many threads share an image.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "macenko/cpu/kernels.h"

namespace ernet::cpu {

using MacenkoParameters = macenko::Parameters;

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

// Count, sums and products of the tissue ODs in real units (macenko/steps/od.h). Returns how many pixels hold no grey
// level.
int64_t macenko_moments(Pixel type, const ImageView& image, const MacenkoParameters& p, const macenko::OdTable& table,
                        const Strips& strips, double moments[macenko::kMomentCount]);

MacenkoImageFit macenko_fit(Pixel type, const ImageView& image, const MacenkoParameters& p,
                            const macenko::OdTable& table, const Strips& strips);

// What the loops need for a reconstruction with `matrix` (macenko/steps/reconstruct.h) and `shift`, but for where to
// write it.
Reconstruction make_reconstruction(const double matrix[3][3], const double shift[3], const macenko::OdTable& table,
                                   double io);

inline MacenkoImageFit no_fit(int32_t status) {
  const double nan = std::nan("");
  return {{{nan, nan, nan}, {nan, nan, nan}}, {nan, nan}, status};
}

// Moments in real units of the sums of fixed-point ODs and of their products.
template <class Sum>
void moments_of_sums(int64_t count, const Sum sum[3], const uint128 product[6], double moments[macenko::kMomentCount]) {
  const double scale = 1 / macenko::kOdScale;
  moments[0] = double(count);
  for (int k = 0; k < 3; ++k) moments[1 + k] = double(sum[k]) * scale;
  for (int k = 0; k < 6; ++k) moments[4 + k] = double(product[k]) * (scale * scale);
}

// The steps from the moments to the stains; `percentiles` finds two percentiles of keys, of angles as angles.
template <class Percentiles>
MacenkoImageFit fit_of_moments(const double moments[macenko::kMomentCount], const MacenkoParameters& p,
                               const macenko::OdTable& table, const Percentiles& percentiles) {
  MacenkoImageFit fit;
  const auto find = [&](KeyKind kind, const double a[3], const double b[3], double low, double high, double* result) {
    const Keys keys = {kind, {a[0], a[1], a[2]}, {b[0], b[1], b[2]}, p.beta, p.io, &table};
    const double percent[2] = {low, high};
    percentiles(keys, percent, result);
  };
  macenko::Plane plane;
  fit.status = macenko::plane_of_moments(moments, plane);
  if (fit.status != macenko::kOk) return no_fit(fit.status);
  double angle[2], rows[2][3];
  find(KeyKind::angle, plane.first, plane.second, p.alpha, 100 - p.alpha, angle);
  fit.status = macenko::stain_of_angles(plane, angle[0], angle[1], fit.stain);
  if (fit.status != macenko::kOk) return no_fit(fit.status);
  macenko::concentration_rows(fit.stain, rows);
  const double* maximum = fit.max_concentration;
  find(KeyKind::linear, rows[0], rows[1], 99, 99, fit.max_concentration);
  const bool usable = maximum[0] > macenko::kMinConcentration && maximum[1] > macenko::kMinConcentration;
  return usable ? fit : no_fit(macenko::kZeroConcentration);
}

// Writes every result, laid out as the image, in one pass over its pixels.
void macenko_reconstruct(Pixel type, const ImageView& image, const Reconstruction* r, int results,
                         const Strips& strips);

// Images up to this size are ordered whole.
constexpr int64_t kCollectAll = 2048;

// The percentiles `percent[0]` of key a and `percent[1]` of key b among the `count` pixels that have keys. `sample` are
// some pixels of the image that say where to look; none if the image is not to be sampled.
void macenko_percentiles(const MacenkoLoops& loops, const ImageView& image, const ImageView& sample, const Keys& keys,
                         int64_t count, const double percent[2], bool nearest, bool interpolate_angles,
                         const Strips& strips, double result[2]);

// The input of a network: (I' / range - mean) / std.
enum class NetworkType : int { f32, bf16, f16 };

struct NetworkInput {
  void* data;  // [pixels, 3]
  NetworkType type;
  double range;  // the value of the image that stands for 1
  double mean[3];
  double std[3];
};

// The values of `macenko_reconstruct` (8-bit ones truncated), or without `r` the image itself, scaled; the image is
// read once and the result written once.
void macenko_scaled(Pixel type, const ImageView& image, const Reconstruction* r, const Strips& strips,
                    const NetworkInput& out);

// One count for each colour, at red + 256 green + 65536 blue.
constexpr int64_t kColours = int64_t(1) << 24;

// Adds the pixels of an 8-bit image to `counts` [kColours].
void macenko_count_colours(const ImageView& image, int64_t* counts);

// The fit of an image with these colours, with the bits of `macenko_fit` of that image.
MacenkoImageFit macenko_fit_colours(const int64_t* counts, const MacenkoParameters& p, const macenko::OdTable& table);

}  // namespace ernet::cpu
