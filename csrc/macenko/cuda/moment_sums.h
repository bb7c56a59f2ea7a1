// Exact sums over the tissue pixels of a thread, a warp, a block: fixed-point ODs of macenko/steps/od.h. Integer
// addition makes the order irrelevant.
#pragma once

#include <cuda_runtime.h>

#include "macenko/steps/od.h"

namespace ernet::cuda {

// What is added up: tissue pixels, invalid pixels, 3 sums, and the low and the high 32 bits of 6 sums of products.
constexpr int kPartials = 2 + 3 + 12;
constexpr int kMaxWarps = 32;

struct Sums {
  int64_t count = 0;
  int64_t invalid = 0;
  int64_t sum[3] = {0, 0, 0};
  int64_t product[6] = {0, 0, 0, 0, 0, 0};
};

// Of 16 pixels at most, whose ODs stay below 2^31 together.
struct GroupSums {
  int count = 0;
  int32_t sum[3] = {0, 0, 0};
};
static_assert(16 * 6.9315 * macenko::kOdScale < 0x1p31, "sums of 16 fixed-point ODs are held in 32 bits");

// Negative ODs are no tissue.
__device__ __forceinline__ void add_pixel(int32_t r, int32_t g, int32_t b, GroupSums& group, Sums& s) {
  const int32_t none = (r | g | b) >> 31;  // all bits, or no bit
  r &= ~none;
  g &= ~none;
  b &= ~none;
  group.count += 1 + none;
  group.sum[0] += r;
  group.sum[1] += g;
  group.sum[2] += b;
  s.product[0] += int64_t(r) * r;
  s.product[1] += int64_t(r) * g;
  s.product[2] += int64_t(r) * b;
  s.product[3] += int64_t(g) * g;
  s.product[4] += int64_t(g) * b;
  s.product[5] += int64_t(b) * b;
}

__device__ __forceinline__ void add_sums(const GroupSums& group, Sums& s) {
  s.count += group.count;
  for (int k = 0; k < 3; ++k) s.sum[k] += group.sum[k];
}

__device__ __forceinline__ int sum_of_warp(int value) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffffu, value, delta);
  return value;
}

__device__ __forceinline__ int64_t sum_of_warp(int64_t value) {
  for (int delta = 16; delta > 0; delta /= 2)
    value += __shfl_down_sync(0xffffffffu, static_cast<long long>(value), delta);
  return value;
}

// The sums of every warp to `scratch`, its totals to be had by `total_of_block` after a barrier.
struct SumScratch {
  int64_t of_warp[kPartials][kMaxWarps];
};

__device__ __forceinline__ void store_warp(int64_t value, int which, SumScratch& scratch) {
  const int64_t warp = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) scratch.of_warp[which][threadIdx.x / 32] = warp;
}

__device__ __forceinline__ void store_sums(const Sums& s, SumScratch& scratch) {
  store_warp(s.count, 0, scratch);
  store_warp(s.invalid, 1, scratch);
  for (int k = 0; k < 3; ++k) store_warp(s.sum[k], 2 + k, scratch);
  for (int k = 0; k < 6; ++k) {
    const uint64_t product = uint64_t(s.product[k]);
    store_warp(int64_t(product & 0xffffffffu), 5 + 2 * k, scratch);
    store_warp(int64_t(product >> 32), 6 + 2 * k, scratch);
  }
}

__device__ __forceinline__ int64_t total_of_block(int which, const SumScratch& scratch) {
  const int warps = int(blockDim.x) / 32;
  int64_t total = 0;
  for (int w = 0; w < warps; ++w) total += scratch.of_warp[which][w];
  return total;
}

// Moments in real units of the totals of kPartials numbers.
__device__ __forceinline__ void moments_of_totals(const int64_t* totals, double moments[macenko::kMomentCount]) {
  const double unit = 1 / macenko::kOdScale;
  moments[0] = double(totals[0]);
  for (int k = 0; k < 3; ++k) moments[1 + k] = double(totals[2 + k]) * unit;
  for (int k = 0; k < 6; ++k) {
    const unsigned __int128 product =
        ((unsigned __int128)(uint64_t(totals[6 + 2 * k])) << 32) + uint64_t(totals[5 + 2 * k]);
    moments[4 + k] = double(product) * (unit * unit);
  }
}

}  // namespace ernet::cuda
