// The C-vectors of the ER operators as arrays: checks, conversions, and the arguments of the algebra's loops.
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
#include "memory/outputs.h"

namespace ernet {

using cpu::BlockCoefficients;
using cpu::BranchNorm;
using cpu::kTableRows;
using cpu::kTotalRows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrainValues = 32768;  // values of C-vectors below which a second thread costs more than it brings

inline std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline void check_vector(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
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
inline double* stage_rows(const Tensor& t, const char* name, int64_t rows, int64_t index, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == rows && t.size(2) == channels && t.is_cpu() && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Double,
                  "ernet: ", name, " must be a contiguous float64 tensor [maps, ", rows, ", ", channels,
                  "] on the CPU");
  STD_TORCH_CHECK(index >= 0 && index < t.size(0), "ernet: index ", index, " is outside the ", t.size(0), " maps of ",
                  name);
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

inline void run(const BlockCoefficients<float>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().forward_f32(k, begin, end);
}
inline void run(const BlockCoefficients<double>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().forward_f64(k, begin, end);
}
inline void run(const cpu::PairGradient<float>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().pair_f32(k, begin, end);
}
inline void run(const cpu::PairGradient<double>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().pair_f64(k, begin, end);
}
inline void run(const cpu::OwnGradient<float>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().own_f32(k, begin, end);
}
inline void run(const cpu::OwnGradient<double>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().own_f64(k, begin, end);
}
inline void run(const cpu::MomentsGradient<float>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().gradient_f32(k, begin, end);
}
inline void run(const cpu::MomentsGradient<double>& k, int64_t begin, int64_t end) {
  cpu::coefficient_loops().gradient_f64(k, begin, end);
}

inline ScalarType vector_type(bool doubles) { return doubles ? ScalarType::Double : ScalarType::Float; }

// All channels, by several threads where that pays; `rows` values a channel are read.
template <typename Work>
void over_channels(int64_t channels, int64_t rows, const Work& work) {
  torch::stable::parallel_for(0, channels, kGrainValues / rows + 1, work);
}

struct ForwardTensors {
  const Tensor& table;
  const OptionalTensor &gamma, &beta, &norm_mean, &norm_var, &norm_batches;
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

// The arguments of the loops but a and b. `moments`: mean and variance of the map, null where nothing depends on them.
// Counts a batch where running statistics are to be moved, so whatever else is checked must have been before.
template <typename A>
BlockCoefficients<A> forward_arguments(Vectors<A>& vectors, const ForwardTensors& t, const ForwardNumbers& k,
                                       std::pair<const A*, const A*> moments, double count) {
  const int64_t channels = t.table.dim() == 3 ? t.table.size(2) : 0;
  const std::vector<int64_t> one = {channels}, all = {k.index, channels};
  const bool batch = k.norm == BranchNorm::batch;
  BlockCoefficients<A> args{};
  args.index = k.index;
  args.C = channels;
  args.table = stage_rows(t.table, "table", kTableRows, k.index, channels);
  args.mean = moments.first;
  args.var = moments.second;
  args.count = count;
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
  return args;
}

// Where the coefficients stand with which later blocks read map `index`.
template <typename A>
std::vector<const A*> reader_rows(const std::vector<Tensor>& readers, int64_t index, int64_t channels) {
  std::vector<const A*> rows;
  for (const Tensor& reader : readers) {
    STD_TORCH_CHECK(reader.dim() == 2 && reader.size(0) > index && reader.size(1) == channels && reader.is_cpu() &&
                        reader.is_contiguous() && reader.scalar_type() == vector_type(std::is_same_v<A, double>),
                    "ernet: readers must be coefficients [> index, C] of later blocks");
    rows.push_back(static_cast<const A*>(reader.const_data_ptr()) + index * channels);
  }
  return rows;
}

// Rows of coefficients of dz: those with which later blocks read the map, k1, and ones for a gradient passed on; and
// k0.
template <typename A>
struct GradientRows {
  std::vector<const A*> readers;
  bool measured, pass_on;
  cpu::MomentsGradient<A> moments;  // k1 is set here
  A* rows;                          // [readers + measured + pass_on][C]
  int64_t C;

  void fill(int64_t begin, int64_t end) const {
    A* row = rows;
    for (const A* reader : readers) {
      std::copy(reader + begin, reader + end, row + begin);
      row += C;
    }
    if (measured) {
      cpu::MomentsGradient<A> args = moments;
      args.k1 = row;
      run(args, begin, end);
      row += C;
    }
    if (pass_on) std::fill(row + begin, row + end, A(1));
  }
};

}  // namespace ernet
