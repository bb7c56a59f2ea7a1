// The loops over 8-bit images. A pass reads the bytes again instead of keeping anything: packed pixels, tissue ones moved together, their
// fixed-point ODs by a polynomial (macenko/od.h), then integer products, float32 comparisons or float32 exponentials.
#include "cpu/macenko_loops.h"
#include "macenko/order_statistic.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#define ERNET_AVX512 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined vectors inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__SSE2__)
#define ERNET_SSE 1
#include <immintrin.h>
#endif

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

using macenko::OdTable;

// Pixels at a time. Everything about a block stays in the first-level cache.
constexpr int kBlock = 512;
constexpr int kLanes = 16;
static_assert(kBlock <= macenko::kMaxFixedProducts, "products of one block are summed in int64");
static_assert(kBlock % kLanes == 0, "blocks are whole vectors");

struct PackedBlock {
  alignas(64) uint32_t pixel[kBlock + kLanes];  // red + 256 green + 65536 blue
};

struct FixedBlock {
  alignas(64) int32_t od[3][kBlock + kLanes];
};

static int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

static void pack(const ImageView& image, int64_t begin, int count, PackedBlock& block) {
  const uint8_t* data = static_cast<const uint8_t*>(image.data) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    const uint8_t* g = data + image.channel_stride;
    const uint8_t* b = g + image.channel_stride;
    for (int i = 0; i < count; ++i) block.pixel[i] = uint32_t(data[i]) | uint32_t(g[i]) << 8 | uint32_t(b[i]) << 16;
  } else {
    // Four bytes from each third one; the last pixel must not read past the end.
    for (int i = 0; i + 1 < count; ++i) {
      uint32_t four;
      __builtin_memcpy(&four, data + 3 * i, 4);
      block.pixel[i] = four & 0xffffff;
    }
    const uint8_t* last = data + 3 * (count - 1);
    block.pixel[count - 1] = uint32_t(last[0]) | uint32_t(last[1]) << 8 | uint32_t(last[2]) << 16;
  }
  for (int i = count; i < padded(count); ++i) block.pixel[i] = 0;
}

// Moves the tissue pixels of a block to its front and returns how many there are.
static int keep_tissue(PackedBlock& block, int count, int limit) {
  if (limit < 0) return 0;
  int kept = 0;
#ifdef ERNET_AVX512
  const __m512i top = _mm512_set1_epi32(limit);
  const __m512i byte = _mm512_set1_epi32(255);
  for (int i = 0; i < count; i += kLanes) {
    const __m512i p = _mm512_load_si512(block.pixel + i);
    const __m512i largest = _mm512_max_epu8(_mm512_max_epu8(p, _mm512_srli_epi32(p, 8)), _mm512_srli_epi32(p, 16));
    const __mmask16 exists = count - i >= kLanes ? __mmask16(0xffff) : __mmask16((1u << (count - i)) - 1);
    const __mmask16 keep = _mm512_mask_cmple_epu32_mask(exists, _mm512_and_si512(largest, byte), top);
    _mm512_storeu_si512(block.pixel + kept, _mm512_maskz_compress_epi32(keep, p));
    kept += __builtin_popcount(keep);
  }
#else
  alignas(64) uint32_t keep[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const int32_t p = int32_t(block.pixel[i]);
    const int32_t r = p & 255;
    const int32_t g = p >> 8 & 255;
    const int32_t b = p >> 16;
    const int32_t rg = r > g ? r : g;
    keep[i] = (rg > b ? rg : b) <= limit;
  }
  for (int i = 0; i < count; ++i) {
    block.pixel[kept] = block.pixel[i];
    kept += int(keep[i]);
  }
#endif
  for (int i = kept; i < padded(kept); ++i) block.pixel[i] = 0;
  return kept;
}

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
  int64_t sum[3] = {0, 0, 0};
  int64_t product[6] = {0, 0, 0, 0, 0, 0};
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
        const __m512i wide = _mm512_add_epi64(_mm512_and_si512(s[k], _mm512_set1_epi64(0xffffffff)), _mm512_srli_epi64(s[k], 32));
        sum[k] += _mm512_reduce_add_epi64(wide);
        s[k] = _mm512_setzero_si512();
      }
    }
  }
  for (int j = 0; j < 6; ++j) product[j] = _mm512_reduce_add_epi64(p[j]);
