// The algebra on per-channel vectors in double, whatever the vectors are stored in: plain loops that the compiler
// vectorises. Compiled once per instruction set.
#include "er/simd/coefficients.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

// Row l of the table, and running statistics of the branch's BatchNorm.
template <typename A> void file_map(const BlockCoefficients<A>& args, int64_t c0, int64_t n) {
  double* row = args.table + args.index * kTableRows * args.C + c0;
  const double* __restrict scale = row + kScale * args.C;
  double* __restrict mean = row + kMean * args.C;
  double* __restrict var = row + kVar * args.C;
  double* __restrict norm = row + kNorm * args.C;
  read(mean, args.mean == nullptr ? nullptr : args.mean + c0, 0.0, n);
  read(var, args.var == nullptr ? nullptr : args.var + c0, 0.0, n);
  file_affine(args, row, mean, var, c0, n);
  for (int64_t c = 0; c < n; ++c) norm[c] = inverse_sqrt(scale[c] * scale[c] * var[c] + args.eps);
}

// Updates the shortcut's running statistics of map i with mean and unbiased variance of x_i.
template <typename A> void update_running(const BlockCoefficients<A>& args, int64_t i, int64_t c0, int64_t n) {
  const double* row = args.table + i * kTableRows * args.C + c0;
  double mean[kChunk], var[kChunk];
  for (int64_t c = 0; c < n; ++c) {
    const double scale = row[kScale * args.C + c];
    mean[c] = scale * row[kMean * args.C + c] + row[kShift * args.C + c];
    var[c] = scale * scale * row[kVar * args.C + c];
  }
  move_towards(args.running_mean + i * args.C + c0, mean, 1.0, args.momentum, n);
  move_towards(args.running_var + i * args.C + c0, var, args.count / (args.count - 1.0), args.momentum, n);
}

template <typename A> void forward_chunk(const BlockCoefficients<A>& args, int64_t c0, int64_t n) {
  file_map(args, c0, n);
  if (args.a == nullptr) return;
  const double* own = args.table + args.index * kTableRows * args.C + c0;
  double constant[kChunk];
  own_coefficient(own, args.C, args.a + args.index * args.C + c0, constant, n);
  for (int64_t i = 0; i < args.index; ++i) {
    const double* __restrict row = args.table + i * kTableRows * args.C + c0;
    const A* __restrict weight = args.weight + i * args.C + c0;
    A* __restrict a = args.a + i * args.C + c0;
    const double *scale = row + kScale * args.C, *shift = row + kShift * args.C, *mean = row + kMean * args.C,
                 *norm = row + kNorm * args.C;
    if (args.use_running) {
      const A* __restrict running_mean = args.running_mean + i * args.C + c0;
      const A* __restrict running_var = args.running_var + i * args.C + c0;
      for (int64_t c = 0; c < n; ++c) {
        const double s = static_cast<double>(weight[c]) * inverse_sqrt(static_cast<double>(running_var[c]) + args.eps);
        a[c] = static_cast<A>(s * scale[c]);
        constant[c] += s * (shift[c] - static_cast<double>(running_mean[c]));
      }
    } else {
      for (int64_t c = 0; c < n; ++c) {
        a[c] = static_cast<A>(static_cast<double>(weight[c]) * norm[c] * scale[c]);
        constant[c] -= static_cast<double>(a[c]) * mean[c];
      }
      if (args.running_mean != nullptr) update_running(args, i, c0, n);
    }
  }
  A* __restrict b = args.b + c0;
  for (int64_t c = 0; c < n; ++c) b[c] = static_cast<A>(constant[c]);
}

