// The ER operators: schemas, argument checks and the CPU implementation. Autograd and fake kernels are in
// ernet_fast/er/operators.py; the GPU implementation is Triton, in ernet_fast/er/.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "er/passes.h"

namespace ernet {
namespace {

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x, bool per_sample) {
  const MapChecker checker(x, "x");
  const Storage storage = storage_of(x, "x");
  const MapShape shape = checker.shape(per_sample);
  Tensor mean = like_channels(x, channel_sizes(shape), storage);
  Tensor var = like_channels(x, channel_sizes(shape), storage);
  if (storage == Storage::f64) {
    MomentsPass<double>(shape, storage, x, data_of<double>(mean), data_of<double>(var)).whole();
  } else {
    MomentsPass<float>(shape, storage, x, data_of<float>(mean), data_of<float>(var)).whole();
  }
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
  void* const g_data = y.has_value() ? g.mutable_data_ptr() : nullptr;
  if (storage == Storage::f64) {
    DotPass<double>(shape, storage, dy, y, g_data, data, data_of<double>(da), data_of<double>(db)).whole();
  } else {
    DotPass<float>(shape, storage, dy, y, g_data, data, data_of<float>(da), data_of<float>(db)).whole();
  }
  return {da, db, g};
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def("channel_moments(Tensor x, bool per_sample) -> (Tensor mean, Tensor var)");
  m.def("weighted_sum(Tensor[] maps, Tensor a, Tensor? b, bool relu) -> Tensor");
  m.def(
      "weighted_dot(Tensor dy, Tensor[] maps, Tensor? y, bool per_sample) "
      "-> (Tensor da, Tensor db, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&ernet::channel_moments));
  m.impl("weighted_sum", TORCH_BOX(&ernet::weighted_sum));
  m.impl("weighted_dot", TORCH_BOX(&ernet::weighted_dot));
}
