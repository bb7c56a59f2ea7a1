// The algebra on per-channel vectors with group norm: s and N's constant belong to a sample and a group of channels.
// Channels of different groups have nothing to do with one another. In double, whatever the vectors are stored in;
// plain loops that the compiler vectorises. Compiled once per instruction set.
#include "er/simd/coefficients.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Row `row` of sample n in the table of a map.
template <typename T> inline T* sample_row(T* table, int64_t C, int64_t n, SampleRow row) {
  return table + (kShift + 1 + kSampleRows * n + row) * C;
}

// Mean and variance of x over each group of sample n.
template <typename A>
void file_groups(const BlockCoefficients<A>& args, double* table, int64_t n, int64_t begin, int64_t end) {
  const int64_t C = args.C, width = C / args.num_groups;
  const double *scale = table + kScale * C, *shift = table + kShift * C;
  const double* const mean = sample_row(table, C, n, kSampleMean);
  const double* const var = sample_row(table, C, n, kSampleVar);
  double* const group_mean = sample_row(table, C, n, kGroupMean);
  double* const norm = sample_row(table, C, n, kGroupNorm);
  for (int64_t first = begin; first < end; first += width) {
    double total = 0, spread = 0;
    for (int64_t c = first; c < first + width; ++c) total += scale[c] * mean[c] + shift[c];
    total /= static_cast<double>(width);
    for (int64_t c = first; c < first + width; ++c) {
      const double deviation = scale[c] * mean[c] + shift[c] - total;
      spread += scale[c] * scale[c] * var[c] + deviation * deviation;
    }
    const double s = inverse_sqrt(spread / static_cast<double>(width) + args.eps);
    for (int64_t c = first; c < first + width; ++c) {
      group_mean[c] = total;
      norm[c] = s;
    }
  }
}

// Mean and biased variance of the batch from those of its samples, which are equally large.
template <typename A>
void combine_samples(const BlockCoefficients<A>& args, int64_t c0, int64_t n, double* mean, double* var) {
  const double share = 1.0 / static_cast<double>(args.samples);
  for (int64_t c = 0; c < n; ++c) mean[c] = var[c] = 0;
  for (int64_t i = 0; i < args.samples; ++i) {
    const A* const sample = args.mean + i * args.C + c0;
    for (int64_t c = 0; c < n; ++c) mean[c] += static_cast<double>(sample[c]) * share;
  }
  for (int64_t i = 0; i < args.samples; ++i) {
    const A *sample = args.mean + i * args.C + c0, *sample_var = args.var + i * args.C + c0;
    for (int64_t c = 0; c < n; ++c) {
      const double deviation = static_cast<double>(sample[c]) - mean[c];
      var[c] += (static_cast<double>(sample_var[c]) + deviation * deviation) * share;
    }
  }
}

template <typename A> void file_map(const BlockCoefficients<A>& args, double* table, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
    const int64_t n = at_most(kChunk, end - c0);
    double mean[kChunk], var[kChunk];
    if (args.norm == BranchNorm::batch) combine_samples(args, c0, n, mean, var);
    file_affine(args, table + c0, mean, var, c0, n);
  }
  for (int64_t n = 0; n < args.samples; ++n) {
    read(sample_row(table, C, n, kSampleMean) + begin, args.mean == nullptr ? nullptr : args.mean + n * C + begin, 0.0,
         end - begin);
    read(sample_row(table, C, n, kSampleVar) + begin, args.var == nullptr ? nullptr : args.var + n * C + begin, 0.0,
         end - begin);
    file_groups(args, table, n, begin, end);
  }
}

}  // namespace

template <typename A> void group_block(const BlockCoefficients<A>& args, int64_t begin, int64_t end) {
  const int64_t C = args.C, map_rows = group_table_rows(args.samples);
  double* const own = args.table + args.index * map_rows * C;
  file_map(args, own, begin, end);
  if (args.a == nullptr) return;
  for (int64_t n = 0; n < args.samples; ++n) {
    for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
      const int64_t count = at_most(kChunk, end - c0);
      double constant[kChunk];
      own_coefficient(own + c0, C, args.a + (args.index * args.samples + n) * C + c0, constant, count);
      for (int64_t i = 0; i < args.index; ++i) {
        const double* const table = args.table + i * map_rows * C + c0;
        const double *scale = table + kScale * C, *shift = table + kShift * C;
        const double* const mean = sample_row(table, C, n, kSampleMean);
        const double* const group_mean = sample_row(table, C, n, kGroupMean);
        const double* const norm = sample_row(table, C, n, kGroupNorm);
        const A* __restrict weight = args.weight + i * C + c0;
        A* __restrict a = args.a + (i * args.samples + n) * C + c0;
        for (int64_t c = 0; c < count; ++c) {
          const double s = static_cast<double>(weight[c]) * norm[c], exact = s * scale[c];
          a[c] = static_cast<A>(exact);
          constant[c] += s * (shift[c] - group_mean[c]) + (exact - static_cast<double>(a[c])) * mean[c];
        }
      }
      A* const b = args.b + n * C + c0;
      for (int64_t c = 0; c < count; ++c) b[c] = static_cast<A>(constant[c]);
    }
  }
}

