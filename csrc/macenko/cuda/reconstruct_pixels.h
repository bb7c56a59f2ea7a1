// Reconstruction of pixels in registers: I' = Io 2^(sum_k M_ck log2((I_k + 1) / Io) + shift_c), clipped at 255, written
// as an image or as the scaled input of a network.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "macenko/cuda/kernels.h"
#include "macenko/cuda/passes.h"
#include "macenko/steps/reconstruct.h"

namespace ernet::cuda {

// What one image's reconstruction needs, in shared memory.
struct Transform {
  double matrix[3][3];
  double exponent_shift[3];  // natural
  float m[9];
  float log2_shift[3];
  bool single;     // float32 holds the exponents
  bool unchanged;  // the image stays as it is
};

// Largest exponent of one input channel: with three, and log2 Io, 2^z stays within float32.
constexpr double kSingleExponent = 25.0;

__device__ __forceinline__ void set_transform(const macenko::Replacement& r, double od_magnitude, Transform& t) {
  macenko::reconstruction_of(r, t.matrix, t.exponent_shift);
  t.single = true;
  for (int c = 0; c < 3; ++c) {
    t.log2_shift[c] = float(t.exponent_shift[c] * 1.44269504088896340736);
    for (int k = 0; k < 3; ++k) {
      t.m[3 * c + k] = float(t.matrix[c][k]);
      t.single = t.single && fabs(t.matrix[c][k]) * od_magnitude < kSingleExponent;
    }
  }
}

__device__ __forceinline__ void make_transform(const Recipe& recipe, bool fitted, const macenko::Stain& own,
                                               const double own_max[2], double od_magnitude, int64_t image,
                                               Transform& t) {
  set_transform(macenko::replacement_of(recipe, image, fitted, own, own_max), od_magnitude, t);
  t.unchanged = !fitted && recipe.identity;
}

// The transform of an image whose source stains are in memory. One thread.
__device__ __forceinline__ void transform_of_image(const Recipe& recipe, double od_magnitude, int64_t image,
                                                   Transform& t) {
  macenko::Stain own;
  double own_max[2];
  macenko::read_stain(recipe.source, image, own, own_max);
  const bool fitted = recipe.status == nullptr || recipe.status[image] == macenko::kOk;
  make_transform(recipe, fitted, own, own_max, od_magnitude, image, t);
}

// log2 of the intensity of a value, and the way back to a value.
struct ByteValues {
  using Value = uint8_t;
  ByteReader reader;
  const float (*scaled)[256];  // network input of every level, or null
  __device__ __forceinline__ float log2_intensity(uint8_t value, bool&) const { return reader.log2_intensity(value); }
  __device__ __forceinline__ double density(uint8_t value) const { return reader.od(value); }
  __device__ __forceinline__ uint8_t result(double level, bool) const { return uint8_t(int32_t(level)); }
  __device__ __forceinline__ float network(uint8_t level, int c) const { return scaled[c][level]; }
};

struct FloatValues {
  using Value = float;
  float scale, inverse_scale, inverse_io;
  double exact_scale, exact_inverse_io, range;
  double mean[3], std[3];
  __device__ __forceinline__ float log2_intensity(float value, bool& defined) const {
    const float level = value * scale;
    // false for NaN
    defined &= (level > -1.0f) & (level <= 3.402823466e38f);
    return log2f((level + 1.0f) * inverse_io);
  }
  __device__ __forceinline__ double density(float value) const {
    const double intensity = (double(value) * exact_scale + 1.0) * exact_inverse_io;
    return -macenko::log_of_normal(intensity > 1e-300 ? intensity : 1e-300);
  }
  __device__ __forceinline__ float result(float level, bool defined) const {
    const float clipped = level < 255.0f ? level : 255.0f;
    return defined ? clipped * inverse_scale : __int_as_float(0x7fc00000);
  }
  __device__ __forceinline__ float result(double level, bool defined) const {
    return defined ? float(level / exact_scale) : __int_as_float(0x7fc00000);
  }
  __device__ __forceinline__ float network(float value, int c) const {
    return float((double(value) / range - mean[c]) / std[c]);
  }
};

__device__ __forceinline__ FloatValues float_values(double scale, double io, const Output& out) {
  FloatValues values = {float(scale), float(1 / scale), float(1 / io), scale, 1 / io, out.range, {}, {}};
  for (int c = 0; c < 3; ++c) {
    values.mean[c] = out.mean[c];
    values.std[c] = out.std[c];
  }
  return values;
}

// Network input of every 8-bit level.
__device__ __forceinline__ void fill_scaled_table(const Output& out, float (*table)[256]) {
  for (int i = int(threadIdx.x); i < 3 * 256; i += int(blockDim.x)) {
    const int c = i / 256;
    table[c][i % 256] = float((double(i % 256) / out.range - out.mean[c]) / out.std[c]);
  }
}

// One channel of a pixel in double precision, for matrices whose exponents float32 does not hold.
template <class Values>
__device__ __forceinline__ double exact_level(const Values& values, const Transform& t, double io, const double od[3],
                                              int c) {
  const double* m = t.matrix[c];
  const double exponent = t.exponent_shift[c] - (m[0] * od[0] + m[1] * od[1] + m[2] * od[2]);
  const double level = io * macenko::exp_clamped(exponent);
  return level < 255.0 ? level : 255.0;
}

__device__ __forceinline__ float exponent_of(const Transform& t, int c, float r, float g, float b) {
  return fmaf(t.m[3 * c], r, fmaf(t.m[3 * c + 1], g, fmaf(t.m[3 * c + 2], b, t.log2_shift[c])));
}

template <bool kInterleaved>
__device__ __forceinline__ void reconstruct_group(const PixelGroup<float, kInterleaved>& group,
                                                  const FloatValues& values, const Transform& t, float io,
                                                  PixelGroup<float, kInterleaved>& result) {
  for (int i = 0; i < GroupSize<float>::value; ++i) {
    bool defined = true;
    const float r = values.log2_intensity(group.get(i, 0), defined);
    const float g = values.log2_intensity(group.get(i, 1), defined);
    const float b = values.log2_intensity(group.get(i, 2), defined);
    for (int c = 0; c < 3; ++c) result.set(i, c, values.result(io * exp2f(exponent_of(t, c, r, g, b)), defined));
  }
}

// 2^z, 0 below 2^-126.
__device__ __forceinline__ float power_of_two(float z) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z));
  return power;
