// Blocks of an 8-bit image on the stack: packed pixels, tissue ones moved together, logarithms. Included by the loops
// over bytes, once per instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/simd/planes.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

constexpr int kLanes = 16;
static_assert(kBlock % kLanes == 0, "blocks are whole vectors");

struct PackedBlock {
  alignas(64) uint32_t pixel[kBlock + kLanes];  // red + 256 green + 65536 blue
};

struct FixedBlock {
  alignas(64) int32_t od[3][kBlock + kLanes];
};

static inline int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

static inline void pack(const ImageView& image, int64_t begin, int count, PackedBlock& block) {
  const uint8_t* data = static_cast<const uint8_t*>(image.data) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    const uint8_t* g = data + image.channel_stride;
    const uint8_t* b = g + image.channel_stride;
    for (int i = 0; i < count; ++i) block.pixel[i] = uint32_t(data[i]) | uint32_t(g[i]) << 8 | uint32_t(b[i]) << 16;
  } else {
    int i = 0;
#ifdef ERNET_AVX512
    // 48 bytes: twelve to each quarter of the vector, there spread to four pixels.
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    for (; i + kLanes <= count; i += kLanes) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(0xffffffffffff, data + 3 * i);
      _mm512_store_si512(block.pixel + i, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, bytes), spread));
    }
#elif defined(__SSSE3__)
    const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    for (; i + 6 <= count; i += 4) {  // reads 16 bytes, of which 12 are these four pixels
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 3 * i));
      _mm_store_si128(reinterpret_cast<__m128i*>(block.pixel + i), _mm_shuffle_epi8(bytes, spread));
    }
#endif
    // Four bytes from each third one; the last pixel must not read past the end.
    for (; i + 1 < count; ++i) {
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
static inline int keep_tissue(PackedBlock& block, int count, int limit) {
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

struct LogBlock {
  alignas(64) float log2[3][kBlock + kLanes];
};

// An affine function of the three logarithms of a pixel.
struct Affine {
  float n[3];
  float n0;
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
