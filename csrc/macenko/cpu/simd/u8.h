// Blocks of an 8-bit image, channel by channel: levels, fixed-point ODs, their logarithms in 16 bits. Included by the
// loops over bytes, once per instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/simd/planes.h"
#include "macenko/cpu/simd/words.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

struct ByteBlock {
  alignas(64) uint8_t copied[3][kBlock];
  const uint8_t* level[3];
};

// Levels of `count` pixels: where they are, or, of interleaved pixels, copies.
static inline void load_levels(const ImageView& image, int64_t begin, int count, ByteBlock& block) {
  const uint8_t* data = static_cast<const uint8_t*>(image.data) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int k = 0; k < 3; ++k) block.level[k] = data + k * image.channel_stride;
    return;
  }
  for (int i = 0; i < count; ++i) {
    block.copied[0][i] = data[3 * i];
    block.copied[1][i] = data[3 * i + 1];
    block.copied[2][i] = data[3 * i + 2];
  }
  for (int k = 0; k < 3; ++k) block.level[k] = block.copied[k];
}

static inline void fixed_densities(const ByteBlock& block, int count, const macenko::OdTable& table,
                                   int32_t fixed[3][kBlock]) {
  for (int k = 0; k < 3; ++k) {
    const uint8_t* const level = block.level[k];
#if defined(__FMA__) || defined(__aarch64__)
    const int32_t offset = table.fixed_offset;
    for (int i = 0; i < count; ++i) fixed[k][i] = macenko::fixed_od_of_level(level[i], offset);
#else
    for (int i = 0; i < count; ++i) fixed[k][i] = table.fixed[level[i]];
#endif
  }
}

// Words of a block, whose pixels' words of one channel lie `stride` behind those of the last.
static inline void words_of(const int32_t fixed[3][kBlock], int count, int32_t origin, int16_t* words, int64_t stride) {
  for (int k = 0; k < 3; ++k) {
    int16_t* const out = words + k * stride;
    for (int i = 0; i < count; ++i) out[i] = word_of(fixed[k][i], origin);
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