#else
  return ERNET_EX2_APPROX(z);
#endif
}

// The grey level io 2^z, clipped at 255 and truncated, in the low 8 bits: behind 2^23 a float32 has no fraction.
__device__ __forceinline__ uint32_t level_bits(float io, float z) {
  const float level = __fmaf_rz(io, power_of_two(z), 8388608.0f);
  return __float_as_uint(level < 8388863.0f ? level : 8388863.0f);
}

// The low bytes of four words.
__device__ __forceinline__ uint32_t four_bytes(const uint32_t word[4]) {
  return __byte_perm(__byte_perm(word[0], word[1], 0x0040), __byte_perm(word[2], word[3], 0x0040), 0x5410);
}

// Four pixels at a time: three words of the result in either layout.
template <bool kInterleaved>
__device__ __forceinline__ void reconstruct_group(const PixelGroup<uint8_t, kInterleaved>& group,
                                                  const ByteValues& values, const Transform& t, float io,
                                                  PixelGroup<uint8_t, kInterleaved>& result) {
  using Group = PixelGroup<uint8_t, kInterleaved>;
  for (int four = 0; four < GroupSize<uint8_t>::value; four += 4) {
    uint32_t level[12];  // by channel or by pixel, as the layout has it
    for (int i = 0; i < 4; ++i) {
      const float r = values.reader.log2_intensity(group.get(four + i, 0));
      const float g = values.reader.log2_intensity(group.get(four + i, 1));
      const float b = values.reader.log2_intensity(group.get(four + i, 2));
      for (int c = 0; c < 3; ++c)
        level[kInterleaved ? 3 * i + c : 4 * c + i] = level_bits(io, exponent_of(t, c, r, g, b));
    }
    for (int k = 0; k < 3; ++k)
      result.word[kInterleaved ? Group::element(four, 0) / 4 + k : Group::element(four, k) / 4] =
          four_bytes(level + 4 * k);
  }
}

// 16-bit floats are handled as their bits.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ void convert(float value, float& out) { out = value; }
__device__ __forceinline__ void convert(float value, Bfloat16& out) {
  const uint32_t bits = __float_as_uint(value);
  // To nearest, ties to even.
  out.bits = value != value ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ __forceinline__ void convert(float value, Half& out) { out.bits = __half_as_ushort(__float2half_rn(value)); }

template <class Out> __device__ __forceinline__ void set_element(uint32_t* word, int e, Out value) {
  if constexpr (sizeof(Out) == 4) {
    word[e] = __float_as_uint(value);
  } else {
    word[e / 2] |= uint32_t(value.bits) << (16 * (e % 2));
  }
}

// Writes the first `count` pixels of a group to `to`, [pixels][3].
template <class Values, bool kInterleaved, class Out>
__device__ __forceinline__ void store_network(const PixelGroup<typename Values::Value, kInterleaved>& group,
                                              const Values& values, int count, bool aligned, Out* to) {
  constexpr int kPixels = GroupSize<typename Values::Value>::value;
  constexpr int kPart = kPixels % 8 == 0 && sizeof(Out) == 2 ? 8 : 4;  // pixels at a time: 16-byte stores
  constexpr int kWords = kPart * 3 * int(sizeof(Out)) / 4;
  for (int part = 0; part < kPixels; part += kPart) {
    if (part >= count) break;
    uint32_t word[kWords] = {};
    for (int e = 0; e < 3 * kPart; ++e) {
      Out value;
      convert(values.network(group.get(part + e / 3, e % 3), e % 3), value);
      if (aligned && count == kPixels) {
        set_element(word, e, value);
      } else if (part + e / 3 < count) {
        to[3 * part + e] = value;
      }
    }
    if (aligned && count == kPixels) {
      uint2* target = reinterpret_cast<uint2*>(to + 3 * part);
      if constexpr (kWords % 4 == 0) {
        for (int k = 0; k < kWords; k += 4)
          store_wide(reinterpret_cast<uint4*>(target + k / 2),
                     make_uint4(word[k], word[k + 1], word[k + 2], word[k + 3]));
      } else {
        for (int k = 0; k < kWords; k += 2) store_wide(target + k / 2, make_uint2(word[k], word[k + 1]));
      }
    }
  }
}

// One pixel at a time in double precision.
template <class Values, bool kInterleaved, class Pixels, class Store>
__device__ __forceinline__ void reconstruct_exactly(const Pixels& shared, const Values& values, const Transform& t,
                                                    double io, const Store& store) {
  constexpr int kPixels = GroupSize<typename Values::Value>::value;
  for (int64_t first = shared.thread * kPixels; first < shared.pixels; first += shared.threads * kPixels) {
    const int64_t end = first + kPixels < shared.pixels ? first + kPixels : shared.pixels;
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const int64_t at = pixel * (kInterleaved ? 3 : 1);
      const int64_t place = shared.place(pixel);
      bool defined = true;
      double od[3];
      for (int k = 0; k < 3; ++k) {
        const typename Values::Value value = shared.planes.plane[k][at];
        values.log2_intensity(value, defined);
        od[k] = values.density(value);
      }
      for (int c = 0; c < 3; ++c) store(place, c, values.result(exact_level(values, t, io, od, c), defined));
    }
  }
}

