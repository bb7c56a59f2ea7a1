// What a pixel value means: its logarithm in float32, its optical density in double precision, whether it is tissue.
#pragma once

#include <cuda_runtime.h>

#include "macenko/elementary.h"
#include "macenko/od.h"

namespace ernet::cuda {

// 8-bit levels by table. The float table may be repeated 2^shift times, entry by entry, so that lanes that look up
// different levels meet in fewer banks.
struct ByteReader {
  using Value = uint8_t;
  static constexpr bool kExactOnly = false;
  const float* light_table;
  unsigned shift;
  unsigned lane;  // which of the copies
  const double* od_table;
  int tissue_limit;

  __device__ __forceinline__ float light(uint8_t level) const { return light_table[(unsigned(level) << shift) + lane]; }
  __device__ __forceinline__ double od(uint8_t level) const { return od_table[level]; }
  __device__ __forceinline__ bool is_tissue(uint8_t r, uint8_t g, uint8_t b) const {
    const int rg = r > g ? r : g;
    return (rg > b ? rg : b) <= tissue_limit;
  }
};

// log2((I + 1) / Io) of every level, each 2^shift times in a row.
__device__ __forceinline__ void fill_light_table(const double* od_table, unsigned shift, float* table) {
  const double minus_log2_e = -1.44269504088896340736;
  for (unsigned i = threadIdx.x; i < (256u << shift); i += blockDim.x) {
    table[i] = float(od_table[i >> shift] * minus_log2_e);
  }
}

// Fixed-point OD of every level, -1 where it is below beta.
__device__ __forceinline__ void fill_fixed_table(int32_t fixed_offset, int tissue_limit, int32_t* table) {
  for (int level = int(threadIdx.x); level < 256; level += int(blockDim.x)) {
    const int32_t fixed = macenko::fixed_od_of_level(level, fixed_offset);
    table[level] = level > tissue_limit ? -1 : (fixed > 0 ? fixed : 0);
  }
}

// Float values have exact keys only: their logarithms cost far more than the arithmetic on them.
struct FloatReader {
  using Value = float;
  static constexpr bool kExactOnly = true;
  double scale;
  double inverse_io;
  double beta;

  __device__ __forceinline__ float light(float) const { return 0; }
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
  const int32_t* table;
  __device__ __forceinline__ int32_t operator()(uint8_t value, bool&) const { return table[value]; }
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
