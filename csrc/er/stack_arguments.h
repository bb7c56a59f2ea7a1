// Operators with many parameters: a struct whose members are read off the dispatcher's stack in order of declaration.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace ernet {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments of one call of an operator, each taken once, in the order of the schema.
class StackArguments {
 public:
  StackArguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  Tensor tensor() { return take<Tensor>(); }
  OptionalTensor optional_tensor() { return take<OptionalTensor>(); }
  std::vector<Tensor> tensors() { return take<std::vector<Tensor>>(); }
  std::vector<bool> booleans() { return take<std::vector<bool>>(); }
  int64_t integer() { return take<int64_t>(); }
  double number() { return take<double>(); }
  std::optional<double> optional_number() { return take<std::optional<double>>(); }
  bool boolean() { return take<bool>(); }

  bool all_taken() const { return next_ == end_; }

 private:
  template <typename T> T take() {
    STD_TORCH_CHECK(next_ != end_, "ernet: the schema has fewer parameters than the kernel");
    return torch::stable::detail::to<T>(*next_++);
  }

  StableIValue *next_, *end_;
};

template <typename... T, size_t... I>
void put_results(StableIValue* stack, const std::tuple<T...>& results, std::index_sequence<I...>) {
  ((stack[I] = torch::stable::detail::from(std::get<I>(results))), ...);
}

// The kernel that the dispatcher calls. Parameters{StackArguments&} takes all arguments, then `implementation` returns
// a tuple of the results.
template <typename Parameters, auto implementation>
void boxed(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  StackArguments in(stack, num_arguments);
  const Parameters parameters{in};
  STD_TORCH_CHECK(in.all_taken(), "ernet: the schema has more parameters than the kernel");
  const auto results = implementation(parameters);
  constexpr size_t count = std::tuple_size_v<std::decay_t<decltype(results)>>;
  STD_TORCH_CHECK(num_results == count, "ernet: the schema has ", num_results, " results, the kernel ", count);
  put_results(stack, results, std::make_index_sequence<count>());
}

}  // namespace ernet
