// 48 bytes of image in registers: 16 RGB pixels of 8 bits, or 4 of float32, read and written by three 16-byte accesses
// where the memory is aligned, and element by element elsewhere and at the end of an image.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "macenko/steps/host_device.h"

namespace ernet::cuda {

template <class T> struct GroupSize {
  static constexpr int value = 16 / int(sizeof(T));
};

// One image's planes; for channels-last images plane[c] points at channel c of the first pixel.
template <class T> struct Planes {
  T* plane[3];
};

template <class T> __device__ __forceinline__ Planes<T> planes_of(T* first, int64_t channel_stride) {
  return {{first, first + channel_stride, first + 2 * channel_stride}};
}

template <class T, bool kInterleaved> struct PixelGroup {
  static constexpr int kPixels = GroupSize<T>::value;
  uint32_t word[12];

  // Position of channel c of pixel i among the 48 / sizeof(T) elements. Constant once loops are unrolled.
  static constexpr __host__ __device__ int element(int i, int c) { return kInterleaved ? 3 * i + c : c * kPixels + i; }

  __device__ __forceinline__ T get(int i, int c) const {
    const int e = element(i, c);
    if constexpr (sizeof(T) == 1) {
      return T(word[e / 4] >> (8 * (e % 4)) & 255u);
    } else {
      return macenko::bits_as<T>(word[e]);
    }
  }

  // Every element is set once, in ascending order of `element` within a word, after clear().
  __device__ __forceinline__ void set(int i, int c, T value) {
    const int e = element(i, c);
    if constexpr (sizeof(T) == 1) {
      word[e / 4] |= uint32_t(value) << (8 * (e % 4));
    } else {
      word[e] = macenko::bits_as<uint32_t>(value);
    }
  }

  __device__ __forceinline__ uint4 four(int k) const {
    return make_uint4(word[4 * k], word[4 * k + 1], word[4 * k + 2], word[4 * k + 3]);
  }

  __device__ __forceinline__ void clear() {
    for (int k = 0; k < 12; ++k) word[k] = 0;
  }
};

// True if groups of the image can be accessed by 16 bytes.
template <class T, bool kInterleaved> __device__ __forceinline__ bool is_aligned(const Planes<T>& p) {
  if (kInterleaved) return (reinterpret_cast<uintptr_t>(p.plane[0]) & 15) == 0;
  return ((reinterpret_cast<uintptr_t>(p.plane[0]) | reinterpret_cast<uintptr_t>(p.plane[1]) |
           reinterpret_cast<uintptr_t>(p.plane[2])) &
          15) == 0;
}

// Pixels from `first`, of which `count` exist; the others are 0.
template <class T, bool kInterleaved>
__device__ __forceinline__ void load_group(const Planes<const T>& p, int64_t first, int count, bool aligned,
                                           PixelGroup<T, kInterleaved>& group) {
  constexpr int kPixels = GroupSize<T>::value;
  if (aligned && count == kPixels) {
    for (int k = 0; k < 3; ++k) {
      const T* from = kInterleaved ? p.plane[0] + 3 * first + k * kPixels : p.plane[k] + first;
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      group.word[4 * k] = four.x;
      group.word[4 * k + 1] = four.y;
      group.word[4 * k + 2] = four.z;
      group.word[4 * k + 3] = four.w;
    }
    return;
  }
  group.clear();
  for (int i = 0; i < kPixels; ++i) {
    if (i < count) {
      for (int c = 0; c < 3; ++c) group.set(i, c, p.plane[c][(first + i) * (kInterleaved ? 3 : 1)]);
    }
  }
}

// To device memory. Compilers would join a plain store with those by elements beside it.
template <class Word> __device__ __forceinline__ void store_wide(Word* to, Word value) { __stcg(to, value); }

// To device memory.
template <class T, bool kInterleaved>
__device__ __forceinline__ void store_group(const Planes<T>& p, int64_t first, int count, bool aligned,
                                            const PixelGroup<T, kInterleaved>& group) {
  constexpr int kPixels = GroupSize<T>::value;
  if (aligned && count == kPixels) {
    for (int k = 0; k < 3; ++k) {
      T* to = kInterleaved ? p.plane[0] + 3 * first + k * kPixels : p.plane[k] + first;
      store_wide(reinterpret_cast<uint4*>(to), group.four(k));
    }
    return;
  }
  for (int i = 0; i < kPixels; ++i) {
    if (i < count) {
      for (int c = 0; c < 3; ++c) p.plane[c][(first + i) * (kInterleaved ? 3 : 1)] = group.get(i, c);
    }
  }
}

}  // namespace ernet::cuda
