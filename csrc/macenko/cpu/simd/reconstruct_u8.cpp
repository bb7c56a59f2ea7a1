// Reconstruction of 8-bit images: a level of the result is the product of three factors, one of each channel of the
// pixel, which a table holds for all 256 levels.
#include <string.h>

#include "macenko/cpu/simd/planes.h"
#include "macenko/steps/elementary.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

typedef float FourFloats __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// exp(-M_ck OD_k) of every result channel c, channel k and level, and what these are for. Io exp(shift) is in the
// first. Three factors and two products are rounded: off by 3e-7.
struct Factors {
  alignas(64) float of[3][256][4];  // k, level, c
  double matrix[3][3], shift[3], io;

  bool serve(const Reconstruction& r) const {
    return io == r.io && memcmp(matrix, r.matrix, sizeof matrix) == 0 && memcmp(shift, r.shift, sizeof shift) == 0;
  }
};

static void make_factors(const Reconstruction& r, Factors& f) {
  for (int c = 0; c < 3; ++c) {
    const double first = r.io * macenko::exp_clamped(r.shift[c]);
    for (int k = 0; k < 3; ++k) {
      const double row = -r.matrix[c][k], scale = k == 0 ? first : 1;
      for (int level = 0; level < 256; ++level) {
        f.of[k][level][c] = float(scale * macenko::exp_clamped(row * r.table->od[level]));
      }
    }
  }
  memcpy(f.matrix, r.matrix, sizeof f.matrix);
  memcpy(f.shift, r.shift, sizeof f.shift);
  f.io = r.io;
}

// Those of the last call on this thread: an image comes in many blocks, and a batch may have one reconstruction.
static const Factors& factors_of(const Reconstruction& r, int result) {
  thread_local Factors last[kMostResults] = {};
  if (!last[result].serve(r)) make_factors(r, last[result]);
  return last[result];
}

static inline FourInts levels_of(const Factors& f, uint8_t red, uint8_t green, uint8_t blue) {
  FourFloats factor[3];
  memcpy(&factor[0], f.of[0][red], 16);
  memcpy(&factor[1], f.of[1][green], 16);
  memcpy(&factor[2], f.of[2][blue], 16);
  const FourFloats value = factor[0] * factor[1] * factor[2], top = {255, 255, 255, 255};
  return __builtin_convertvector(value < top ? value : top, FourInts);
}

// The levels of `count` pixels, a multiple of four, each followed by a zero.
template <int kStride>
static void reconstruct_block(const uint8_t* const level[3], int count, const Factors& f, uint8_t* out) {
  for (int i = 0; i < count; i += 4) {
    FourInts pixel[4];
    for (int j = 0; j < 4; ++j) {
      const int at = (i + j) * kStride;
      pixel[j] = levels_of(f, level[0][at], level[1][at], level[2][at]);
    }
#ifdef __SSE2__
    const auto lanes = [&](int j) { return reinterpret_cast<__m128i>(pixel[j]); };
    const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(lanes(0), lanes(1)), _mm_packs_epi32(lanes(2), lanes(3)));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 4 * i), bytes);
#elif defined(__aarch64__)
    const auto lanes = [&](int j) { return vqmovun_s32(reinterpret_cast<int32x4_t>(pixel[j])); };
    const uint16x8_t first = vcombine_u16(lanes(0), lanes(1)), second = vcombine_u16(lanes(2), lanes(3));
    vst1q_u8(out + 4 * i, vcombine_u8(vmovn_u16(first), vmovn_u16(second)));
#else
    for (int j = 0; j < 4; ++j) {
      for (int c = 0; c < 4; ++c) out[4 * (i + j) + c] = uint8_t(pixel[j][c]);
    }
#endif
  }
}

// Writes a block of four bytes a pixel to an image laid out as `image`.
static void store_block(const ImageView& image, int64_t begin, int count, void* out, const uint8_t* from) {
  uint8_t* data = static_cast<uint8_t*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int c = 0; c < 3; ++c) {
      uint8_t* plane = data + c * image.channel_stride;
      for (int i = 0; i < count; ++i) plane[i] = from[4 * i + c];
    }
    return;
  }
  // Four bytes each: the fourth is overwritten by the next pixel, which the last has none of.
  for (int i = 0; i < count - 1; ++i) memcpy(data + 3 * i, from + 4 * i, 4);
  memcpy(data + 3 * (count - 1), from + 4 * (count - 1), 3);
}

void reconstruct_bytes(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  const Factors* factors[kMostResults];
  for (int j = 0; j < results; ++j) factors[j] = &factors_of(r[j], j);
  const auto block = image.pixel_stride == 1 ? reconstruct_block<1> : reconstruct_block<3>;
  uint8_t last[3][3 * 4] = {};  // of the pixels that make no four
  alignas(64) uint8_t out[4 * kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    const int whole = count / 4 * 4;
    const uint8_t* level[3];
    for (int k = 0; k < 3; ++k) {
      level[k] = static_cast<const uint8_t*>(image.data) + begin * image.pixel_stride + k * image.channel_stride;
      for (int i = whole; i < count; ++i) {
        last[k][(i - whole) * image.pixel_stride] = level[k][i * image.pixel_stride];
      }
    }
    for (int j = 0; j < results; ++j) {
      block(level, whole, *factors[j], out);
      const uint8_t* const rest[3] = {last[0], last[1], last[2]};
      if (whole < count) block(rest, 4, *factors[j], out + 4 * whole);
      store_block(image, begin, count, r[j].out, out);
    }
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
