// Blocks of pixels of any type in float64: optical densities, tissue and keys, by loops that compilers vectorise.
// Included by the loops, once per instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/simd/planes.h"
#include "macenko/steps/elementary.h"
#include "macenko/steps/order_statistic.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

using macenko::OdTable;

static_assert(kBlock % 8 == 0, "flags are read eight at a time");

template <class T> struct Block {
  alignas(64) T value[3][kBlock];
};

template <class T> static void load(const ImageView& image, int64_t begin, int count, Block<T>& block) {
  const T* data = static_cast<const T*>(image.data) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int k = 0; k < 3; ++k) {
      const T* plane = data + k * image.channel_stride;
      for (int i = 0; i < count; ++i) block.value[k][i] = plane[i];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      block.value[0][i] = data[3 * i];
      block.value[1][i] = data[3 * i + 1];
      block.value[2][i] = data[3 * i + 2];
    }
  }
  // Zeros behind the end are valid levels, so loops may run over whole blocks.
  for (int k = 0; k < 3; ++k) {
    for (int i = count; i < kBlock; ++i) block.value[k][i] = 0;
  }
}

// ODs of a block; a value that is no grey level gives whatever it gives, but never a trap.
static inline void densities(const Block<uint8_t>& block, const Keys& keys, double, double od[3][kBlock]) {
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; ++i) od[k][i] = keys.table->od[block.value[k][i]];
  }
}

template <class T> static void densities(const Block<T>& block, const Keys& keys, double scale, double od[3][kBlock]) {
  const double inverse = 1 / keys.io;
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; ++i) {
      double level = double(block.value[k][i]) * scale;
      level = level > -0.5 ? level : -0.5;
      od[k][i] = -macenko::log_of_normal((level + 1.0) * inverse);
    }
  }
}

static inline void tissue_flags(const Block<uint8_t>& block, const Keys& keys, const double (*)[kBlock],
                                uint8_t* flags) {
  const int limit = keys.table->tissue_limit;
  const uint8_t top = uint8_t(limit < 0 ? 0 : limit);
  const uint8_t any = limit < 0 ? 0 : 1;
  for (int i = 0; i < kBlock; ++i) {
    const uint8_t rg = block.value[0][i] > block.value[1][i] ? block.value[0][i] : block.value[1][i];
    const uint8_t largest = rg > block.value[2][i] ? rg : block.value[2][i];
    flags[i] = uint8_t((largest <= top) & any);
  }
}

template <class T>
static void tissue_flags(const Block<T>&, const Keys& keys, const double (*od)[kBlock], uint8_t* flags) {
  for (int i = 0; i < kBlock; ++i) {
    flags[i] = uint8_t((od[0][i] >= keys.beta) & (od[1][i] >= keys.beta) & (od[2][i] >= keys.beta));
  }
}

static inline void clear_end(uint8_t* flags, int count) {
  for (int i = count; i < kBlock; ++i) flags[i] = 0;
}

// Keys of a block; `live` flags the pixels that count.
template <class T>
static void block_keys(const Block<T>& block, const Keys& keys, double scale, int count, double* a, double* b,
                       uint8_t* live) {
  alignas(64) double od[3][kBlock];
  densities(block, keys, scale, od);
  for (int i = 0; i < kBlock; ++i) {
    a[i] = keys.a[0] * od[0][i] + keys.a[1] * od[1][i] + keys.a[2] * od[2][i];
    b[i] = keys.b[0] * od[0][i] + keys.b[1] * od[1][i] + keys.b[2] * od[2][i];
  }
  if (keys.kind == KeyKind::angle) {
    tissue_flags(block, keys, od, live);
    for (int i = 0; i < kBlock; ++i) {
      const double key = macenko::pseudo_angle(a[i], b[i]);
      a[i] = key;
      b[i] = key;
    }
  } else {
    for (int i = 0; i < kBlock; ++i) live[i] = 1;
  }
  clear_end(live, count);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
