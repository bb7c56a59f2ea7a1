// Kernels with planted errors: the emulator has to find them.
#include <cuda_runtime.h>

#include "macenko/cuda/launch.h"

namespace {

// Each thread passes its value to its neighbour through shared memory.
__global__ void rotate_kernel(const int* in, int* out, bool with_barrier) {
  __shared__ int values[256];
  values[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
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

}  // namespace

extern "C" {

void planted_rotate(const int* in, int* out, int threads, int with_barrier) {
  ERNET_LAUNCH(rotate_kernel, 1, threads, nullptr, in, out, with_barrier != 0);
}

void planted_split_barrier(int* out) { ERNET_LAUNCH(split_barrier_kernel, 1, 64, nullptr, out); }

void planted_copy(const int* in, int* out, int threads, int count) {
  ERNET_LAUNCH(copy_kernel, 1, threads, nullptr, in, out, count);
}
}
