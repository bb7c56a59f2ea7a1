// CUDA registration of the Macenko operators: tensors to pointers, the current stream, errors. The kernels know nothing
// of torch.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "macenko/checks.h"
#include "macenko/cuda/kernels.h"
#include "macenko/cuda/plan.h"

namespace {

using ernet::DenseImages;
using ernet::NetworkScale;
using ernet::cuda::Device;
using ernet::cuda::FitResult;
using ernet::cuda::Images;
using ernet::cuda::Output;
using ernet::cuda::OutputType;
using ernet::cuda::Parameters;
using ernet::cuda::Pixel;
using ernet::cuda::Plan;
using ernet::cuda::PlanKind;
using ernet::cuda::PlanRequest;
using ernet::cuda::Recipe;
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

Stains cuda_stains(const Tensor& stain, const Tensor& maximum, const Tensor& images, const char* name) {
  ernet::check_stains(stain, maximum, images.size(0), name);
  const bool same = stain.is_cuda() && maximum.is_cuda() && stain.get_device_index() == images.get_device_index() &&
                    maximum.get_device_index() == images.get_device_index();
  STD_TORCH_CHECK(same, "ernet: ", name, " stains must be on the device of the images");
  return {static_cast<const double*>(stain.const_data_ptr()), static_cast<const double*>(maximum.const_data_ptr()),
          stain.size(0) == 1};
}

// An image of the input's own layout.
Output image_output(Tensor& result, const Tensor& images) {
  const DenseImages out = ernet::output_images(result, ernet::dense_images(images, "images"));
  return {out.data, out.image_stride, out.channel_stride, OutputType::image, 1, {}, {}};
}

Recipe given_stains(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                    const Tensor& target_stain, const Tensor& target_max) {
  const Stains source = cuda_stains(source_stain, source_max, images, "source");
  const Stains target = cuda_stains(target_stain, target_max, images, "target");
  return {source, nullptr, target, false, nullptr, nullptr};
}

// An uninitialised result: laid out as the images, or a network's input [B, H, W, 3].
Tensor new_result(const Tensor& images, const std::optional<NetworkScale>& scale) {
  if (!scale) return torch::stable::empty_like(images);
  return torch::stable::new_empty(images, {images.size(0), images.size(2), images.size(3), 3}, scale->dtype);
}

Output output_of(Tensor& result, const Tensor& images, const std::optional<NetworkScale>& scale) {
  if (!scale) return image_output(result, images);
  const OutputType type = scale->dtype == ScalarType::Float      ? OutputType::f32
                          : scale->dtype == ScalarType::BFloat16 ? OutputType::bf16
                                                                 : OutputType::f16;
  Output out = {result.mutable_data_ptr(), 0, 0, type, scale->range, {}, {}};
  std::memcpy(out.mean, scale->mean, sizeof out.mean);
  std::memcpy(out.std, scale->std, sizeof out.std);
  return out;
}

Tensor macenko_reconstruct(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                           const Tensor& target_stain, const Tensor& target_max, double io, double range,
                           std::optional<ScalarType> dtype, std::optional<Tensor> mean, std::optional<Tensor> std) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Images in = cuda_images(images, range);
  const Recipe recipe = given_stains(images, source_stain, source_max, target_stain, target_max);
  const auto scale = ernet::network_scale(images, dtype, mean, std, range);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor result = new_result(images, scale);
  check(ernet::cuda::macenko_reconstruct(in, recipe, io, output_of(result, images, scale),
                                         current_stream(images.get_device_index())),
        "macenko_reconstruct");
  return result;
}

int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading an attribute of the device");
  return value;
}

// Read once a device.
const Device& device_limits(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, Device> known;  // its elements stay where they are
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const Device limits = {
      attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrMultiProcessorCount, device),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), attribute(cudaDevAttrL2CacheSize, device)};
  return known.emplace(device, limits).first->second;
}

