// Sixty-four 8-bit pixels at a time for CPUs with AVX-512 VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later): a table of
// 256 entries lies in vector registers and is read by byte permutations, one for each quarter of it. Included by the
// loops of that instruction set alone, and therefore static throughout.
#pragma once

#include "macenko/cpu/simd/u8.h"

#ifdef ERNET_VBMI

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

constexpr int kWide = 64;  // pixels whose bytes fill a vector

// Levels of 64 pixels.
struct Levels {
  __m512i c[3];
};

static inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64(0) : count <= 0 ? 0 : (__mmask64(1) << count) - 1;
}

// Where the bytes of three vectors of interleaved pixels belong, and back.
struct Interleaving {
  alignas(64) uint8_t split[3][2][64];  // of the first two vectors, of the third
  uint64_t split_third[3];              // which pixels of a channel lie in the third vector
  alignas(64) uint8_t merge[3][2][64];  // of red and green, of blue
  uint64_t merge_blue[3];               // which bytes of a vector are blue
};

static constexpr Interleaving make_interleaving() {
  Interleaving t = {};
  for (int c = 0; c < 3; ++c) {
    for (int i = 0; i < 64; ++i) {
      const int from = 3 * i + c;
      t.split[c][0][i] = uint8_t(from & 127);
      t.split[c][1][i] = uint8_t(from & 63);
      if (from >= 128) t.split_third[c] |= uint64_t(1) << i;
      const int to = 64 * c + i;  // byte `to` is channel to % 3 of pixel to / 3
      t.merge[c][0][i] = uint8_t(to / 3 + (to % 3 == 1 ? 64 : 0));
      t.merge[c][1][i] = uint8_t(to / 3);
      if (to % 3 == 2) t.merge_blue[c] |= uint64_t(1) << i;
    }
  }
  return t;
}

static constexpr Interleaving kInterleaving = make_interleaving();

// `count` pixels from `begin`, at most 64; zeros behind them. Reads no other bytes.
static inline Levels load_levels(const ImageView& image, int64_t begin, int64_t count) {
  const uint8_t* data = static_cast<const uint8_t*>(image.data) + begin * image.pixel_stride;
  Levels pixels;
  if (image.pixel_stride == 1) {
    const __mmask64 there = first_bytes(count);
    for (int c = 0; c < 3; ++c) pixels.c[c] = _mm512_maskz_loadu_epi8(there, data + c * image.channel_stride);
    return pixels;
  }
  __m512i part[3];
  for (int j = 0; j < 3; ++j) part[j] = _mm512_maskz_loadu_epi8(first_bytes(3 * count - 64 * j), data + 64 * j);
  for (int c = 0; c < 3; ++c) {
    const __m512i two = _mm512_permutex2var_epi8(part[0], _mm512_load_si512(kInterleaving.split[c][0]), part[1]);
    pixels.c[c] = _mm512_mask_permutexvar_epi8(two, kInterleaving.split_third[c],
                                               _mm512_load_si512(kInterleaving.split[c][1]), part[2]);
  }
  return pixels;
}

// Writes `count` pixels from `begin` of an image laid out as `image`, and no other bytes.
static inline void store_levels(const ImageView& image, int64_t begin, int64_t count, void* out, const Levels& pixels) {
  uint8_t* data = static_cast<uint8_t*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    const __mmask64 there = first_bytes(count);
    for (int c = 0; c < 3; ++c) _mm512_mask_storeu_epi8(data + c * image.channel_stride, there, pixels.c[c]);
    return;
  }
  for (int j = 0; j < 3; ++j) {
    const __m512i two =
        _mm512_permutex2var_epi8(pixels.c[0], _mm512_load_si512(kInterleaving.merge[j][0]), pixels.c[1]);
    const __m512i bytes = _mm512_mask_permutexvar_epi8(two, kInterleaving.merge_blue[j],
                                                       _mm512_load_si512(kInterleaving.merge[j][1]), pixels.c[2]);
    _mm512_mask_storeu_epi8(data + 64 * j, first_bytes(3 * count - 64 * j), bytes);
  }
}

// One byte of every entry of a table of 256.
struct BytePlane {
  alignas(64) uint8_t entry[256];
};

// In which quarter of a table the levels of a vector fall.
struct Quarters {
  __mmask64 second, third, fourth;  // from this one on
};

static inline Quarters quarters_of(__m512i level) {
  const __mmask64 bit7 = _mm512_movepi8_mask(level);
  const __mmask64 bit6 = _mm512_movepi8_mask(_mm512_add_epi8(level, level));
  return {bit7 | bit6, bit7, bit7 & bit6};
}

static inline __m512i look_up(const BytePlane& table, __m512i level, const Quarters& q) {
  const uint8_t* entry = table.entry;
  __m512i found = _mm512_permutexvar_epi8(level, _mm512_load_si512(entry));
  found = _mm512_mask_permutexvar_epi8(found, q.second, level, _mm512_load_si512(entry + 64));
  found = _mm512_mask_permutexvar_epi8(found, q.third, level, _mm512_load_si512(entry + 128));
  return _mm512_mask_permutexvar_epi8(found, q.fourth, level, _mm512_load_si512(entry + 192));
}

// A table of 16-bit entries. Results come in two vectors: pixels 0 to 7 and 8 to 15 of each group of sixteen.
struct WordTable {
  BytePlane low, high;

  void set(int level, int value) {
    low.entry[level] = uint8_t(value);
    high.entry[level] = uint8_t(value >> 8);
  }
};

struct Words {
  __m512i part[2];
};

static inline Words look_up(const WordTable& table, __m512i level, const Quarters& q) {
  const __m512i low = look_up(table.low, level, q);
  const __m512i high = look_up(table.high, level, q);
  return {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
}

static inline __mmask64 tissue_mask(const Levels& p, int limit) {
  const __m512i largest = _mm512_max_epu8(_mm512_max_epu8(p.c[0], p.c[1]), p.c[2]);
  return limit < 0 ? 0 : _mm512_cmple_epu8_mask(largest, _mm512_set1_epi8(char(limit)));
}

// Selected pixels, moved together and worked on in whole vectors.
struct Gathered {
  alignas(64) uint8_t level[3][kBlock + kWide];
  int count = 0;

  void add(const Levels& p, __mmask64 keep) {
    for (int c = 0; c < 3; ++c) _mm512_storeu_si512(level[c] + count, _mm512_maskz_compress_epi8(keep, p.c[c]));
    count += __builtin_popcountll(keep);
  }
  bool full() const { return count > kBlock - kWide; }
  Levels at(int i) const {
    return {{_mm512_load_si512(level[0] + i), _mm512_load_si512(level[1] + i), _mm512_load_si512(level[2] + i)}};
  }
  // Drops the first `done` pixels, a multiple of 64 that leaves less than a vector.
  void drop(int done) {
    for (int c = 0; c < 3; ++c) _mm512_store_si512(level[c], _mm512_load_si512(level[c] + done));
    count -= done;
  }
};
static_assert(kBlock % kWide == 0, "blocks are whole vectors");

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
