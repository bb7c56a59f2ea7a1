// The Macenko operators: schemas, argument checks and the CPU implementation. Autograd and fake kernels are in
// ernet_fast/stain/operators.py; the CUDA implementations are registered in macenko/cuda/ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "macenko/checks.h"
#include "macenko/cpu/image.h"
#include "macenko/cpu/network_input.h"
#include "memory/outputs.h"

namespace {

using ernet::DenseImages;
using ernet::cpu::ImageView;
using ernet::cpu::MacenkoImageFit;
using ernet::cpu::MacenkoParameters;
using ernet::cpu::Pixel;
using ernet::cpu::Strips;
using ernet::macenko::OdTable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// From this size on an image is shared by all threads; smaller ones are taken whole.
constexpr int64_t kSharedImagePixels = 1 << 18;

Pixel pixel_type(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::Byte:
      return Pixel::u8;
    case ScalarType::Float:
      return Pixel::f32;
    case ScalarType::Double:
      return Pixel::f64;
    default:
      STD_TORCH_CHECK(false, "ernet: images must be uint8, float32 or float64 on the CPU");
  }
  return Pixel::u8;
}

// Runs body(image, strips) for every image, either whole images or strips of each in parallel.
template <class F>
void for_each_image(const DenseImages& images, const F& body) {
  const int64_t threads = torch::stable::get_num_threads();
  if (images.pixels < kSharedImagePixels || threads == 1) {
    torch::stable::parallel_for(0, images.count, 1, [&](int64_t begin, int64_t end) {
      const Strips whole = ernet::cpu::one_strip();
      for (int64_t i = begin; i < end; ++i) body(i, whole);
    });
    return;
  }
  const Strips shared = {threads, [](int64_t tasks, const std::function<void(int64_t)>& task) {
                           torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                             for (int64_t i = begin; i < end; ++i) task(i);
                           });
                         }};
  for (int64_t i = 0; i < images.count; ++i) body(i, shared);
}

ImageView view_of(const DenseImages& images, int64_t index, size_t element_size, double range) {
  const auto* base = static_cast<const unsigned char*>(images.data);
  return {base + size_t(index * images.image_stride) * element_size, images.pixel_stride, images.channel_stride,
          images.pixels, element_size == 1 ? 1.0 : 255.0 / range};
}

void* output_of(const DenseImages& images, int64_t index, size_t element_size) {
  return static_cast<unsigned char*>(images.data) + size_t(index * images.image_stride) * element_size;
}

// The table of the last call on this thread: nearly all calls have the same Io, and its logarithms would take a third
// of the time of a small image. A reference holds until the next call on this thread.
const OdTable& od_table(double io, double beta) {
  struct Last {
    double io = 0, beta = 0;
    OdTable table;
  };
  thread_local Last last;
  if (last.io != io) {
    last = {io, beta, ernet::macenko::make_od_table(io, beta)};
  } else if (last.beta != beta) {
    ernet::macenko::set_tissue_limit(last.table, beta);
    last.beta = beta;
  }
  return last.table;
}

// An uninitialised result with the strides of `images`, or those that torch.empty_like gives it.
Tensor result_like(const Tensor& images, const DenseImages& in) {
  const int64_t plane = in.pixel_stride == 3 ? 1 : in.pixels;
  const bool dense = in.channel_stride == plane && (in.count == 1 || in.image_stride == 3 * in.pixels);
  if (!dense || in.count == 0) return torch::stable::empty_like(images);
  const std::vector<int64_t> sizes = {images.size(0), images.size(1), images.size(2), images.size(3)};
  const std::vector<int64_t> strides = {images.stride(0), images.stride(1), images.stride(2), images.stride(3)};
  return ernet::cpu_output(sizes, strides, images.scalar_type(), images.element_size());
}

struct FitTensors {
  Tensor stain, maximum, status;

  explicit FitTensors(int64_t count)
      : stain(ernet::cpu_output({count, 3, 2}, ScalarType::Double, 8)),
        maximum(ernet::cpu_output({count, 2}, ScalarType::Double, 8)),
        status(ernet::cpu_output({count}, ScalarType::Int, 4)) {}

  void set(int64_t index, const MacenkoImageFit& fit) const {
    auto* s = static_cast<double*>(stain.mutable_data_ptr()) + 6 * index;
    for (int k = 0; k < 3; ++k) {
      s[2 * k] = fit.stain.h[k];
      s[2 * k + 1] = fit.stain.e[k];
    }
    auto* m = static_cast<double*>(maximum.mutable_data_ptr()) + 2 * index;
    m[0] = fit.max_concentration[0];
    m[1] = fit.max_concentration[1];
    static_cast<int32_t*>(status.mutable_data_ptr())[index] = fit.status;
  }
};

