// Reconstruction of 8-bit images with AVX-512, sixteen pixels at a time. Logarithms are gathered from a table, which
// keeps the load ports busy and leaves the arithmetic ones to the exponentials.
#include "macenko/cpu/simd/log_fine.h"

#ifdef ERNET_AVX512
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

constexpr int kLanes = 16;

// One channel of a reconstruction in every lane: the exponent is n . log2 + n0.
struct ChannelLanes {
  __m512 n[3];
  __m512 n0;
};

static inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

static inline __mmask64 first_triples(int64_t count) {
  return count >= kLanes ? 0xffffffffffff : (__mmask64(1) << (3 * count)) - 1;
}

// Levels of sixteen pixels, each in 32 bits, to those of the result.
static inline void reconstruct_lanes(__m512i level[3], const float* table, const ChannelLanes channel[3], __m512 io) {
  __m512 log2[3];
  for (int k = 0; k < 3; ++k) log2[k] = _mm512_i32gather_ps(level[k], table, 4);
  for (int c = 0; c < 3; ++c) {
    __m512 z = _mm512_fmadd_ps(channel[c].n[2], log2[2], channel[c].n0);
    z = _mm512_fmadd_ps(channel[c].n[1], log2[1], z);
    z = _mm512_fmadd_ps(channel[c].n[0], log2[0], z);
    level[c] = levels_of_exponent(z, io);
  }
}

// Functions that are called by pointer take no vectors: GCC clears the upper halves of the registers neither in a
// function with vector arguments nor after such a call, and all SSE code that follows would be slowed down.
static void reconstruct_planar(const ImageView& image, PixelSpan span, void* out, const float* table,
                               const ChannelLanes channel[3], float transmitted) {
  const __m512 io = _mm512_set1_ps(transmitted);
  const uint8_t* from = static_cast<const uint8_t*>(image.data);
  uint8_t* to = static_cast<uint8_t*>(out);
  const int64_t plane = image.channel_stride;
  for (int64_t i = span.begin; i < span.end; i += kLanes) {
    const __mmask16 there = first_lanes(span.end - i);
    __m512i level[3];
    for (int k = 0; k < 3; ++k) level[k] = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, from + i + k * plane));
    reconstruct_lanes(level, table, channel, io);
    for (int c = 0; c < 3; ++c) _mm512_mask_cvtepi32_storeu_epi8(to + i + c * plane, there, level[c]);
  }
}

static void reconstruct_interleaved(const ImageView& image, PixelSpan span, void* out, const float* table,
                                    const ChannelLanes channel[3], float transmitted) {
  const __m512 io = _mm512_set1_ps(transmitted);
  const uint8_t* from = static_cast<const uint8_t*>(image.data);
  uint8_t* to = static_cast<uint8_t*>(out);
  const __m512i byte = _mm512_set1_epi32(255);
  // Twelve bytes to each quarter of a vector, there spread to four pixels, and back.
  const __m512i apart = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
  const __m512i together = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
  const __m512i close = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  for (int64_t i = span.begin; i < span.end; i += kLanes) {
    const __mmask64 there = first_triples(span.end - i);
    const __m512i bytes = _mm512_permutexvar_epi32(apart, _mm512_maskz_loadu_epi8(there, from + 3 * i));
    const __m512i pixel = _mm512_shuffle_epi8(bytes, spread);
    __m512i level[3] = {_mm512_and_si512(pixel, byte), _mm512_and_si512(_mm512_srli_epi32(pixel, 8), byte),
                        _mm512_srli_epi32(pixel, 16)};
    reconstruct_lanes(level, table, channel, io);
    const __m512i green = _mm512_slli_epi32(level[1], 8);
    const __m512i blue = _mm512_slli_epi32(level[2], 16);
    const __m512i packed = _mm512_shuffle_epi8(_mm512_or_si512(_mm512_or_si512(level[0], green), blue), close);
    _mm512_mask_storeu_epi8(to + 3 * i, there, _mm512_permutexvar_epi32(together, packed));
  }
}

void reconstruct_avx512(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  alignas(64) float table[256];
  ChannelLanes channel[kMostResults][3];
  for (int j = 0; j < results; ++j) {
    Affine exponent[3];
    const float origin = log2_exponents(r[j], exponent);
    if (j == 0) {
      for (int level = 0; level < 256; ++level) table[level] = fine_log2(level, origin);
    }
    for (int c = 0; c < 3; ++c) {
      for (int k = 0; k < 3; ++k) channel[j][c].n[k] = _mm512_set1_ps(exponent[c].n[k]);
      channel[j][c].n0 = _mm512_set1_ps(exponent[c].n0);
    }
  }
  const auto loop = image.pixel_stride == 1 ? reconstruct_planar : reconstruct_interleaved;
  for_each_tile(span, results,
                [&](PixelSpan tile, int j) { loop(image, tile, r[j].out, table, channel[j], float(r->io)); });
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
