// The algebra on C-vectors as two operators: schemas, argument checks, the CPU implementation. Fake kernels are in
// ernet_fast/er/coefficients.py; the GPU implementation is Triton, in ernet_fast/er/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/er_coefficients.h"

namespace {

using ernet::cpu::BlockCoefficients;
using ernet::cpu::BlockCoefficientsBackward;
using ernet::cpu::BranchNorm;
using ernet::cpu::coefficient_loops;
using ernet::cpu::kTableRows;
using ernet::cpu::kTotalRows;
using ernet::cpu::MomentsGradient;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainValues = 32768;  // below this, a second thread costs more than it brings

std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

void check_vector(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < t.dim(); ++i) found.push_back(t.size(i));
  STD_TORCH_CHECK(found == sizes, "ernet: ", name, " must have shape ", sizes_text(sizes), "; got ", sizes_text(found));
  STD_TORCH_CHECK(t.is_cpu(), "ernet: ", name, " must be on the CPU here");
  STD_TORCH_CHECK(t.is_contiguous() || t.numel() == 0, "ernet: ", name, " must be contiguous");
}

template <typename T, typename A>
void convert(const void* from, A* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(static_cast<const T*>(from)[i]);
}

template <typename T, typename A>
void convert_back(const A* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = static_cast<T>(from[i]);
}

// C-vectors as arrays of A: the tensors' own memory, or, where their dtype is another one, copies of it; those of
// tensors to be changed are written back in the end.
template <typename A>
class Vectors {
 public:
  const A* read(const std::optional<Tensor>& t, const char* name, const std::vector<int64_t>& sizes) {
    if (!t.has_value()) return nullptr;
    check_vector(*t, name, sizes);
    if (t->scalar_type() == own_type()) return static_cast<const A*>(t->const_data_ptr());
    return copy_of(*t, name);
  }

  // Where `changes` is false the array is only read.
  A* change_if(bool changes, const std::optional<Tensor>& t, const char* name, const std::vector<int64_t>& sizes) {
    if (!changes) return const_cast<A*>(read(t, name, sizes));
    if (!t.has_value()) return nullptr;
    check_vector(*t, name, sizes);
    if (t->scalar_type() == own_type()) return static_cast<A*>(t->mutable_data_ptr());
    A* copy = copy_of(*t, name);
    changed_.emplace_back(copy, *t);
    return copy;
  }

  void write_back() {
    for (auto& [copy, t] : changed_) {
      void* to = t.mutable_data_ptr();
      switch (t.scalar_type()) {
        case ScalarType::Float:
          convert_back<float>(copy, to, t.numel());
          break;
        case ScalarType::Double:
          convert_back<double>(copy, to, t.numel());
          break;
        case ScalarType::BFloat16:
          convert_back<torch::headeronly::BFloat16>(copy, to, t.numel());
          break;
        default:
          convert_back<torch::headeronly::Half>(copy, to, t.numel());
      }
    }
  }

 private:
  static ScalarType own_type() { return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float; }

  A* copy_of(const Tensor& t, const char* name) {
    copies_.emplace_back(static_cast<size_t>(t.numel()));
    A* copy = copies_.back().data();
    switch (t.scalar_type()) {
      case ScalarType::Float:
        convert<float>(t.const_data_ptr(), copy, t.numel());
        break;
      case ScalarType::Double:
        convert<double>(t.const_data_ptr(), copy, t.numel());
        break;
      case ScalarType::BFloat16:
        convert<torch::headeronly::BFloat16>(t.const_data_ptr(), copy, t.numel());
        break;
      case ScalarType::Half:
        convert<torch::headeronly::Half>(t.const_data_ptr(), copy, t.numel());
        break;
      default:
        STD_TORCH_CHECK(false, "ernet: ", name, " must be float32, float64, bfloat16 or float16");
    }
    return copy;
  }

  std::deque<std::vector<A>> copies_;
  std::vector<std::pair<A*, Tensor>> changed_;
};

