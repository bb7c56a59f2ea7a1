// How stains are replaced. Reconstruction is linear in the log domain: I' = Io exp(shift - M OD) with M = HE_target
// diag(max_target / max_source) pinv(HE_source).
#pragma once

#include "macenko/steps/stains.h"

namespace ernet::macenko {

// Stains as [1 or count][3][2] and [1 or count][2] float64; `shared` says that one serves all images.
struct Stains {
  const double* stain;
  const double* maximum;
  bool shared;
};

ERNET_HOST_DEVICE void read_stain(const Stains& stains, int64_t image, Stain& stain, double maximum[2]) {
  const int64_t i = stains.shared ? 0 : image;
  for (int k = 0; k < 3; ++k) {
    stain.h[k] = stains.stain[6 * i + 2 * k];
    stain.e[k] = stains.stain[6 * i + 2 * k + 1];
  }
  maximum[0] = stains.maximum[2 * i];
  maximum[1] = stains.maximum[2 * i + 1];
}

// Images with a status other than 0 (null: none) have the stains `target` in place of those of `source`, or stay as
// they are under `identity`. With `gain` and `shift`, [count][2], the stains of an image stay, and its concentrations C
// become gain C + shift. Without a `source` the stains are those of a fit.
struct Recipe {
  Stains source;
  const int32_t* status;
  Stains target;
  bool identity;
  const double* gain;
  const double* shift;
};

// Of one image: its stains, and those it gets, with concentrations increased by `shift`.
struct Replacement {
  Stain from, to;
  double from_max[2], to_max[2];
  double shift[2];
};

ERNET_HOST_DEVICE Replacement replacement_of(const Recipe& recipe, int64_t image, bool fitted, const Stain& own,
                                             const double own_max[2]) {
  Replacement r;
  read_stain(recipe.target, image, r.to, r.to_max);
  r.from = fitted ? own : r.to;
  for (int k = 0; k < 2; ++k) {
    r.from_max[k] = fitted ? own_max[k] : r.to_max[k];
    r.shift[k] = 0;
  }
  if (recipe.gain == nullptr) return r;
  r.to = r.from;
  for (int k = 0; k < 2; ++k) {
    r.to_max[k] = r.from_max[k] * recipe.gain[2 * image + k];
    r.shift[k] = recipe.shift[2 * image + k];
  }
  return r;
}

ERNET_HOST_DEVICE void reconstruction_of(const Replacement& r, double matrix[3][3], double shift[3]) {
  double rows[2][3];
  concentration_rows(r.from, rows);
  const double gain_h = r.to_max[0] / r.from_max[0];
  const double gain_e = r.to_max[1] / r.from_max[1];
  for (int c = 0; c < 3; ++c) {
    shift[c] = -(r.to.h[c] * r.shift[0] + r.to.e[c] * r.shift[1]);
    for (int k = 0; k < 3; ++k) matrix[c][k] = r.to.h[c] * gain_h * rows[0][k] + r.to.e[c] * gain_e * rows[1][k];
  }
}

}  // namespace ernet::macenko