#else
  for (int i = 0; i < n; ++i) {
    const int64_t r = fixed.od[0][i];
    const int64_t g = fixed.od[1][i];
    const int64_t b = fixed.od[2][i];
    sum[0] += r;
    sum[1] += g;
    sum[2] += b;
    product[0] += r * r;
    product[1] += r * g;
    product[2] += r * b;
    product[3] += g * g;
    product[4] += g * b;
    product[5] += b * b;
  }
#endif
  for (int k = 0; k < 3; ++k) sums.sum[k] += sum[k];
  for (int k = 0; k < 6; ++k) sums.product[k] += uint64_t(product[k]);
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

// log2(level + 1) - kCoarseConstant in float32, off by at most kCoarseError: with level + 1 = 2^k m, k + a polynomial of degree 5 in m.
// A constant term would be one more operation; whoever uses the result has a constant anyway.
constexpr double kCoarseError = 1.5e-5;
constexpr double kCoarseConstant = -2.79415369;

static inline float coarse_log2(int level) {
  union {
    float real;
    int32_t bits;
  } u;
  u.bits = level | 0x4b000000;      // 2^23 + level
  u.real = u.real - 8388607.0f;     // level + 1
  const float exponent = float((u.bits >> 23) - 127);
  u.bits = (u.bits & 0x7fffff) | 0x3f800000;
  const float m = u.real;
  float p = 0.0439286269f;
  p = p * m - 0.409475595f;
  p = p * m + 1.61017752f;
  p = p * m - 3.52021885f;
  p = p * m + 5.06975651f;
  return p * m + exponent;
}

// log2(level + 1) = k + f P(f) as in macenko/od.h.
struct Split {
  float exponent;
  float f;
};

static inline Split split(int level) {
  union {
    float real;
    int32_t bits;
  } u;
  u.real = float(level + 1);
  const int32_t shifted = u.bits - macenko::kSqrtHalfBits;
  u.bits = (shifted & 0x7fffff) + macenko::kSqrtHalfBits;
  return {float(shifted >> 23), u.real - 1.0f};
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

struct LightBlock {
  alignas(64) float log2[3][kBlock + kLanes];
};

// coarse_log2 of a block.
static void coarse_light(const PackedBlock& block, int count, LightBlock& light) {
  const int n = padded(count);
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < n; ++i) light.log2[k][i] = coarse_log2(int(block.pixel[i] >> (8 * k) & 255));
  }
}

// n . OD + n0 as an affine function of coarse_log2.
struct Affine {
  float n[3];
  float n0;
};

constexpr double kLn2 = 0.693147180559945309417;

// row . OD, with OD = ln Io - ln 2 log2(I + 1).
static Affine affine(const double row[3], double io) {
  Affine f;
  for (int k = 0; k < 3; ++k) f.n[k] = float(-kLn2 * row[k]);
  f.n0 = float((__builtin_log(io) - kLn2 * kCoarseConstant) * (row[0] + row[1] + row[2]));
  return f;
}

// One end of a bracket as cx x + cy y + c0, negative outside, of the two forms x = a . OD and y = b . OD.
struct Edge {
  float cx, cy, c0;
};

// For pixels with y > 0 and a key in (0, 2): the cross product with the direction of the key.
static Edge angle_edge(double key, bool is_low) {
  if (!(key > 0 && key < 2)) return {0, 0, 1};
  const double x = 1 - key;
  const double y = 1 - __builtin_fabs(x);
  return is_low ? Edge{float(-y), float(x), 0} : Edge{float(y), float(-x), 0};
}

static Edge linear_edge(double key, bool is_low) {
  if (!(key > -1e30 && key < 1e30)) return {0, 0, 1};
  return is_low ? Edge{1, 0, float(-key)} : Edge{-1, 0, float(key)};
}

static double sum_of_magnitudes(const double row[3]) {
  return __builtin_fabs(row[0]) + __builtin_fabs(row[1]) + __builtin_fabs(row[2]);
}

// Bit i says that value[i] is negative.
static unsigned negative_mask(const float* value) {
#ifdef ERNET_AVX512
  return _mm512_movepi32_mask(_mm512_castps_si512(_mm512_loadu_ps(value)));
#elif defined(ERNET_SSE)
  unsigned mask = 0;
  for (int i = 0; i < kLanes; i += 4) mask |= unsigned(_mm_movemask_ps(_mm_loadu_ps(value + i))) << i;
  return mask;
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= unsigned(value[i] < 0) << i;
  return mask;
#endif
}

