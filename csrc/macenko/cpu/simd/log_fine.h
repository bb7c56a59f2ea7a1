// Logarithms of 8-bit intensity in float32, and the exponents of a reconstruction as affine functions of them. Included
// by the loops, once per instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// log2(level + 1) = k + f P(f) as in macenko/steps/od.h.
struct Split {
  float exponent;
  float f;
};

static inline Split split(int level) {
  const int32_t shifted = macenko::bits_as<int32_t>(float(level + 1)) - macenko::kSqrtHalfBits;
  return {float(shifted >> 23), macenko::bits_as<float>((shifted & 0x7fffff) + macenko::kSqrtHalfBits) - 1.0f};
}

// Relative to `origin`, so that levels near it keep all their digits.
static inline float fine_log2(int level, float origin) {
  const Split s = split(level);
  float p = 0.126148462f;
  p = p * s.f - 0.207421035f;
  p = p * s.f + 0.215669855f;
  p = p * s.f - 0.238920346f;
  p = p * s.f + 0.287918329f;
  p = p * s.f - 0.360704839f;
  p = p * s.f + 0.480910599f;
  p = p * s.f - 0.721347332f;
  p = p * s.f + 1.44269502f;
  return p * s.f + (s.exponent - origin);
}

// 2^f for |f| <= 1/2, highest power first: off by 3e-9.
constexpr int kExp2Terms = 7;
constexpr float kExp2[kExp2Terms] = {0.00015469731972f,
                                     0.00134004321658f,
                                     0.00961802560297f,
                                     0.05550327214208f,
                                     0.24022651213595f,
                                     0.69314720671062f,
                                     1.0f};

// An affine function of the three logarithms of a pixel.
struct Affine {
  float n[3];
  float n0;
};

// The exponents log2(I' / Io) of a reconstruction, of the logarithms that `fine_log2` gives relative to the origin that
// is returned.
static inline float log2_exponents(const Reconstruction& r, Affine exponent[3]) {
  // log2(I' / Io) = sum_k M_ck log2((I_k + 1) / Io). What `origin` and the polynomial round off where I + 1 = Io goes
  // into the constant, so that intensity without any absorption comes out as Io exactly: truncation would show the
  // least error there.
  const float origin = float(__builtin_log2(r.io));
  const int clear = int(r.io) - 1;
  const double unit_log = __builtin_log2((clear + 1) / r.io);
  const double residue = fine_log2(clear, origin) - unit_log;
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int k = 0; k < 3; ++k) {
      exponent[c].n[k] = float(r.matrix[c][k]);
      sum += exponent[c].n[k];
    }
    exponent[c].n0 = float(r.shift[c] * 1.44269504088896340736 - sum * residue);
  }
  return origin;
}

#ifdef ERNET_AVX512
// Calls f(tile, result) for every result of one tile of a range after the other: from the second result on its pixels
// come from the cache.
template <class F> static inline void for_each_tile(PixelSpan span, int results, const F& f) {
  const int64_t size = results == 1 ? span.end - span.begin : 4096;
  for (int64_t begin = span.begin; begin < span.end; begin += size) {
    const int64_t end = begin + size < span.end ? begin + size : span.end;
    for (int j = 0; j < results; ++j) f(PixelSpan{begin, end}, j);
  }
}

// Levels Io 2^z as integers, clipped at 255, for |z| < 117.
static inline __m512i levels_of_exponent(__m512 z, __m512 io) {
  const __m512 f = _mm512_reduce_ps(z, 0);  // z less the nearest integer
  __m512 p = _mm512_set1_ps(kExp2[0]);
  for (int k = 1; k < kExp2Terms; ++k) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[k]));
  const __m512 intensity = _mm512_mul_ps(io, _mm512_scalef_ps(p, _mm512_sub_ps(z, f)));
  return _mm512_cvttps_epi32(_mm512_min_ps(intensity, _mm512_set1_ps(255.0f)));
}
#endif

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
