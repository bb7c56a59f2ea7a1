// Vectors of one register for the loops that are compiled once per instruction set: float or double lanes, loads and
// stores that convert from and to the storage type. Built on the vector extensions of GCC and Clang.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "simd/isa.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage types. bfloat16 and float16 are raw bits: arithmetic is done on float alone.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename A> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int count = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2)));
};
template <> struct Lanes<double> {
  static constexpr int count = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <typename A> using Vec = typename Lanes<A>::type;
template <typename A> inline constexpr int kLanes = Lanes<A>::count;

template <typename A> static inline Vec<A> broadcast(A value) { return value - Vec<A>{}; }

// Accumulation type of a storage type.
template <typename T> struct Accumulate {
  using type = float;
};
template <> struct Accumulate<double> {
  using type = double;
};

// load<A>(p): kLanes<A> elements of storage type T as accumulation type A.
template <typename A> static inline Vec<A> load(const A* p) {
  Vec<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename A> static inline Vec<float> load(const bf16* p) {
#if defined(__aarch64__)  // GCC widens vectors of eight bytes lane by lane
  return reinterpret_cast<Vec<float>>(vshll_n_u16(vld1_u16(&p->bits), 16));
#else
  Lanes<float>::half_bits narrow;
  memcpy(&narrow, p, sizeof narrow);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(narrow, Lanes<float>::bits) << 16);
#endif
}

template <typename A> static inline Vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(  // maskz: GCC 12 takes the plain form for a use of an uninitialised value
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  using Integers = Lanes<float>::integers;
  Lanes<float>::half_bits narrow;
  memcpy(&narrow, p, sizeof narrow);
  const Integers h = __builtin_convertvector(narrow, Integers), magnitude = h & 0x7fff;
  // zero and subnormal numbers: magnitude * 2^-24 is exact
  const Vec<float> small = __builtin_convertvector(magnitude, Vec<float>) * 5.9604644775390625e-8f;
  const Integers normal = (magnitude << 13) + 0x38000000, special = 0x7f800000 | ((magnitude & 0x3ff) << 13);
  const Integers finite = magnitude < 0x400 ? reinterpret_cast<Integers>(small) : normal;
  return reinterpret_cast<Vec<float>>((h & 0x8000) << 16 | (magnitude < 0x7c00 ? finite : special));
#endif
}

// Lanes as they are stored in elements of the first argument's type.
static inline Vec<float> narrow(float, Vec<float> v) { return v; }
static inline Vec<double> narrow(double, Vec<double> v) { return v; }

static inline Lanes<float>::half_bits narrow(bf16, Vec<float> v) {  // round to nearest, ties to even; NaN stays NaN
  const Lanes<float>::bits bits = reinterpret_cast<Lanes<float>::bits>(v);
  const Lanes<float>::bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Lanes<float>::bits quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, Lanes<float>::half_bits);
}

static inline Lanes<float>::half_bits narrow(f16, Vec<float> v) {  // round to nearest, ties to even
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes<float>::half_bits>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Lanes<float>::half_bits>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return reinterpret_cast<Lanes<float>::half_bits>(vcvt_f16_f32(reinterpret_cast<float32x4_t>(v)));
#else
  using Integers = Lanes<float>::integers;
  const Integers bits = reinterpret_cast<Integers>(v), magnitude = bits & 0x7fffffff;
  // below 2^-14, subnormal: the sum aligns the bits of value * 2^24 at the end of the significand
  const Integers small = reinterpret_cast<Integers>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  const Integers normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Integers infinite = Integers{} + 0x7c00, nan = Integers{} + 0x7e00;
  const Integers finite = magnitude < 0x38800000 ? small : normal;
  const Integers number = magnitude < 0x477ff000 ? finite : infinite;  // from 65520 on infinity is nearest
  const Integers sign = (bits >> 16) & 0x8000;
  return __builtin_convertvector(sign | (magnitude > 0x7f800000 ? nan : number), Lanes<float>::half_bits);
#endif
}

template <typename T, typename V> static inline void store(T* p, V v) {
  const auto bits = narrow(T{}, v);
  memcpy(p, &bits, sizeof bits);
}

