// The Macenko operators: schemas, argument checks and the CPU implementation. Autograd and fake kernels are in
// ernet_fast/stain/operators.py; the CUDA implementations are registered in macenko/cuda/ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "macenko/checks.h"
#include "macenko/cpu/image.h"
#include "memory/outputs.h"

namespace {

using ernet::DenseImages;
using ernet::cpu::ImageView;
using ernet::cpu::MacenkoImageFit;
using ernet::cpu::MacenkoParameters;
using ernet::cpu::Pixel;
using ernet::cpu::Reconstruction;
using ernet::cpu::Strips;
using ernet::macenko::OdTable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// From this size on an image is shared by all threads; smaller ones are taken whole.
constexpr int64_t kSharedImagePixels = 1 << 18;

Pixel pixel_type(const Tensor& images) {
  const ScalarType type = images.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Float || type == ScalarType::Double,
                  "ernet: images must be uint8, float32 or float64 on the CPU");
  return type == ScalarType::Byte ? Pixel::u8 : type == ScalarType::Float ? Pixel::f32 : Pixel::f64;
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
  const double* stain;
  const double* maximum;
  bool shared;

  StainsOfImages(const Tensor& s, const Tensor& m, int64_t count, const char* name) {
    ernet::check_stains(s, m, count, name);
    STD_TORCH_CHECK(s.is_cpu() && m.is_cpu(), "ernet: ", name, " stains must be on the device of the images");
    stain = finite(s, 6, name, "_stain");
    maximum = finite(m, 2, name, "_max");
    shared = s.size(0) == 1;
  }

  MacenkoImageFit get(int64_t index) const {
    const int64_t i = shared ? 0 : index;
    const double* s = stain + 6 * i;
    return {{{s[0], s[2], s[4]}, {s[1], s[3], s[5]}}, {maximum[2 * i], maximum[2 * i + 1]}, ernet::macenko::kOk};
  }

  static const double* finite(const Tensor& t, int64_t numbers, const char* name, const char* part) {
    const auto* values = static_cast<const double*>(t.const_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) {
      STD_TORCH_CHECK(std::isfinite(values[i]), "ernet: ", name, part, " of image ", i / numbers,
                      " is not finite. Images whose fit has a status need another source");
    }
    return values;
  }
};

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

ernet::cpu::NetworkType network_type(ScalarType dtype) {
  using ernet::cpu::NetworkType;
  if (dtype == ScalarType::Float) return NetworkType::f32;
  return dtype == ScalarType::BFloat16 ? NetworkType::bf16 : NetworkType::f16;
}

// Where the results of a call go: to images laid out as the input, or to a network's input [B, H, W, 3].
class Results {
 public:
  Results(const Tensor& images, const DenseImages& in, double range, const std::optional<ernet::NetworkScale>& scale)
      : tensor(scale ? network_tensor(images, scale->dtype) : result_like(images, in)),
        in_(in),
        type_(pixel_type(images)),
        element_size_(images.element_size()),
        range_(range),
        network_(scale.has_value()) {
    if (!scale) {
      out_ = ernet::output_images(tensor, in);
      ernet::check_same_planes(in, out_);
      return;
    }
    first_ = {tensor.mutable_data_ptr(), network_type(scale->dtype), scale->range, {}, {}};
    std::memcpy(first_.mean, scale->mean, sizeof first_.mean);
    std::memcpy(first_.std, scale->std, sizeof first_.std);
    image_bytes_ = 3 * in.pixels * (scale->dtype == ScalarType::Float ? 4 : 2);
  }

  ImageView view(int64_t index) const { return view_of(in_, index, element_size_, range_); }
  Pixel type() const { return type_; }

  // Image `index` with other stains, whose exponents are increased by `shift`.
  Reconstruction reconstruction(int64_t index, const MacenkoImageFit& from, const MacenkoImageFit& to,
                                const double shift[3], const OdTable& table, double io) const {
    double matrix[3][3];
    ernet::macenko::reconstruction_matrix(from.stain, from.max_concentration, to.stain, to.max_concentration, matrix);
    Reconstruction r = ernet::cpu::make_reconstruction(type_, matrix, shift, table, io);
    if (!network_) r.out = output_of(out_, index, element_size_);
    return r;
  }

