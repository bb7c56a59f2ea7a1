// Which of the three ways an image's fit and reconstruction take on a device.
#pragma once

#include <stdint.h>

#include "macenko/cuda/kernels.h"

namespace ernet::cuda {

// What a plan depends on, read off the device.
struct Device {
  int major;  // compute capability
  int multiprocessors;
  int64_t block_shared_bytes;  // that a block can opt in to
  int64_t cache_bytes;
};

enum class PlanKind : int {
  automatic = 0,
  streaming = 1,  // kernels that read the images from the cache in every pass
  resident = 2,   // one block an image, its pixels in shared memory
  cluster = 3,    // blocks of a cluster share an image
};

struct Plan {
  PlanKind kind;
  int blocks;   // that share an image
  int threads;  // of a block
  int table_shift;
  int64_t shared_bytes;
  int listed;  // keys of a list that a thread holds at most, 0 for no lists
};

// Of a block, and of all blocks of a multiprocessor: 128 registers each are all that it has.
constexpr int kMostThreads = 512;
constexpr int kLeastThreads = 128;
constexpr int kPortableCluster = 8;  // blocks that every device with clusters can hold together

constexpr int kListedOfThread = 6;  // pixels of a list, whose keys are in registers

// Bytes of shared memory that a block needs beside the pixels, the repeated table of logarithms left out.
int64_t resident_shared_bytes(bool network);

// Pixels in a row that one block of several holds, a cache line of every plane: each has its part of every region.
constexpr int kRun = 128;

// Pixels of an image that each of `blocks` blocks holds at most: a multiple of 16.
inline int64_t pixels_of_share(int64_t pixels, int blocks) {
  if (blocks == 1) return (pixels + 15) / 16 * 16;
  const int64_t runs = (pixels + kRun - 1) / kRun;
  return (runs + blocks - 1) / blocks * kRun;
}

// A kind of plan, and the size of its clusters (0: any).
struct PlanRequest {
  PlanKind kind;
  int blocks;
};

// What is asked for (requested_plan.h).
PlanRequest requested_plan();

// The plan for these images and this kind of output; its kind is automatic where the one wanted does not support them.
Plan choose_plan(const Device& device, const Images& images, bool network, PlanRequest wanted);

}  // namespace ernet::cuda