Tensor macenko_moments(const Tensor& images, double io, double beta, double range) {
  ernet::check_fit_parameters(io, 1.0, beta, range);
  const Pixel type = pixel_type(images);
  const DenseImages in = ernet::dense_images(images, "images");
  Tensor moments = ernet::cpu_output({in.count, ernet::macenko::kMomentCount}, ScalarType::Double, 8);
  auto* out = static_cast<double*>(moments.mutable_data_ptr());
  const OdTable& table = od_table(io, beta);
  const MacenkoParameters p = {io, 1.0, beta, false};
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    double* row = out + i * ernet::macenko::kMomentCount;
    const ImageView view = view_of(in, i, images.element_size(), range);
    if (ernet::cpu::macenko_moments(type, view, p, table, strips, row) > 0) row[0] = std::nan("");
  });
  return moments;
}

std::tuple<Tensor, Tensor, Tensor> macenko_fit(const Tensor& images, double io, double alpha, double beta, bool nearest,
                                               double range) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const Pixel type = pixel_type(images);
  const DenseImages in = ernet::dense_images(images, "images");
  const FitTensors fits(in.count);
  const OdTable& table = od_table(io, beta);
  const MacenkoParameters p = {io, alpha, beta, nearest};
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    fits.set(i, ernet::cpu::macenko_fit(type, view_of(in, i, images.element_size(), range), p, table, strips));
  });
  return {fits.stain, fits.maximum, fits.status};
}

// The stains of `count` images: [1 or count, 3, 2] and [1 or count, 2].
struct StainsOfImages {
  Tensor stain_tensor, maximum_tensor;
  const double* stain;
  const double* maximum;
  bool shared;

  StainsOfImages(const Tensor& s, const Tensor& m, int64_t count, const char* name)
      : stain_tensor(s), maximum_tensor(m) {
    ernet::check_stains(s, m, count, name);
    STD_TORCH_CHECK(s.is_cpu() && m.is_cpu(), "ernet: ", name, " stains must be on the device of the images");
    stain = static_cast<const double*>(s.const_data_ptr());
    maximum = static_cast<const double*>(m.const_data_ptr());
    shared = s.size(0) == 1;
    for (int64_t i = 0; i < s.numel(); ++i) {
      STD_TORCH_CHECK(std::isfinite(stain[i]), "ernet: ", name, "_stain of image ", i / 6,
                      " is not finite. Images whose fit has a status need another source");
    }
    for (int64_t i = 0; i < m.numel(); ++i) {
      STD_TORCH_CHECK(std::isfinite(maximum[i]), "ernet: ", name, "_max of image ", i / 2,
                      " is not finite. Images whose fit has a status need another source");
    }
  }

  void get(int64_t index, ernet::macenko::Stain& s, double m[2]) const {
    const int64_t i = shared ? 0 : index;
    for (int k = 0; k < 3; ++k) {
      s.h[k] = stain[6 * i + 2 * k];
      s.e[k] = stain[6 * i + 2 * k + 1];
    }
    m[0] = maximum[2 * i];
    m[1] = maximum[2 * i + 1];
  }
};

Tensor macenko_reconstruct(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                           const Tensor& target_stain, const Tensor& target_max, double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Pixel type = pixel_type(images);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages sources(source_stain, source_max, in.count, "source");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  Tensor result = result_like(images, in);
  const DenseImages out = ernet::output_images(result, in);
  ernet::check_same_planes(in, out);
  const OdTable& table = od_table(io, 0.0);
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    ernet::macenko::Stain source, target;
    double source_maxima[2], target_maxima[2], matrix[3][3];
    sources.get(i, source, source_maxima);
    targets.get(i, target, target_maxima);
    ernet::macenko::reconstruction_matrix(source, source_maxima, target, target_maxima, matrix);
    ernet::cpu::macenko_reconstruct(type, view_of(in, i, images.element_size(), range), matrix, table, io, strips,
                                    output_of(out, i, images.element_size()));
  });
  return result;
}

ernet::cpu::NetworkType network_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ernet::cpu::NetworkType::f32;
    case ScalarType::BFloat16:
      return ernet::cpu::NetworkType::bf16;
    case ScalarType::Half:
      return ernet::cpu::NetworkType::f16;
    default:
      STD_TORCH_CHECK(false, "ernet: a network's input must be float32, bfloat16 or float16");
  }
  return ernet::cpu::NetworkType::f32;
}

