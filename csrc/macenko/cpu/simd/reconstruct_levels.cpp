// Reconstruction of images of whole levels: a level of the result is the product of three factors, one of each channel
// of the pixel, which a table holds for all 256 levels.
#include <string.h>

#include "macenko/cpu/simd/planes.h"
#include "macenko/steps/elementary.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

template <class T> struct FourOf {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
};
template <class T> using Four = typename FourOf<T>::type;

// exp(-M_ck OD_k) of every result channel c, channel k and level, and what these are for. Io exp(shift) is in the
// first. Three factors and two products are rounded: off by 3e-7 in float32, which is enough for 8-bit results.
template <class Value> struct Factors {
  alignas(64) Value of[3][256][4];  // k, level, c
  double matrix[3][3], shift[3], io;

  bool serve(const Reconstruction& r) const {
    return io == r.io && memcmp(matrix, r.matrix, sizeof matrix) == 0 && memcmp(shift, r.shift, sizeof shift) == 0;
  }
};

template <class Value> static void make_factors(const Reconstruction& r, Factors<Value>& f) {
  for (int c = 0; c < 3; ++c) {
    const double first = r.io * macenko::exp_clamped(r.shift[c]);
    for (int k = 0; k < 3; ++k) {
      const double row = -r.matrix[c][k], scale = k == 0 ? first : 1;
      for (int level = 0; level < 256; ++level) {
        f.of[k][level][c] = Value(scale * macenko::exp_clamped(row * r.table->od[level]));
      }
    }
  }
  memcpy(f.matrix, r.matrix, sizeof f.matrix);
  memcpy(f.shift, r.shift, sizeof f.shift);
  f.io = r.io;
}

// Those of the last call on this thread: an image comes in many blocks, and a batch may have one reconstruction.
template <class Value> static const Factors<Value>& factors_of(const Reconstruction& r, int result) {
  thread_local Factors<Value> last[kMostResults] = {};
  if (!last[result].serve(r)) make_factors(r, last[result]);
  return last[result];
}

// Not returned: portable code has no register for four doubles.
template <class Value>
static inline void clipped_product(const Factors<Value>& f, uint8_t red, uint8_t green, uint8_t blue,
                                   Four<Value>& level) {
  Four<Value> factor[3];
  memcpy(&factor[0], f.of[0][red], sizeof factor[0]);
  memcpy(&factor[1], f.of[1][green], sizeof factor[1]);
  memcpy(&factor[2], f.of[2][blue], sizeof factor[2]);
  const Four<Value> value = factor[0] * factor[1] * factor[2], top = {255, 255, 255, 255};
  level = value < top ? value : top;
}

// The levels of `count` pixels, a multiple of four, each followed by a zero.
template <int kStride>
static void reconstruct_block(const uint8_t* const level[3], int count, const Factors<float>& f, uint8_t* out) {
  for (int i = 0; i < count; i += 4) {
    Four<int32_t> pixel[4];
    for (int j = 0; j < 4; ++j) {
      const int at = (i + j) * kStride;
      Four<float> value;
      clipped_product(f, level[0][at], level[1][at], level[2][at], value);
      pixel[j] = __builtin_convertvector(value, Four<int32_t>);
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

// Writes a block of four values a pixel to an image laid out as `image`.
template <class T> static void store_block(const ImageView& image, int64_t begin, int count, void* out, const T* from) {
  T* data = static_cast<T*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int c = 0; c < 3; ++c) {
      T* plane = data + c * image.channel_stride;
      for (int i = 0; i < count; ++i) plane[i] = from[4 * i + c];
    }
    return;
  }
  int i = 0;
#ifdef __SSSE3__
  if constexpr (sizeof(T) == 1) {  // four pixels at a time, and four bytes more, which the next overwrite
    const __m128i three_of_four = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (; i + 6 <= count; i += 4) {
      const __m128i four = _mm_load_si128(reinterpret_cast<const __m128i*>(from + 4 * i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(data + 3 * i), _mm_shuffle_epi8(four, three_of_four));
    }
  }
#endif
  // Four values each: the fourth is overwritten by the next pixel, which the last has none of.
  for (; i < count - 1; ++i) memcpy(data + 3 * i, from + 4 * i, 4 * sizeof(T));
  memcpy(data + 3 * (count - 1), from + 4 * (count - 1), 3 * sizeof(T));
}

void reconstruct_bytes(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  const Factors<float>* factors[kMostResults];
  for (int j = 0; j < results; ++j) factors[j] = &factors_of<float>(r[j], j);
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

// The levels of an image of T.
template <class T> static const uint8_t* levels_of(const ImageView& image) { return image.levels; }
template <> const uint8_t* levels_of<uint8_t>(const ImageView& image) {
  return static_cast<const uint8_t*>(image.data);
}

// Results in the caller's range, truncated to bytes. A product of doubles is off by less than what a T is rounded by.
template <class T>
static void reconstruct_values(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  const Factors<double>* factors[kMostResults];
  for (int j = 0; j < results; ++j) factors[j] = &factors_of<double>(r[j], j);
  const double inverse = 1 / image.scale;
  const int64_t stride = image.pixel_stride;
  const int64_t channel_stride = sizeof(T) == 1 ? image.channel_stride : image.level_channel_stride;
  alignas(64) T out[4 * kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    const uint8_t* const red = levels_of<T>(image) + begin * stride;
    const uint8_t* const green = red + channel_stride;
    const uint8_t* const blue = green + channel_stride;
    for (int j = 0; j < results; ++j) {
      for (int i = 0; i < count; ++i) {
        const int64_t at = i * stride;
        Four<double> value;
        clipped_product(*factors[j], red[at], green[at], blue[at], value);
        Four<T> stored;
        if constexpr (sizeof(T) == 1) {
          stored = __builtin_convertvector(__builtin_convertvector(value, Four<int32_t>), Four<T>);
        } else {
          stored = __builtin_convertvector(value * inverse, Four<T>);
        }
        memcpy(out + 4 * i, &stored, sizeof stored);
      }
      store_block(image, begin, count, r[j].out, out);
    }
  }
}

void reconstruct_levels_u8(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  reconstruct_values<uint8_t>(image, span, r, results);
}

void reconstruct_levels_f32(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  reconstruct_values<float>(image, span, r, results);
}

void reconstruct_levels_f64(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  reconstruct_values<double>(image, span, r, results);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
