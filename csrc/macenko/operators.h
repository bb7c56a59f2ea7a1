// The Macenko operators, the same on every device: checks of their arguments, and the calls of `Images`, what a device
// makes of the tensor of images.
#pragma once

#include "macenko/checks.h"

namespace ernet {

struct FitTensors {
  torch::stable::Tensor stain, maximum, status;

  macenko::FitResult pointers() const {
    return {static_cast<double*>(stain.mutable_data_ptr()), static_cast<double*>(maximum.mutable_data_ptr()),
            static_cast<int32_t*>(status.mutable_data_ptr())};
  }
};

template <class Images> struct MacenkoOperators {
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;
  using OptionalTensor = std::optional<Tensor>;
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Three fit(const Tensor& images, double io, double alpha, double beta, bool nearest, double range) {
    check_fit_parameters(io, alpha, beta, range);
    const Images in(images, range);
    const FitTensors fits = in.new_fits();
    in.fit({io, alpha, beta, nearest}, fits);
    return {fits.stain, fits.maximum, fits.status};
  }

  static Tensor reconstruct(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                            const Tensor& target_stain, const Tensor& target_max, double io, double range,
                            std::optional<ScalarType> dtype, OptionalTensor mean, OptionalTensor std) {
    check_fit_parameters(io, 1.0, 0.0, range);
    const Images in(images, range);
    const macenko::Stains source = checked_stains(source_stain, source_max, images, "source");
    const macenko::Stains target = checked_stains(target_stain, target_max, images, "target");
    const auto scale = network_scale(images, dtype, mean, std, range);
    return in.reconstruct({source, nullptr, target, false, nullptr, nullptr}, io, scale);
  }

  static Three reconstruct_stains(const Tensor& images, const Tensor& source_stain, const Tensor& source_max,
                                  const Tensor& target_stain, const Tensor& target_max, double io, double range) {
    check_fit_parameters(io, 1.0, 0.0, range);
    const Images in(images, range);
    const macenko::Stains source = checked_stains(source_stain, source_max, images, "source");
    return in.reconstruct_stains(source, checked_stains(target_stain, target_max, images, "target"), io);
  }

  static Four normalize(const Tensor& images, const Tensor& target_stain, const Tensor& target_max, double io,
                        double alpha, double beta, bool nearest, bool identity, double range,
                        std::optional<ScalarType> dtype, OptionalTensor mean, OptionalTensor std) {
    check_fit_parameters(io, alpha, beta, range);
    const Images in(images, range);
    const macenko::Stains target = checked_stains(target_stain, target_max, images, "target");
    const auto scale = network_scale(images, dtype, mean, std, range);
    return fit_and_reconstruct(in, {{}, nullptr, target, identity, nullptr, nullptr}, {io, alpha, beta, nearest},
                               scale);
  }

  static Tensor change(const Tensor& images, const Tensor& source_stain, const Tensor& source_max, const Tensor& gain,
                       const Tensor& shift, double io, double range) {
    check_fit_parameters(io, 1.0, 0.0, range);
    const Images in(images, range);
    const macenko::Stains source = checked_stains(source_stain, source_max, images, "source");
    const double* gains = checked_change(gain, images, "gain");
    return in.reconstruct({source, nullptr, source, false, gains, checked_change(shift, images, "shift")}, io, {});
  }

  static Four augment(const Tensor& images, const Tensor& reference_stain, const Tensor& reference_max,
                      const Tensor& gain, const Tensor& shift, double io, double alpha, double beta, bool nearest,
                      bool identity, double range) {
    check_fit_parameters(io, alpha, beta, range);
    const Images in(images, range);
    const macenko::Stains reference = checked_stains(reference_stain, reference_max, images, "reference");
    const double* gains = checked_change(gain, images, "gain");
    const double* shifts = checked_change(shift, images, "shift");
    return fit_and_reconstruct(in, {{}, nullptr, reference, identity, gains, shifts}, {io, alpha, beta, nearest}, {});
  }

  static Four fit_and_reconstruct(const Images& in, const macenko::Recipe& recipe, const macenko::Parameters& p,
                                  const std::optional<NetworkScale>& scale) {
    const FitTensors fits = in.new_fits();
    const Tensor result = in.fit_and_reconstruct(recipe, p, scale, fits);
    return {result, fits.stain, fits.maximum, fits.status};
  }

  template <class Library> static void register_in(Library& m) {
    m.impl("macenko_fit", TORCH_BOX(&fit));
    m.impl("macenko_reconstruct", TORCH_BOX(&reconstruct));
    m.impl("macenko_reconstruct_stains", TORCH_BOX(&reconstruct_stains));
    m.impl("macenko_normalize", TORCH_BOX(&normalize));
    m.impl("macenko_change", TORCH_BOX(&change));
    m.impl("macenko_augment", TORCH_BOX(&augment));
  }
};

}  // namespace ernet
