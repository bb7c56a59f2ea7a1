// CUDA registration of the Macenko operators: tensors to pointers, the current stream, errors. The kernels know nothing
// of torch.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/macenko.h"
#include "macenko_checks.h"

namespace {

using ernet::DenseImages;
using ernet::cuda::Images;
using ernet::cuda::Pixel;
using ernet::cuda::Stains;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stream that torch works on. Its getter lives in libtorch_cuda, which a CPU build of torch does not have and which
// this binary therefore does not link; it is loaded by the time a CUDA tensor exists.
cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr,
                  "ernet: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream; torch >= 2.11 has it");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "ernet: the current CUDA stream could not be read");
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "ernet: ", what, " failed: ", cudaGetErrorString(error));
}

Images cuda_images(const Tensor& t, double range) {
  STD_TORCH_CHECK(t.is_cuda(), "ernet: images must be on a CUDA device here");
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Float,
                  "ernet: images must be uint8 or float32 on CUDA");
  const DenseImages dense = ernet::dense_images(t, "images");
  const bool bytes = type == ScalarType::Byte;
  return {dense.data,         bytes ? Pixel::u8 : Pixel::f32, dense.count,        dense.pixels,
          dense.image_stride, dense.channel_stride,           dense.pixel_stride, bytes ? 1.0 : 255.0 / range};
}

Tensor macenko_moments(const Tensor& images, double io, double beta, double range) {
  ernet::check_fit_parameters(io, 1.0, beta, range);
  const Images in = cuda_images(images, range);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor moments = torch::stable::new_empty(images, {in.count, ernet::macenko::kMomentCount}, ScalarType::Double);
  const int64_t words = ernet::cuda::macenko_moments_workspace(in) / 8;
  Tensor workspace = torch::stable::new_empty(images, {words}, ScalarType::Long);
  check(ernet::cuda::macenko_moments(in, io, beta, workspace.mutable_data_ptr(),
                                     static_cast<double*>(moments.mutable_data_ptr()),
                                     current_stream(images.get_device_index())),
        "macenko_moments");
  return moments;
}

Stains cuda_stains(const Tensor& stain, const Tensor& maximum, const Tensor& images, const char* name) {
  ernet::check_stains(stain, maximum, images.size(0), name);
  const bool same = stain.is_cuda() && maximum.is_cuda() && stain.get_device_index() == images.get_device_index() &&
                    maximum.get_device_index() == images.get_device_index();
  STD_TORCH_CHECK(same, "ernet: ", name, " stains must be on the device of the images");
  return {static_cast<const double*>(stain.const_data_ptr()), static_cast<const double*>(maximum.const_data_ptr()),
          stain.size(0) == 1};
}

Tensor macenko_reconstruct(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                           const Tensor& target_stain, const Tensor& target_max, double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Images in = cuda_images(images, range);
  const Stains source = cuda_stains(source_stain, source_max, images, "source");
  const Stains target = cuda_stains(target_stain, target_max, images, "target");
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor result = torch::stable::empty_like(images);
  const DenseImages out = ernet::output_images(result, ernet::dense_images(images, "images"));
  check(ernet::cuda::macenko_reconstruct(in, source, target, io, {out.data, out.image_stride, out.channel_stride},
                                         current_stream(images.get_device_index())),
        "macenko_reconstruct");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ernet, CUDA, m) {
  m.impl("macenko_moments", TORCH_BOX(&macenko_moments));
  m.impl("macenko_reconstruct", TORCH_BOX(&macenko_reconstruct));
}
