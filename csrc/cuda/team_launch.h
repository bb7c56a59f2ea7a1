// Launch of a persistent grid of teams: as many blocks as the device holds at a time, in clusters where a team has more
// than one.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/plan.h"

namespace ernet::cuda {

template <class Job>
cudaError_t launch_team(void (*kernel)(Job), const Plan& plan, const Device& device, const Job& job, int64_t images,
                        cudaStream_t stream) {
  const auto* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes));
  if (error != cudaSuccess) return error;
  if (plan.blocks > 8) {
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  int beside = 0;  // blocks of a multiprocessor
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&beside, entry, plan.threads, size_t(plan.shared_bytes));
  if (error != cudaSuccess) return error;
  if (beside == 0) return cudaErrorInvalidConfiguration;
  const int64_t held = int64_t(beside) * device.multiprocessors / plan.blocks;
  const int64_t teams = images < held ? images : (held > 0 ? held : 1);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(plan.blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  const cudaLaunchConfig_t config = {dim3(unsigned(teams * plan.blocks)),
                                     dim3(unsigned(plan.threads)),
                                     size_t(plan.shared_bytes),
                                     stream,
                                     &cluster,
                                     plan.blocks > 1 ? 1u : 0u};
  return ERNET_LAUNCH_CONFIGURED(config, kernel, job);
}

}  // namespace ernet::cuda
