// What the kernels of a fit get as their parameter, and how they give its result back.
#pragma once

#include <cuda_runtime.h>

#include "macenko/cuda/kernels.h"
#include "macenko/steps/fit_state.h"

namespace ernet::cuda {

struct FitJob {
  Images images;
  macenko::FitParameters p;
  FitResult fit;
  int32_t fixed_offset;
  double od[256];  // of 8-bit levels
};

inline FitJob make_fit_job(const Images& images, const Parameters& parameters, const FitResult& fit) {
  const macenko::OdTable levels = macenko::make_od_table(parameters.io, parameters.beta);
  FitJob job = {images, {}, fit, levels.fixed_offset, {}};
  for (int level = 0; level < 256; ++level) job.od[level] = levels.od[level];
  const bool bytes = images.type == Pixel::u8;
  job.p = {parameters.io,
           parameters.alpha,
           parameters.beta,
           bytes ? levels.od[255] : macenko::od_of_level(255.5, parameters.io),
           bytes ? levels.od[0] : macenko::od_of_level(-0.5, parameters.io),
           images.pixels,
           0,
           levels.tissue_limit,
           parameters.nearest};
  return job;
}

// One thread, once the state is finished.
__device__ __forceinline__ void write_fit(const FitResult& fit, int64_t image, const macenko::FitState& state) {
  macenko::write_fit(fit, image, state.stain, state.maximum, state.status);
}

}  // namespace ernet::cuda