// The table or the totals of a stage: float64 [maps, rows, C].
double* stage_rows(const Tensor& t, const char* name, int64_t rows, int64_t index, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == rows && t.size(2) == channels && t.is_cpu() && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Double,
                  "ernet: ", name, " must be a contiguous float64 tensor [maps, ", rows, ", ", channels,
                  "] on the CPU");
  STD_TORCH_CHECK(index >= 0 && index < t.size(0), "ernet: index ", index, " is outside the ", t.size(0), " maps of ",
                  name);
  return static_cast<double*>(t.mutable_data_ptr());
}

BranchNorm branch_norm(int64_t norm) {
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "ernet: norm must be 0 (none), 1 (batch) or 2 (running); got ", norm);
  return static_cast<BranchNorm>(norm);
}

double value_count(const std::optional<Tensor>& count, int64_t elements) {
  if (!count.has_value()) return static_cast<double>(elements);
  STD_TORCH_CHECK(count->is_cpu() && count->numel() == 1 && count->scalar_type() == ScalarType::Double,
                  "ernet: count must be one float64 number on the CPU");
  return *static_cast<const double*>(count->const_data_ptr());
}

void check_batches(const std::optional<Tensor>& batches, const std::optional<double>& momentum, const char* name) {
  STD_TORCH_CHECK(!batches.has_value() ||
                      (batches->is_cpu() && batches->numel() == 1 && batches->scalar_type() == ScalarType::Long),
                  "ernet: ", name, " must be one int64 number on the CPU");
  STD_TORCH_CHECK(batches.has_value() || momentum.has_value(),
                  "ernet: a momentum of None (a cumulative average) needs ", name);
}

// Counts a batch and returns the momentum for it; without one, that of a cumulative average.
double next_momentum(const std::optional<Tensor>& batches, const std::optional<double>& momentum) {
  const int64_t seen = batches.has_value() ? ++*static_cast<int64_t*>(batches->mutable_data_ptr()) : 1;
  return momentum.has_value() ? *momentum : 1.0 / static_cast<double>(seen);
}

