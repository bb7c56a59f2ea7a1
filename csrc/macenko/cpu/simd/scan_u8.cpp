// Brackets of percentiles in 8-bit images: float32 comparisons with a known error, exact keys for what falls inside.
#include "macenko/cpu/simd/log_coarse.h"
#include "macenko/cpu/simd/u8.h"
#include "macenko/steps/order_statistic.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

static inline float level_plus_one(uint32_t level) {
  return macenko::bits_as<float>(level | 0x4b000000) - 8388607.0f;  // 2^23 + level
}

// coarse_log2 of level + 1, of a block.
static void coarse_logs(const PackedBlock& block, int count, LogBlock& logs) {
  const int n = padded(count);
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < n; ++i) logs.log2[k][i] = coarse_log2(level_plus_one(block.pixel[i] >> (8 * k) & 255));
  }
}

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

// Bit i says that value[i] is negative.
static unsigned negative_mask(const float* value) {
#ifdef ERNET_AVX512
  return _mm512_movepi32_mask(_mm512_castps_si512(_mm512_loadu_ps(value)));
#elif defined(__SSE2__)
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

static float edge_values_of_angles(const LogBlock& logs, int count, const Affine& fx, const Affine& fy,
                                   const Edge edges[4], EdgeBlock& out) {
  const int n = padded(count);
  float least[kLanes];
  for (int j = 0; j < kLanes; ++j) least[j] = 1e30f;
  for (int i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float r = logs.log2[0][i + j];
      const float g = logs.log2[1][i + j];
      const float b = logs.log2[2][i + j];
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

static void edge_values_of_row(const LogBlock& logs, int count, const Affine& f, const Edge& low, const Edge& high,
                               float* low_value, float* high_value) {
  const int n = padded(count);
  for (int i = 0; i < n; ++i) {
    const float x = f.n[0] * logs.log2[0][i] + (f.n[1] * logs.log2[1][i] + (f.n[2] * logs.log2[2][i] + f.n0));
    low_value[i] = low.cx * x + low.c0;
    high_value[i] = high.cx * x + high.c0;
  }
}

void scan_bytes(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  const bool angles = keys.kind == KeyKind::angle;
  const auto edge = angles ? angle_edge : linear_edge;
  const Edge edges[4] = {edge(first.low, true), edge(first.high, false), edge(second.low, true),
                         edge(second.high, false)};
  const Affine fx = affine(keys.a, keys.io);
  const Affine fy = affine(keys.b, keys.io);
  PackedBlock block;
  LogBlock logs;
  EdgeBlock values;
  float least = 1e30f;
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    pack(image, begin, count, block);
    if (angles) count = keep_tissue(block, count, keys.table->tissue_limit);
    if (count == 0) continue;
    // The padding repeats a pixel that is there, so that it has no say in `least`.
    for (int i = count; i < padded(count); ++i) block.pixel[i] = block.pixel[0];
    coarse_logs(block, count, logs);
    if (angles) {
      const float height = edge_values_of_angles(logs, count, fx, fy, edges, values);
      least = height < least ? height : least;
    } else {
      edge_values_of_row(logs, count, fx, edges[0], edges[1], values.value[0], values.value[1]);
      edge_values_of_row(logs, count, fy, edges[2], edges[3], values.value[2], values.value[3]);
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
  const double error = kLn2 * kCoarseErrorOfLevels + 8 * 8 * 0x1p-24;
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

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