// The tensors of a fit, and the kernels that fill them.
class FitCall {
 public:
  FitCall(const Tensor& images, const Images& in)
      : stain(torch::stable::new_empty(images, {in.count, 3, 2}, ScalarType::Double)),
        maximum(torch::stable::new_empty(images, {in.count, 2}, ScalarType::Double)),
        status(torch::stable::new_empty(images, {in.count}, ScalarType::Int)),
        in_(in),
        images_(images) {}

  FitResult result() {
    return {static_cast<double*>(stain.mutable_data_ptr()), static_cast<double*>(maximum.mutable_data_ptr()),
            static_cast<int32_t*>(status.mutable_data_ptr())};
  }

  // A fit and, if there is a recipe and an output, the reconstruction. Images without pixels are not launched for.
  void run(const Parameters& parameters, const Recipe* recipe, const Output* out) {
    if (in_.count == 0) return;
    const int32_t index = images_.get_device_index();
    const Device& device = device_limits(index);
    const PlanRequest wanted = ernet::cuda::requested_plan();
    const bool network = out != nullptr && out->type != OutputType::image;
    const Plan plan = ernet::cuda::choose_plan(device, in_, network, wanted);
    STD_TORCH_CHECK(plan.kind != PlanKind::automatic,
                    "ernet: the plan that ERNET_MACENKO_PLAN asks for does not support these images on this device. "
                    "Unset it");
    const cudaStream_t stream = current_stream(index);
    if (plan.kind != PlanKind::streaming) {
      const cudaError_t error =
          ernet::cuda::macenko_resident(in_, parameters, plan, device, result(), recipe, out, stream);
      // A part of a device may hold no cluster of this size.
      const bool elsewhere = error == cudaErrorInvalidConfiguration && plan.kind == PlanKind::cluster &&
                             wanted.kind == PlanKind::automatic;
      if (!elsewhere) return check(error, "the Macenko kernel");
      cudaGetLastError();  // not for the next one to find
    }
    const int64_t bytes = ernet::cuda::macenko_streaming_workspace(in_, device.cache_bytes);
    Tensor workspace = torch::stable::new_empty(images_, {bytes}, ScalarType::Byte);
    check(ernet::cuda::macenko_streaming(in_, parameters, device.cache_bytes, workspace.mutable_data_ptr(), result(),
                                         recipe, out, stream),
          "the streaming Macenko kernels");
  }

  Tensor stain, maximum, status;

 private:
  Images in_;
  const Tensor& images_;
};

std::tuple<Tensor, Tensor, Tensor> macenko_fit(const Tensor& images, double io, double alpha, double beta, bool nearest,
                                               double range) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const Images in = cuda_images(images, range);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  FitCall fit(images, in);
  fit.run({io, alpha, beta, nearest}, nullptr, nullptr);
  return {fit.stain, fit.maximum, fit.status};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> macenko_normalize(const Tensor& images, const Tensor& target_stain,
                                                             const Tensor& target_max, double io, double alpha,
                                                             double beta, bool nearest, bool identity, double range,
                                                             std::optional<ScalarType> dtype,
                                                             std::optional<Tensor> mean, std::optional<Tensor> std) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const Images in = cuda_images(images, range);
  const Stains target = cuda_stains(target_stain, target_max, images, "target");
  const auto scale = ernet::network_scale(images, dtype, mean, std, range);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor result = new_result(images, scale);
  FitCall fit(images, in);
  const Recipe recipe = {{}, nullptr, target, identity, nullptr, nullptr};
  const Output out = output_of(result, images, scale);
  fit.run({io, alpha, beta, nearest}, &recipe, &out);
  return {result, fit.stain, fit.maximum, fit.status};
}

// Gain or shift of the two stains of every image, [B, 2] float64.
const double* change_of(const Tensor& change, const Tensor& images, const char* name) {
  STD_TORCH_CHECK(change.is_cuda() && change.get_device_index() == images.get_device_index() && change.dim() == 2 &&
                      change.size(0) == images.size(0) && change.size(1) == 2 && change.is_contiguous() &&
                      change.scalar_type() == ScalarType::Double,
                  "ernet: ", name, " must be [", images.size(0),
                  ", 2] float64, contiguous, on the device of the images; got ", ernet::shape_of(change));
  return static_cast<const double*>(change.const_data_ptr());
}

