// The ER operators: schemas, argument checks and the CPU implementation. Autograd and fake kernels are in
// ernet_fast/er/operators.py; the GPU implementation is Triton, in ernet_fast/er/.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "er/passes.h"

namespace ernet {
namespace {

// A reduction over whole maps into tensors of the accumulation type.
template <typename Arguments>
void reduce(Storage storage, const Arguments& args, const Tensor& out, const Tensor& last) {
  if (storage == Storage::f64) {
    Reduction(storage, args, data_of<double>(out), data_of<double>(last)).whole();
  } else {
    Reduction(storage, args, data_of<float>(out), data_of<float>(last)).whole();
  }
}

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x, bool per_sample) {
  const MapChecker checker(x, "x");
  const Storage storage = storage_of(x, "x");
  const MapShape shape = checker.shape(per_sample);
  Tensor mean = like_channels(x, channel_sizes(shape), storage);
  Tensor var = like_channels(x, channel_sizes(shape), storage);
  const cpu::ChannelMoments args{shape, x.const_data_ptr(), nullptr};
  reduce(storage, args, mean, var);
  return {mean, var};
}

Tensor weighted_sum(const std::vector<Tensor>& maps, const Tensor& a, const std::optional<Tensor>& b, bool relu) {
  const MapChecker checker = checked_maps(maps);
  const Storage storage = storage_of(maps[0], "maps");
  const MapShape shape = checker.shape(a.dim() == 3);
  std::vector<int64_t> sizes = channel_sizes(shape);
  const void* b_data = b.has_value() ? coefficients(*b, "b", sizes, storage) : nullptr;
  sizes.insert(sizes.begin(), static_cast<int64_t>(maps.size()));
  const void* a_data = coefficients(a, "a", sizes, storage);
  const std::vector<const void*> data = pointers(maps);
  const SumPass sum(shape, storage, maps[0], data, a_data, b_data, relu);
  sum.whole();
  return sum.y;
}

std::tuple<Tensor, Tensor, Tensor> weighted_dot(const Tensor& dy, const std::vector<Tensor>& maps,
                                                const std::optional<Tensor>& y, bool per_sample) {
  STD_TORCH_CHECK(!maps.empty(), "ernet: maps must hold at least one map");
  MapChecker checker(dy, "dy");
  const Storage storage = storage_of(dy, "dy");
  for (size_t i = 0; i < maps.size(); ++i) checker.add(maps[i], ("maps[" + std::to_string(i) + "]").c_str());
  if (y.has_value()) checker.add(*y, "y");
  const MapShape shape = checker.shape(per_sample);
  std::vector<int64_t> sizes = channel_sizes(shape);
  Tensor db = like_channels(dy, sizes, storage);
  sizes.insert(sizes.begin(), static_cast<int64_t>(maps.size()));
  Tensor da = like_channels(dy, sizes, storage);
  const std::vector<const void*> data = pointers(maps);
  Tensor g = y.has_value() ? empty_map_like(dy) : torch::stable::new_empty(dy, std::vector<int64_t>{0});
  if (dy.numel() == 0) {  // an empty dy has no address
    torch::stable::zero_(da);
    torch::stable::zero_(db);
  } else {
    reduce(storage, gradient_dots(shape, dy, y, g, data), da, db);
  }
  return {da, db, g};
}

std::tuple<Tensor, Tensor> map_dots(const Tensor& z, const std::optional<Tensor>& dy, const std::optional<Tensor>& y,
                                    const std::vector<Tensor>& later_g, bool per_sample) {
  MapChecker checker(z, "z");
  STD_TORCH_CHECK(dy.has_value() || !y.has_value(), "ernet: y is given without dy");
  if (dy.has_value()) checker.add(*dy, "dy");
  if (y.has_value()) checker.add(*y, "y");
  for (size_t l = 0; l < later_g.size(); ++l) checker.add(later_g[l], ("later_g[" + std::to_string(l) + "]").c_str());
  const Storage storage = storage_of(z, "z");
  const MapShape shape = checker.shape(per_sample);
  const Tensor g = y.has_value() ? empty_map_like(z) : torch::stable::new_empty(z, std::vector<int64_t>{0});
  const std::vector<const void*> later = pointers(later_g);
  const cpu::MapDots args{shape,
                          z.const_data_ptr(),
                          dy.has_value() ? dy->const_data_ptr() : nullptr,
                          y.has_value() ? y->const_data_ptr() : nullptr,
                          nullptr,
                          y.has_value() ? g.mutable_data_ptr() : nullptr,
                          static_cast<int64_t>(later.size()),
                          later.data(),
                          nullptr,
                          nullptr,
                          y.has_value() && static_cast<int64_t>(later.size()) <= cpu::kLaterAtOnce && streams(z)};
  const int64_t rows = args.num_later + (dy.has_value() ? 2 : 0);  // an empty dy has no address
  std::vector<int64_t> sizes = channel_sizes(shape);
  sizes.insert(sizes.begin(), rows);
  Tensor sums = torch::stable::new_empty(z, sizes, ScalarType::Double);
  if (z.numel() == 0) {
    torch::stable::zero_(sums);
  } else if (rows > 0) {
    Reduction(storage, args, data_of<double>(sums)).whole();
  }
  return {sums, g};
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def("channel_moments(Tensor x, bool per_sample) -> (Tensor mean, Tensor var)");
  m.def("weighted_sum(Tensor[] maps, Tensor a, Tensor? b, bool relu) -> Tensor");
  m.def(
      "weighted_dot(Tensor dy, Tensor[] maps, Tensor? y, bool per_sample) "
      "-> (Tensor da, Tensor db, Tensor g)");
  m.def("map_dots(Tensor z, Tensor? dy, Tensor? y, Tensor[] later_g, bool per_sample) -> (Tensor sums, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&ernet::channel_moments));
  m.impl("weighted_sum", TORCH_BOX(&ernet::weighted_sum));
  m.impl("weighted_dot", TORCH_BOX(&ernet::weighted_dot));
  m.impl("map_dots", TORCH_BOX(&ernet::map_dots));
}
