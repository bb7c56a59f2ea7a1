// Reconstruction is linear in the log domain: I' = Io exp(-M OD) with M = HE_target diag(max_target / max_source)
// pinv(HE_source).
#pragma once

#include "macenko/steps/stains.h"

namespace ernet::macenko {

ERNET_HOST_DEVICE void reconstruction_matrix(const Stain& source, const double source_max[2], const Stain& target,
                                             const double target_max[2], double matrix[3][3]) {
  double rows[2][3];
  concentration_rows(source, rows);
  const double gain_h = target_max[0] / source_max[0];
  const double gain_e = target_max[1] / source_max[1];
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < 3; ++k) {
      matrix[c][k] = target.h[c] * gain_h * rows[0][k] + target.e[c] * gain_e * rows[1][k];
    }
  }
}

}  // namespace ernet::macenko
