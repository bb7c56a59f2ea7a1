// Reconstruction of 8-bit images: float32 logarithms and exponentials by polynomials.
#include "cpu/macenko_bytes.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

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

// Bytes of the levels Io 2^z, clipped at 255 and truncated, for |z| < 117: 2^z is 2^n times a polynomial of degree 6,
// off by 3e-9.
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
  // log2(I' / Io) = sum_k M_ck log2((I_k + 1) / Io). What `origin` and the polynomial round off where I + 1 = Io goes
  // into the constant, so that light without any absorption comes out as Io exactly: truncation would show the least
  // error there.
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
