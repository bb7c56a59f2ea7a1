// Clusters, and the launch of a persistent grid of them: as many as the device holds at a time.
#pragma once

#include <cuda_runtime.h>

#include "macenko/cuda/launch.h"
#include "macenko/cuda/plan.h"

namespace ernet::cuda {

// The blocks that share an image: one alone, or those of a cluster, which share memory. In the CPU emulator the cluster
// functions are those of tests/simt/simt.h.
struct OneBlock {
  static constexpr bool kExists = true;
  static __device__ __forceinline__ unsigned rank() { return 0; }
  static __device__ __forceinline__ unsigned size() { return 1; }
  static __device__ __forceinline__ unsigned index() { return blockIdx.x; }
  static __device__ __forceinline__ unsigned clusters() { return gridDim.x; }
  // A barrier for all threads of the cluster.
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  // Before a block returns: the others may still look at its memory. Waits for no stores.
  static __device__ __forceinline__ void leave() {}
  // Where another block of the cluster has what this block has at `p` in shared memory.
  template <class T> static __device__ __forceinline__ T* at_rank(T* p, unsigned) { return p; }
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
  static __device__ __forceinline__ void leave() {
    __cluster_barrier_arrive_relaxed();
    __cluster_barrier_wait();
  }
  template <class T> static __device__ __forceinline__ T* at_rank(T* p, unsigned rank) {
    return static_cast<T*>(__cluster_map_shared_rank(p, rank));
  }
#else
  static constexpr bool kExists = false;  // no plan asks for it
#endif
};

// Clusters that the device holds at a time, by its answer for one launch of a whole number of them.
inline cudaError_t clusters_held(const void* kernel, const Plan& plan, const Device& device,
                                 const cudaLaunchConfig_t& config, int64_t& clusters) {
  int found = 0;
  cudaError_t error;
  if (plan.blocks > 1) {
    error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
    clusters = found;
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, plan.threads, size_t(plan.shared_bytes));
    clusters = int64_t(found) * device.multiprocessors;
  }
  if (error != cudaSuccess) return error;
  return clusters > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// cudaErrorInvalidConfiguration, and nothing launched, if the device holds not a single cluster.
template <class Job>
cudaError_t launch_persistent(void (*kernel)(Job), const Plan& plan, const Device& device, const Job& job,
                              int64_t images, cudaStream_t stream) {
  const auto* entry = reinterpret_cast<const void*>(kernel);
  // Always the same limit: another thread may be about to launch with other plans.
  const int limit = int(device.block_shared_bytes);
  cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess) {  // memory for as many blocks as the plan counts on
    error = cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && plan.blocks > kPortableCluster) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(plan.blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  const auto configured = [&](int64_t clusters) {
    return cudaLaunchConfig_t{dim3(unsigned(clusters * plan.blocks)),
                              dim3(unsigned(plan.threads)),
                              size_t(plan.shared_bytes),
                              stream,
                              &cluster,
                              plan.blocks > 1 ? 1u : 0u};
  };
  int64_t held = 0;
  error = clusters_held(entry, plan, device, configured(1), held);
  if (error != cudaSuccess) return error;
  const cudaLaunchConfig_t config = configured(images < held ? images : held);
  return ERNET_LAUNCH_CONFIGURED(config, kernel, job);
}

}  // namespace ernet::cuda
