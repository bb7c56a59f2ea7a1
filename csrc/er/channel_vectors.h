// The per-channel vectors of the ER operators as arrays: checks, conversions, and the arguments of the algebra's loops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "er/coefficients.h"
#include "er/kernels.h"
#include "er/stack_arguments.h"
#include "memory/outputs.h"

namespace ernet {

using cpu::BlockCoefficients;
using cpu::BranchNorm;
using cpu::kTableRows;
using cpu::kTotalRows;
using torch::headeronly::ScalarType;

constexpr int64_t kGrainValues = 32768;  // values of vectors below which a second thread costs more than it brings

inline std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
inline std::string shape_text(const Tensor& t) { return sizes_text(sizes_of(t)); }

inline void check_vector(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes_of(t) == sizes, "ernet: ", name, " must have shape ", sizes_text(sizes), "; got ",
                  shape_text(t));
  STD_TORCH_CHECK(t.is_cpu(), "ernet: ", name, " must be on the CPU here");
  STD_TORCH_CHECK(t.is_contiguous() || t.numel() == 0, "ernet: ", name, " must be contiguous");
}

template <typename From, typename To> void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// work(a number of the tensor's type)
template <typename Work> void with_type(const Tensor& t, const char* name, const Work& work) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return work(float{});
    case ScalarType::Double: return work(double{});
    case ScalarType::BFloat16: return work(torch::headeronly::BFloat16{});
    case ScalarType::Half: return work(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "ernet: ", name, " must be float32, float64, bfloat16 or float16");
  }
}

// Per-channel vectors as arrays of A: the tensors' own memory, or, where their dtype is another one, copies of it;
// those of tensors to be changed are written back in the end.
template <typename A> class Vectors {
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
      with_type(t, "running statistics", [from = copy, to = t](auto of_type) {
        convert(from, static_cast<decltype(of_type)*>(to.mutable_data_ptr()), to.numel());
      });
    }
  }

 private:
  static ScalarType own_type() { return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float; }

  A* copy_of(const Tensor& t, const char* name) {
    copies_.emplace_back(static_cast<size_t>(t.numel()));
    A* copy = copies_.back().data();
    with_type(t, name, [&](auto of_type) {
      convert(static_cast<const decltype(of_type)*>(t.const_data_ptr()), copy, t.numel());
    });
    return copy;
  }

  std::deque<std::vector<A>> copies_;
  std::vector<std::pair<A*, Tensor>> changed_;
};

// The table of a stage, float64 [maps, rows, C].
inline double* table_of(const Tensor& t, int64_t index, int64_t channels, int64_t rows = kTableRows) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == rows && t.size(2) == channels && t.is_cpu() && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Double,
                  "ernet: table must be a contiguous float64 tensor [maps, ", rows, ", ", channels, "] on the CPU");
  STD_TORCH_CHECK(index >= 0 && index < t.size(0), "ernet: index ", index, " is outside the ", t.size(0),
                  " maps of table");
  return static_cast<double*>(t.mutable_data_ptr());
}

inline BranchNorm branch_norm(int64_t norm) {
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "ernet: norm must be 0 (none), 1 (batch) or 2 (running); got ", norm);
  return static_cast<BranchNorm>(norm);
}

inline double value_count(const std::optional<Tensor>& count, int64_t elements) {
  if (!count.has_value()) return static_cast<double>(elements);
  STD_TORCH_CHECK(count->is_cpu() && count->numel() == 1 && count->scalar_type() == ScalarType::Double,
                  "ernet: count must be one float64 number on the CPU");
  return *static_cast<const double*>(count->const_data_ptr());
}

inline void check_batches(const std::optional<Tensor>& batches, const std::optional<double>& momentum,
                          const char* name) {
  STD_TORCH_CHECK(!batches.has_value() ||
                      (batches->is_cpu() && batches->numel() == 1 && batches->scalar_type() == ScalarType::Long),
                  "ernet: ", name, " must be one int64 number on the CPU");
  STD_TORCH_CHECK(batches.has_value() || momentum.has_value(),
                  "ernet: a momentum of None (a cumulative average) needs ", name);
}

// Counts a batch and returns the momentum for it; without one, that of a cumulative average.
inline double next_momentum(const std::optional<Tensor>& batches, const std::optional<double>& momentum) {
  const int64_t seen = batches.has_value() ? ++*static_cast<int64_t*>(batches->mutable_data_ptr()) : 1;
  return momentum.has_value() ? *momentum : 1.0 / static_cast<double>(seen);
}