  void reconstruct(int64_t index, const MacenkoImageFit& from, const MacenkoImageFit& to, const double shift[3],
                   const OdTable& table, double io, const Strips& strips) const {
    const Reconstruction r = reconstruction(index, from, to, shift, table, io);
    if (network_) {
      ernet::cpu::macenko_scaled(type_, view(index), &r, strips, network_input(index));
    } else {
      ernet::cpu::macenko_reconstruct(type_, view(index), &r, 1, strips);
    }
  }

  // Image `index` as it is.
  void keep(int64_t index, const Strips& strips) const {
    if (network_) {
      ernet::cpu::macenko_scaled(type_, view(index), nullptr, strips, network_input(index));
    } else {
      copy_image(in_, out_, index, element_size_);
    }
  }

  Tensor tensor;

 private:
  static Tensor network_tensor(const Tensor& images, ScalarType dtype) {
    const size_t element_size = dtype == ScalarType::Float ? 4 : 2;
    return ernet::cpu_output({images.size(0), images.size(2), images.size(3), 3}, dtype, element_size);
  }

  ernet::cpu::NetworkInput network_input(int64_t index) const {
    ernet::cpu::NetworkInput out = first_;
    out.data = static_cast<unsigned char*>(first_.data) + index * image_bytes_;
    return out;
  }

  DenseImages in_;
  DenseImages out_ = {};
  ernet::cpu::NetworkInput first_ = {};
  int64_t image_bytes_ = 0;
  Pixel type_;
  size_t element_size_;
  double range_;
  bool network_;
};

constexpr double kNoShift[3] = {0, 0, 0};

// How stains are replaced: those of `source`, or if it is null those that a fit estimates, by the stains of `target`;
// with `gain` and `shift`, [count][2], the stains of an image stay, and its concentrations C become gain C + shift.
// Images without a fit are taken to have the stains of `target`, or stay as they are under `identity`.
struct Recipe {
  const StainsOfImages* source;
  const StainsOfImages& target;
  bool identity = false;
  const double* gain = nullptr;
  const double* shift = nullptr;
};

// Fit, unless stains are known, and result of each image one after the other, while it is in the cache.
Tensor replace_stains(const Tensor& images, const DenseImages& in, const Recipe& recipe, const MacenkoParameters& p,
                      double range, const std::optional<ernet::NetworkScale>& scale, const FitTensors* fits) {
  const Results results(images, in, range, scale);
  const OdTable& table = od_table(p.io, p.beta);
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    MacenkoImageFit own;
    if (recipe.source != nullptr) {
      own = recipe.source->get(i);
    } else {
      own = ernet::cpu::macenko_fit(results.type(), results.view(i), p, table, strips);
      fits->set(i, own);
      if (own.status != ernet::macenko::kOk) {
        if (recipe.identity) return results.keep(i, strips);
        own = recipe.target.get(i);
      }
    }
    if (recipe.gain == nullptr) {
      return results.reconstruct(i, own, recipe.target.get(i), kNoShift, table, p.io, strips);
    }
    const double *gain = recipe.gain + 2 * i, *shift = recipe.shift + 2 * i;
    MacenkoImageFit changed = own;
    for (int t = 0; t < 2; ++t) changed.max_concentration[t] *= gain[t];
    double tint[3];
    for (int c = 0; c < 3; ++c) tint[c] = -(own.stain.h[c] * shift[0] + own.stain.e[c] * shift[1]);
    results.reconstruct(i, own, changed, tint, table, p.io, strips);
  });
  return results.tensor;
}

// Of a reconstruction with known stains.
MacenkoParameters without_fit(double io, double range) {
  ernet::check_fit_parameters(io, 1.0, 0.0, range);
  return {io, 1.0, 0.0, false};
}

