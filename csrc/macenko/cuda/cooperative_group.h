// The blocks that share an image: one alone, or those of a thread-block cluster, which read and write each other's
// shared memory. In the CPU emulator the cluster functions are those of tests/simt/simt.h.
#pragma once

#include <cuda_runtime.h>

namespace ernet::cuda {

struct OneBlock {
  static constexpr bool kExists = true;
  static __device__ __forceinline__ unsigned rank() { return 0; }
  static __device__ __forceinline__ unsigned size() { return 1; }
  static __device__ __forceinline__ unsigned index() { return blockIdx.x; }
  static __device__ __forceinline__ unsigned clusters() { return gridDim.x; }
  // A barrier for all threads of the cluster.
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  // Where another block of the cluster has what this block has at `p` in shared memory.
  template <class T>
  static __device__ __forceinline__ T* at_rank(T* p, unsigned) {
    return p;
  }
};

struct BlockCluster {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kExists = true;
  static __device__ __forceinline__ unsigned rank() { return __clusterRelativeBlockRank(); }
  static __device__ __forceinline__ unsigned size() { return __clusterSizeInBlocks(); }
  static __device__ __forceinline__ unsigned index() { return blockIdx.x / size(); }
  static __device__ __forceinline__ unsigned clusters() { return gridDim.x / size(); }
  static __device__ __forceinline__ void sync() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
  template <class T>
  static __device__ __forceinline__ T* at_rank(T* p, unsigned rank) {
    return static_cast<T*>(__cluster_map_shared_rank(p, rank));
  }
#else
  static constexpr bool kExists = false;  // no plan asks for it
#endif
};

}  // namespace ernet::cuda
