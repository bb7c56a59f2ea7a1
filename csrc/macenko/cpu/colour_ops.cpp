// Operators on how often each 8-bit colour occurs in a slide: schemas, argument checks and the CPU implementation.
// Fake kernels are in ernet_fast/stain/colour_counts.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "macenko/checks.h"
#include "macenko/cpu/colour_counts.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t* counts_of(const Tensor& counts) {
  STD_TORCH_CHECK(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() &&
                      counts.dim() == 1 && counts.size(0) == ernet::cpu::kColours,
                  "ernet: counts must be [16777216] int64 on the CPU; got ", ernet::shape_of(counts));
  return static_cast<int64_t*>(counts.mutable_data_ptr());
}

void macenko_count_colours(const Tensor& images, const Tensor& counts) {
  STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte, "ernet: images must be uint8");
  const ernet::DenseImages in = ernet::dense_images(images, "images");
  int64_t* table = counts_of(counts);
  for (int64_t i = 0; i < in.count; ++i) {
    const auto* image = static_cast<const unsigned char*>(in.data) + i * in.image_stride;
    ernet::cpu::macenko_count_colours({image, in.pixel_stride, in.channel_stride, in.pixels, 1.0}, table);
  }
}

std::tuple<Tensor, Tensor, Tensor> macenko_fit_colours(const Tensor& counts, double io, double alpha, double beta,
                                                       bool nearest) {
  ernet::check_fit_parameters(io, alpha, beta, 255.0);
  const int64_t* table = counts_of(counts);
  Tensor stain = torch::stable::new_empty(counts, {1, 3, 2}, ScalarType::Double);
  Tensor maximum = torch::stable::new_empty(counts, {1, 2}, ScalarType::Double);
  Tensor status = torch::stable::new_empty(counts, {1}, ScalarType::Int);
  const ernet::cpu::MacenkoImageFit fit =
      ernet::cpu::macenko_fit_colours(table, {io, alpha, beta, nearest}, ernet::macenko::make_od_table(io, beta));
  auto* columns = static_cast<double*>(stain.mutable_data_ptr());
  for (int k = 0; k < 3; ++k) {
    columns[2 * k] = fit.stain.h[k];
    columns[2 * k + 1] = fit.stain.e[k];
  }
  auto* maxima = static_cast<double*>(maximum.mutable_data_ptr());
  maxima[0] = fit.max_concentration[0];
  maxima[1] = fit.max_concentration[1];
  *static_cast<int32_t*>(status.mutable_data_ptr()) = fit.status;
  return {stain, maximum, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def("macenko_count_colours(Tensor images, Tensor(a!) counts) -> ()");
  m.def(
      "macenko_fit_colours(Tensor counts, float Io, float alpha, float beta, bool nearest) -> (Tensor stain_matrix, "
      "Tensor max_concentration, Tensor status)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("macenko_count_colours", TORCH_BOX(&macenko_count_colours));
  m.impl("macenko_fit_colours", TORCH_BOX(&macenko_fit_colours));
}
