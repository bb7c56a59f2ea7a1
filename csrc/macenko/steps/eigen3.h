// Eigenvectors of a symmetric 3x3 matrix by cyclic Jacobi rotations: accurate to a few ulp also where eigenvalues are
// close.
#pragma once

#include "macenko/steps/host_device.h"

namespace ernet::macenko {

struct Eigen3 {
  double value[3];      // ascending
  double vector[3][3];  // vector[i] is the unit eigenvector of value[i]
};

// Makes a[p][q] zero; v collects the rotations in its rows.
ERNET_HOST_DEVICE void jacobi_rotate(double a[3][3], double v[3][3], int p, int q) {
  if (a[p][q] == 0) return;
  const double theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
  const double t = (theta >= 0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1));
  const double c = 1 / sqrt(t * t + 1);
  const double s = t * c;
  const double shift = t * a[p][q];
  const int r = 3 - p - q;
  a[p][p] -= shift;
  a[q][q] += shift;
  a[p][q] = a[q][p] = 0;
  const double arp = a[r][p];
  const double arq = a[r][q];
  a[r][p] = a[p][r] = c * arp - s * arq;
  a[r][q] = a[q][r] = s * arp + c * arq;
  for (int k = 0; k < 3; ++k) {
    const double vp = v[p][k];
    const double vq = v[q][k];
    v[p][k] = c * vp - s * vq;
    v[q][k] = s * vp + c * vq;
  }
}

ERNET_HOST_DEVICE double smaller(double a, double b) { return a < b ? a : b; }

// True if no rotation that is left changes a bit of the diagonal of `a` or of `v`. Let o be the largest off-diagonal
// magnitude and g the smallest distance of two diagonal elements. Then |t| <= o / g =: e, and
//   t^2 + 1, so c, rounds to 1 and s to t where e <= 2^-28, as the condition on v implies: its components are at most
//   1; x - y rounds to x where |y| <= 2^-54 |x|, fused or not: of diagonal elements y = t a_pq, at most o e; of
//   components of v it is s v_qk, at most e (1 + 2^-40).
// A rotation that changes neither leaves g as it is and makes o larger by the factor 1 + e at most, so with twice o in
// the comparisons they hold for all that follow. They are strict, so that products that underflow to 0 prove nothing.
ERNET_HOST_DEVICE bool rotations_change_nothing(const double a[3][3], const double v[3][3], double off) {
  double limit = smaller(smaller(fabs(a[0][0] - a[1][1]), fabs(a[0][0] - a[2][2])), fabs(a[1][1] - a[2][2]));
  limit *= 0x1p-56;  // of what one rotation may change, over the value that it changes
  bool nothing = true;
  for (int i = 0; i < 3; ++i) {
    nothing &= off * off < limit * fabs(a[i][i]);
    for (int k = 0; k < 3; ++k) nothing &= off < limit * fabs(v[i][k]);
  }
  return nothing;
}

ERNET_HOST_DEVICE void swap_eigenpair(Eigen3& e, int i, int j) {
  const double value = e.value[i];
  e.value[i] = e.value[j];
  e.value[j] = value;
  for (int k = 0; k < 3; ++k) {
    const double component = e.vector[i][k];
    e.vector[i][k] = e.vector[j][k];
    e.vector[j][k] = component;
  }
}

// `m` holds the upper triangle: xx, xy, xz, yy, yz, zz.
ERNET_HOST_DEVICE Eigen3 eigen3(const double m[6]) {
  double a[3][3] = {{m[0], m[1], m[2]}, {m[1], m[3], m[4]}, {m[2], m[4], m[5]}};
  Eigen3 e = {{0, 0, 0}, {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  // Convergence is quadratic: five sweeps leave nothing for double precision, the bound is for safety.
  for (int sweep = 0; sweep < 12; ++sweep) {
    const double off = fabs(a[0][1]) + fabs(a[0][2]) + fabs(a[1][2]);
    if (!(off > 0) || rotations_change_nothing(a, e.vector, off)) break;
    jacobi_rotate(a, e.vector, 0, 1);
    jacobi_rotate(a, e.vector, 0, 2);
    jacobi_rotate(a, e.vector, 1, 2);
  }
  for (int i = 0; i < 3; ++i) e.value[i] = a[i][i];
  if (e.value[0] > e.value[1]) swap_eigenpair(e, 0, 1);
  if (e.value[1] > e.value[2]) swap_eigenpair(e, 1, 2);
  if (e.value[0] > e.value[1]) swap_eigenpair(e, 0, 1);
  return e;
}

}  // namespace ernet::macenko
