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

int simt_reconstruct(const Images* images, const Stains* source, const Stains* target, double io, const Output* out) {
  return macenko_reconstruct(*images, *source, *target, io, *out, nullptr);
}
}
