// Checks of the Macenko operators' arguments, and images as pointer and strides: shared by the CPU and the CUDA
// registration.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "macenko/steps/od.h"
#include "macenko/steps/reconstruct.h"

namespace ernet {

// Strides in elements. pixel_stride is 1 (planar) or 3 (channels-last).
struct DenseImages {
  void* data;
  int64_t count;
  int64_t pixels;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t pixel_stride;
};

inline std::string shape_of(const torch::stable::Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline bool rows_follow(const torch::stable::Tensor& t, int64_t pixel_stride) {
  return (t.size(3) == 1 || t.stride(3) == pixel_stride) && (t.size(2) == 1 || t.stride(2) == pixel_stride * t.size(3));
}

inline DenseImages dense_images(const torch::stable::Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(1) == 3, "ernet: ", name, " must be RGB, [B, 3, H, W]; got ", shape_of(t));
  const int64_t pixels = t.size(2) * t.size(3);
  STD_TORCH_CHECK(pixels > 0 || t.size(0) == 0, "ernet: ", name, " have no pixels; got ", shape_of(t));
  DenseImages images = {t.data_ptr(), t.size(0), pixels, t.stride(0), t.stride(1), 1};
  if (t.numel() == 0 || rows_follow(t, 1)) return images;
  STD_TORCH_CHECK(t.stride(1) == 1 && rows_follow(t, 3), "ernet: the pixels of ", name,
                  " must be dense, contiguous or channels-last. Call .contiguous() or "
                  ".contiguous(memory_format=torch.channels_last)");
  images.pixel_stride = 3;
  return images;
}

// The output of an operator, allocated like its input, seen with the input's kind of layout.
inline DenseImages output_images(const torch::stable::Tensor& t, const DenseImages& like) {
  DenseImages images = dense_images(t, "the output");
  if (images.pixel_stride != like.pixel_stride && t.numel() > 0) {
    // Where H W = 1 both layouts describe the same memory.
    STD_TORCH_CHECK(like.pixels == 1, "ernet: the output was allocated in another layout");
    images.pixel_stride = like.pixel_stride;
  }
  return images;
}

// The loops write a planar result at the distances of the input's planes.
inline void check_same_planes(const DenseImages& in, const DenseImages& out) {
  STD_TORCH_CHECK(
      in.pixel_stride == 3 || in.count == 0 || in.channel_stride == out.channel_stride,
      "ernet: the channels of planar images must follow each other, as the result's do. Call .contiguous()");
}

inline void check_fit_parameters(double io, double alpha, double beta, double range) {
  STD_TORCH_CHECK(io > 1 && io <= macenko::kMaxIo, "ernet: Io must be in (1, 1024]; got ", io);
  STD_TORCH_CHECK(alpha >= 0 && alpha < 50, "ernet: alpha must be in [0, 50) percent; got ", alpha);
  STD_TORCH_CHECK(beta >= 0 && beta < std::log(io), "ernet: beta must be in [0, ln(Io)); got ", beta);
  STD_TORCH_CHECK(range > 0 && std::isfinite(range), "ernet: range must be positive and finite; got ", range);
}

inline bool on_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline const double* finite_on_cpu(const torch::stable::Tensor& t, const char* name, const char* part) {
  const auto* values = static_cast<const double*>(t.const_data_ptr());
  for (int64_t i = 0; t.is_cpu() && i < t.numel(); ++i) {
    STD_TORCH_CHECK(std::isfinite(values[i]), "ernet: ", name, part, " of image ", i * t.size(0) / t.numel(),
                    " is not finite. Images whose fit has a status need another source");
  }
  return values;
}

// `name`_stain [1 or B, 3, 2] and `name`_max [1 or B, 2] for images [B, 3, H, W], float64 and contiguous.
inline macenko::Stains checked_stains(const torch::stable::Tensor& stain, const torch::stable::Tensor& maximum,
                                      const torch::stable::Tensor& images, const char* name) {
  const int64_t count = images.size(0);
  const bool shapes = stain.dim() == 3 && maximum.dim() == 2 && stain.size(1) == 3 && stain.size(2) == 2 &&
                      maximum.size(1) == 2 && stain.size(0) == maximum.size(0) &&
                      (stain.size(0) == 1 || stain.size(0) == count);
  STD_TORCH_CHECK(shapes, "ernet: ", name, "_stain and ", name, "_max must be [B, 3, 2] and [B, 2] with B = 1 or ",
                  count, "; got ", shape_of(stain), " and ", shape_of(maximum));
  STD_TORCH_CHECK(stain.scalar_type() == torch::headeronly::ScalarType::Double &&
                      maximum.scalar_type() == torch::headeronly::ScalarType::Double,
                  "ernet: ", name, "_stain and ", name, "_max must be float64");
  STD_TORCH_CHECK(stain.is_contiguous() && maximum.is_contiguous(), "ernet: ", name, "_stain and ", name,
                  "_max must be contiguous");
  STD_TORCH_CHECK(on_same_device(stain, images) && on_same_device(maximum, images), "ernet: ", name,
                  " stains must be on the device of the images");
  return {finite_on_cpu(stain, name, "_stain"), finite_on_cpu(maximum, name, "_max"), stain.size(0) == 1};
}

// Gain or shift of the two stains of every image, [B, 2] float64.
inline const double* checked_change(const torch::stable::Tensor& change, const torch::stable::Tensor& images,
                                    const char* name) {
  STD_TORCH_CHECK(on_same_device(change, images) && change.dim() == 2 && change.size(0) == images.size(0) &&
                      change.size(1) == 2 && change.is_contiguous() &&
                      change.scalar_type() == torch::headeronly::ScalarType::Double,
                  "ernet: ", name, " must be [", images.size(0),
                  ", 2] float64, contiguous, on the device of the images; got ", shape_of(change));
  return static_cast<const double*>(change.const_data_ptr());
}

// How levels become the input of a network: (value / range - mean) / std.
struct NetworkScale {
  torch::headeronly::ScalarType dtype;
  double range;
  double mean[3];
  double std[3];
};

// The optional arguments of an operator: nothing without a dtype; mean and std [3] float64, contiguous, on the CPU, 0
// and 1 by default.
inline std::optional<NetworkScale> network_scale(const torch::stable::Tensor& images,
                                                 const std::optional<torch::headeronly::ScalarType>& dtype,
                                                 const std::optional<torch::stable::Tensor>& mean,
                                                 const std::optional<torch::stable::Tensor>& std, double range) {
  using torch::headeronly::ScalarType;
  if (!dtype) {
    STD_TORCH_CHECK(!mean && !std, "ernet: mean and std scale a network's input; pass its dtype too");
    return std::nullopt;
  }
  STD_TORCH_CHECK(*dtype == ScalarType::Float || *dtype == ScalarType::BFloat16 || *dtype == ScalarType::Half,
                  "ernet: a network's input must be float32, bfloat16 or float16");
  NetworkScale out = {*dtype, images.element_size() == 1 ? 255.0 : range, {0, 0, 0}, {1, 1, 1}};
  for (const auto& [tensor, values, name] : {std::tuple{&mean, out.mean, "mean"}, std::tuple{&std, out.std, "std"}}) {
    if (!*tensor) continue;
    const torch::stable::Tensor& given = **tensor;
    STD_TORCH_CHECK(given.is_cpu() && given.dim() == 1 && given.size(0) == 3 && given.is_contiguous() &&
                        given.scalar_type() == ScalarType::Double,
                    "ernet: ", name, " must be [3] float64 on the CPU; got ", shape_of(given));
    std::memcpy(values, given.const_data_ptr(), 3 * sizeof(double));
  }
  for (double value : out.std) STD_TORCH_CHECK(value > 0, "ernet: std must be positive; got ", value);
  return out;
}

}  // namespace ernet