Tensor macenko_reconstruct(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                           const Tensor& target_stain, const Tensor& target_max, double io, double range,
                           std::optional<ScalarType> dtype, std::optional<Tensor> mean, std::optional<Tensor> std) {
  const MacenkoParameters p = without_fit(io, range);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages sources(source_stain, source_max, in.count, "source");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  const auto scale = ernet::network_scale(images, dtype, mean, std, range);
  return replace_stains(images, in, {&sources, targets}, p, range, scale, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> macenko_reconstruct_stains(const Tensor& images, const Tensor& source_stain,
                                                              const Tensor& source_max, const Tensor& target_stain,
                                                              const Tensor& target_max, double io, double range) {
  const MacenkoParameters p = without_fit(io, range);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages sources(source_stain, source_max, in.count, "source");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  const Results both(images, in, range, std::nullopt);
  const Results haematoxylin(images, in, range, std::nullopt);
  const Results eosin(images, in, range, std::nullopt);
  const OdTable& table = od_table(io, p.beta);
  for_each_image(in, [&](int64_t i, const Strips& strips) {
    const MacenkoImageFit source = sources.get(i), target = targets.get(i);
    MacenkoImageFit h = target, e = target;
    h.max_concentration[1] = e.max_concentration[0] = 0;
    const Reconstruction results[] = {both.reconstruction(i, source, target, kNoShift, table, io),
                                      haematoxylin.reconstruction(i, source, h, kNoShift, table, io),
                                      eosin.reconstruction(i, source, e, kNoShift, table, io)};
    ernet::cpu::macenko_reconstruct(both.type(), both.view(i), results, 3, strips);
  });
  return {both.tensor, haematoxylin.tensor, eosin.tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> macenko_normalize(const Tensor& images, const Tensor& target_stain,
                                                             const Tensor& target_max, double io, double alpha,
                                                             double beta, bool nearest, bool identity, double range,
                                                             std::optional<ScalarType> dtype,
                                                             std::optional<Tensor> mean, std::optional<Tensor> std) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages targets(target_stain, target_max, in.count, "target");
  const auto scale = ernet::network_scale(images, dtype, mean, std, range);
  const FitTensors fits(in.count);
  const Tensor result =
      replace_stains(images, in, {nullptr, targets, identity}, {io, alpha, beta, nearest}, range, scale, &fits);
  return {result, fits.stain, fits.maximum, fits.status};
}

// Gain or shift of the two stains of every image, [B, 2] float64.
const double* change_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == count && t.size(1) == 2 && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Double,
                  "ernet: ", name, " must be [", count, ", 2] float64, contiguous, on the device of the images; got ",
                  ernet::shape_of(t));
  return static_cast<const double*>(t.const_data_ptr());
}

Tensor macenko_change(const Tensor& images, const Tensor& source_stain, const Tensor& source_max, const Tensor& gain,
                      const Tensor& shift, double io, double range) {
  const MacenkoParameters p = without_fit(io, range);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages sources(source_stain, source_max, in.count, "source");
  const Recipe recipe = {&sources, sources, false, change_of(gain, in.count, "gain"),
                         change_of(shift, in.count, "shift")};
  return replace_stains(images, in, recipe, p, range, std::nullopt, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> macenko_augment(const Tensor& images, const Tensor& reference_stain,
                                                           const Tensor& reference_max, const Tensor& gain,
                                                           const Tensor& shift, double io, double alpha, double beta,
                                                           bool nearest, bool identity, double range) {
  ernet::check_fit_parameters(io, alpha, beta, range);
  const DenseImages in = ernet::dense_images(images, "images");
  const StainsOfImages reference(reference_stain, reference_max, in.count, "reference");
  const Recipe recipe = {nullptr, reference, identity, change_of(gain, in.count, "gain"),
                         change_of(shift, in.count, "shift")};
  const FitTensors fits(in.count);
  const Tensor result = replace_stains(images, in, recipe, {io, alpha, beta, nearest}, range, std::nullopt, &fits);
  return {result, fits.stain, fits.maximum, fits.status};
}

int64_t* counts_of(const Tensor& counts) {
  STD_TORCH_CHECK(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() &&
                      counts.dim() == 1 && counts.size(0) == ernet::cpu::kColours,
                  "ernet: counts must be [16777216] int64 on the CPU; got ", ernet::shape_of(counts));
  return static_cast<int64_t*>(counts.mutable_data_ptr());
}

void macenko_count_colours(const Tensor& images, const Tensor& counts) {
  STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte, "ernet: images must be uint8");
  const DenseImages in = ernet::dense_images(images, "images");
  int64_t* table = counts_of(counts);
  for (int64_t i = 0; i < in.count; ++i) {
    const auto* image = static_cast<const unsigned char*>(in.data) + i * in.image_stride;
    ernet::cpu::macenko_count_colours({image, in.pixel_stride, in.channel_stride, in.pixels, 1.0}, table);
  }
}

std::tuple<Tensor, Tensor, Tensor> macenko_fit_colours(const Tensor& counts, double io, double alpha, double beta,
                                                       bool nearest) {
  ernet::check_fit_parameters(io, alpha, beta, 255.0);
  const FitTensors fits(1);
  fits.set(0, ernet::cpu::macenko_fit_colours(counts_of(counts), {io, alpha, beta, nearest}, od_table(io, beta)));
  return {fits.stain, fits.maximum, fits.status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def(
      "macenko_fit(Tensor images, float Io, float alpha, float beta, bool nearest, float range=255.) -> (Tensor "
      "stain_matrix, Tensor max_concentration, Tensor status)");
  // With a dtype the result is a network's input [B, H, W, 3] of (I' / range - mean) / std.
  m.def(
      "macenko_reconstruct(Tensor images, Tensor source_stain, Tensor source_max, Tensor target_stain, Tensor "
      "target_max, float Io, float range=255., *, ScalarType? dtype=None, Tensor? mean=None, Tensor? std=None) -> "
      "Tensor");
  m.def(
      "macenko_normalize(Tensor images, Tensor target_stain, Tensor target_max, float Io, float alpha, float beta, "
      "bool nearest, bool identity, float range=255., *, ScalarType? dtype=None, Tensor? mean=None, Tensor? std=None) "
      "-> (Tensor images, Tensor stain_matrix, Tensor max_concentration, Tensor status)");
  // With both stains of the target, and with either alone: one pass over the images.
  m.def(
      "macenko_reconstruct_stains(Tensor images, Tensor source_stain, Tensor source_max, Tensor target_stain, Tensor "
      "target_max, float Io, float range=255.) -> (Tensor images, Tensor haematoxylin, Tensor eosin)");
  // Augmentation, with stains that are known and with stains that are estimated.
  m.def(
      "macenko_change(Tensor images, Tensor source_stain, Tensor source_max, Tensor gain, Tensor shift, float Io, "
      "float range=255.) -> Tensor");
  m.def(
      "macenko_augment(Tensor images, Tensor reference_stain, Tensor reference_max, Tensor gain, Tensor shift, float "
      "Io, float alpha, float beta, bool nearest, bool identity, float range=255.) -> (Tensor images, Tensor "
      "stain_matrix, Tensor max_concentration, Tensor status)");
  // On CUDA only.
  m.def(
      "macenko_separate(Tensor images, Tensor source_stain, Tensor source_max, Tensor drawn_stain, Tensor drawn_max, "
      "bool scaled, float Io, float range=255.) -> (Tensor haematoxylin, Tensor eosin, Tensor concentrations)");
  // How often each 8-bit colour occurs in a slide, [2^24].
  m.def("macenko_count_colours(Tensor images, Tensor(a!) counts) -> ()");
  m.def(
      "macenko_fit_colours(Tensor counts, float Io, float alpha, float beta, bool nearest) -> (Tensor stain_matrix, "
      "Tensor max_concentration, Tensor status)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("macenko_fit", TORCH_BOX(&macenko_fit));
  m.impl("macenko_reconstruct", TORCH_BOX(&macenko_reconstruct));
  m.impl("macenko_reconstruct_stains", TORCH_BOX(&macenko_reconstruct_stains));
  m.impl("macenko_normalize", TORCH_BOX(&macenko_normalize));
  m.impl("macenko_change", TORCH_BOX(&macenko_change));
  m.impl("macenko_augment", TORCH_BOX(&macenko_augment));
  m.impl("macenko_count_colours", TORCH_BOX(&macenko_count_colours));
  m.impl("macenko_fit_colours", TORCH_BOX(&macenko_fit_colours));
}
