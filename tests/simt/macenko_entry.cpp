// C functions over the Macenko launchers, for ctypes.
#include "cuda/macenko.h"
#include "simt.h"

using namespace ernet::cuda;

extern "C" {

void simt_seed(uint64_t seed) { simt::set_seed(seed); }

int64_t simt_moments_workspace(const Images* images) { return macenko_moments_workspace(*images); }

int simt_moments(const Images* images, double io, double beta, void* workspace, double* moments) {
  return macenko_moments(*images, io, beta, workspace, moments, nullptr);
}

int simt_reconstruct(const Images* images, const Recipe* recipe, double io, const Output* out) {
  return macenko_reconstruct(*images, *recipe, io, *out, nullptr);
}

int64_t simt_streaming_workspace(const Images* images, int64_t cache_bytes) {
  return macenko_streaming_workspace(*images, cache_bytes);
}

int simt_fit_streaming(const Images* images, const Parameters* parameters, int64_t cache_bytes, void* workspace,
                       const FitResult* fit) {
  return macenko_fit_streaming(*images, *parameters, cache_bytes, workspace, *fit, nullptr);
}

int simt_normalize_streaming(const Images* images, const Parameters* parameters, int64_t cache_bytes, void* workspace,
                             const FitResult* fit, const Recipe* recipe, const Output* out) {
  return macenko_normalize_streaming(*images, *parameters, cache_bytes, workspace, *fit, *recipe, *out, nullptr);
}
}
