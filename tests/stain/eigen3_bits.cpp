// Eigenvectors by rotations until the matrix is diagonal to the last bit, against those that stop before: the same
// bits.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "macenko/steps/eigen3.h"

namespace {

using namespace ernet::macenko;

Eigen3 to_the_end(const double m[6]) {
  double a[3][3] = {{m[0], m[1], m[2]}, {m[1], m[3], m[4]}, {m[2], m[4], m[5]}};
  Eigen3 e = {{0, 0, 0}, {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  for (int sweep = 0; sweep < 12; ++sweep) {
    if (!(fabs(a[0][1]) + fabs(a[0][2]) + fabs(a[1][2]) > 0)) break;
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

// Sweeps that are left out.
int sweeps_saved(const double m[6]) {
  double a[3][3] = {{m[0], m[1], m[2]}, {m[1], m[3], m[4]}, {m[2], m[4], m[5]}};
  double v[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  bool stopped = false;
  int saved = 0;
  for (int sweep = 0; sweep < 12; ++sweep) {
    const double off = fabs(a[0][1]) + fabs(a[0][2]) + fabs(a[1][2]);
    if (!(off > 0)) break;
    stopped |= rotations_change_nothing(a, v, off);
    saved += stopped;
    jacobi_rotate(a, v, 0, 1);
    jacobi_rotate(a, v, 0, 2);
    jacobi_rotate(a, v, 1, 2);
  }
  return saved;
}

}  // namespace

// Covariances of a few random points: full rank and less, of any scale, with equal and nearly equal axes.
int main() {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  int wrong = 0, tried = 0;
  long saved = 0;
  for (int i = 0; i < 60000; ++i) {
    const int kind = i % 6;
    const double scale = kind == 1 ? std::pow(10.0, int(random() % 600) - 300) : 1;
    double m[6] = {0, 0, 0, 0, 0, 0};
    for (int point = 0; point < (kind == 2 ? 2 : 5); ++point) {
      double x[3];
      for (int k = 0; k < 3; ++k) x[k] = normal(random) * (kind == 3 ? std::pow(1e-4, k) : 1);
      if (kind == 4) x[2] = x[random() % 2] * (random() % 2);
      int at = 0;
      for (int j = 0; j < 3; ++j) {
        for (int k = j; k < 3; ++k) m[at++] += x[j] * x[k] * scale;
      }
    }
    if (kind == 5) {  // nearly a multiple of the identity
      for (double& value : m) value *= 1e-9;
      m[0] += 1, m[3] += 1, m[5] += 1;
    }
    const Eigen3 whole = to_the_end(m), found = eigen3(m);
    wrong += std::memcmp(&whole, &found, sizeof whole) != 0;
    saved += kind == 0 ? sweeps_saved(m) : 0;
    tried += kind == 0;
  }
  std::printf("%d wrong, %.2f sweeps saved\n", wrong, double(saved) / tried);
  return wrong != 0 || saved < tried;  // at least a sweep each
}
