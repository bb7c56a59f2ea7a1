// Order statistics of an array by partition around pivots: the part without the wanted rank is dropped each time.
#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

constexpr double kInfinity = __builtin_inf();

// What a partition leaves: keys below the pivot at the front of the array, those above it in the scratch array.
struct Parts {
  int64_t below;
  int64_t above;
  double least_above;
};

static Parts partition(double* keys, double* scratch, int64_t count, double pivot) {
  Parts parts = {0, 0, kInfinity};
  int64_t i = 0;
#ifdef ERNET_AVX512
  const __m512d p = _mm512_set1_pd(pivot);
  __m512d least = _mm512_set1_pd(kInfinity);
  for (; i < count; i += 8) {
    const __mmask8 there = count - i >= 8 ? __mmask8(0xff) : __mmask8((1u << (count - i)) - 1);
    const __m512d k = _mm512_maskz_loadu_pd(there, keys + i);
    const __mmask8 below = _mm512_mask_cmp_pd_mask(there, k, p, _CMP_LT_OQ);
    const __mmask8 above = _mm512_mask_cmp_pd_mask(there, k, p, _CMP_GT_OQ);
    const int num_below = __builtin_popcount(below);
    const int num_above = __builtin_popcount(above);
    // No more keys are written than were read, so both stay within their arrays.
    _mm512_mask_storeu_pd(keys + parts.below, __mmask8((1u << num_below) - 1), _mm512_maskz_compress_pd(below, k));
    _mm512_mask_storeu_pd(scratch + parts.above, __mmask8((1u << num_above) - 1), _mm512_maskz_compress_pd(above, k));
    least = _mm512_mask_min_pd(least, above, least, k);
    parts.below += num_below;
    parts.above += num_above;
  }
  parts.least_above = _mm512_reduce_min_pd(least);
#else
  for (; i < count; ++i) {
    const double k = keys[i];
    keys[parts.below] = k;
    scratch[parts.above] = k;
    parts.below += k < pivot;
    parts.above += k > pivot;
    parts.least_above = k > pivot && k < parts.least_above ? k : parts.least_above;
  }
#endif
  return parts;
}

// A key near the wanted rank: that rank among a few drawn at random, so that no order of the keys is a bad one.
static double choose_pivot(const double* keys, int64_t count, int64_t rank, uint64_t& state) {
  constexpr int kDrawn = 9;
  double drawn[kDrawn];
  for (int i = 0; i < kDrawn; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    double key = keys[int64_t((state >> 33) % uint64_t(count))];
    int j = i;
    for (; j > 0 && drawn[j - 1] > key; --j) drawn[j] = drawn[j - 1];
    drawn[j] = key;
  }
  return drawn[rank * kDrawn / count];
}

Neighbours select_order(double* keys, double* scratch, int64_t count, int64_t rank) {
  uint64_t state = 1;
  double above = kInfinity;  // the least key that was dropped for being too large
  for (;;) {
    const double pivot = choose_pivot(keys, count, rank, state);
    const Parts parts = partition(keys, scratch, count, pivot);
    if (rank >= count - parts.above) {
      rank -= count - parts.above;
      count = parts.above;
      double* other = keys;
      keys = scratch;
      scratch = other;
      continue;
    }
    above = parts.least_above < above ? parts.least_above : above;
    if (rank >= parts.below) return {pivot, rank + 1 < count - parts.above ? pivot : above};
    // The next key after all that stay is the pivot.
    above = pivot;
    count = parts.below;
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