static double exact_key(uint32_t pixel, const Keys& keys, int which) {
  const double* od = keys.table->od;
  const double r = od[pixel & 255];
  const double g = od[pixel >> 8 & 255];
  const double b = od[pixel >> 16 & 255];
  const double x = keys.a[0] * r + keys.a[1] * g + keys.a[2] * b;
  const double y = keys.b[0] * r + keys.b[1] * g + keys.b[2] * b;
  if (keys.kind == KeyKind::angle) return macenko::pseudo_angle(x, y);
  return which == 0 ? x : y;
}

static void collect(unsigned mask, const uint32_t* pixels, const Keys& keys, int which, Bracket& bracket) {
  while (mask) {
    const int i = __builtin_ctz(mask);
    mask &= mask - 1;
    if (bracket.inside < bracket.capacity) bracket.collected[bracket.inside] = exact_key(pixels[i], keys, which);
    ++bracket.inside;
  }
}

// Values of the four edges of a block.
struct EdgeBlock {
  alignas(64) float value[4][kBlock + kLanes];
};

static float edge_values_of_angles(const LightBlock& light, int count, const Affine& fx, const Affine& fy, const Edge edges[4],
                                   EdgeBlock& out) {
  const int n = padded(count);
  float least[kLanes];
  for (int j = 0; j < kLanes; ++j) least[j] = 1e30f;
  for (int i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float r = light.log2[0][i + j];
      const float g = light.log2[1][i + j];
      const float b = light.log2[2][i + j];
      const float x = fx.n[0] * r + (fx.n[1] * g + (fx.n[2] * b + fx.n0));
      const float y = fy.n[0] * r + (fy.n[1] * g + (fy.n[2] * b + fy.n0));
      for (int e = 0; e < 4; ++e) out.value[e][i + j] = edges[e].cx * x + (edges[e].cy * y + edges[e].c0);
      least[j] = y < least[j] ? y : least[j];
    }
  }
  float result = least[0];
  for (int j = 1; j < kLanes; ++j) result = least[j] < result ? least[j] : result;
  return result;
}

static void edge_values_of_row(const LightBlock& light, int count, const Affine& f, const Edge& low, const Edge& high,
                               float* low_value, float* high_value) {
  const int n = padded(count);
  for (int i = 0; i < n; ++i) {
    const float x = f.n[0] * light.log2[0][i] + (f.n[1] * light.log2[1][i] + (f.n[2] * light.log2[2][i] + f.n0));
    low_value[i] = low.cx * x + low.c0;
    high_value[i] = high.cx * x + high.c0;
  }
}

void scan_bytes(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  const bool angles = keys.kind == KeyKind::angle;
  const auto edge = angles ? angle_edge : linear_edge;
  const Edge edges[4] = {edge(first.low, true), edge(first.high, false), edge(second.low, true), edge(second.high, false)};
  const Affine fx = affine(keys.a, keys.io);
  const Affine fy = affine(keys.b, keys.io);
  PackedBlock block;
  LightBlock light;
  EdgeBlock values;
  float least = 1e30f;
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    pack(image, begin, count, block);
    if (angles) count = keep_tissue(block, count, keys.table->tissue_limit);
    if (count == 0) continue;
    // The padding repeats a pixel that is there, so that it has no say in `least`.
    for (int i = count; i < padded(count); ++i) block.pixel[i] = block.pixel[0];
    coarse_light(block, count, light);
    if (angles) {
      const float height = edge_values_of_angles(light, count, fx, fy, edges, values);
      least = height < least ? height : least;
    } else {
      edge_values_of_row(light, count, fx, edges[0], edges[1], values.value[0], values.value[1]);
      edge_values_of_row(light, count, fy, edges[2], edges[3], values.value[2], values.value[3]);
    }
    for (int i = 0; i < count; i += kLanes) {
      const unsigned live = count - i >= kLanes ? 0xffffu : (1u << (count - i)) - 1;
      for (int which = 0; which < 2; ++which) {
        Bracket& bracket = which == 0 ? first : second;
        const unsigned below = negative_mask(values.value[2 * which] + i) & live;
        const unsigned above = negative_mask(values.value[2 * which + 1] + i) & live;
        bracket.below += __builtin_popcount(below);
        collect(live & ~below & ~above, block.pixel + i, keys, which, bracket);
      }
    }
  }
  // Logarithms are below 16; products of them, their sums and the constants are rounded eight times at most.
  const double error = kLn2 * kCoarseError + 8 * 8 * 0x1p-24;
  const double error_a = error * (1 + sum_of_magnitudes(keys.a));
  const double error_b = error * (1 + sum_of_magnitudes(keys.b));
  if (angles) {
    // The cross product is the difference of the keys times |x| + |y|, at least half of it across quadrants.
    const double margin = least > error_b ? 2 * (error_a + error_b) / (double(least) - error_b) : 1e300;
    first.margin = margin > first.margin ? margin : first.margin;
    second.margin = margin > second.margin ? margin : second.margin;
  } else {
    first.margin = error_a > first.margin ? error_a : first.margin;
    second.margin = error_b > second.margin ? error_b : second.margin;
  }
}

