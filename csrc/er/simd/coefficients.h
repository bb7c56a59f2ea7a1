// What the loops of the algebra share, with batch norm and with group norm.
#pragma once

#include "er/coefficients.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

constexpr int64_t kChunk = 256;  // channels at a time: partial sums of a chunk stay in the first-level cache

inline double inverse_sqrt(double x) { return 1.0 / __builtin_sqrt(x); }

// value, or `otherwise` for a null vector
template <typename A> inline void read(double* out, const A* v, double otherwise, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = v == nullptr ? otherwise : static_cast<double>(v[c]);
}

template <typename A>
void move_towards(A* __restrict running, const double* __restrict value, double factor, double momentum, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const double old = static_cast<double>(running[c]);
    running[c] = static_cast<A>(old + momentum * (value[c] * factor - old));
  }
}

// How x comes from z in channels [c0, c0 + n), at most kChunk of them: the first rows of the map's table, of which
// `row` is the first. mean, var: of the batch, towards which running statistics of the branch's BatchNorm are updated.
template <typename A>
void file_affine(const BlockCoefficients<A>& args, double* row, const double* mean, const double* var, int64_t c0,
                 int64_t n) {
  double* __restrict scale = row + kScale * args.C;
  double* __restrict rstd = row + kRstd * args.C;
  double* __restrict centre = row + kCentre * args.C;
  double* __restrict shift = row + kShift * args.C;
  if (args.norm == BranchNorm::none) {
    for (int64_t c = 0; c < n; ++c) {
      scale[c] = 1.0;
      rstd[c] = centre[c] = shift[c] = 0.0;
    }
    return;
  }
  const bool batch = args.norm == BranchNorm::batch;
  double gamma[kChunk], beta[kChunk], norm_var[kChunk];
  read(gamma, args.gamma == nullptr ? nullptr : args.gamma + c0, 1.0, n);
  read(beta, args.beta == nullptr ? nullptr : args.beta + c0, 0.0, n);
  batch ? read(norm_var, var, 0.0, n) : read(norm_var, args.norm_var + c0, 0.0, n);
  batch ? read(centre, mean, 0.0, n) : read(centre, args.norm_mean + c0, 0.0, n);
  for (int64_t c = 0; c < n; ++c) {
    rstd[c] = inverse_sqrt(norm_var[c] + args.norm_eps);
    scale[c] = gamma[c] * rstd[c];
    shift[c] = beta[c] - scale[c] * centre[c];
  }
  if (batch && args.norm_mean != nullptr) {
    move_towards(args.norm_mean + c0, mean, 1.0, args.norm_momentum, n);
    move_towards(args.norm_var + c0, var, args.count / (args.count - 1.0), args.norm_momentum, n);
  }
}

// a of the block's own map, and its part of the constant, which goes with the coefficient as it is stored: rounding one
// must not shift a large mean.
template <typename A>
inline void own_coefficient(const double* own, int64_t C, A* __restrict a, double* __restrict constant, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const double scale = own[kScale * C + c];
    a[c] = static_cast<A>(scale);
    constant[c] = own[kShift * C + c] + (scale - static_cast<double>(a[c])) * own[kCentre * C + c];
  }
}

// The gradients of x = scale * z + shift become those of gamma and beta, and where the branch's BatchNorm takes the
// moments of the batch, are added to those of its mean and variance.
template <typename A>
void own_vectors(const double* row, int64_t C, BranchNorm norm, double* __restrict dscale, const double* dshift,
                 double* __restrict dmean, double* __restrict dvar, A* __restrict dgamma, A* __restrict dbeta,
                 int64_t n) {
  const double *scale = row + kScale * C, *rstd = row + kRstd * C, *centre = row + kCentre * C;
  for (int64_t c = 0; c < n; ++c) dscale[c] -= centre[c] * dshift[c];
  if (norm == BranchNorm::batch) {
    for (int64_t c = 0; c < n; ++c) {
      dmean[c] -= scale[c] * dshift[c];
      dvar[c] -= 0.5 * dscale[c] * scale[c] * rstd[c] * rstd[c];
    }
  }
  if (dgamma != nullptr) {
    for (int64_t c = 0; c < n; ++c) {
      dgamma[c] = static_cast<A>(dscale[c] * rstd[c]);
      dbeta[c] = static_cast<A>(dshift[c]);
    }
  }
}

template <typename A> void group_block(const BlockCoefficients<A>& args, int64_t begin, int64_t end);
template <typename A> void group_gradient(const GroupGradient<A>& args, int64_t begin, int64_t end);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
