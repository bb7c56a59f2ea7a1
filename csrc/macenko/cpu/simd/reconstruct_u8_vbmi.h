// Sixty-four pixels of an 8-bit image rebuilt at a time: logarithms from a table in registers, exponentials by the
// polynomial of macenko_bytes_rebuild_loops.cpp; the same bits as there with fused multiply-add. Included by the loops,
// and therefore static throughout.
#pragma once

#include "macenko/cpu/simd/log_fine.h"
#include "macenko/cpu/simd/u8_vbmi.h"

#ifdef ERNET_VBMI
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// A table of float32 entries. Results come in four vectors: pixels 4 j to 4 j + 3 of each group of sixteen.
struct FloatTable {
  BytePlane byte[4];
};

static void make_log2(float origin, FloatTable& table) {
  for (int level = 0; level < 256; ++level) {
    const float value = fine_log2(level, origin);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    for (int k = 0; k < 4; ++k) table.byte[k].entry[level] = uint8_t(bits >> (8 * k));
  }
}

// Logarithms of 64 pixels.
struct Light {
  __m512 log2[3][4];
};

static inline void assemble(const __m512i byte[4], __m512 found[4]) {
  const __m512i low[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
  const __m512i high[2] = {_mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
  for (int k = 0; k < 2; ++k) {
    found[2 * k] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[k], high[k]));
    found[2 * k + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[k], high[k]));
  }
}

static inline void look_up(const FloatTable& table, const Levels& pixels, Light& light) {
  for (int k = 0; k < 3; ++k) {
    const Quarters q = quarters_of(pixels.c[k]);
    __m512i byte[4];
    for (int j = 0; j < 4; ++j) byte[j] = look_up(table.byte[j], pixels.c[k], q);
    assemble(byte, light.log2[k]);
  }
}

// The result of 64 pixels, while the logarithms of the next are looked up: permutations have one port, arithmetic has
// two, and a processor does not see far enough ahead to mix the two by itself.
static inline Levels rebuild(const Light& light, const Affine exponent[3], __m512 io, const FloatTable& table,
                             const Levels& next, Light& next_light) {
  Levels out;
  for (int c = 0; c < 3; ++c) {
    const Affine& m = exponent[c];
    const Quarters q = quarters_of(next.c[c]);
    __m512i level[4], byte[4];
    for (int j = 0; j < 4; ++j) {
      byte[j] = look_up(table.byte[j], next.c[c], q);
      __m512 z = _mm512_fmadd_ps(_mm512_set1_ps(m.n[2]), light.log2[2][j], _mm512_set1_ps(m.n0));
      z = _mm512_fmadd_ps(_mm512_set1_ps(m.n[1]), light.log2[1][j], z);
      z = _mm512_fmadd_ps(_mm512_set1_ps(m.n[0]), light.log2[0][j], z);
      level[j] = levels_of_exponent(z, io);
    }
    assemble(byte, next_light.log2[c]);
    out.c[c] = _mm512_packus_epi16(_mm512_packus_epi32(level[0], level[1]), _mm512_packus_epi32(level[2], level[3]));
  }
  return out;
}

// Calls store(begin, count, levels) for every 64 pixels of a range, or those that are left at its end.
template <class Store>
static inline void rebuild_pixels(const ImageView& image, PixelSpan span, const Reconstruction& r, const Store& store) {
  if (span.begin >= span.end) return;
  Affine exponent[3];
  const float origin = log2_exponents(r, exponent);
  FloatTable table;
  make_log2(origin, table);
  const __m512 io = _mm512_set1_ps(float(r.io));
  Light light[2];
  look_up(table, load_levels(image, span.begin, span.end - span.begin), light[0]);
  int now = 0;
  for (int64_t begin = span.begin; begin < span.end; begin += kWide) {
    const int64_t left = span.end - begin;
    // Behind the end nothing is read, and the pixels are zeros.
    const Levels next = load_levels(image, begin + (left > kWide ? kWide : 0), left > kWide ? left - kWide : 0);
    store(begin, left < kWide ? left : kWide, rebuild(light[now], exponent, io, table, next, light[1 - now]));
    now = 1 - now;
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
