// The ER operators: schemas, argument checks and the CPU implementation. Autograd and fake kernels are in
// ernet_fast/er/_ops.py; the GPU implementation is Triton, in ernet_fast/er/.
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "er_maps.h"

namespace ernet {
namespace {

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x, bool per_sample) {
  const MapChecker checker(x, "x");
  const Storage storage = storage_of(x, "x");
  const MapShape shape = checker.shape(per_sample);
  Tensor mean = like_channels(x, channel_sizes(shape), storage);
  Tensor var = like_channels(x, channel_sizes(shape), storage);
  const int64_t partials = shape.groups() * cpu::slabs_per_group(shape) * 2 * shape.C;
  const std::unique_ptr<double[]> partial = partial_results(partials, x.numel() == 0);
  const cpu::ChannelMoments args{shape, x.const_data_ptr(), partial.get()};
  if (x.numel() > 0) {
    const auto loop = cpu::er_loops().channel_moments[static_cast<int>(storage)];
    torch::stable::parallel_for(0, cpu::reduce_items(shape), grain(shape, 1, true),
                                [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  }
  if (storage == Storage::f64) {
    cpu::merge_moments(args, static_cast<double*>(mean.mutable_data_ptr()),
                       static_cast<double*>(var.mutable_data_ptr()));
  } else {
    cpu::merge_moments(args, static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(var.mutable_data_ptr()));
  }
  return {mean, var};
}

Tensor weighted_sum(const std::vector<Tensor>& maps, const Tensor& a, const std::optional<Tensor>& b, bool relu) {
  STD_TORCH_CHECK(!maps.empty(), "ernet: maps must hold at least one map");
  MapChecker checker(maps[0], "maps[0]");
  const Storage storage = storage_of(maps[0], "maps");
  for (size_t i = 1; i < maps.size(); ++i) checker.add(maps[i], ("maps[" + std::to_string(i) + "]").c_str());
  const MapShape shape = checker.shape(a.dim() == 3);
  std::vector<int64_t> sizes = channel_sizes(shape);
  const void* b_data = b.has_value() ? coefficients(*b, "b", sizes, storage) : nullptr;
  sizes.insert(sizes.begin(), static_cast<int64_t>(maps.size()));
  const void* a_data = coefficients(a, "a", sizes, storage);
  Tensor y = empty_map_like(maps[0]);
  const std::vector<const void*> data = pointers(maps);
  const cpu::WeightedSum args{
      shape, static_cast<int64_t>(maps.size()), data.data(), a_data, b_data, y.mutable_data_ptr(), relu, streams(y)};
  if (y.numel() > 0) {
    const auto loop = cpu::er_loops().weighted_sum[static_cast<int>(storage)];
    torch::stable::parallel_for(0, cpu::sum_items(shape), grain(shape, args.num_maps, false),
                                [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  }
  return y;
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
  Tensor g = y.has_value() ? empty_map_like(dy) : torch::stable::new_empty(dy, std::vector<int64_t>{0});
  const std::vector<const void*> data = pointers(maps);
  const int64_t rows = static_cast<int64_t>(maps.size()) + 1;
  const int64_t partials = shape.groups() * cpu::slabs_per_group(shape) * rows * shape.C;
  const std::unique_ptr<double[]> partial = partial_results(partials, dy.numel() == 0);
  const cpu::WeightedDot args{shape,
                              rows - 1,
                              dy.const_data_ptr(),
                              y.has_value() ? y->const_data_ptr() : nullptr,
                              y.has_value() ? g.mutable_data_ptr() : nullptr,
                              data.data(),
                              partial.get(),
                              y.has_value() && streams(g)};
  if (dy.numel() > 0) {
    const auto loop = cpu::er_loops().weighted_dot[static_cast<int>(storage)];
    torch::stable::parallel_for(0, cpu::reduce_items(shape), grain(shape, rows, true),
                                [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  }
  if (storage == Storage::f64) {
    cpu::merge_dot(args, static_cast<double*>(da.mutable_data_ptr()), static_cast<double*>(db.mutable_data_ptr()));
  } else {
    cpu::merge_dot(args, static_cast<float*>(da.mutable_data_ptr()), static_cast<float*>(db.mutable_data_ptr()));
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