// Non-temporal stores, for outputs that would only evict what is still needed; `p` must be a multiple of the bytes
// stored (stream_aligned). Before another thread may read them: stream_fence. On arm64 ordinary stores, which its cores
// take past the caches by themselves where whole lines are written one after the other.
template <typename V> static inline void stream_bytes(void* p, const V& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) {
    __m512i bits;
    memcpy(&bits, &v, sizeof v);
    return _mm512_stream_si512(static_cast<__m512i*>(p), bits);
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) {
    __m256i bits;
    memcpy(&bits, &v, sizeof v);
    return _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) {
    __m128i bits;
    memcpy(&bits, &v, sizeof v);
    return _mm_stream_si128(static_cast<__m128i*>(p), bits);
  }
#endif
  memcpy(p, &v, sizeof v);
}

template <typename T, typename V> static inline void stream(T* p, V v) { stream_bytes(p, narrow(T{}, v)); }

template <typename T> static inline bool stream_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) == 2 ? kVectorBytes / 2 : kVectorBytes) == 0;
}

static inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` < kLanes elements; the other lanes are zero. memcpy of a variable size is a call: where the
// instruction set has masks, float, double and half-width types use them.
template <typename A, typename T> static inline Vec<A> load_part(const T* p, int64_t count) {
  T buffer[kLanes<A>] = {};
  memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load<A>(buffer);
}

template <typename A, typename T> static inline void store_part(T* p, Vec<A> v, int64_t count) {
  T buffer[kLanes<A>];
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <> inline Vec<float> load_part<float, float>(const float* p, int64_t count) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}
template <> inline Vec<double> load_part<double, double>(const double* p, int64_t count) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p));
}
template <typename T> static inline Vec<float> load_half_part(const T* p, int64_t count) {
  T buffer[kLanes<float>];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer),
                      _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
  return load<float>(buffer);
}
template <> inline Vec<float> load_part<float, bf16>(const bf16* p, int64_t count) { return load_half_part(p, count); }
template <> inline Vec<float> load_part<float, f16>(const f16* p, int64_t count) { return load_half_part(p, count); }
template <> inline void store_part<float, float>(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
}
template <> inline void store_part<double, double>(double* p, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), reinterpret_cast<__m512d>(v));
}
#endif

// load and load_part in one: `count` may be anything >= 1.
template <typename A, typename T> static inline Vec<A> load_upto(const T* p, int64_t count) {
  return count >= kLanes<A> ? load<A>(p) : load_part<A, T>(p, count);
}

template <typename A, typename T> static inline void store_upto(T* p, Vec<A> v, int64_t count) {
  if (count >= kLanes<A>) {
    store(p, v);
  } else {
    store_part<A, T>(p, v, count);
  }
}

// Lanes as a condition: `lanes ? a : b`.
template <typename A> using LaneMask = decltype(Vec<A>{} < Vec<A>{});

// The first `count` lanes.
template <typename A> static inline LaneMask<A> first_lanes(int64_t count) {
  LaneMask<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < static_cast<decltype(lane[0] + 0)>(count);
}

// v in the first `count` lanes, zero in the others.
static inline Vec<float> keep(Vec<float> v, int64_t count) {
  return first_lanes<float>(count < kLanes<float> ? count : kLanes<float>) ? v : Vec<float>{};
}
static inline Vec<double> keep(Vec<double> v, int64_t count) { return first_lanes<double>(count) ? v : Vec<double>{}; }

template <typename A> static inline Vec<A> relu(Vec<A> v) {  // NaN stays NaN, as in torch.relu
  const Vec<A> zero = {};
  return v < zero ? zero : v;
}

// Sum of the lanes in double, always in the same order: neighbours first.
static inline double sum_lanes(Vec<double> v) {
  double lanes[kLanes<double>];
  memcpy(lanes, &v, sizeof v);
  for (int step = 1; step < kLanes<double>; step *= 2) {
    for (int i = 0; i < kLanes<double>; i += 2 * step) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}
static inline double sum_lanes(Vec<float> v) {
  typedef float half __attribute__((vector_size(kVectorBytes / 2)));
  half parts[2];
  memcpy(parts, &v, sizeof v);
  return sum_lanes(__builtin_convertvector(parts[0], Vec<double>) + __builtin_convertvector(parts[1], Vec<double>));
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