Tensor macenko_change(const Tensor& images, const Tensor& source_stain, const Tensor& source_max, const Tensor& gain,
                      const Tensor& shift, double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Images in = cuda_images(images, range);
  const Stains source = cuda_stains(source_stain, source_max, images, "source");
  const Recipe recipe = {
      source, nullptr, source, false, change_of(gain, images, "gain"), change_of(shift, images, "shift")};
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor result = torch::stable::empty_like(images);
  check(ernet::cuda::macenko_reconstruct(in, recipe, io, image_output(result, images),
                                         current_stream(images.get_device_index())),
        "macenko_change");
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> macenko_augment(const Tensor& images, const Tensor& reference_stain,
                                                           const Tensor& reference_max, const Tensor& gain,
                                                           const Tensor& shift, double io, double alpha, double beta,
                                                           bool nearest, bool identity, double range) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const Images in = cuda_images(images, range);
  const Stains reference = cuda_stains(reference_stain, reference_max, images, "reference");
  const Recipe recipe = {
      {}, nullptr, reference, identity, change_of(gain, images, "gain"), change_of(shift, images, "shift")};
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor result = torch::stable::empty_like(images);
  FitCall fit(images, in);
  const Output out = image_output(result, images);
  fit.run({io, alpha, beta, nearest}, &recipe, &out);
  return {result, fit.stain, fit.maximum, fit.status};
}

std::tuple<Tensor, Tensor, Tensor> macenko_separate(const Tensor& images, const Tensor& source_stain,
                                                    const Tensor& source_max, const Tensor& drawn_stain,
                                                    const Tensor& drawn_max, bool scaled, double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Images in = cuda_images(images, range);
  const Stains source = cuda_stains(source_stain, source_max, images, "source");
  const Stains drawn = cuda_stains(drawn_stain, drawn_max, images, "drawn");
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor haematoxylin = torch::stable::empty_like(images);
  Tensor eosin = torch::stable::empty_like(images);
  Tensor concentrations =
      torch::stable::new_empty(images, {in.count, 2, images.size(2), images.size(3)}, ScalarType::Float);
  const ernet::cuda::Separation what = {source,
                                        drawn,
                                        scaled,
                                        {image_output(haematoxylin, images), image_output(eosin, images), {}},
                                        static_cast<float*>(concentrations.mutable_data_ptr())};
  check(ernet::cuda::macenko_separate(in, what, io, current_stream(images.get_device_index())), "macenko_separate");
  return {haematoxylin, eosin, concentrations};
}

std::tuple<Tensor, Tensor, Tensor> macenko_reconstruct_stains(const Tensor& images, const Tensor& source_stain,
                                                              const Tensor& source_max, const Tensor& target_stain,
                                                              const Tensor& target_max, double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Images in = cuda_images(images, range);
  const Stains source = cuda_stains(source_stain, source_max, images, "source");
  const Stains target = cuda_stains(target_stain, target_max, images, "target");
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor both = torch::stable::empty_like(images);
  Tensor haematoxylin = torch::stable::empty_like(images);
  Tensor eosin = torch::stable::empty_like(images);
  const ernet::cuda::Separation what = {
      source,
      target,
      true,
      {image_output(haematoxylin, images), image_output(eosin, images), image_output(both, images)},
      nullptr};
  check(ernet::cuda::macenko_separate(in, what, io, current_stream(images.get_device_index())),
        "macenko_reconstruct_stains");
  return {both, haematoxylin, eosin};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ernet, CUDA, m) {
  m.impl("macenko_fit", TORCH_BOX(&macenko_fit));
  m.impl("macenko_reconstruct", TORCH_BOX(&macenko_reconstruct));
  m.impl("macenko_reconstruct_stains", TORCH_BOX(&macenko_reconstruct_stains));
  m.impl("macenko_normalize", TORCH_BOX(&macenko_normalize));
  m.impl("macenko_change", TORCH_BOX(&macenko_change));
  m.impl("macenko_augment", TORCH_BOX(&macenko_augment));
  m.impl("macenko_separate", TORCH_BOX(&macenko_separate));
}