// mean and std: [3] float64, contiguous, on the CPU.
ernet::cpu::NetworkInput network_input(const Tensor& mean, const Tensor& std, ScalarType dtype, double range) {
  ernet::cpu::NetworkInput out = {nullptr, network_type(dtype), range, {}, {}};
  for (const auto& [tensor, values, name] : {std::tuple{&mean, out.mean, "mean"}, std::tuple{&std, out.std, "std"}}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == 3 && tensor->is_contiguous() &&
                        tensor->scalar_type() == ScalarType::Double,
                    "ernet: ", name, " must be [3] float64 on the CPU; got ", ernet::shape_of(*tensor));
    std::memcpy(values, tensor->const_data_ptr(), 3 * sizeof(double));
  }
  for (double value : out.std) STD_TORCH_CHECK(value > 0, "ernet: std must be positive; got ", value);
  return out;
}

// A network's input [B, H, W, 3] and where each image of it goes.
struct ScaledImages {
  Tensor tensor;
  ernet::cpu::NetworkInput first;
  int64_t image_bytes;

  ScaledImages(const Tensor& images, const Tensor& mean, const Tensor& std, ScalarType dtype, double range)
      : first(network_input(mean, std, dtype, images.element_size() == 1 ? 255.0 : range)) {
    const int64_t element_size = dtype == ScalarType::Float ? 4 : 2;
    tensor = ernet::cpu_output({images.size(0), images.size(2), images.size(3), 3}, dtype, size_t(element_size));
    first.data = tensor.mutable_data_ptr();
    image_bytes = 3 * images.size(2) * images.size(3) * element_size;
  }

  ernet::cpu::NetworkInput image(int64_t index) const {
    ernet::cpu::NetworkInput out = first;
    out.data = static_cast<unsigned char*>(first.data) + index * image_bytes;
    return out;
  }
};

Tensor macenko_reconstruct_scaled(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                                  const Tensor& target_stain, const Tensor& target_max, const Tensor& mean,
                                  const Tensor& std, double io, ScalarType dtype, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  const Pixel type = pixel_type(images);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages sources(source_stain, source_max, in.count, "source");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  const ScaledImages result(images, mean, std, dtype, range);
  const OdTable& table = od_table(io, 0.0);
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    ernet::macenko::Stain source, target;
    double source_maxima[2], target_maxima[2], matrix[3][3];
    sources.get(i, source, source_maxima);
    targets.get(i, target, target_maxima);
    ernet::macenko::reconstruction_matrix(source, source_maxima, target, target_maxima, matrix);
    ernet::cpu::macenko_reconstruct_scaled(type, view_of(in, i, images.element_size(), range), matrix, table, io,
                                           strips, result.image(i));
  });
  return result.tensor;
}

void copy_image(const DenseImages& in, const DenseImages& out, int64_t index, size_t element_size) {
  const auto* from = static_cast<const unsigned char*>(in.data) + size_t(index * in.image_stride) * element_size;
  auto* to = static_cast<unsigned char*>(output_of(out, index, element_size));
  if (in.pixel_stride == 3) {
    std::memcpy(to, from, size_t(3 * in.pixels) * element_size);
    return;
  }
  for (int k = 0; k < 3; ++k) {
    std::memcpy(to + size_t(k * out.channel_stride) * element_size, from + size_t(k * in.channel_stride) * element_size,
                size_t(in.pixels) * element_size);
  }
}

// From an image's own stains, or, where it has no fit, from the target's, to the target's.
void matrix_of_fit(const MacenkoImageFit& fit, const StainsOfImages& targets, int64_t index, double matrix[3][3]) {
  ernet::macenko::Stain target;
  double target_maxima[2];
  targets.get(index, target, target_maxima);
  const bool ok = fit.status == ernet::macenko::kOk;
  ernet::macenko::reconstruction_matrix(ok ? fit.stain : target, ok ? fit.max_concentration : target_maxima, target,
                                        target_maxima, matrix);
}

// Fit and reconstruction of each image one after the other, while it is in the cache.
std::tuple<Tensor, Tensor, Tensor, Tensor> macenko_normalize(const Tensor& images, const Tensor& target_stain,
                                                             const Tensor& target_max, double io, double alpha,
                                                             double beta, bool nearest, bool identity, double range) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const Pixel type = pixel_type(images);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  Tensor result = result_like(images, in);
  const DenseImages out = ernet::output_images(result, in);
  ernet::check_same_planes(in, out);
  const FitTensors fits(in.count);
  const OdTable& table = od_table(io, beta);
  const MacenkoParameters p = {io, alpha, beta, nearest};
  const size_t element_size = images.element_size();
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    const ImageView view = view_of(in, i, element_size, range);
    const MacenkoImageFit fit = ernet::cpu::macenko_fit(type, view, p, table, strips);
    fits.set(i, fit);
    if (fit.status != ernet::macenko::kOk && identity) {
      copy_image(in, out, i, element_size);
      return;
    }
    double matrix[3][3];
    matrix_of_fit(fit, targets, i, matrix);
    ernet::cpu::macenko_reconstruct(type, view, matrix, table, io, strips, output_of(out, i, element_size));
  });
  return {result, fits.stain, fits.maximum, fits.status};
}

