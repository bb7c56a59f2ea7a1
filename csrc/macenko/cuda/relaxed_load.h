// Reads of what other threads change by atomics at the same time: relaxed, so neither a data race nor cached in a
// register.
#pragma once

#include <cuda_runtime.h>

namespace ernet::cuda {

__device__ __forceinline__ unsigned relaxed_load(const unsigned* from) {
#ifdef __CUDA_ARCH__
  unsigned value;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

__device__ __forceinline__ unsigned long long relaxed_load(const unsigned long long* from) {
#ifdef __CUDA_ARCH__
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(value) : "l"(from));
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

}  // namespace ernet::cuda
