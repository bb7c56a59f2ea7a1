// The algebra on per-channel vectors as two operators, one for each way: schemas, argument checks, the CPU
// implementation. Fake kernels are in ernet_fast/er/epilogue_composed.py; the GPU implementation is Triton, in
// ernet_fast/er/triton/.
#include <optional>
#include <tuple>
#include <vector>

#include "er/map_algebra.h"

namespace ernet {
namespace {

struct ForwardParameters {
  StackArguments& in;
  Tensor table = in.tensor();
  int64_t index = in.integer();
  bool doubles = in.boolean();
  OptionalTensor mean = in.optional_tensor();
  OptionalTensor var = in.optional_tensor();
  OptionalTensor count = in.optional_tensor();
  int64_t elements = in.integer();
  EpilogueParameters epilogue{in};
};

template <typename A> std::tuple<Tensor, Tensor> forward(const ForwardParameters& k) {
  const int64_t channels = k.table.dim() == 3 ? k.table.size(2) : 0;
  STD_TORCH_CHECK(k.mean.has_value() == k.var.has_value(), "ernet: mean and var go together");
  Vectors<A> vectors;
  const A* const mean = vectors.read(k.mean, "mean", {channels});
  const A* const var = vectors.read(k.var, "var", {channels});
  BlockCoefficients<A> args =
      forward_arguments<A>(vectors, k.table, k.index, k.epilogue, {mean, var}, value_count(k.count, k.elements));
  const ScalarType type = vector_type(k.doubles);
  const bool block = k.epilogue.weight.has_value();
  Tensor a = torch::stable::new_empty(k.table, {block ? k.index + 1 : 0, channels}, type);
  Tensor b = torch::stable::new_empty(k.table, {block ? channels : 0}, type);
  args.a = block ? data_of<A>(a) : nullptr;
  args.b = data_of<A>(b);
  over_channels(channels, k.index + 1, [&](int64_t begin, int64_t end) { vector_loops<A>().block(args, begin, end); });
  vectors.write_back();
  return {a, b};
}

std::tuple<Tensor, Tensor> block_coefficients(const ForwardParameters& k) {
  return k.doubles ? forward<double>(k) : forward<float>(k);
}

struct BackwardParameters {
  StackArguments& in;
  Tensor table = in.tensor();
  int64_t index = in.integer();
  OptionalTensor sums = in.optional_tensor();
  OptionalTensor a = in.optional_tensor();
  LaterVectors later{in};
  OptionalTensor count = in.optional_tensor();
  int64_t elements = in.integer();
  int64_t norm = in.integer();
  double eps = in.number();
  bool measured = in.boolean();
  bool pass_on = in.boolean();
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A> Gradients backward(const BackwardParameters& k) {
  const int64_t C = k.table.dim() == 3 ? k.table.size(2) : 0, num_later = static_cast<int64_t>(k.later.a.size());
  const bool dots = k.sums.has_value(), affine = dots && k.norm != 0;
  const LaterVectors& later = k.later;
  later.check(later.a.size());
  Vectors<A> vectors;
  MapVectors<A> v{};
  v.C = C;
  v.row = table_of(k.table, k.index, C) + k.index * kTableRows * C;
  v.norm = branch_norm(k.norm);
  v.eps = k.eps;
  v.count = value_count(k.count, k.elements);
  v.a = k.a.has_value() ? row_of<A>(*k.a, "a", k.index, C) : nullptr;
  v.later = later_rows<A>(vectors, later, k.index, C, dots);
  v.sums = dots ? vector_of<double>(*k.sums, "sums", {num_later + (v.a == nullptr ? 0 : 2), C}) : nullptr;
  v.own_sums = dots ? v.sums + num_later * C : nullptr;
  v.measured = k.measured;
  v.pass_on = k.pass_on;
  const ScalarType type = vector_type(std::is_same_v<A, double>);
  const Tensor rows = torch::stable::new_empty(k.table, {v.terms(), C}, type);
  const Tensor k0 = torch::stable::new_empty(k.table, {k.measured ? C : 0}, type);
  const Tensor dgamma = torch::stable::new_empty(k.table, {affine ? C : 0}, type);
  const Tensor dbeta = torch::stable::new_empty(k.table, {affine ? C : 0}, type);
  const Tensor dmoments = torch::stable::new_empty(k.table, {2, C}, ScalarType::Double);
  v.rows = data_of<A>(rows);
  v.k0 = data_of<A>(k0);
  v.dgamma = affine ? data_of<A>(dgamma) : nullptr;
  v.dbeta = affine ? data_of<A>(dbeta) : nullptr;
  v.dmoments = data_of<double>(dmoments);
  const MapAlgebra<A> algebra(std::move(v));
  over_channels(C, num_later + 2, [&](int64_t begin, int64_t end) { algebra.run(begin, end); });
  return {rows, k0, dgamma, dbeta, dmoments};
}

// Coefficients are of one dtype, that of whichever are there.
Gradients map_coefficients_backward(const BackwardParameters& k) {
  const Tensor* const any = k.a.has_value() ? &*k.a : k.later.a.empty() ? nullptr : &k.later.a[0];
  const bool doubles = any != nullptr && any->scalar_type() == ScalarType::Double;
  return doubles ? backward<double>(k) : backward<float>(k);
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def(
      "block_coefficients(Tensor(a!) table, int index, bool doubles, Tensor? mean, Tensor? var, Tensor? count, "
      "int elements, int norm, Tensor? gamma, Tensor? beta, Tensor(b!)? norm_mean, Tensor(c!)? norm_var, "
      "Tensor(d!)? norm_batches, float? norm_momentum, float norm_eps, Tensor? weight, Tensor(e!)? running_mean, "
      "Tensor(f!)? running_var, Tensor(g!)? batches, bool use_running, float? momentum, float eps) "
      "-> (Tensor a, Tensor b)");
  m.def(
      "map_coefficients_backward(Tensor table, int index, Tensor? sums, Tensor? a, Tensor[] later_a, "
      "Tensor[] later_db, Tensor[] later_weight, Tensor[] later_running_mean, Tensor[] later_running_var, "
      "Tensor(a!)[] later_dweight, Tensor? count, int elements, int norm, float eps, bool measured, bool pass_on) "
      "-> (Tensor rows, Tensor k0, Tensor dgamma, Tensor dbeta, Tensor dmoments)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("block_coefficients", &ernet::boxed<ernet::ForwardParameters, ernet::block_coefficients>);
  m.impl("map_coefficients_backward", &ernet::boxed<ernet::BackwardParameters, ernet::map_coefficients_backward>);
}
