// Sixty-four pixels of an 8-bit image reconstructed at a time: logarithms from a table in registers, exponentials by
// the polynomial of reconstruct_u8.cpp; the same bits as there with fused multiply-add. Written as bytes laid out as
// they are, or as a network's input: the scaled value of every level from a table in registers, interleaved, of 32 or
// 16 bits.
#include "macenko/cpu/simd/log_fine.h"
#include "macenko/cpu/simd/u8_vbmi.h"

#ifdef ERNET_VBMI
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// A table of float32 entries. Results come in four vectors: pixels 4 j to 4 j + 3 of each group of sixteen.
struct FloatTable {
  BytePlane byte[4];

  void set(int level, float value) {
    const uint32_t bits = macenko::bits_as<uint32_t>(value);
    for (int k = 0; k < 4; ++k) byte[k].entry[level] = uint8_t(bits >> (8 * k));
  }
};

static void make_log2(const Reconstruction& r, FloatTable& table) {
  Affine exponent[3];
  const float origin = log2_exponents(r, exponent);
  for (int level = 0; level < 256; ++level) table.set(level, fine_log2(level, origin));
}

// Logarithms of 64 pixels.
struct Logs {
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

static inline void look_up(const FloatTable& table, const Levels& pixels, Logs& logs) {
  for (int k = 0; k < 3; ++k) {
    const Quarters q = quarters_of(pixels.c[k]);
    __m512i byte[4];
    for (int j = 0; j < 4; ++j) byte[j] = look_up(table.byte[j], pixels.c[k], q);
    assemble(byte, logs.log2[k]);
  }
}

// The result of 64 pixels, while the logarithms of the next are looked up: permutations have one port, arithmetic has
// two, and a processor does not see far enough ahead to mix the two by itself.
static inline Levels reconstruct_lanes(const Logs& logs, const Affine exponent[3], __m512 io, const FloatTable& table,
                                       const Levels& next, Logs& next_logs) {
  Levels out;
  for (int c = 0; c < 3; ++c) {
    const Affine& m = exponent[c];
    const Quarters q = quarters_of(next.c[c]);
    __m512i level[4], byte[4];
    for (int j = 0; j < 4; ++j) {
      byte[j] = look_up(table.byte[j], next.c[c], q);
      __m512 z = _mm512_fmadd_ps(_mm512_set1_ps(m.n[2]), logs.log2[2][j], _mm512_set1_ps(m.n0));
      z = _mm512_fmadd_ps(_mm512_set1_ps(m.n[1]), logs.log2[1][j], z);
      z = _mm512_fmadd_ps(_mm512_set1_ps(m.n[0]), logs.log2[0][j], z);
      level[j] = levels_of_exponent(z, io);
    }
    assemble(byte, next_logs.log2[c]);
    out.c[c] = _mm512_packus_epi16(_mm512_packus_epi32(level[0], level[1]), _mm512_packus_epi32(level[2], level[3]));
  }
  return out;
}

// Calls store(begin, count, levels) for every 64 pixels of a range, or those that are left at its end.
template <class Store>
static inline void reconstruct_pixels(const ImageView& image, PixelSpan span, const Reconstruction& r,
                                      const FloatTable& table, const Store& store) {
  if (span.begin >= span.end) return;
  Affine exponent[3];
  log2_exponents(r, exponent);
  const __m512 io = _mm512_set1_ps(float(r.io));
  Logs logs[2];
  look_up(table, load_levels(image, span.begin, span.end - span.begin), logs[0]);
  int now = 0;
  for (int64_t begin = span.begin; begin < span.end; begin += kWide) {
    const int64_t left = span.end - begin;
    // Behind the end nothing is read, and the pixels are zeros.
    const Levels next = load_levels(image, begin + (left > kWide ? kWide : 0), left > kWide ? left - kWide : 0);
    store(begin, left < kWide ? left : kWide, reconstruct_lanes(logs[now], exponent, io, table, next, logs[1 - now]));
    now = 1 - now;
  }
}

void reconstruct_vbmi(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  FloatTable logs;
  make_log2(*r, logs);
  for_each_tile(span, results, [&](PixelSpan tile, int j) {
    reconstruct_pixels(image, tile, r[j], logs, [&](int64_t begin, int64_t count, const Levels& levels) {
      store_levels(image, begin, count, r[j].out, levels);
    });
  });
}

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
template <class Index, int n> struct Merge {
  alignas(64) Index red_green[3][n];
  alignas(64) Index blue[3][n];
  uint32_t is_blue[3];
};

template <class Index, int n> static constexpr Merge<Index, n> make_merge() {
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
    const float* value = static_cast<const float*>(scaled.value) + 256 * c;
    for (int level = 0; level < 256; ++level) table[c].set(level, value[level]);
  }
  float* const out = static_cast<float*>(scaled.out);
  const __m512i order = _mm512_load_si512(kPixelOrder.of_floats);
  FloatTable logs;
  make_log2(r, logs);
  reconstruct_pixels(image, span, r, logs, [&](int64_t begin, int64_t count, const Levels& levels) {
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
  FloatTable logs;
  make_log2(r, logs);
  reconstruct_pixels(image, span, r, logs, [&](int64_t begin, int64_t count, const Levels& levels) {
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
