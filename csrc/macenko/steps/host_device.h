// The steps in this folder run on the host and in CUDA kernels. Everything is `static`: the CPU loops are compiled once
// per instruction set, and the linker must not merge an AVX-512 copy with a portable one (see simd/isa.h).
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define ERNET_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define ERNET_HOST_DEVICE static inline
#endif

namespace ernet::macenko {

// The bits of a value as a value of another type.
template <class To, class From> ERNET_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  union {
    From from;
    To to;
  } u;
  u.from = from;
  return u.to;
}

}  // namespace ernet::macenko

// A fused multiply-add that compilers can vectorise; a call where the instruction set has none.
#ifdef __CUDA_ARCH__
#define ERNET_FMA fmaf
#else
#define ERNET_FMA __builtin_fmaf
#endif
