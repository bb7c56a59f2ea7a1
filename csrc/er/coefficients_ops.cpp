// The algebra on C-vectors as two operators: schemas, argument checks, the CPU implementation. Fake kernels are in
// ernet_fast/er/coefficients.py; the GPU implementation is Triton, in ernet_fast/er/.
#include <optional>
#include <tuple>
#include <vector>

#include "er/channel_vectors.h"

namespace ernet {
namespace {

template <typename A>
std::tuple<Tensor, Tensor> forward(const ForwardTensors& t, const ForwardNumbers& k, const OptionalTensor& mean,
                                   const OptionalTensor& var, const OptionalTensor& count) {
  const int64_t channels = t.table.dim() == 3 ? t.table.size(2) : 0;
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "ernet: mean and var go together");
  Vectors<A> vectors;
  const A* const mean_data = vectors.read(mean, "mean", {channels});
  const A* const var_data = vectors.read(var, "var", {channels});
  BlockCoefficients<A> args =
      forward_arguments<A>(vectors, t, k, {mean_data, var_data}, value_count(count, k.elements));
  const ScalarType type = vector_type(std::is_same_v<A, double>);
  const bool block = t.weight.has_value();
  Tensor a = torch::stable::new_empty(t.table, {block ? k.index + 1 : 0, channels}, type);
  Tensor b = torch::stable::new_empty(t.table, {block ? channels : 0}, type);
  args.a = block ? data_of<A>(a) : nullptr;
  args.b = data_of<A>(b);
  over_channels(channels, k.index + 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  vectors.write_back();
  return {a, b};
}

std::tuple<Tensor, Tensor> block_coefficients(
    const Tensor& table, int64_t index, bool doubles, const OptionalTensor& mean, const OptionalTensor& var,
    const OptionalTensor& count, int64_t elements, int64_t norm, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& norm_mean, const OptionalTensor& norm_var,
    const OptionalTensor& norm_batches, std::optional<double> norm_momentum, double norm_eps,
    const OptionalTensor& weight, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& batches, bool use_running, std::optional<double> momentum, double eps) {
  const ForwardTensors t{table,        gamma,  beta,         norm_mean,   norm_var,
                         norm_batches, weight, running_mean, running_var, batches};
  const ForwardNumbers k{index, elements, branch_norm(norm), norm_momentum, norm_eps, use_running, momentum, eps};
  return doubles ? forward<double>(t, k, mean, var, count) : forward<float>(t, k, mean, var, count);
}

using cpu::OwnGradient;
using cpu::PairGradient;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct BackwardTensors {
  const Tensor &table, &totals;
  const OptionalTensor &weight, &running_mean, &running_var;
  const std::vector<Tensor>& readers;
};

struct BackwardNumbers {
  int64_t index, elements;
  BranchNorm norm;
  bool use_running;
  double eps;
  bool measured, pass_on;
};

template <typename A>
Gradients backward(const BackwardTensors& t, const BackwardNumbers& k, const OptionalTensor& da,
                   const OptionalTensor& db, const OptionalTensor& count) {
  const int64_t channels = t.table.dim() == 3 ? t.table.size(2) : 0;
  STD_TORCH_CHECK(da.has_value() == db.has_value(), "ernet: da and db go together");
  Vectors<A> vectors;
  const A* const da_data = vectors.read(da, "da", {k.index + 1, channels});
  const A* const db_data = vectors.read(db, "db", {channels});
  const double* const table = stage_rows(t.table, "table", kTableRows, k.index, channels);
  double* const totals = stage_rows(t.totals, "totals", kTotalRows, k.index, channels);
  const double values = value_count(count, k.elements);
  const std::vector<int64_t> all = {k.index, channels};
  const A* const weight = vectors.read(t.weight, "weight", all);
  const A* const running_mean = vectors.read(t.running_mean, "running_mean", all);
  const A* const running_var = vectors.read(t.running_var, "running_var", all);
  STD_TORCH_CHECK(da_data == nullptr || weight != nullptr, "ernet: da needs weight");
  STD_TORCH_CHECK(!k.use_running || (running_mean != nullptr && running_var != nullptr),
                  "ernet: use_running needs running_mean and running_var");
  const ScalarType type = vector_type(std::is_same_v<A, double>);
  const bool affine = k.norm != BranchNorm::none;
  Tensor dweight = torch::stable::new_empty(t.table, {da.has_value() ? k.index : 0, channels}, type);
  Tensor dgamma = torch::stable::new_empty(t.table, {affine ? channels : 0}, type);
  Tensor dbeta = torch::stable::new_empty(t.table, {affine ? channels : 0}, type);
  Tensor dmoments = torch::stable::new_empty(t.table, {2, channels}, ScalarType::Double);
  double* const moments_out = data_of<double>(dmoments);
  const std::vector<const A*> readers = reader_rows<A>(t.readers, k.index, channels);
  const OwnGradient<A> own{channels,
                           table + k.index * kTableRows * channels,
                           totals + k.index * kTotalRows * channels,
                           da_data == nullptr ? nullptr : da_data + k.index * channels,
                           db_data,
                           k.norm,
                           affine ? data_of<A>(dgamma) : nullptr,
                           affine ? data_of<A>(dbeta) : nullptr,
                           moments_out};
  over_channels(channels, k.index + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; da_data != nullptr && i < k.index; ++i) {
      const PairGradient<A> pair{channels,
                                 table + i * kTableRows * channels,
                                 totals + i * kTotalRows * channels,
                                 weight + i * channels,
                                 da_data + i * channels,
                                 db_data,
                                 k.use_running ? running_mean + i * channels : nullptr,
                                 k.use_running ? running_var + i * channels : nullptr,
                                 k.eps,
                                 data_of<A>(dweight) + i * channels};
      run(pair, begin, end);
    }
    run(own, begin, end);
  });
  const int64_t num_rows = static_cast<int64_t>(readers.size()) + k.measured + k.pass_on;
  Tensor rows = torch::stable::new_empty(t.table, {num_rows, channels}, type);
  Tensor k0 = torch::stable::new_empty(t.table, {k.measured ? channels : 0}, type);
  const double* mean = table + (k.index * kTableRows + cpu::kMean) * channels;
  const cpu::MomentsGradient<A> moments{channels, mean, moments_out, values, nullptr, data_of<A>(k0)};
  GradientRows<A>{readers, k.measured, k.pass_on, moments, data_of<A>(rows), channels}.fill(0, channels);
  return {rows, k0, dweight, dgamma, dbeta, dmoments};
}

Gradients block_coefficients_backward(const Tensor& table, int64_t index, bool doubles, const Tensor& totals,
                                      const OptionalTensor& da, const OptionalTensor& db, const OptionalTensor& count,
                                      int64_t elements, int64_t norm, const OptionalTensor& weight,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      bool use_running, double eps, const std::vector<Tensor>& readers, bool measured,
                                      bool pass_on) {
  const BackwardTensors t{table, totals, weight, running_mean, running_var, readers};
  const BackwardNumbers k{index, elements, branch_norm(norm), use_running, eps, measured, pass_on};
  return doubles ? backward<double>(t, k, da, db, count) : backward<float>(t, k, da, db, count);
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
      "block_coefficients_backward(Tensor table, int index, bool doubles, Tensor(a!) totals, Tensor? da, Tensor? db, "
      "Tensor? count, int elements, int norm, Tensor? weight, Tensor? running_mean, Tensor? running_var, "
      "bool use_running, float eps, Tensor[] readers, bool measured, bool pass_on) "
      "-> (Tensor rows, Tensor k0, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor dmoments)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("block_coefficients", TORCH_BOX(&ernet::block_coefficients));
  m.impl("block_coefficients_backward", TORCH_BOX(&ernet::block_coefficients_backward));
}
