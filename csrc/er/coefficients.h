// The algebra on per-channel vectors between the moments of raw maps and the coefficients of a block's weighted sum,
// free of torch. docs/er-shortcuts.md derives it.
//
// Map i of a stage is x_i = scale_i * z_i + shift_i, its normalisation N(x_i) = s_i scale_i (z_i - mean_i). The table
// of a stage holds a row of numbers for each; block l turns its own row and those before into
//
//     y_l = sum_{i<=l} a_i * z_i + b,   a_i = w_i s_i scale_i,  a_l = scale_l,  b = shift_l + sum_i w_i (N's constant)
//
// With group norm s_i and N's constant are those of a sample and a group of channels, and so a and b of a sample.
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

// With group norm the first four rows are followed by these for each sample, the last two spread over a group's
// channels.
enum SampleRow : int { kSampleMean, kSampleVar, kGroupMean, kGroupNorm, kSampleRows };
// kSampleMean, kSampleVar   measured mean of the sample's z and its biased variance
// kGroupMean                mean of x over the group
// kGroupNorm                s = 1 / sqrt(variance of x over the group + eps)
constexpr int64_t group_table_rows(int64_t samples) { return kShift + 1 + kSampleRows * samples; }

// Rows of [C] sums over the later blocks of a map: gradients of its scale, shift, mean and variance.
enum TotalRow : int { kDScale, kDShift, kDMean, kDVar, kTotalRows };

// Vectors are [C] arrays of A, float or double. Null: absent.
template <typename A> struct BlockCoefficients {
  int64_t index;  // which map of the stage, l
  int64_t C;
  double* table;  // [> l][rows][C]: that of map l is written
  const A* mean;  // measured moments of z_l, [C], with group norm [N][C]; or null
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

  A* a;  // [l + 1][C], or [l + 1][N][C]; null for a map that no block has made: only the table is written
  A* b;  // [C], or [N][C]

  int64_t samples;     // group norm: N
  int64_t num_groups;  // of channels; 0: batch norm
};

// What block l owes its weights of an earlier map i, and that map: from the gradients of a_i and b of its sum.
template <typename A> struct PairGradient {
  int64_t C;
  const double* row;  // of map i in the table
  double* totals;     // of map i, [kTotalRows][C]: added to
  const A* weight;    // [C] each
  const double* da;
  const double* db;
  const A* running_mean;  // null: map i was normalised with its measured moments
  const A* running_var;
  double eps;
  A* dweight;
};

// The gradients of a map's scale and shift become those of gamma, beta, mean and variance.
template <typename A> struct OwnGradient {
  int64_t C;
  const double* row;     // of the map in the table
  const double* totals;  // of the map: what all later blocks owe to it
  const double* da;      // of its own block's sum, or null where the block's output has no gradient
  const double* db;
  BranchNorm norm;
  A* dgamma;  // [C], or null
  A* dbeta;
  double* dmoments;  // [2][C]: gradients of mean and variance
};

// dz = k1 z + k0 for the gradients of mean and variance: k1 = 2 dvar / count, k0 = dmean / count - k1 mean.
template <typename A> struct MomentsGradient {
  int64_t C;
  const double* mean;
  const double* dmoments;  // [2][C]
  double count;
  A* k1;
  A* k0;
};

// Group norm: from the inner products of a map with all gradients that depend on it to those of its per-channel
// vectors, and k1 and k0 of dz. `readers` are the later blocks that read the map.
template <typename A> struct GroupReader {
  const double* da;  // [N][C] each
  const double* db;
  const A* weight;  // [C] each
  A* dweight;
};
template <typename A> struct GroupGradient {
  int64_t C, samples, num_groups;
  const double* table;  // of the map, [group_table_rows(N)][C]
  BranchNorm norm;
  double pixels;  // values a sample and channel
  const GroupReader<A>* readers;
  int64_t num_readers;
  const double* da;  // [N][C], of its own block's sum, or null
  const double* db;
  A* dgamma;  // [C], or null
  A* dbeta;
  A* k1;  // [N][C], or null where the map was not measured
  A* k0;
  double* scratch;  // [group_scratch_rows(N)][C]
};
constexpr int64_t group_scratch_rows(int64_t samples) { return 5 + 2 * samples; }

// Channels [begin, end) of each; of the last two whole groups.
template <typename A> struct VectorLoops {
  void (*block)(const BlockCoefficients<A>&, int64_t begin, int64_t end);
  void (*pair)(const PairGradient<A>&, int64_t begin, int64_t end);
  void (*own)(const OwnGradient<A>&, int64_t begin, int64_t end);
  void (*moments)(const MomentsGradient<A>&, int64_t begin, int64_t end);
  void (*group_block)(const BlockCoefficients<A>&, int64_t begin, int64_t end);
  void (*group_gradient)(const GroupGradient<A>&, int64_t begin, int64_t end);
};

}  // namespace ernet::cpu