namespace {

// Rows of [C] numbers of GroupGradient::scratch; kMoments: gradients of mean and variance of each sample.
enum ScratchRow : int { kScaleSum, kShiftSum, kBatchMean, kBatchVar, kWeightSum, kMoments };

// Gradients of scale, shift and the moments of sample n, from those of the group's s and mean.
template <typename A> void sample_gradient(const GroupGradient<A>& args, int64_t n, int64_t begin, int64_t end) {
  const int64_t C = args.C, width = C / args.num_groups;
  const double *scale = args.table + kScale * C, *shift = args.table + kShift * C;
  const double* const mean = sample_row(args.table, C, n, kSampleMean);
  const double* const var = sample_row(args.table, C, n, kSampleVar);
  const double* const group_mean = sample_row(args.table, C, n, kGroupMean);
  const double* const norm = sample_row(args.table, C, n, kGroupNorm);
  double *dscale = args.scratch + kScaleSum * C, *dshift = args.scratch + kShiftSum * C;
  double *dmean = args.scratch + (kMoments + 2 * n) * C, *dvar = dmean + C;  // first of s and of the group's mean
  for (int64_t c = begin; c < end; ++c) dmean[c] = dvar[c] = 0;
  for (int64_t i = 0; i < args.num_readers; ++i) {
    const double *da = args.readers[i].da + n * C, *db = args.readers[i].db + n * C;
    const A* __restrict weight = args.readers[i].weight;
    for (int64_t c = begin; c < end; ++c) {
      const double w = static_cast<double>(weight[c]), s = w * norm[c];
      dvar[c] += w * (scale[c] * da[c] + (shift[c] - group_mean[c]) * db[c]);
      dmean[c] -= s * db[c];
      dscale[c] += s * da[c];
      dshift[c] += s * db[c];
    }
  }
  for (int64_t first = begin; first < end; first += width) {
    double ds = 0, dgroup = 0;
    for (int64_t c = first; c < first + width; ++c) {
      ds += dvar[c];
      dgroup += dmean[c];
    }
    const double s = norm[first], dgroup_var = -0.5 * s * s * s * ds / static_cast<double>(width);
    dgroup /= static_cast<double>(width);
    for (int64_t c = first; c < first + width; ++c) {
      const double dx = dgroup + 2 * dgroup_var * (scale[c] * mean[c] + shift[c] - group_mean[c]);
      dscale[c] += 2 * dgroup_var * scale[c] * var[c] + dx * mean[c];
      dshift[c] += dx;
      dmean[c] = dx * scale[c];
      dvar[c] = dgroup_var * scale[c] * scale[c];
    }
  }
}

template <typename A>
void weight_gradient(const GroupGradient<A>& args, const GroupReader<A>& reader, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  const double *scale = args.table + kScale * C, *shift = args.table + kShift * C;
  double* const sum = args.scratch + kWeightSum * C;
  for (int64_t c = begin; c < end; ++c) sum[c] = 0;
  for (int64_t n = 0; n < args.samples; ++n) {
    const double *da = reader.da + n * C, *db = reader.db + n * C;
    const double* const group_mean = sample_row(args.table, C, n, kGroupMean);
    const double* const norm = sample_row(args.table, C, n, kGroupNorm);
    for (int64_t c = begin; c < end; ++c) {
      sum[c] += norm[c] * (scale[c] * da[c] + (shift[c] - group_mean[c]) * db[c]);
    }
  }
  for (int64_t c = begin; c < end; ++c) reader.dweight[c] = static_cast<A>(sum[c]);
}

}  // namespace

template <typename A> void group_gradient(const GroupGradient<A>& args, int64_t begin, int64_t end) {
  const int64_t C = args.C, count = end - begin;
  double *dscale = args.scratch + kScaleSum * C, *dshift = args.scratch + kShiftSum * C;
  double *batch_dmean = args.scratch + kBatchMean * C, *batch_dvar = args.scratch + kBatchVar * C;
  for (int64_t c = begin; c < end; ++c) dscale[c] = dshift[c] = batch_dmean[c] = batch_dvar[c] = 0;
  for (int64_t i = 0; i < args.num_readers; ++i) weight_gradient(args, args.readers[i], begin, end);
  for (int64_t n = 0; n < args.samples; ++n) {
    if (args.num_readers > 0) sample_gradient(args, n, begin, end);
    for (int64_t c = begin; args.da != nullptr && c < end; ++c) {
      dscale[c] += args.da[n * C + c];
      dshift[c] += args.db[n * C + c];
    }
  }
  own_vectors(args.table + begin, C, args.norm, dscale + begin, dshift + begin, batch_dmean + begin, batch_dvar + begin,
              args.dgamma == nullptr ? nullptr : args.dgamma + begin,
              args.dbeta == nullptr ? nullptr : args.dbeta + begin, count);
  if (args.k1 == nullptr) return;
  const double share = 1.0 / args.pixels, batch_share = share / static_cast<double>(args.samples);
  const double* const centre = args.table + kCentre * C;
  for (int64_t n = 0; n < args.samples; ++n) {
    const double* const mean = sample_row(args.table, C, n, kSampleMean);
    const double *dmean = args.scratch + (kMoments + 2 * n) * C, *dvar = dmean + C;
    A *k1 = args.k1 + n * C, *k0 = args.k0 + n * C;
    for (int64_t c = begin; c < end; ++c) {
      const double own = args.num_readers > 0 ? 2 * share * dvar[c] : 0, batch = 2 * batch_share * batch_dvar[c];
      k1[c] = static_cast<A>(own + batch);
      // the rounded k1 multiplies z, so it must multiply the mean too
      const double rounded_off = own + batch - static_cast<double>(k1[c]);
      k0[c] = static_cast<A>((args.num_readers > 0 ? share * dmean[c] : 0) + batch_share * batch_dmean[c] -
                             own * mean[c] - batch * centre[c] + rounded_off * mean[c]);
    }
  }
}

template void group_block(const BlockCoefficients<float>&, int64_t, int64_t);
template void group_block(const BlockCoefficients<double>&, int64_t, int64_t);
template void group_gradient(const GroupGradient<float>&, int64_t, int64_t);
template void group_gradient(const GroupGradient<double>&, int64_t, int64_t);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
