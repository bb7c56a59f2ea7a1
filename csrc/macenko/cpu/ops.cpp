// The schemas of the Macenko operators, and the operators on the CPU. Autograd and fake kernels are in
// ernet_fast/stain/operators.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "macenko/cpu/image.h"
#include "macenko/cpu/levels.h"
#include "macenko/operators.h"
#include "memory/outputs.h"

namespace {

using ernet::DenseImages;
using ernet::FitTensors;
using ernet::NetworkScale;
using ernet::cpu::ImageView;
using ernet::cpu::MacenkoImageFit;
using ernet::cpu::Pixel;
using ernet::cpu::Reconstruction;
using ernet::cpu::Strips;
using ernet::cpu::WholeLevels;
using ernet::macenko::OdTable;
using ernet::macenko::Parameters;
using ernet::macenko::Recipe;
using ernet::macenko::Replacement;
using ernet::macenko::Stains;
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
template <class F> void for_each_image(const DenseImages& images, const F& body) {
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

ernet::cpu::NetworkType network_type(ScalarType dtype) {
  using ernet::cpu::NetworkType;
  if (dtype == ScalarType::Float) return NetworkType::f32;
  return dtype == ScalarType::BFloat16 ? NetworkType::bf16 : NetworkType::f16;
}

FitTensors new_fits(int64_t count) {
  return {ernet::cpu_output({count, 3, 2}, ScalarType::Double, 8), ernet::cpu_output({count, 2}, ScalarType::Double, 8),
          ernet::cpu_output({count}, ScalarType::Int, 4)};
}

void write_fit(const FitTensors& fits, int64_t index, const MacenkoImageFit& fit) {
  ernet::macenko::write_fit(fits.pointers(), index, fit.stain, fit.max_concentration, fit.status);
}

// Fits and reconstructs each image one after the other, while it is in the cache.
class CpuImages {
 public:
  CpuImages(const Tensor& images, double range)
      : type_(pixel_type(images)),
        in_(ernet::dense_images(images, "images")),
        images_(images),
        element_size_(images.element_size()),
        level_scale_(element_size_ == 1 ? 1.0 : 255.0 / range) {}

  FitTensors new_fits() const { return ::new_fits(in_.count); }

  void fit(const Parameters& p, const FitTensors& fits) const {
    const OdTable& table = od_table(p.io, p.beta);
    for_each([&](int64_t i, const ImageView& image, const Strips& strips) {
      write_fit(fits, i, ernet::cpu::macenko_fit(type_, image, p, table, strips));
    });
  }

  Tensor reconstruct(const Recipe& recipe, double io, const std::optional<NetworkScale>& scale) const {
    const Results results(*this, scale);
    const OdTable& table = od_table(io, 0.0);
    for_each([&](int64_t i, const ImageView& image, const Strips& strips) {
      MacenkoImageFit own;
      ernet::macenko::read_stain(recipe.source, i, own.stain, own.max_concentration);
      results.reconstruct(i, image, recipe, true, own, table, io, strips);
    });
    return results.tensor;
  }

  Tensor fit_and_reconstruct(const Recipe& recipe, const Parameters& p, const std::optional<NetworkScale>& scale,
                             const FitTensors& fits) const {
    const Results results(*this, scale);
    const OdTable& table = od_table(p.io, p.beta);
    for_each([&](int64_t i, const ImageView& image, const Strips& strips) {
      const MacenkoImageFit own = ernet::cpu::macenko_fit(type_, image, p, table, strips);
      write_fit(fits, i, own);
      const bool fitted = own.status == ernet::macenko::kOk;
      if (!fitted && recipe.identity) return results.write(i, image, nullptr, strips);
      results.reconstruct(i, image, recipe, fitted, own, table, p.io, strips);
    });
    return results.tensor;
  }

  std::tuple<Tensor, Tensor, Tensor> reconstruct_stains(const Stains& source, const Stains& target, double io) const {
    const Results both(*this, {}), haematoxylin(*this, {}), eosin(*this, {});
    const OdTable& table = od_table(io, 0.0);
    for_each([&](int64_t i, const ImageView& image, const Strips& strips) {
      Replacement r = {};
      ernet::macenko::read_stain(source, i, r.from, r.from_max);
      ernet::macenko::read_stain(target, i, r.to, r.to_max);
      Replacement h = r, e = r;
      h.to_max[1] = e.to_max[0] = 0;
      const Reconstruction results[] = {both.reconstruction(i, r, table, io),
                                        haematoxylin.reconstruction(i, h, table, io),
                                        eosin.reconstruction(i, e, table, io)};
      ernet::cpu::macenko_reconstruct(type_, image, results, 3, strips);
    });
    return {both.tensor, haematoxylin.tensor, eosin.tensor};
  }

 private:
  // Where the results of a call go: to images laid out as the input, or to a network's input [B, H, W, 3].
  class Results {
   public:
    Results(const CpuImages& images, const std::optional<NetworkScale>& scale)
        : tensor(scale ? network_tensor(images.images_, scale->dtype) : result_like(images.images_, images.in_)),
          images_(images),
          network_(scale.has_value()) {
      if (!scale) {
        out_ = ernet::output_images(tensor, images.in_);
        ernet::check_same_planes(images.in_, out_);
        return;
      }
      first_ = {tensor.mutable_data_ptr(), network_type(scale->dtype), scale->range, {}, {}};
      std::memcpy(first_.mean, scale->mean, sizeof first_.mean);
      std::memcpy(first_.std, scale->std, sizeof first_.std);
    }

    Reconstruction reconstruction(int64_t index, const Replacement& replacement, const OdTable& table,
                                  double io) const {
      double matrix[3][3], shift[3];
      ernet::macenko::reconstruction_of(replacement, matrix, shift);
      Reconstruction r = ernet::cpu::make_reconstruction(matrix, shift, table, io);
      if (!network_) r.out = images_.at(out_, index);
      return r;
    }

    void reconstruct(int64_t index, const ImageView& image, const Recipe& recipe, bool fitted,
                     const MacenkoImageFit& own, const OdTable& table, double io, const Strips& strips) const {
      const Replacement replacement =
          ernet::macenko::replacement_of(recipe, index, fitted, own.stain, own.max_concentration);
      const Reconstruction r = reconstruction(index, replacement, table, io);
      write(index, image, &r, strips);
    }

    // Image `index`, without `r` as it is.
    void write(int64_t index, const ImageView& view, const Reconstruction* r, const Strips& strips) const {
      if (network_) {
        ernet::cpu::NetworkInput out = first_;
        out.data = static_cast<unsigned char*>(first_.data) + index * 3 * view.pixels * int64_t(tensor.element_size());
        ernet::cpu::macenko_scaled(images_.type_, view, r, strips, out);
      } else if (r != nullptr) {
        ernet::cpu::macenko_reconstruct(images_.type_, view, r, 1, strips);
      } else {
        copy(view, static_cast<unsigned char*>(images_.at(out_, index)));
      }
    }

    Tensor tensor;

   private:
    static Tensor network_tensor(const Tensor& images, ScalarType dtype) {
      const size_t element_size = dtype == ScalarType::Float ? 4 : 2;
      return ernet::cpu_output({images.size(0), images.size(2), images.size(3), 3}, dtype, element_size);
    }

    void copy(const ImageView& view, unsigned char* to) const {
      const auto* from = static_cast<const unsigned char*>(view.data);
      const size_t size = images_.element_size_, plane = size_t(view.pixels) * size;
      if (view.pixel_stride == 3) {
        std::memcpy(to, from, 3 * plane);
        return;
      }
      for (int k = 0; k < 3; ++k) {
        std::memcpy(to + size_t(k * out_.channel_stride) * size, from + size_t(k * view.channel_stride) * size, plane);
      }
    }

    const CpuImages& images_;
    DenseImages out_ = {};
    ernet::cpu::NetworkInput first_ = {};
    bool network_;
  };

  // Calls body(index, image, strips) for every image.
  template <class F> void for_each(const F& body) const {
    for_each_image(in_, [&](int64_t i, const Strips& strips) {
      ImageView image = view(i);
      const WholeLevels levels(type_, image, strips);
      body(i, image, strips);
    });
  }

  void* at(const DenseImages& images, int64_t index) const {
    return static_cast<unsigned char*>(images.data) + size_t(index * images.image_stride) * element_size_;
  }

  ImageView view(int64_t index) const {
    return {at(in_, index), in_.pixel_stride, in_.channel_stride, in_.pixels, level_scale_};
  }

  Pixel type_;
  DenseImages in_;
  const Tensor& images_;
  size_t element_size_;
  double level_scale_;
};

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
  const FitTensors fits = new_fits(1);
  write_fit(fits, 0,
            ernet::cpu::macenko_fit_colours(counts_of(counts), {io, alpha, beta, nearest}, od_table(io, beta)));
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
  ernet::MacenkoOperators<CpuImages>::register_in(m);
  m.impl("macenko_count_colours", TORCH_BOX(&macenko_count_colours));
  m.impl("macenko_fit_colours", TORCH_BOX(&macenko_fit_colours));
}