// Bytes of the levels Io 2^z, clipped at 255 and truncated, for |z| < 117: 2^z is 2^n times a polynomial of degree 6, off by 3e-9.
static void levels_of_exponents(const float* z, int n, float io, uint8_t* out) {
  for (int i = 0; i < n; ++i) {
    union {
      float real;
      int32_t bits;
    } whole, power;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    whole.real = z[i] + shift;
    const float f = z[i] - (whole.real - shift);
    float p = 0.00015469731972f;
    p = p * f + 0.00134004321658f;
    p = p * f + 0.00961802560297f;
    p = p * f + 0.05550327214208f;
    p = p * f + 0.24022651213595f;
    p = p * f + 0.69314720671062f;
    power.real = p * f + 1.0f;
    power.bits += int32_t(uint32_t(whole.bits) << 23);
    const float light = io * power.real;
    const float level = light < 255.0f ? light : 255.0f;
    out[i] = uint8_t(int32_t(level));
  }
}

static void store(const ImageView& image, int64_t begin, int count, void* out, const uint8_t (*level)[kBlock]) {
  uint8_t* data = static_cast<uint8_t*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int c = 0; c < 3; ++c) __builtin_memcpy(data + c * image.channel_stride, level[c], size_t(count));
  } else {
    for (int i = 0; i < count; ++i) {
      data[3 * i] = level[0][i];
      data[3 * i + 1] = level[1][i];
      data[3 * i + 2] = level[2][i];
    }
  }
}

// log2((I + 1) / 2^origin) of a block.
static void fine_light(const ImageView& image, int64_t begin, int count, float origin, LightBlock& light) {
  if (image.pixel_stride == 1) {
    for (int k = 0; k < 3; ++k) {
      const uint8_t* plane = static_cast<const uint8_t*>(image.data) + begin + k * image.channel_stride;
      for (int i = 0; i < count; ++i) light.log2[k][i] = fine_log2(plane[i], origin);
      for (int i = count; i < padded(count); ++i) light.log2[k][i] = 0;
    }
    return;
  }
  PackedBlock block;
  pack(image, begin, count, block);
  const int n = padded(count);
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < n; ++i) light.log2[k][i] = fine_log2(int(block.pixel[i] >> (8 * k) & 255), origin);
  }
}

void reconstruct_bytes(const ImageView& image, PixelSpan span, const Reconstruction& r) {
  // log2(I' / Io) = sum_k M_ck log2((I_k + 1) / Io). What `origin` and the polynomial round off where I + 1 = Io goes into the constant, so
  // that light without any absorption comes out as Io exactly: truncation would show the least error there.
  const float origin = float(__builtin_log2(r.io));
  const int clear = int(r.io) - 1;
  const double unit_light = __builtin_log2((clear + 1) / r.io);
  const double residue = fine_log2(clear, origin) - unit_light;
  Affine exponent[3];
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int k = 0; k < 3; ++k) {
      exponent[c].n[k] = float(r.matrix[c][k]);
      sum += exponent[c].n[k];
    }
    exponent[c].n0 = float(-sum * residue);
  }
  const float io = float(r.io);
  LightBlock light;
  alignas(64) float z[kBlock];
  alignas(64) uint8_t level[3][kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    const int n = padded(count);
    fine_light(image, begin, count, origin, light);
    for (int c = 0; c < 3; ++c) {
      const Affine m = exponent[c];
      for (int i = 0; i < n; ++i) {
        z[i] = m.n[0] * light.log2[0][i] + (m.n[1] * light.log2[1][i] + (m.n[2] * light.log2[2][i] + m.n0));
      }
      levels_of_exponents(z, n, io, level[c]);
    }
    store(image, begin, count, r.out, level);
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