// Reconstructs this thread's pixels: to store_value(pixel, channel, value) or store_group(group, first, count).
template <class Values, bool kInterleaved, class Pixels, class StoreValue, class StoreGroup>
__device__ __forceinline__ void reconstruct_pixels(const Pixels& shared, const Values& values, const Transform& t,
                                                   double io, const StoreValue& store_value,
                                                   const StoreGroup& store_group) {
  using T = typename Values::Value;
  if (!t.single && !t.unchanged) {
    return reconstruct_exactly<Values, kInterleaved>(shared, values, t, io, store_value);
  }
  for_each_group<T, kInterleaved>(shared, [&](const PixelGroup<T, kInterleaved>& group, auto first, int count) {
    PixelGroup<T, kInterleaved> result = group;
    if (!t.unchanged) reconstruct_group<kInterleaved>(group, values, t, float(io), result);
    store_group(result, first, count);
  });
}

// Into an image of their own layout.
template <class Values, bool kInterleaved, class Pixels>
__device__ __forceinline__ void reconstruct_image(const Pixels& shared, const Values& values, const Transform& t,
                                                  double io, const Planes<typename Values::Value>& out) {
  using T = typename Values::Value;
  const bool aligned = is_aligned<T, kInterleaved>(out);
  reconstruct_pixels<Values, kInterleaved>(
      shared, values, t, io,
      [&](int64_t pixel, int c, T value) { out.plane[c][pixel * (kInterleaved ? 3 : 1)] = value; },
      [&](const PixelGroup<T, kInterleaved>& group, auto first, int count) {
        store_group<T, kInterleaved>(out, shared.place(first), count, aligned, group);
      });
}

// Into a network's input, [pixels][3].
template <class Values, bool kInterleaved, class Pixels, class Out>
__device__ __forceinline__ void reconstruct_network(const Pixels& shared, const Values& values, const Transform& t,
                                                    double io, Out* out) {
  using T = typename Values::Value;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) & 15) == 0;
  reconstruct_pixels<Values, kInterleaved>(
      shared, values, t, io,
      [&](int64_t pixel, int c, T value) { convert(values.network(value, c), out[3 * pixel + c]); },
      [&](const PixelGroup<T, kInterleaved>& group, auto first, int count) {
        store_network<Values, kInterleaved, Out>(group, values, count, aligned, out + 3 * int64_t(shared.place(first)));
      });
}

// Into image `image` of `out`, whose images have `pixels` pixels.
template <class Values, bool kInterleaved, class Pixels>
__device__ __forceinline__ void reconstruct_output(const Pixels& shared, const Values& values, const Transform& t,
                                                   double io, const Output& out, int64_t image, int64_t pixels) {
  using T = typename Values::Value;
  const int64_t network = 3 * pixels * image;
  switch (out.type) {
    case OutputType::image: {
      const Planes<T> planes = planes_of(static_cast<T*>(out.data) + image * out.image_stride, out.channel_stride);
      return reconstruct_image<Values, kInterleaved>(shared, values, t, io, planes);
    }
    case OutputType::f32:
      return reconstruct_network<Values, kInterleaved>(shared, values, t, io, static_cast<float*>(out.data) + network);
    case OutputType::bf16:
      return reconstruct_network<Values, kInterleaved>(shared, values, t, io,
                                                       static_cast<Bfloat16*>(out.data) + network);
    case OutputType::f16:
      return reconstruct_network<Values, kInterleaved>(shared, values, t, io, static_cast<Half*>(out.data) + network);
  }
}

}  // namespace ernet::cuda
