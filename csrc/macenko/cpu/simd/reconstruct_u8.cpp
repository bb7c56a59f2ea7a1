// Reconstruction of 8-bit images: float32 logarithms and exponentials by polynomials.
#include "macenko/cpu/simd/log_fine.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// Bytes of the levels Io 2^z, clipped at 255 and truncated, for |z| < 117.
static void levels_of_exponents(const float* z, int n, float io, uint8_t* out) {
  for (int i = 0; i < n; ++i) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float whole = z[i] + shift;
    const float f = z[i] - (whole - shift);
    float p = kExp2[0];
    p = p * f + kExp2[1];
    p = p * f + kExp2[2];
    p = p * f + kExp2[3];
    p = p * f + kExp2[4];
    p = p * f + kExp2[5];
    const uint32_t power = macenko::bits_as<uint32_t>(p * f + kExp2[6]) + (macenko::bits_as<uint32_t>(whole) << 23);
    const float intensity = io * macenko::bits_as<float>(power);
    const float level = intensity < 255.0f ? intensity : 255.0f;
    out[i] = uint8_t(int32_t(level));
  }
}

// log2((I + 1) / 2^origin) of a block.
static void fine_logs(const ImageView& image, int64_t begin, int count, float origin, LogBlock& logs) {
  if (image.pixel_stride == 1) {
    for (int k = 0; k < 3; ++k) {
      const uint8_t* plane = static_cast<const uint8_t*>(image.data) + begin + k * image.channel_stride;
      for (int i = 0; i < count; ++i) logs.log2[k][i] = fine_log2(plane[i], origin);
      for (int i = count; i < padded(count); ++i) logs.log2[k][i] = 0;
    }
    return;
  }
  PackedBlock block;
  pack(image, begin, count, block);
  const int n = padded(count);
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < n; ++i) logs.log2[k][i] = fine_log2(int(block.pixel[i] >> (8 * k) & 255), origin);
  }
}

void reconstruct_bytes(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  Affine exponent[kMostResults][3];
  float origin = 0;
  for (int j = 0; j < results; ++j) origin = log2_exponents(r[j], exponent[j]);
  const float io = float(r->io);
  LogBlock logs;
  alignas(64) float z[kBlock];
  alignas(64) uint8_t level[3][kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    const int n = padded(count);
    fine_logs(image, begin, count, origin, logs);
    for (int j = 0; j < results; ++j) {
      for (int c = 0; c < 3; ++c) {
        const Affine m = exponent[j][c];
        for (int i = 0; i < n; ++i) {
          z[i] = m.n[0] * logs.log2[0][i] + (m.n[1] * logs.log2[1][i] + (m.n[2] * logs.log2[2][i] + m.n0));
        }
        levels_of_exponents(z, n, io, level[c]);
      }
      store(image, begin, count, r[j].out, level);
    }
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
