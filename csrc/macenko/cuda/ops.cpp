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

#include "macenko/cuda/kernels.h"
#include "macenko/cuda/plan.h"
#include "macenko/operators.h"

namespace {

using ernet::DenseImages;
using ernet::FitTensors;
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
using ernet::cuda::Separation;
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

// The answers of a device, or of a part of one (MIG), that has no room for a cluster of a plan's size: none fits, the
// size is beyond it, or it knows no clusters.
bool holds_no_cluster(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorNotSupported;
}

class CudaImages {
 public:
  CudaImages(const Tensor& images, double range)
      : images_(images), in_(checked(images, range)), guard_(images.get_device_index()) {}

  FitTensors new_fits() const {
    return {torch::stable::new_empty(images_, {in_.count, 3, 2}, ScalarType::Double),
            torch::stable::new_empty(images_, {in_.count, 2}, ScalarType::Double),
            torch::stable::new_empty(images_, {in_.count}, ScalarType::Int)};
  }

  void fit(const Parameters& p, const FitTensors& fits) const { run(p, fits.pointers(), nullptr, nullptr); }

  Tensor reconstruct(const Recipe& recipe, double io, const std::optional<NetworkScale>& scale) const {
    Tensor result = new_result(scale);
    check(ernet::cuda::macenko_reconstruct(in_, recipe, io, output_of(result, scale), stream()), "macenko_reconstruct");
    return result;
  }

  Tensor fit_and_reconstruct(const Recipe& recipe, const Parameters& p, const std::optional<NetworkScale>& scale,
                             const FitTensors& fits) const {
    Tensor result = new_result(scale);
    const Output out = output_of(result, scale);
    run(p, fits.pointers(), &recipe, &out);
    return result;
  }

  std::tuple<Tensor, Tensor, Tensor> reconstruct_stains(const Stains& source, const Stains& target, double io) const {
    Tensor both = new_result({}), haematoxylin = new_result({}), eosin = new_result({});
    const Separation what = {
        source, target, true, {output_of(haematoxylin, {}), output_of(eosin, {}), output_of(both, {})}, nullptr};
    check(ernet::cuda::macenko_separate(in_, what, io, stream()), "macenko_reconstruct_stains");
    return {both, haematoxylin, eosin};
  }

  std::tuple<Tensor, Tensor, Tensor> separate(const Stains& source, const Stains& drawn, bool scaled, double io) const {
    Tensor haematoxylin = new_result({}), eosin = new_result({});
    Tensor concentrations =
        torch::stable::new_empty(images_, {in_.count, 2, images_.size(2), images_.size(3)}, ScalarType::Float);
    const Separation what = {source,
                             drawn,
                             scaled,
                             {output_of(haematoxylin, {}), output_of(eosin, {}), {}},
                             static_cast<float*>(concentrations.mutable_data_ptr())};
    check(ernet::cuda::macenko_separate(in_, what, io, stream()), "macenko_separate");
    return {haematoxylin, eosin, concentrations};
  }

 private:
  static Images checked(const Tensor& t, double range) {
    STD_TORCH_CHECK(t.is_cuda(), "ernet: images must be on a CUDA device here");
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Float,
                    "ernet: images must be uint8 or float32 on CUDA");
    const DenseImages dense = ernet::dense_images(t, "images");
    const bool bytes = type == ScalarType::Byte;
    return {dense.data,         bytes ? Pixel::u8 : Pixel::f32, dense.count,        dense.pixels,
            dense.image_stride, dense.channel_stride,           dense.pixel_stride, bytes ? 1.0 : 255.0 / range};
  }

  cudaStream_t stream() const { return current_stream(images_.get_device_index()); }

  // An uninitialised result: laid out as the images, or a network's input [B, H, W, 3].
  Tensor new_result(const std::optional<NetworkScale>& scale) const {
    if (!scale) return torch::stable::empty_like(images_);
    return torch::stable::new_empty(images_, {in_.count, images_.size(2), images_.size(3), 3}, scale->dtype);
  }

  Output output_of(Tensor& result, const std::optional<NetworkScale>& scale) const {
    if (!scale) {
      const DenseImages out = ernet::output_images(result, ernet::dense_images(images_, "images"));
      return {out.data, out.image_stride, out.channel_stride, OutputType::image, 1, {}, {}};
    }
    const OutputType type = scale->dtype == ScalarType::Float      ? OutputType::f32
                            : scale->dtype == ScalarType::BFloat16 ? OutputType::bf16
                                                                   : OutputType::f16;
    Output out = {result.mutable_data_ptr(), 0, 0, type, scale->range, {}, {}};
    std::memcpy(out.mean, scale->mean, sizeof out.mean);
    std::memcpy(out.std, scale->std, sizeof out.std);
    return out;
  }

  // A fit and, if there is a recipe and an output, the reconstruction. Images without pixels are not launched for.
  void run(const Parameters& parameters, const FitResult& result, const Recipe* recipe, const Output* out) const {
    if (in_.count == 0) return;
    const int32_t index = images_.get_device_index();
    const Device& device = device_limits(index);
    const PlanRequest wanted = ernet::cuda::requested_plan();
    const bool network = out != nullptr && out->type != OutputType::image;
    const Plan plan = ernet::cuda::choose_plan(device, in_, network, wanted);
    STD_TORCH_CHECK(plan.kind != PlanKind::automatic,
                    "ernet: the plan that ERNET_MACENKO_PLAN asks for does not support these images on this device. "
                    "Unset it");
    const cudaStream_t stream = this->stream();
    if (plan.kind != PlanKind::streaming) {
      const cudaError_t error =
          ernet::cuda::macenko_resident(in_, parameters, plan, device, result, recipe, out, stream);
      const bool elsewhere =
          holds_no_cluster(error) && plan.kind == PlanKind::cluster && wanted.kind == PlanKind::automatic;
      if (!elsewhere) return check(error, "the Macenko kernel");
      cudaGetLastError();  // not for the next one to find
    }
    const int64_t bytes = ernet::cuda::macenko_streaming_workspace(in_, device.cache_bytes);
    Tensor workspace = torch::stable::new_empty(images_, {bytes}, ScalarType::Byte);
    check(ernet::cuda::macenko_streaming(in_, parameters, device.cache_bytes, workspace.mutable_data_ptr(), result,
                                         recipe, out, stream),
          "the streaming Macenko kernels");
  }

  const Tensor& images_;
  Images in_;
  torch::stable::accelerator::DeviceGuard guard_;
};

std::tuple<Tensor, Tensor, Tensor> macenko_separate(const Tensor& images, const Tensor& source_stain,
                                                    const Tensor& source_max, const Tensor& drawn_stain,
                                                    const Tensor& drawn_max, bool scaled, double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const CudaImages in(images, range);
  const Stains source = ernet::checked_stains(source_stain, source_max, images, "source");
  return in.separate(source, ernet::checked_stains(drawn_stain, drawn_max, images, "drawn"), scaled, io);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ernet, CUDA, m) {
  ernet::MacenkoOperators<CudaImages>::register_in(m);
  m.impl("macenko_separate", TORCH_BOX(&macenko_separate));
}
