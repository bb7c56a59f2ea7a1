// What a pixel value means: its logarithm in float32, its optical density in double precision, whether it is tissue.
#pragma once

#include <cuda_runtime.h>

#include "macenko/steps/elementary.h"
#include "macenko/steps/od.h"

namespace ernet::cuda {

// A table of 4-byte entries by 8-bit level, each entry 2^shift times in a row, so that lanes that look up different
// levels meet in fewer banks.
struct LevelTable {
  const unsigned char* mine;  // this lane's copy of the first entry
  unsigned stride;            // bytes from a level to the next

  template <class T> __device__ __forceinline__ const T& at(uint8_t level) const {
    return *reinterpret_cast<const T*>(mine + level * stride);
  }
};

__device__ __forceinline__ LevelTable level_table(const void* entries, unsigned shift) {
  const unsigned copy = threadIdx.x & ((1u << shift) - 1);
  return {static_cast<const unsigned char*>(entries) + 4 * copy, 4u << shift};
}

// Fills a table from level `first` on. By all threads of a block.
template <class T, class ValueOf>
__device__ __forceinline__ void fill_levels(unsigned first, unsigned shift, T* entries, const ValueOf& value_of) {
  static_assert(sizeof(T) == 4, "an entry is one bank wide");
  if (shift < 2) {
    for (unsigned i = (first << shift) + threadIdx.x; i < (256u << shift); i += blockDim.x) {
      entries[i] = value_of(int(i >> shift));
    }
    return;
  }
  struct alignas(16) Four {
    T copy[4];
  };
  const unsigned quarter = shift - 2;
  for (unsigned i = (first << quarter) + threadIdx.x; i < (256u << quarter); i += blockDim.x) {
    const T value = value_of(int(i >> quarter));
    reinterpret_cast<Four*>(entries)[i] = {{value, value, value, value}};
  }
}

// 8-bit levels by table.
struct ByteReader {
  using Value = uint8_t;
  static constexpr bool kExactOnly = false;
  LevelTable log2_table;
  const double* od_table;
  int tissue_limit;

  __device__ __forceinline__ float log2_intensity(uint8_t level) const { return log2_table.at<float>(level); }
  __device__ __forceinline__ double od(uint8_t level) const { return od_table[level]; }
  __device__ __forceinline__ bool is_tissue(uint8_t r, uint8_t g, uint8_t b) const {
    const int rg = r > g ? r : g;
    return (rg > b ? rg : b) <= tissue_limit;
  }
};

// log2((I + 1) / Io) of a level.
__device__ __forceinline__ float log2_of_od(double od) { return float(od * -1.44269504088896340736); }

// Fixed-point OD of a level, -1 where it is below beta.
__device__ __forceinline__ int32_t fixed_of_level(int level, int32_t fixed_offset, int tissue_limit) {
  const int32_t fixed = macenko::fixed_od_of_level(level, fixed_offset);
  return level > tissue_limit ? -1 : (fixed > 0 ? fixed : 0);
}

__device__ __forceinline__ void fill_log2_table(const double* od_table, unsigned shift, float* table) {
  fill_levels(0, shift, table, [&](int level) { return log2_of_od(od_table[level]); });
}

__device__ __forceinline__ void fill_fixed_table(int32_t fixed_offset, int tissue_limit, unsigned shift,
                                                 int32_t* table) {
  fill_levels(0, shift, table, [&](int level) { return fixed_of_level(level, fixed_offset, tissue_limit); });
}

// Float values have exact keys only: their logarithms cost far more than the arithmetic on them.
struct FloatReader {
  using Value = float;
  static constexpr bool kExactOnly = true;
  double scale;
  double inverse_io;
  double beta;

  __device__ __forceinline__ float log2_intensity(float) const { return 0; }
  __device__ __forceinline__ double od(float value) const {
    double level = double(value) * scale;
    level = level > -0.5 ? level : -0.5;
    return -macenko::log_of_normal((level + 1.0) * inverse_io);
  }
  __device__ __forceinline__ bool is_tissue(float r, float g, float b) const {
    return od(r) >= beta && od(g) >= beta && od(b) >= beta;
  }
};

// Fixed-point OD of a value, -1 if it is no tissue; says if it is no grey level.
struct FixedOfByte {
  LevelTable table;
  __device__ __forceinline__ int32_t operator()(uint8_t value) const { return table.at<int32_t>(value); }
};

struct FixedOfFloat {
  double scale, inverse_io, beta;
  __device__ __forceinline__ int32_t operator()(float value, bool& invalid) const {
    const double level = double(value) * scale;
    if (!macenko::is_level(level)) {
      invalid = true;
      return -1;
    }
    const double od = -macenko::log_of_normal((level + 1.0) * inverse_io);
    return od >= beta ? macenko::fixed_of_od(od) : -1;
  }
};

}  // namespace ernet::cuda
