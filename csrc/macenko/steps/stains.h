// From moments to the plane of the two stains, from two angles to the stain matrix, from the matrix to concentrations.
#pragma once

#include "macenko/steps/eigen3.h"
#include "macenko/steps/elementary.h"
#include "macenko/steps/od.h"

namespace ernet::macenko {

// The same numbers as in ernet_fast/stain/result.py; a test holds them equal.
enum Status : int32_t {
  kOk = 0,
  kTooFewTissuePixels = 1,
  kRankDeficient = 2,
  kZeroConcentration = 3,
  kNonFinite = 4,
};
constexpr int64_t kMinTissuePixels = 10;
constexpr double kRankTolerance = 1e-10;
constexpr double kMinConcentration = 1e-6;
// Components of two stain vectors that are at most this far apart are equal: they differ by rounding.
constexpr double kEqualComponents = 1e-6;

struct Parameters {
  double io;
  double alpha;  // percent
  double beta;
  bool nearest;
};

// Orthonormal directions in OD space: `first` of the middle eigenvalue, `second` of the largest.
struct Plane {
  double first[3];
  double second[3];
};

// Columns haematoxylin and eosin.
struct Stain {
  double h[3];
  double e[3];
};

ERNET_HOST_DEVICE double dot3(const double a[3], const double b[3]) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

// The plane of the two largest principal directions of the tissue, with signs that keep its angles off the cut of
// atan2: `second` points towards the mean OD, `first` has a red component that is not negative.
ERNET_HOST_DEVICE Status plane_of_moments(const double moments[kMomentCount], Plane& plane) {
  const double n = moments[0];
  if (!(n >= double(kMinTissuePixels))) return kTooFewTissuePixels;
  const double mean[3] = {moments[1] / n, moments[2] / n, moments[3] / n};
  const double* product = moments + 4;
  double covariance[6];
  int k = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = i; j < 3; ++j, ++k) covariance[k] = (product[k] - n * mean[i] * mean[j]) / (n - 1);
  }
  const Eigen3 e = eigen3(covariance);
  if (!(e.value[1] > kRankTolerance * (product[0] + product[3] + product[5]) / n)) return kRankDeficient;
  const double first = e.vector[1][0] < 0 ? -1.0 : 1.0;
  const double second = dot3(e.vector[2], mean) < 0 ? -1.0 : 1.0;
  for (int i = 0; i < 3; ++i) {
    plane.first[i] = first * e.vector[1][i];
    plane.second[i] = second * e.vector[2][i];
  }
  return kOk;
}

// Haematoxylin absorbs more red; of two that absorb as much red it absorbs less green; then more blue.
ERNET_HOST_DEVICE bool is_haematoxylin(const double a[3], const double b[3]) {
  if (fabs(a[0] - b[0]) > kEqualComponents) return a[0] > b[0];
  if (fabs(a[1] - b[1]) > kEqualComponents) return a[1] < b[1];
  return a[2] > b[2];
}

// The stain matrix whose columns are the directions at the two extreme angles.
ERNET_HOST_DEVICE Status stain_of_angles(const Plane& plane, double min_angle, double max_angle, Stain& stain) {
  double low_cos, low_sin, high_cos, high_sin;
  cos_sin(min_angle, low_cos, low_sin);
  cos_sin(max_angle, high_cos, high_sin);
  double low[3];
  double high[3];
  for (int i = 0; i < 3; ++i) {
    low[i] = plane.first[i] * low_cos + plane.second[i] * low_sin;
    high[i] = plane.first[i] * high_cos + plane.second[i] * high_sin;
  }
  const bool low_is_h = is_haematoxylin(low, high);
  for (int i = 0; i < 3; ++i) {
    stain.h[i] = low_is_h ? low[i] : high[i];
    stain.e[i] = low_is_h ? high[i] : low[i];
  }
  const double he = dot3(stain.h, stain.e);
  const double determinant = dot3(stain.h, stain.h) * dot3(stain.e, stain.e) - he * he;
  return determinant > kRankTolerance ? kOk : kRankDeficient;
}

// [count][3][2], [count][2] and [count]; NaN where the status is not 0.
struct FitResult {
  double* stain;
  double* maximum;
  int32_t* status;
};

ERNET_HOST_DEVICE void write_fit(const FitResult& fit, int64_t image, const Stain& stain, const double maximum[2],
                                 int32_t status) {
  const bool ok = status == kOk;
  const double nan = bits_as<double>(uint64_t(0x7ff8000000000000));
  for (int k = 0; k < 3; ++k) {
    fit.stain[6 * image + 2 * k] = ok ? stain.h[k] : nan;
    fit.stain[6 * image + 2 * k + 1] = ok ? stain.e[k] : nan;
  }
  for (int t = 0; t < 2; ++t) fit.maximum[2 * image + t] = ok ? maximum[t] : nan;
  fit.status[image] = status;
}

// Pseudo-inverse: concentrations are rows[0] . OD and rows[1] . OD.
ERNET_HOST_DEVICE void concentration_rows(const Stain& stain, double rows[2][3]) {
  const double hh = dot3(stain.h, stain.h);
  const double ee = dot3(stain.e, stain.e);
  const double he = dot3(stain.h, stain.e);
  const double scale = 1 / (hh * ee - he * he);
  for (int i = 0; i < 3; ++i) {
    rows[0][i] = (ee * stain.h[i] - he * stain.e[i]) * scale;
    rows[1][i] = (hh * stain.e[i] - he * stain.h[i]) * scale;
  }
}

}  // namespace ernet::macenko
