// The algebra on per-channel vectors between the moments of raw maps and the coefficients of a block's weighted sum,
// for batch norm, free of torch. docs/er-shortcuts.md derives it.
//
// Map i of a stage is x_i = scale_i * z_i + shift_i, its normalisation N(x_i) = s_i scale_i (z_i - mean_i). The table
// of a stage holds a row of numbers for each; block l turns its own row and those before into
//
//     y_l = sum_{i<=l} a_i * z_i + b,   a_i = w_i s_i scale_i,  a_l = scale_l,  b = shift_l + sum_i w_i (N's constant)
#pragma once

#include <stdint.h>

#include "simd/isa.h"

namespace ernet::cpu {

// What x = scale * z + shift comes from.
enum class BranchNorm : int { none = 0, batch = 1, running = 2 };

// Rows of [C] numbers of each map in the table.
enum TableRow : int { kScale, kRstd, kCentre, kShift, kMean, kVar, kNorm, kTableRows };
// kRstd     1 / sqrt(variance that the branch's BatchNorm divides by + its eps); 0 without one
// kCentre   the mean that it subtracts; 0 without one
// kMean     measured mean of z; kVar its biased variance
// kNorm     s = 1 / sqrt(scale^2 var + eps)

// Rows of [C] sums over the later blocks of a map: gradients of its scale, shift, mean and variance.
enum TotalRow : int { kDScale, kDShift, kDMean, kDVar, kTotalRows };

// Vectors are [C] arrays of A, float or double. Null: absent.
template <typename A>
struct BlockCoefficients {
  int64_t index;  // which map of the stage, l
  int64_t C;
  double* table;  // [> l][kTableRows][C]: row l is written
  const A* mean;  // measured moments of z_l, or null
  const A* var;
  double count;  // values a channel, behind mean and var

  BranchNorm norm;
  const A* gamma;
  const A* beta;
  A* norm_mean;  // norm batch: updated with the measured ones, if given; norm running: read
  A* norm_var;
  double norm_momentum;
  double norm_eps;

  const A* weight;  // [l][C]
  A* running_mean;  // [l][C]; use_running: read; else updated with the measured ones, if given
  A* running_var;
  bool use_running;
  double momentum;
  double eps;

  A* a;  // [l + 1][C]; null for a map that no block has made: only the table is written
  A* b;  // [C]
};

// What block l owes its weights of an earlier map i, and that map: from the gradients of a_i and b of its sum.
template <typename A>
struct PairGradient {
  int64_t C;
  const double* row;  // of map i in the table
  double* totals;     // of map i, [kTotalRows][C]: added to
  const A* weight;    // [C] each
  const A* da;
  const A* db;
  const A* running_mean;  // null: map i was normalised with its measured moments
  const A* running_var;
  double eps;
  A* dweight;
};

// The gradients of a map's scale and shift become those of gamma, beta, mean and variance.
template <typename A>
struct OwnGradient {
  int64_t C;
  const double* row;     // of the map in the table
  const double* totals;  // of the map: what all later blocks owe to it
  const A* da;           // of its own block's sum, or null where the block's output has no gradient
  const A* db;
  BranchNorm norm;
  A* dgamma;  // [C], or null
  A* dbeta;
  double* dmoments;  // [2][C]: gradients of mean and variance
};

// dz = k1 z + k0 for the gradients of mean and variance: k1 = 2 dvar / count, k0 = dmean / count - k1 mean.
template <typename A>
struct MomentsGradient {
  int64_t C;
  const double* mean;
  const double* dmoments;  // [2][C]
  double count;
  A* k1;
  A* k0;
};

// Channels [begin, end) of each.
template <typename A>
struct VectorLoops {
  void (*block)(const BlockCoefficients<A>&, int64_t begin, int64_t end);
  void (*pair)(const PairGradient<A>&, int64_t begin, int64_t end);
  void (*own)(const OwnGradient<A>&, int64_t begin, int64_t end);
  void (*moments)(const MomentsGradient<A>&, int64_t begin, int64_t end);
};

struct CoefficientLoops {
  VectorLoops<float> f32;
  VectorLoops<double> f64;
};

namespace isa_portable {
extern const CoefficientLoops coefficient_loops;
}
namespace isa_avx2 {
extern const CoefficientLoops coefficient_loops;
}
namespace isa_avx512 {
extern const CoefficientLoops coefficient_loops;
}

const CoefficientLoops& coefficient_loops();

}  // namespace ernet::cpu
