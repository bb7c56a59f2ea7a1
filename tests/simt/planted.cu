// Kernels with planted errors: the emulator has to find them.
#include <cuda_runtime.h>

#include "macenko/cuda/clusters.h"
#include "macenko/cuda/launch.h"
#include "macenko/cuda/relaxed_load.h"

namespace {

using ernet::cuda::BlockCluster;
using ernet::cuda::relaxed_load;

struct Values {
  int of[256];
};

// Each thread passes its value to its neighbour through shared memory.
__global__ void rotate_kernel(const int* in, int* out, bool with_barrier) {
  ERNET_SHARED(Values, values);
  values.of[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values.of[(threadIdx.x + 1) % blockDim.x];
}

// One thread waits for the block, the others of its warp wait for it.
__global__ void split_barrier_kernel(int* out) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1;
}

__global__ void copy_kernel(const int* in, int* out, int count) {
  if (int(threadIdx.x) < count) out[threadIdx.x] = in[threadIdx.x];
}

// In each round the values are read before the next ones take their place.
__global__ void rounds_kernel(int* out, bool with_barrier) {
  ERNET_SHARED(Values, values);
  for (int round = 0; round < 3; ++round) {
    values.of[threadIdx.x] = round;
    __syncthreads();
    out[threadIdx.x] += values.of[(threadIdx.x + 1) % blockDim.x];
    if (with_barrier) __syncthreads();
  }
}

// A shuffle orders no memory.
__global__ void warp_kernel(int* out, bool with_barrier) {
  ERNET_SHARED(Values, values);
  values.of[threadIdx.x] = int(threadIdx.x);
  int value = __shfl_down_sync(0xffffffffu, int(threadIdx.x), 1);
  if (with_barrier) __syncwarp();
  value += values.of[threadIdx.x ^ 1];
  out[threadIdx.x] = value;
}

// The last block adds up what the others have left.
__global__ void last_block_kernel(int* out, unsigned* arrived, bool with_fence) {
  ERNET_SHARED(bool, last);
  if (threadIdx.x == 0) {
    out[1 + blockIdx.x] = int(blockIdx.x);
    if (with_fence) __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (with_fence) __threadfence();
    if (last) {
      for (unsigned i = 0; i < gridDim.x; ++i) out[0] += out[1 + i];
    }
  }
}

// All blocks count, and look at the count meanwhile.
__global__ void count_kernel(unsigned* count, bool atomically) {
  if (atomically) {
    if (relaxed_load(count) < 1000u) atomicAdd(count, 1u);
  } else {
    *count += 1;
  }
}

// Blocks read what their neighbour in the cluster has in its shared memory, which must have written it and must stay.
__global__ void neighbour_kernel(int* out, bool wait_before, bool wait_after) {
  ERNET_DYNAMIC_SHARED(memory);
  int* value = reinterpret_cast<int*>(memory);
  if (threadIdx.x == 0) *value = int(BlockCluster::rank());
  if (wait_before) {
    BlockCluster::sync();
  } else {
    __syncthreads();
  }
  if (BlockCluster::rank() == 1) {
    __syncthreads();
    out[threadIdx.x] = *BlockCluster::at_rank(value, 0);
  }
  if (wait_after) BlockCluster::sync();
}

void launch_neighbours(int* out, bool wait_before, bool wait_after) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 2;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  const cudaLaunchConfig_t config = {dim3(2), dim3(64), 64, nullptr, &cluster, 1};
  ERNET_LAUNCH_CONFIGURED(config, neighbour_kernel, out, wait_before, wait_after);
}

}  // namespace

extern "C" {

void planted_rotate(const int* in, int* out, int threads, int with_barrier) {
  ERNET_LAUNCH(rotate_kernel, 1, threads, nullptr, in, out, with_barrier != 0);
}

void planted_split_barrier(int* out) { ERNET_LAUNCH(split_barrier_kernel, 1, 64, nullptr, out); }

void planted_copy(const int* in, int* out, int threads, int count) {
  ERNET_LAUNCH(copy_kernel, 1, threads, nullptr, in, out, count);
}

// `out` has 256 zeros.
void planted_rounds(int* out, int right) { ERNET_LAUNCH(rounds_kernel, 1, 64, nullptr, out, right != 0); }
void planted_warp(int* out, int right) { ERNET_LAUNCH(warp_kernel, 1, 64, nullptr, out, right != 0); }
void planted_last_block(int* out, int right) {
  auto* arrived = reinterpret_cast<unsigned*>(out + 255);
  ERNET_LAUNCH(last_block_kernel, 4, 32, nullptr, out, arrived, right != 0);
}
void planted_count(int* out, int right) {
  ERNET_LAUNCH(count_kernel, 4, 32, nullptr, reinterpret_cast<unsigned*>(out), right != 0);
}
void planted_neighbour(int* out, int right) { launch_neighbours(out, right != 0, true); }
void planted_early_exit(int* out, int right) { launch_neighbours(out, true, right != 0); }
}
