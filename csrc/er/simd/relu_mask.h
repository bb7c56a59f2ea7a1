// The ReLU bitmask, one bit an element in place of a map: where a ReLU let the gradient through. Every row of a map
// (planar: the plane of a channel; channels-last: a pixel) has bit_row_bytes() of its own, so rows may be written by
// different threads.
#pragma once

#include "er/kernels.h"
#include "simd/vec.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// The lanes where y <= 0 does not hold: where it is positive, or NaN, which torch.relu lets through.
static inline uint32_t lanes_alive(Vec<float> y) {
#if defined(__AVX512F__)
  return static_cast<uint16_t>(~_mm512_cmp_ps_mask(reinterpret_cast<__m512>(y), _mm512_setzero_ps(), _CMP_LE_OQ));
#elif defined(__AVX2__)
  const __m256 off = _mm256_cmp_ps(reinterpret_cast<__m256>(y), _mm256_setzero_ps(), _CMP_LE_OQ);
  return ~static_cast<uint32_t>(_mm256_movemask_ps(off)) & 0xffu;
#elif defined(__aarch64__)
  constexpr uint32x4_t own = {1, 2, 4, 8};
  return vaddvq_u32(vbicq_u32(own, vclezq_f32(reinterpret_cast<float32x4_t>(y))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(!(y[i] <= 0.0f)) << i;
  return bits;
#endif
}
static inline uint32_t lanes_alive(Vec<double> y) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= static_cast<uint32_t>(!(y[i] <= 0.0)) << i;
  return bits;
}

// v in the lanes whose bit is set, zero in the others.
static inline Vec<float> keep_lanes(Vec<float> v, uint32_t bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
#else
  typedef uint32_t lanes __attribute__((vector_size(kVectorBytes)));
  lanes own;
  for (int i = 0; i < kLanes<float>; ++i) own[i] = 1u << i;
  return (own & bits) != 0 ? v : Vec<float>{};
#endif
}
static inline Vec<double> keep_lanes(Vec<double> v, uint32_t bits) {
  typedef uint64_t lanes __attribute__((vector_size(kVectorBytes)));
  lanes own;
  for (int i = 0; i < kLanes<double>; ++i) own[i] = uint64_t{1} << i;
  return (own & static_cast<uint64_t>(bits)) != 0 ? v : Vec<double>{};
}

// The bits of kLanes<A> elements from element j of a row on, a multiple of kLanes<A>. Rows are written from their
// start.
template <typename A> static inline void store_bits(uint8_t* row, int64_t j, uint32_t bits) {
  if constexpr (kLanes<A> == 16) {
    const uint16_t both = static_cast<uint16_t>(bits);
    memcpy(row + j / 8, &both, sizeof both);
  } else {
    uint8_t& byte = row[j / 8];
    byte = static_cast<uint8_t>(j % 8 == 0 ? bits : byte | bits << (j % 8));
  }
}
template <typename A> static inline uint32_t load_bits(const uint8_t* row, int64_t j) {
  if constexpr (kLanes<A> == 16) {
    uint16_t both;
    memcpy(&both, row + j / 8, sizeof both);
    return both;
  } else {
    return static_cast<uint32_t>(row[j / 8]) >> (j % 8);
  }
}

// Those from any element j on. Four bytes are read, so some past the row.
template <typename A> static inline uint32_t load_bits_from(const uint8_t* row, int64_t j) {
  uint32_t bits;
  memcpy(&bits, row + j / 8, sizeof bits);
  return bits >> (j % 8);
}

// A row of a bitmask for maps that have none: all bits are set.
constexpr int64_t kAllLanes = 8192;
struct AllLanes {
  uint8_t bits[kAllLanes / 8 + kBitsPast];
  constexpr AllLanes() : bits() {
    for (uint8_t& byte : bits) byte = 0xff;
  }
};
static constexpr AllLanes all_lanes;

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