template <typename A> const cpu::VectorLoops<A>& vector_loops() {
  if constexpr (std::is_same_v<A, double>) {
    return cpu::er_loops().vectors_f64;
  } else {
    return cpu::er_loops().vectors_f32;
  }
}

inline ScalarType vector_type(bool doubles) { return doubles ? ScalarType::Double : ScalarType::Float; }

// All channels, by several threads where that pays; `rows` values a channel are read.
template <typename Work> void over_channels(int64_t channels, int64_t rows, const Work& work) {
  torch::stable::parallel_for(0, channels, kGrainValues / rows + 1, work);
}

// Of the schemas of er_block and block_coefficients: how x comes from z, and the block's shortcuts.
struct EpilogueParameters {
  StackArguments& in;
  int64_t norm = in.integer();
  OptionalTensor gamma = in.optional_tensor();
  OptionalTensor beta = in.optional_tensor();
  OptionalTensor norm_mean = in.optional_tensor();
  OptionalTensor norm_var = in.optional_tensor();
  OptionalTensor norm_batches = in.optional_tensor();
  std::optional<double> norm_momentum = in.optional_number();
  double norm_eps = in.number();
  OptionalTensor weight = in.optional_tensor();
  OptionalTensor running_mean = in.optional_tensor();
  OptionalTensor running_var = in.optional_tensor();
  OptionalTensor batches = in.optional_tensor();
  bool use_running = in.boolean();
  std::optional<double> momentum = in.optional_number();
  double eps = in.number();
};

// Group norm: how a map is cut. None with batch norm.
struct Grouping {
  int64_t samples, num_groups = 0;
  int64_t table_rows() const { return num_groups > 0 ? cpu::group_table_rows(samples) : +kTableRows; }
};

// The arguments of the loops but a and b. `moments`: mean and variance of the map, null where nothing depends on them.
// Counts a batch where running statistics are to be updated, so whatever else is checked must have been before.
template <typename A>
BlockCoefficients<A> forward_arguments(Vectors<A>& vectors, const Tensor& table, int64_t index,
                                       const EpilogueParameters& k, std::pair<const A*, const A*> moments, double count,
                                       const Grouping& grouping = {}) {
  const int64_t channels = table.dim() == 3 ? table.size(2) : 0;
  const std::vector<int64_t> one = {channels}, all = {index, channels};
  const BranchNorm norm = branch_norm(k.norm);
  const bool batch = norm == BranchNorm::batch;
  BlockCoefficients<A> args{};
  args.index = index;
  args.C = channels;
  args.table = table_of(table, index, channels, grouping.table_rows());
  args.samples = grouping.samples;
  args.num_groups = grouping.num_groups;
  args.mean = moments.first;
  args.var = moments.second;
  args.count = count;
  args.norm = norm;
  args.gamma = vectors.read(k.gamma, "gamma", one);
  args.beta = vectors.read(k.beta, "beta", one);
  args.norm_mean = vectors.change_if(batch, k.norm_mean, "norm_mean", one);
  args.norm_var = vectors.change_if(batch, k.norm_var, "norm_var", one);
  args.norm_eps = k.norm_eps;
  args.weight = vectors.read(k.weight, "weight", all);
  args.running_mean = vectors.change_if(!k.use_running, k.running_mean, "running_mean", all);
  args.running_var = vectors.change_if(!k.use_running, k.running_var, "running_var", all);
  args.use_running = k.use_running;
  args.eps = k.eps;
  STD_TORCH_CHECK((args.norm_mean == nullptr) == (args.norm_var == nullptr),
                  "ernet: norm_mean and norm_var go together");
  STD_TORCH_CHECK((args.running_mean == nullptr) == (args.running_var == nullptr),
                  "ernet: running_mean and running_var go together");
  STD_TORCH_CHECK(!batch || args.mean != nullptr, "ernet: norm 1 (batch) needs mean and var");
  STD_TORCH_CHECK(norm != BranchNorm::running || args.norm_mean != nullptr,
                  "ernet: norm 2 (running) needs norm_mean and norm_var");
  STD_TORCH_CHECK(!k.use_running || args.running_mean != nullptr,
                  "ernet: use_running needs running_mean and running_var");
  const bool update_norm = batch && k.norm_mean.has_value(), update = !k.use_running && k.running_mean.has_value();
  if (update_norm) check_batches(k.norm_batches, k.norm_momentum, "norm_batches");
  if (update) check_batches(k.batches, k.momentum, "batches");
  if (update_norm) args.norm_momentum = next_momentum(k.norm_batches, k.norm_momentum);
  if (update) args.momentum = next_momentum(k.batches, k.momentum);
  return args;
}

}  // namespace ernet