template <typename A, typename F>
void over_channels(const F& loop, const A& args, int64_t pairs) {
  torch::stable::parallel_for(0, args.C, kGrainValues / (pairs + 1) + 1,
                              [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

ScalarType vector_type(bool doubles) { return doubles ? ScalarType::Double : ScalarType::Float; }

using OptionalTensor = std::optional<Tensor>;

struct ForwardTensors {
  const Tensor& table;
  const OptionalTensor &mean, &var, &count, &gamma, &beta, &norm_mean, &norm_var, &norm_batches;
  const OptionalTensor &weight, &running_mean, &running_var, &batches;
};

struct ForwardNumbers {
  int64_t index, elements;
  BranchNorm norm;
  std::optional<double> norm_momentum;
  double norm_eps;
  bool use_running;
  std::optional<double> momentum;
  double eps;
};

template <typename A>
std::tuple<Tensor, Tensor> forward(const ForwardTensors& t, const ForwardNumbers& k) {
  const int64_t channels = t.table.dim() == 3 ? t.table.size(2) : 0;
  const std::vector<int64_t> one = {channels}, all = {k.index, channels};
  const bool batch = k.norm == BranchNorm::batch;
  Vectors<A> vectors;
  BlockCoefficients<A> args{};
  args.index = k.index;
  args.C = channels;
  args.table = stage_rows(t.table, "table", kTableRows, k.index, channels);
  args.mean = vectors.read(t.mean, "mean", one);
  args.var = vectors.read(t.var, "var", one);
  args.count = value_count(t.count, k.elements);
  args.norm = k.norm;
  args.gamma = vectors.read(t.gamma, "gamma", one);
  args.beta = vectors.read(t.beta, "beta", one);
  args.norm_mean = vectors.change_if(batch, t.norm_mean, "norm_mean", one);
  args.norm_var = vectors.change_if(batch, t.norm_var, "norm_var", one);
  args.norm_eps = k.norm_eps;
  args.weight = vectors.read(t.weight, "weight", all);
  args.running_mean = vectors.change_if(!k.use_running, t.running_mean, "running_mean", all);
  args.running_var = vectors.change_if(!k.use_running, t.running_var, "running_var", all);
  args.use_running = k.use_running;
  args.eps = k.eps;
  STD_TORCH_CHECK((args.mean == nullptr) == (args.var == nullptr), "ernet: mean and var go together");
  STD_TORCH_CHECK((args.norm_mean == nullptr) == (args.norm_var == nullptr),
                  "ernet: norm_mean and norm_var go together");
  STD_TORCH_CHECK((args.running_mean == nullptr) == (args.running_var == nullptr),
                  "ernet: running_mean and running_var go together");
  STD_TORCH_CHECK(!batch || args.mean != nullptr, "ernet: norm 1 (batch) needs mean and var");
  STD_TORCH_CHECK(k.norm != BranchNorm::running || args.norm_mean != nullptr,
                  "ernet: norm 2 (running) needs norm_mean and norm_var");
  STD_TORCH_CHECK(!k.use_running || args.running_mean != nullptr,
                  "ernet: use_running needs running_mean and running_var");
  const bool move_norm = batch && t.norm_mean.has_value(), move = !k.use_running && t.running_mean.has_value();
  if (move_norm) check_batches(t.norm_batches, k.norm_momentum, "norm_batches");
  if (move) check_batches(t.batches, k.momentum, "batches");
  if (move_norm) args.norm_momentum = next_momentum(t.norm_batches, k.norm_momentum);
  if (move) args.momentum = next_momentum(t.batches, k.momentum);
  const ScalarType type = vector_type(std::is_same_v<A, double>);
  const bool block = t.weight.has_value();
  Tensor a = torch::stable::new_empty(t.table, {block ? k.index + 1 : 0, channels}, type);
  Tensor b = torch::stable::new_empty(t.table, {block ? channels : 0}, type);
  args.a = block ? static_cast<A*>(a.mutable_data_ptr()) : nullptr;
  args.b = static_cast<A*>(b.mutable_data_ptr());
  if constexpr (std::is_same_v<A, double>) {
    over_channels(coefficient_loops().forward_f64, args, k.index);
  } else {
    over_channels(coefficient_loops().forward_f32, args, k.index);
  }
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
  const ForwardTensors t{table,    mean,         var,    count,        gamma,       beta,   norm_mean,
                         norm_var, norm_batches, weight, running_mean, running_var, batches};
  const ForwardNumbers k{index, elements, branch_norm(norm), norm_momentum, norm_eps, use_running, momentum, eps};
  return doubles ? forward<double>(t, k) : forward<float>(t, k);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct BackwardTensors {
  const Tensor &table, &totals;
  const OptionalTensor &da, &db, &count, &weight, &running_mean, &running_var;
  const std::vector<Tensor>& readers;
};

struct BackwardNumbers {
  int64_t index, elements;
  BranchNorm norm;
  bool use_running;
  double eps;
  bool measured, pass_on;
};

// Rows of coefficients of dz: those with which later blocks read the map, k1, and ones for a gradient passed on; and
// k0.
template <typename A>
std::tuple<Tensor, Tensor> gradient_rows(const BackwardTensors& t, const BackwardNumbers& k, const double* table,
                                         const double* dmoments, double count, int64_t channels) {
  const ScalarType type = vector_type(std::is_same_v<A, double>);
  const int64_t readers = static_cast<int64_t>(t.readers.size());
  Tensor rows = torch::stable::new_empty(t.table, {readers + k.measured + k.pass_on, channels}, type);
  Tensor k0 = torch::stable::new_empty(t.table, {k.measured ? channels : 0}, type);
  A* row = static_cast<A*>(rows.mutable_data_ptr());
  for (const Tensor& reader : t.readers) {
    STD_TORCH_CHECK(reader.dim() == 2 && reader.size(0) > k.index && reader.size(1) == channels && reader.is_cpu() &&
                        reader.is_contiguous() && reader.scalar_type() == type,
                    "ernet: readers must be coefficients [> index, C] of later blocks");
    const A* from = static_cast<const A*>(reader.const_data_ptr()) + k.index * channels;
    for (int64_t c = 0; c < channels; ++c) row[c] = from[c];
    row += channels;
  }
  if (k.measured) {
    const double* mean = table + (k.index * kTableRows + ernet::cpu::kMean) * channels;
    const MomentsGradient<A> args{channels, mean, dmoments, count, row, static_cast<A*>(k0.mutable_data_ptr())};
    if constexpr (std::is_same_v<A, double>) {
      coefficient_loops().gradient_f64(args, 0, channels);
    } else {
      coefficient_loops().gradient_f32(args, 0, channels);
    }
    row += channels;
  }
  for (int64_t c = 0; k.pass_on && c < channels; ++c) row[c] = A(1);
  return {rows, k0};
}

template <typename A>
Gradients backward(const BackwardTensors& t, const BackwardNumbers& k) {
  const int64_t channels = t.table.dim() == 3 ? t.table.size(2) : 0;
  const std::vector<int64_t> one = {channels}, all = {k.index, channels};
  Vectors<A> vectors;
  BlockCoefficientsBackward<A> args{};
  args.index = k.index;
  args.C = channels;
  args.table = stage_rows(t.table, "table", kTableRows, k.index, channels);
  args.totals = stage_rows(t.totals, "totals", kTotalRows, k.index, channels);
  args.da = vectors.read(t.da, "da", {k.index + 1, channels});
  args.db = vectors.read(t.db, "db", one);
  args.count = value_count(t.count, k.elements);
  args.norm = k.norm;
  args.weight = vectors.read(t.weight, "weight", all);
  args.running_mean = vectors.read(t.running_mean, "running_mean", all);
  args.running_var = vectors.read(t.running_var, "running_var", all);
  args.use_running = k.use_running;
  args.eps = k.eps;
  STD_TORCH_CHECK((args.da == nullptr) == (args.db == nullptr), "ernet: da and db go together");
  STD_TORCH_CHECK(!t.da.has_value() || t.weight.has_value(), "ernet: da needs weight");
  STD_TORCH_CHECK(!k.use_running || (args.running_mean != nullptr && args.running_var != nullptr),
                  "ernet: use_running needs running_mean and running_var");
  const ScalarType type = vector_type(std::is_same_v<A, double>);
  const bool reached = t.da.has_value(), affine = k.norm != BranchNorm::none;
  Tensor dweight = torch::stable::new_empty(t.table, {reached ? k.index : 0, channels}, type);
  Tensor dgamma = torch::stable::new_empty(t.table, {affine ? channels : 0}, type);
  Tensor dbeta = torch::stable::new_empty(t.table, {affine ? channels : 0}, type);
  Tensor dmoments = torch::stable::new_empty(t.table, {2, channels}, ScalarType::Double);
  args.dweight = static_cast<A*>(dweight.mutable_data_ptr());
  args.dgamma = affine ? static_cast<A*>(dgamma.mutable_data_ptr()) : nullptr;
  args.dbeta = affine ? static_cast<A*>(dbeta.mutable_data_ptr()) : nullptr;
  args.dmoments = static_cast<double*>(dmoments.mutable_data_ptr());
  if constexpr (std::is_same_v<A, double>) {
    over_channels(coefficient_loops().backward_f64, args, k.index);
  } else {
    over_channels(coefficient_loops().backward_f32, args, k.index);
  }
  auto [rows, k0] = gradient_rows<A>(t, k, args.table, args.dmoments, args.count, channels);
  return {rows, k0, dweight, dgamma, dbeta, dmoments};
}

Gradients block_coefficients_backward(const Tensor& table, int64_t index, bool doubles, const Tensor& totals,
                                      const OptionalTensor& da, const OptionalTensor& db, const OptionalTensor& count,
                                      int64_t elements, int64_t norm, const OptionalTensor& weight,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      bool use_running, double eps, const std::vector<Tensor>& readers, bool measured,
                                      bool pass_on) {
  const BackwardTensors t{table, totals, da, db, count, weight, running_mean, running_var, readers};
  const BackwardNumbers k{index, elements, branch_norm(norm), use_running, eps, measured, pass_on};
  return doubles ? backward<double>(t, k) : backward<float>(t, k);
}

}  // namespace

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
  m.impl("block_coefficients", TORCH_BOX(&block_coefficients));
  m.impl("block_coefficients_backward", TORCH_BOX(&block_coefficients_backward));
}
