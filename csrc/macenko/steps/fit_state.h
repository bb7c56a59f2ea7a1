// A Macenko fit as a machine: passes over the pixels count keys, and between two passes one thread decides here what
// the next one counts. Order statistics are found in a list of the pixels beyond a border that a sample tells
// (macenko/steps/tails.h), or by counts of all keys, approximate and then exact, for any distribution and percentile.
#pragma once

#include "macenko/steps/stains.h"
#include "macenko/steps/tails.h"

namespace ernet::macenko {

enum class Phase : int32_t {
  angle_sample = 0,  // pseudo-angles of some of the tissue, approximate
  angle_listed = 1,  // of the listed pixels, exact
  angle_coarse = 2,  // of all tissue, approximate
  angle_exact = 3,
  concentration_sample = 4,  // concentrations of some of all pixels, and so on
  concentration_listed = 5,
  concentration_coarse = 6,
  concentration_exact = 7,
  finished = 8,
};

ERNET_HOST_DEVICE bool counts_angles(Phase phase) { return phase <= Phase::angle_exact; }
ERNET_HOST_DEVICE bool is_sample(Phase phase) {
  return phase == Phase::angle_sample || phase == Phase::concentration_sample;
}
ERNET_HOST_DEVICE bool is_listed(Phase phase) {
  return phase == Phase::angle_listed || phase == Phase::concentration_listed;
}
// Where the statistics of selection t are.
ERNET_HOST_DEVICE End end_of(Phase phase, int t) { return counts_angles(phase) && t == 0 ? End::low : End::high; }

struct FitParameters {
  double io;
  double alpha;  // percent
  double beta;
  double od_min;  // of any pixel
  double od_max;
  int64_t pixels;  // of an image
  int64_t listed;  // pixels at most, 0 for no lists
  int32_t tissue_limit;
  bool nearest;
};

// What a pass needs to know of an image. Keys are row[0] . OD and row[1] . OD: the coordinates (x, y) of a
// pseudo-angle, or the two concentrations.
struct PassKeys {
  double row[2][3];
  float log2_row[2][3];  // for log2((I + 1) / Io) in place of OD
  float bins_per_unit[2];
  Window window[2];
  // A pixel is listed where form[t][0..2] . log2 intensity + form[t][3] >= 0 for either t.
  float form[2][4];
};

struct FitState {
  Phase phase;
  Status status;
  int64_t keys;  // of the selections: tissue pixels, or all
  bool missed;   // a list is too short, or does not hold the statistics
  PassKeys pass;
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
constexpr float kSmallestNorm = 1.0f / 16;         // of n, in units of the summed |log2 intensity|
constexpr float kCutDistance = 1.0f / 65536;       // of |y| where x < 0, in the same units
constexpr double kAngleBinsPerUnit = kBins / 2.0;  // pseudo-angles in [0, 2]; others share the first bin
constexpr double kSampleBinsPerUnit = kBins;       // the bins of both selections together

// A product row . OD in float32, and one with a constant up to that size added, is off by 9 roundings of what the row's
// magnitudes make of the largest OD: the row, the logarithm, products, sums, the constant. Nearly twice that.
ERNET_HOST_DEVICE double product_margin(const double row[3], const FitParameters& p) {
  const double largest = fabs(p.od_min) > fabs(p.od_max) ? fabs(p.od_min) : fabs(p.od_max);
  return 16 * kFloatUnit * (fabs(row[0]) + fabs(row[1]) + fabs(row[2])) * largest;
}

ERNET_HOST_DEVICE void set_rows(const double a[3], const double b[3], PassKeys& keys) {
  const double ln2 = 0.693147180559945309417;
  for (int k = 0; k < 3; ++k) {
    keys.row[0][k] = a[k];
    keys.row[1][k] = b[k];
    keys.log2_row[0][k] = float(-ln2 * a[k]);
    keys.log2_row[1][k] = float(-ln2 * b[k]);
  }
}

ERNET_HOST_DEVICE void fail(Status status, FitState& s) {
  s.status = status;
  s.phase = Phase::finished;
}

// Pixels are compared with the direction of a pseudo-angle by the sign of a cross product, which says which side of it
// they are on if all of them, and the direction, are in the upper half plane.
ERNET_HOST_DEVICE bool angles_are_comparable(const Plane& plane, const FitParameters& p) {
  return p.beta >= 0 && plane.second[0] >= 0 && plane.second[1] >= 0 && plane.second[2] >= 0;
}

// The first phase of two selections: from a list if one of that length is likely to serve.
ERNET_HOST_DEVICE Phase first_phase(Phase sample, Phase coarse, const FitParameters& p, const FitState& s) {
  const End end[2] = {end_of(sample, 0), end_of(sample, 1)};
  return tails_fit(s.selection, end, s.keys, p.listed) ? sample : coarse;
}

ERNET_HOST_DEVICE void begin_angles(const FitParameters& p, bool listed, FitState& s) {
  set_rows(s.plane.first, s.plane.second, s.pass);
  for (int t = 0; t < 2; ++t) {
    begin_selection(s.keys, t == 0 ? p.alpha : 100 - p.alpha, p.nearest, s.selection[t]);
    s.pass.bins_per_unit[t] = float(kAngleBinsPerUnit);
    s.margin[t] = kAngleMargin;
  }
  s.phase = Phase::angle_coarse;
  if (listed && angles_are_comparable(s.plane, p)) {
    s.phase = first_phase(Phase::angle_sample, Phase::angle_coarse, p, s);
  }
}

ERNET_HOST_DEVICE void begin_fit(const double moments[kMomentCount], int64_t invalid, const FitParameters& p,
                                 FitState& s) {
  if (invalid > 0) return fail(kNonFinite, s);
  const Status status = plane_of_moments(moments, s.plane);
  if (status != kOk) return fail(status, s);
  s.status = kOk;
  s.keys = int64_t(moments[0]);
  begin_angles(p, p.listed > 0, s);
}

ERNET_HOST_DEVICE void begin_concentrations(const FitParameters& p, bool listed, FitState& s) {
  double rows[2][3];
  concentration_rows(s.stain, rows);
  set_rows(rows[0], rows[1], s.pass);
  s.keys = p.pixels;
  for (int t = 0; t < 2; ++t) {
    double greatest = 0;
    for (int k = 0; k < 3; ++k) greatest += rows[t][k] * (rows[t][k] > 0 ? p.od_max : p.od_min);
    begin_selection(p.pixels, 99, p.nearest, s.selection[t]);
    // From 0 to the greatest concentration that a pixel can have.
    s.pass.bins_per_unit[t] = float(kBins / greatest);
    s.margin[t] = product_margin(rows[t], p);
  }
  s.phase = listed ? first_phase(Phase::concentration_sample, Phase::concentration_coarse, p, s)
                   : Phase::concentration_coarse;
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
  begin_concentrations(p, p.listed > 0, s);
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
  bool open[2];  // of a sample: all pixels are to be listed
};

// After a pass has counted approximate keys.
ERNET_HOST_DEVICE void end_coarse(const RankBins& found, FitState& s) {
  for (int t = 0; t < 2; ++t) {
    narrow_approximate(found.bin[t][0], found.bin[t][1], s.pass.bins_per_unit[t], s.margin[t], s.selection[t]);
    s.pass.window[t] = window_of(s.selection[t], s.margin[t]);
  }
  s.phase = s.phase == Phase::angle_coarse ? Phase::angle_exact : Phase::concentration_exact;
}

// A form that is >= 0 for every pixel whose row . OD is at least `least`, and for others only within the margin.
ERNET_HOST_DEVICE void set_form(const double row[3], double least, const FitParameters& p, float form[4]) {
  const double ln2 = 0.693147180559945309417;
  for (int k = 0; k < 3; ++k) form[k] = float(-ln2 * row[k]);
  form[3] = float(product_margin(row, p) - least);
}

// The cross product with the direction of pseudo-angle `key`, which is of length 1 as |x| + |y|: it has the sign of the
// pixel's pseudo-angle less `key`, and at most its size times |x| + |y| of the pixel. That sum is below 2.5 and the row
// above 0.7 times the largest OD, and its error leaves 7 of the margin's 16 roundings: pixels that are not listed are
// beyond `key` by two roundings of float32 at least, where double precision is in no doubt.
ERNET_HOST_DEVICE void set_angle_form(double key, End end, const FitParameters& p, FitState& s, float form[4]) {
  const double x = 1 - key;
  const double y = 1 - fabs(x);
  const double sign = end == End::low ? -1 : 1;
  double row[3];
  for (int k = 0; k < 3; ++k) row[k] = sign * (x * s.plane.second[k] - y * s.plane.first[k]);
  set_form(row, 0, p, form);
}

// After a pass has counted approximate keys of a sample: `found` has the bins of the border and of the inner rank of
// either selection.
ERNET_HOST_DEVICE void end_sample(const RankBins& found, const FitParameters& p, FitState& s) {
  const bool angles = counts_angles(s.phase);
  const int last = angles ? 2 * kBins - 1 : kBins - 1;
  for (int t = 0; t < 2; ++t) {
    const End end = end_of(s.phase, t);
    const double unit = angles ? kSampleBinsPerUnit : double(s.pass.bins_per_unit[t]);
    const int border_bin = found.bin[t][0];
    const int inner_bin = found.bin[t][1];
    float* form = s.pass.form[t];
    const bool low = end == End::low;
    const double outermost = low ? kInfinity : -kInfinity;
    const bool all = found.open[t] || border_bin == (low ? last : 0);
    const double border = all ? outermost : (low ? border_bin + 1 : border_bin) / unit;
    const double inner = inner_bin == (low ? 0 : last) ? -outermost : (low ? inner_bin : inner_bin + 1) / unit;
    set_tail_interval(border, inner, end, s.selection[t]);
    if (all) {
      form[0] = form[1] = form[2] = 0;
      form[3] = 1;
    } else if (angles) {
      set_angle_form(border, end, p, s, form);
    } else {
      set_form(s.pass.row[t], border, p, form);
    }
  }
  s.missed = false;
  s.phase = angles ? Phase::angle_listed : Phase::concentration_listed;
}

ERNET_HOST_DEVICE bool selections_are_done(const FitState& s) {
  return s.selection[0].stage == Stage::done && s.selection[1].stage == Stage::done;
}

ERNET_HOST_DEVICE void end_selections(const FitParameters& p, FitState& s) {
  if (!selections_are_done(s)) return;
  if (counts_angles(s.phase)) {
    end_angles(p, s);
  } else {
    end_concentrations(s);
  }
}

// After a list has been searched: with the statistics found, or in vain. Then all keys are counted.
ERNET_HOST_DEVICE void end_list(const FitParameters& p, FitState& s) {
  if (!s.missed) {
    end_selections(p, s);
  } else if (counts_angles(s.phase)) {
    begin_angles(p, false, s);
  } else {
    begin_concentrations(p, false, s);
  }
}

// After a pass over exact keys, whose result the selections have taken.
ERNET_HOST_DEVICE void end_exact(const FitParameters& p, FitState& s) {
  for (int t = 0; t < 2; ++t) s.pass.window[t] = window_of(s.selection[t], s.margin[t]);
  end_selections(p, s);
}

}  // namespace ernet::macenko
