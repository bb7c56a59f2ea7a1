// Order statistics of an array by partition around pivots: the part without the wanted rank is dropped each time.
#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

constexpr double kInfinity = __builtin_inf();

// What a partition leaves: keys below the pivot at the front of the array, those above it in the scratch array.
struct Parts {
  int64_t below;
  int64_t above;
};

static Parts partition(double* keys, double* scratch, int64_t count, double pivot) {
  Parts parts = {0, 0};
  int64_t i = 0;
#ifdef ERNET_AVX512
  const __m512d p = _mm512_set1_pd(pivot);
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
    parts.below += num_below;
    parts.above += num_above;
  }
#else
  for (; i < count; ++i) {
    const double k = keys[i];
    keys[parts.below] = k;
    scratch[parts.above] = k;
    parts.below += k < pivot;
    parts.above += k > pivot;
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
  double next = kInfinity;  // after all keys that are left
  for (;;) {
    const double pivot = choose_pivot(keys, count, rank, state);
    const Parts parts = partition(keys, scratch, count, pivot);
    if (rank < parts.below) {
      next = pivot;
      count = parts.below;
      continue;
    }
    if (rank < count - parts.above) {
      if (rank + 1 < count - parts.above) return {pivot, pivot};
      for (int64_t i = 0; i < parts.above; ++i) next = scratch[i] < next ? scratch[i] : next;
      return {pivot, next};
    }
    rank -= count - parts.above;
    count = parts.above;
    double* other = keys;
    keys = scratch;
    scratch = other;
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
