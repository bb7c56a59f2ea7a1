// Reconstruction of 8-bit images as a network's input: the scaled value of every level from a table in registers,
// written as interleaved values of 32 or 16 bits.
#include "macenko/cpu/simd/reconstruct_u8_vbmi.h"

#ifdef ERNET_VBMI
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// Tables give results in pieces of each group of sixteen pixels (`assemble`, `Words`). Pixels are put in such an order
// beforehand that vector j holds pixels n j to n (j + 1), for n values to a vector.
struct PixelOrder {
  alignas(64) uint8_t of_floats[64];
  alignas(64) uint8_t of_words[64];
};

static constexpr PixelOrder make_pixel_order() {
  PixelOrder t = {};
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 16;
    t.of_floats[i] = uint8_t(16 * (i % 16 / 4) + 4 * lane + i % 4);
    t.of_words[i] = uint8_t(32 * (i % 16 / 8) + 8 * lane + i % 8);
  }
  return t;
}

static constexpr PixelOrder kPixelOrder = make_pixel_order();

// How `n` pixels of three channels become 3 n values one after the other: from red and green, and from blue.
template <class Index, int n>
struct Merge {
  alignas(64) Index red_green[3][n];
  alignas(64) Index blue[3][n];
  uint32_t is_blue[3];
};

template <class Index, int n>
static constexpr Merge<Index, n> make_merge() {
  Merge<Index, n> t = {};
  for (int j = 0; j < 3; ++j) {
    for (int i = 0; i < n; ++i) {
      const int to = n * j + i;
      t.red_green[j][i] = Index(to / 3 + (to % 3 == 1 ? n : 0));
      t.blue[j][i] = Index(to / 3);
      if (to % 3 == 2) t.is_blue[j] |= uint32_t(1) << i;
    }
  }
  return t;
}

static constexpr Merge<uint32_t, 16> kMergeFloats = make_merge<uint32_t, 16>();
static constexpr Merge<uint16_t, 32> kMergeWords = make_merge<uint16_t, 32>();

static inline uint32_t first_values(int64_t count, int n) {
  return count >= n ? uint32_t((uint64_t(1) << n) - 1) : count <= 0 ? 0 : (uint32_t(1) << count) - 1;
}

static void scale_to_floats(const ImageView& image, PixelSpan span, const Reconstruction& r,
                            const ScaledLevels& scaled) {
  FloatTable table[3];
  for (int c = 0; c < 3; ++c) {
    for (int level = 0; level < 256; ++level) {
      uint32_t bits;
      __builtin_memcpy(&bits, static_cast<const float*>(scaled.value) + 256 * c + level, 4);
      for (int k = 0; k < 4; ++k) table[c].byte[k].entry[level] = uint8_t(bits >> (8 * k));
    }
  }
  float* const out = static_cast<float*>(scaled.out);
  const __m512i order = _mm512_load_si512(kPixelOrder.of_floats);
  rebuild_pixels(image, span, r, [&](int64_t begin, int64_t count, const Levels& levels) {
    __m512 value[3][4];
    for (int c = 0; c < 3; ++c) {
      const __m512i level = _mm512_permutexvar_epi8(order, levels.c[c]);
      const Quarters q = quarters_of(level);
      __m512i byte[4];
      for (int j = 0; j < 4; ++j) byte[j] = look_up(table[c].byte[j], level, q);
      assemble(byte, value[c]);
    }
    float* to = out + 3 * begin;
    int64_t left = 3 * count;
    for (int part = 0; part < 4; ++part) {
      for (int j = 0; j < 3; ++j, to += 16, left -= 16) {
        const __m512 two =
            _mm512_permutex2var_ps(value[0][part], _mm512_load_si512(kMergeFloats.red_green[j]), value[1][part]);
        const __m512 all = _mm512_mask_permutexvar_ps(two, __mmask16(kMergeFloats.is_blue[j]),
                                                      _mm512_load_si512(kMergeFloats.blue[j]), value[2][part]);
        _mm512_mask_storeu_ps(to, __mmask16(first_values(left, 16)), all);
      }
    }
  });
}

static void scale_to_words(const ImageView& image, PixelSpan span, const Reconstruction& r,
                           const ScaledLevels& scaled) {
  WordTable table[3];
  for (int c = 0; c < 3; ++c) {
    const uint16_t* value = static_cast<const uint16_t*>(scaled.value) + 256 * c;
    for (int level = 0; level < 256; ++level) table[c].set(level, value[level]);
  }
  uint16_t* const out = static_cast<uint16_t*>(scaled.out);
  const __m512i order = _mm512_load_si512(kPixelOrder.of_words);
  rebuild_pixels(image, span, r, [&](int64_t begin, int64_t count, const Levels& levels) {
    Words value[3];
    for (int c = 0; c < 3; ++c) {
      const __m512i level = _mm512_permutexvar_epi8(order, levels.c[c]);
      value[c] = look_up(table[c], level, quarters_of(level));
    }
    uint16_t* to = out + 3 * begin;
    int64_t left = 3 * count;
    for (int part = 0; part < 2; ++part) {
      for (int j = 0; j < 3; ++j, to += 32, left -= 32) {
        const __m512i two = _mm512_permutex2var_epi16(value[0].part[part], _mm512_load_si512(kMergeWords.red_green[j]),
                                                      value[1].part[part]);
        const __m512i all = _mm512_mask_permutexvar_epi16(two, kMergeWords.is_blue[j],
                                                          _mm512_load_si512(kMergeWords.blue[j]), value[2].part[part]);
        _mm512_mask_storeu_epi16(to, first_values(left, 32), all);
      }
    }
  });
}

void reconstruct_scaled_vbmi(const ImageView& image, PixelSpan span, const Reconstruction& r,
                             const ScaledLevels& scaled) {
  if (scaled.value_bytes == 2) {
    scale_to_words(image, span, r, scaled);
  } else {
    scale_to_floats(image, span, r, scaled);
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