template <typename A> void pair(const PairGradient<A>& args, int64_t begin, int64_t end) {
  const double* __restrict row = args.row;
  double* __restrict total = args.totals;
  const A* __restrict weight = args.weight;
  const double* __restrict da = args.da;
  const double* __restrict db = args.db;
  A* __restrict dweight = args.dweight;
  double *dscale = total + kDScale * args.C, *dshift = total + kDShift * args.C, *dmean = total + kDMean * args.C,
         *dvar = total + kDVar * args.C;
  const double *scale = row + kScale * args.C, *shift = row + kShift * args.C, *mean = row + kMean * args.C,
               *norm = row + kNorm * args.C;
  if (args.running_mean != nullptr) {
    const A* __restrict running_mean = args.running_mean;
    const A* __restrict running_var = args.running_var;
#pragma GCC ivdep
    for (int64_t c = begin; c < end; ++c) {
      const double s = inverse_sqrt(static_cast<double>(running_var[c]) + args.eps), w = static_cast<double>(weight[c]);
      const double d = da[c], constant = db[c];
      dweight[c] = static_cast<A>(s * (scale[c] * d + (shift[c] - static_cast<double>(running_mean[c])) * constant));
      dscale[c] += w * s * d;
      dshift[c] += w * s * constant;
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t c = begin; c < end; ++c) {
    const double w = static_cast<double>(weight[c]), constant = db[c];
    const double factor = norm[c] * scale[c];
    const double centred = da[c] - mean[c] * constant;
    const double dfactor = w * centred;  // factor = scale / sqrt(scale^2 var + eps)
    dweight[c] = static_cast<A>(factor * centred);
    dscale[c] += dfactor * args.eps * norm[c] * norm[c] * norm[c];
    dvar[c] -= dfactor * 0.5 * factor * factor * factor;
    dmean[c] -= w * factor * constant;
  }
}

template <typename A> void own_chunk(const OwnGradient<A>& args, int64_t c0, int64_t n) {
  const double* __restrict total = args.totals + c0;
  double* __restrict dmean = args.dmoments + c0;
  double* __restrict dvar = args.dmoments + args.C + c0;
  double dscale[kChunk], dshift[kChunk];
  read(dscale, args.da == nullptr ? nullptr : args.da + c0, 0.0, n);
  read(dshift, args.da == nullptr ? nullptr : args.db + c0, 0.0, n);
  for (int64_t c = 0; c < n; ++c) {
    dscale[c] += total[kDScale * args.C + c];
    dshift[c] += total[kDShift * args.C + c];
    dmean[c] = total[kDMean * args.C + c];
    dvar[c] = total[kDVar * args.C + c];
  }
  own_vectors(args.row + c0, args.C, args.norm, dscale, dshift, dmean, dvar,
              args.dgamma == nullptr ? nullptr : args.dgamma + c0, args.dbeta == nullptr ? nullptr : args.dbeta + c0,
              n);
}

template <typename A> void forward(const BlockCoefficients<A>& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kChunk) forward_chunk(args, c, end - c < kChunk ? end - c : kChunk);
}

template <typename A> void own(const OwnGradient<A>& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kChunk) own_chunk(args, c, end - c < kChunk ? end - c : kChunk);
}

template <typename A> void gradient(const MomentsGradient<A>& args, int64_t begin, int64_t end) {
  const double* __restrict dmean = args.dmoments;
  const double* __restrict dvar = args.dmoments + args.C;
  const double* __restrict mean = args.mean;
  A* __restrict out1 = args.k1;
  A* __restrict out0 = args.k0;
  for (int64_t c = begin; c < end; ++c) {
    const double k1 = dvar[c] * (2.0 / args.count);
    out1[c] = static_cast<A>(k1);
    // the rounded k1 multiplies z, so it must multiply the mean too
    out0[c] = static_cast<A>(dmean[c] / args.count - static_cast<double>(out1[c]) * mean[c]);
  }
}

}  // namespace

extern const VectorLoops<float> vector_loops_f32;
extern const VectorLoops<double> vector_loops_f64;
const VectorLoops<float> vector_loops_f32 = {forward, pair, own, gradient, group_block, group_gradient};
const VectorLoops<double> vector_loops_f64 = {forward, pair, own, gradient, group_block, group_gradient};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
