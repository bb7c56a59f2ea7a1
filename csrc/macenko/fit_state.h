// A Macenko fit as a machine: passes over the pixels count keys, and between two passes one thread decides here what
// the next one counts. The GPU's plans differ only in how they count.
#pragma once

#include "macenko/selection.h"
#include "macenko/stains.h"

namespace ernet {
namespace macenko {

enum class Phase : int32_t {
  angle_coarse = 0,  // pseudo-angles of the tissue, approximate
  angle_exact = 1,
  concentration_coarse = 2,  // concentrations of all pixels, approximate
  concentration_exact = 3,
  finished = 4,
};

struct FitParameters {
  double io;
  double alpha;  // percent
  double beta;
  double od_min;  // of any pixel
  double od_max;
  int64_t pixels;  // of an image
  int32_t tissue_limit;
  bool nearest;
};

// What a pass needs to know of an image. Keys are row[0] . OD and row[1] . OD: the coordinates (x, y) of a
// pseudo-angle, or the two concentrations.
struct PassKeys {
  double row[2][3];
  float light_row[2][3];  // for log2((I + 1) / Io) in place of OD
  float bins_per_unit[2];
  Window window[2];
};

struct FitState {
  Phase phase;
  Status status;
  PassKeys keys;
  Selection selection[2];
  double margin[2];
  Plane plane;
  Stain stain;
  double maximum[2];
};

constexpr double kFloatUnit = 0x1p-24;  // half an ulp of 1

// A float32 pseudo-angle is off by at most 15 u S / n + 6 u, with S the sum of the ODs, n = |x| + |y| and u =
// kFloatUnit: by at most 172 u where n > S / (16 ln 2). Pixels beyond that, and those near the cut of the angle, get
// exact keys.
constexpr double kAngleMargin = 512 * kFloatUnit;
constexpr float kSmallestNorm = 1.0f / 16;         // of n, in units of the summed |log2 light|
constexpr float kCutDistance = 1.0f / 65536;       // of |y| where x < 0, in the same units
constexpr double kAngleBinsPerUnit = kBins / 2.0;  // pseudo-angles in [0, 2]; others share the first bin

ERNET_HOST_DEVICE void set_rows(const double a[3], const double b[3], PassKeys& keys) {
  const double ln2 = 0.693147180559945309417;
  for (int k = 0; k < 3; ++k) {
    keys.row[0][k] = a[k];
    keys.row[1][k] = b[k];
    keys.light_row[0][k] = float(-ln2 * a[k]);
    keys.light_row[1][k] = float(-ln2 * b[k]);
  }
}

ERNET_HOST_DEVICE void fail(Status status, FitState& s) {
  s.status = status;
  s.phase = Phase::finished;
}

ERNET_HOST_DEVICE void begin_fit(const double moments[kMomentCount], int64_t invalid, const FitParameters& p,
                                 FitState& s) {
  if (invalid > 0) return fail(kNonFinite, s);
  const Status status = plane_of_moments(moments, s.plane);
  if (status != kOk) return fail(status, s);
  s.status = kOk;
  s.phase = Phase::angle_coarse;
  set_rows(s.plane.first, s.plane.second, s.keys);
  for (int t = 0; t < 2; ++t) {
    begin_selection(int64_t(moments[0]), t == 0 ? p.alpha : 100 - p.alpha, p.nearest, s.selection[t]);
    s.keys.bins_per_unit[t] = float(kAngleBinsPerUnit);
    s.margin[t] = kAngleMargin;
  }
}

ERNET_HOST_DEVICE void begin_concentrations(const FitParameters& p, FitState& s) {
  double rows[2][3];
  concentration_rows(s.stain, rows);
  set_rows(rows[0], rows[1], s.keys);
  const double largest = fabs(p.od_min) > fabs(p.od_max) ? fabs(p.od_min) : fabs(p.od_max);
  for (int t = 0; t < 2; ++t) {
    double greatest = 0;
    double magnitude = 0;
    for (int k = 0; k < 3; ++k) {
      greatest += rows[t][k] * (rows[t][k] > 0 ? p.od_max : p.od_min);
      magnitude += fabs(rows[t][k]);
    }
    begin_selection(p.pixels, 99, p.nearest, s.selection[t]);
    // From 0 to the greatest concentration that a pixel can have.
    s.keys.bins_per_unit[t] = float(kBins / greatest);
    // Five roundings of the row, the logarithm, products and sums; thrice that.
    s.margin[t] = 16 * kFloatUnit * magnitude * largest;
  }
  s.phase = Phase::concentration_coarse;
}

ERNET_HOST_DEVICE void end_angles(const FitParameters& p, FitState& s) {
  double angle[2];
  for (int t = 0; t < 2; ++t) {
    const Selection& found = s.selection[t];
    const double lower = angle_of_key(value_of_ordered_bits(found.lower));
    const double upper = found.upper == found.lower ? lower : angle_of_key(value_of_ordered_bits(found.upper));
    angle[t] = interpolate(lower, upper, found.weight);
  }
  const Status status = stain_of_angles(s.plane, angle[0], angle[1], s.stain);
  if (status != kOk) return fail(status, s);
  begin_concentrations(p, s);
}

ERNET_HOST_DEVICE void end_concentrations(FitState& s) {
  for (int t = 0; t < 2; ++t) {
    const Selection& found = s.selection[t];
    s.maximum[t] = interpolate(value_of_ordered_bits(found.lower), value_of_ordered_bits(found.upper), found.weight);
  }
  const bool usable = s.maximum[0] > kMinConcentration && s.maximum[1] > kMinConcentration;
  s.status = usable ? kOk : kZeroConcentration;
  s.phase = Phase::finished;
}

// The bins of both ranks of both selections.
struct RankBins {
  int32_t bin[2][2];
};

// After a pass has counted approximate keys.
ERNET_HOST_DEVICE void end_coarse(const RankBins& found, FitState& s) {
  for (int t = 0; t < 2; ++t) {
    narrow_approximate(found.bin[t][0], found.bin[t][1], s.keys.bins_per_unit[t], s.margin[t], s.selection[t]);
    s.keys.window[t] = window_of(s.selection[t], s.margin[t]);
  }
  s.phase = s.phase == Phase::angle_coarse ? Phase::angle_exact : Phase::concentration_exact;
}

// After a pass over exact keys, whose result the selections have taken.
ERNET_HOST_DEVICE void end_exact(const FitParameters& p, FitState& s) {
  for (int t = 0; t < 2; ++t) s.keys.window[t] = window_of(s.selection[t], s.margin[t]);
  if (s.selection[0].stage != Stage::done || s.selection[1].stage != Stage::done) return;
  if (s.phase == Phase::angle_exact) {
    end_angles(p, s);
  } else {
    end_concentrations(s);
  }
}

}  // namespace macenko
}  // namespace ernet
