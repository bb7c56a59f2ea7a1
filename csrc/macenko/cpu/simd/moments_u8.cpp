// Moments of 8-bit images: fixed-point ODs of the tissue pixels by a polynomial (macenko/steps/od.h), exact integer
// products.
#include "macenko/cpu/simd/u8.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

using macenko::OdTable;

// Fixed-point ODs of the first `count` pixels, rounded up to whole vectors.
static void fixed_densities(const PackedBlock& block, int count, const OdTable& table, FixedBlock& fixed) {
  const int n = padded(count);
#ifdef __FMA__
  const int32_t offset = table.fixed_offset;
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < n; ++i) {
      fixed.od[k][i] = macenko::fixed_od_of_level(int(block.pixel[i] >> (8 * k) & 255), offset);
    }
  }
#else
  for (int i = 0; i < n; ++i) {
    const uint32_t p = block.pixel[i];
    fixed.od[0][i] = table.fixed[p & 255];
    fixed.od[1][i] = table.fixed[p >> 8 & 255];
    fixed.od[2][i] = table.fixed[p >> 16 & 255];
  }
#endif
}

static void add_products(FixedBlock& fixed, int count, MomentSums& sums) {
  const int n = padded(count);
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < n; ++i) {
      const int32_t q = fixed.od[k][i] > 0 ? fixed.od[k][i] : 0;
      fixed.od[k][i] = i < count ? q : 0;
    }
  }
#ifdef ERNET_AVX512
  // Products of the even and of the odd lanes: one instruction each, where int64 multiplication takes three.
  __m512i s[3], p[6];
  for (auto& v : s) v = _mm512_setzero_si512();
  for (auto& v : p) v = _mm512_setzero_si512();
  for (int i = 0; i < n; i += kLanes) {
    __m512i even[3], odd[3];
    for (int k = 0; k < 3; ++k) {
      even[k] = _mm512_load_si512(fixed.od[k] + i);
      odd[k] = _mm512_srli_epi64(even[k], 32);
      // At most 32 additions of values below 2^27 a lane.
      s[k] = _mm512_add_epi32(s[k], even[k]);
    }
    int j = 0;
    for (int a = 0; a < 3; ++a) {
      for (int b = a; b < 3; ++b, ++j) {
        p[j] = _mm512_add_epi64(p[j], _mm512_mul_epu32(even[a], even[b]));
        p[j] = _mm512_add_epi64(p[j], _mm512_mul_epu32(odd[a], odd[b]));
      }
    }
    if (i % (8 * kLanes) == 7 * kLanes || i + kLanes >= n) {
      // 8 values below 2^27 fit in 32 bits without a sign.
      for (int k = 0; k < 3; ++k) {
        const __m512i wide =
            _mm512_add_epi64(_mm512_and_si512(s[k], _mm512_set1_epi64(0xffffffff)), _mm512_srli_epi64(s[k], 32));
        sums.sum[k] += _mm512_reduce_add_epi64(wide);
        s[k] = _mm512_setzero_si512();
      }
    }
  }
  for (int j = 0; j < 6; ++j) sums.product[j] += uint64_t(_mm512_reduce_add_epi64(p[j]));
#else
  add_fixed(fixed.od, n, sums);
#endif
}

void moments_of_bytes(const ImageView& image, PixelSpan span, const OdTable& table, double, double, MomentSums& sums) {
  PackedBlock block;
  FixedBlock fixed;
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    pack(image, begin, count, block);
    const int tissue = keep_tissue(block, count, table.tissue_limit);
    if (tissue == 0) continue;
    fixed_densities(block, tissue, table, fixed);
    add_products(fixed, tissue, sums);
    sums.count += tissue;
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