// The same into a network's input.
std::tuple<Tensor, Tensor, Tensor, Tensor> macenko_normalize_scaled(const Tensor& images, const Tensor& target_stain,
                                                                    const Tensor& target_max, const Tensor& mean,
                                                                    const Tensor& std, double io, double alpha,
                                                                    double beta, bool nearest, bool identity,
                                                                    ScalarType dtype, double range) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const Pixel type = pixel_type(images);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  const ScaledImages result(images, mean, std, dtype, range);
  const FitTensors fits(in.count);
  const OdTable& table = od_table(io, beta);
  const MacenkoParameters p = {io, alpha, beta, nearest};
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    const ImageView view = view_of(in, i, images.element_size(), range);
    const MacenkoImageFit fit = ernet::cpu::macenko_fit(type, view, p, table, strips);
    fits.set(i, fit);
    if (fit.status != ernet::macenko::kOk && identity) {
      ernet::cpu::macenko_scaled(type, view, strips, result.image(i));
      return;
    }
    double matrix[3][3];
    matrix_of_fit(fit, targets, i, matrix);
    ernet::cpu::macenko_reconstruct_scaled(type, view, matrix, table, io, strips, result.image(i));
  });
  return {result.tensor, fits.stain, fits.maximum, fits.status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def("macenko_moments(Tensor images, float Io, float beta, float range=255.) -> Tensor");
  m.def(
      "macenko_fit(Tensor images, float Io, float alpha, float beta, bool nearest, float range=255.) -> (Tensor "
      "stain_matrix, Tensor max_concentration, Tensor status)");
  m.def(
      "macenko_reconstruct(Tensor images, Tensor source_stain, Tensor source_max, Tensor target_stain, Tensor "
      "target_max, float Io, float range=255.) -> Tensor");
  m.def(
      "macenko_reconstruct_scaled(Tensor images, Tensor source_stain, Tensor source_max, Tensor target_stain, Tensor "
      "target_max, Tensor mean, Tensor std, float Io, ScalarType dtype, float range=255.) -> Tensor");
  m.def(
      "macenko_normalize(Tensor images, Tensor target_stain, Tensor target_max, float Io, float alpha, float beta, "
      "bool "
      "nearest, bool identity, float range=255.) -> (Tensor images, Tensor stain_matrix, Tensor max_concentration, "
      "Tensor status)");
  m.def(
      "macenko_normalize_scaled(Tensor images, Tensor target_stain, Tensor target_max, Tensor mean, Tensor std, float "
      "Io, float alpha, float beta, bool nearest, bool identity, ScalarType dtype, float range=255.) -> (Tensor "
      "images, Tensor stain_matrix, Tensor max_concentration, Tensor status)");
  // On CUDA only: augmentation, with stains that are known and with stains that are estimated, and separation.
  m.def(
      "macenko_change(Tensor images, Tensor source_stain, Tensor source_max, Tensor gain, Tensor shift, float Io, "
      "float range=255.) -> Tensor");
  m.def(
      "macenko_separate(Tensor images, Tensor source_stain, Tensor source_max, Tensor drawn_stain, Tensor drawn_max, "
      "bool scaled, float Io, float range=255.) -> (Tensor haematoxylin, Tensor eosin, Tensor concentrations)");
  m.def(
      "macenko_augment(Tensor images, Tensor reference_stain, Tensor reference_max, Tensor gain, Tensor shift, float "
      "Io, float alpha, float beta, bool nearest, bool identity, float range=255.) -> (Tensor images, Tensor "
      "stain_matrix, Tensor max_concentration, Tensor status)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("macenko_moments", TORCH_BOX(&macenko_moments));
  m.impl("macenko_fit", TORCH_BOX(&macenko_fit));
  m.impl("macenko_reconstruct", TORCH_BOX(&macenko_reconstruct));
  m.impl("macenko_reconstruct_scaled", TORCH_BOX(&macenko_reconstruct_scaled));
  m.impl("macenko_normalize", TORCH_BOX(&macenko_normalize));
  m.impl("macenko_normalize_scaled", TORCH_BOX(&macenko_normalize_scaled));
}
