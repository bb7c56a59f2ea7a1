// Blocks as planes, of whatever a pixel is made of. Included by the loops, once per instruction set, and therefore
// static throughout.
#pragma once

#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// Pixels at a time: everything about a block stays in the first-level cache.
constexpr int kBlock = 512;
static_assert(kBlock <= macenko::kMaxFixedProducts, "products of one block are summed in int64");

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
typedef uint64_t Wides __attribute__((vector_size(kRegister)));
constexpr int kInts = kRegister / 4;
static_assert(kBlock % kInts == 0, "blocks are whole vectors");

// Products of the lower 32 bits of each 64.
static inline Wides low_products(Wides a, Wides b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wides>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wides>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wides>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
  const auto low = [](Wides wide) { return vmovn_u64(reinterpret_cast<uint64x2_t>(wide)); };
  return reinterpret_cast<Wides>(vmull_u32(low(a), low(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Sets the fixed-point ODs of a block to zero where they are negative, and of the pixels that have one below `least`.
// Returns how many have none.
static inline int keep_tissue(int32_t od[3][kBlock], int32_t least) {
  int kept = 0;
  for (int i = 0; i < kBlock; ++i) {
    const int32_t red = od[0][i], green = od[1][i], blue = od[2][i];
    const int32_t rg = red < green ? red : green;
    const int32_t keep = -int32_t((rg < blue ? rg : blue) >= least);
    kept -= keep;
    od[0][i] = (red > 0 ? red : 0) & keep;
    od[1][i] = (green > 0 ? green : 0) & keep;
    od[2][i] = (blue > 0 ? blue : 0) & keep;
  }
  return kept;
}

// Two products for each 64 bits.
struct Halves {
  Wides even, odd;

  Wides operator*(const Halves& other) const { return low_products(even, other.even) + low_products(odd, other.odd); }
};

static inline Halves halves(const int32_t* values) {
  Wides pairs;
  __builtin_memcpy(&pairs, values, sizeof pairs);
  return {pairs & 0xffffffff, pairs >> 32};
}

// Adds up the fixed-point ODs of a block, none of them negative, and their products. Products and sums apart, and
// written out: together, or in loops, they would not stay in registers.
static inline void add_fixed(const int32_t od[3][kBlock], MomentSums& sums) {
  Wides rr = {}, rg = {}, rb = {}, gg = {}, gb = {}, bb = {}, sum[3] = {};
  for (int i = 0; i < kBlock; i += kInts) {
    const Halves r = halves(od[0] + i), g = halves(od[1] + i), b = halves(od[2] + i);
    rr += r * r;
    rg += r * g;
    rb += r * b;
    gg += g * g;
    gb += g * b;
    bb += b * b;
  }
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; i += kInts) {
      const Halves h = halves(od[k] + i);
      sum[k] += h.even + h.odd;
    }
  }
  const Wides product[6] = {rr, rg, rb, gg, gb, bb};
  for (int i = 0; i < kInts / 2; ++i) {
    for (int k = 0; k < 3; ++k) sums.sum[k] += int64_t(sum[k][i]);
    for (int j = 0; j < 6; ++j) sums.product[j] += product[j][i];
  }
}

// Writes a block to an image laid out as `image`.
template <class T>
static void store(const ImageView& image, int64_t begin, int count, void* out, const T (&value)[3][kBlock]) {
  T* data = static_cast<T*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int c = 0; c < 3; ++c) __builtin_memcpy(data + c * image.channel_stride, value[c], size_t(count) * sizeof(T));
  } else {
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < 3; ++c) data[3 * i + c] = value[c][i];
    }
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
