// The ER operators: schemas, argument checks and the CPU implementation. Autograd and fake kernels are in
// ernet_fast/er/_ops.py; the GPU implementation is Triton, in ernet_fast/er/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/er_loops.h"
#include "cpu/map_buffers.h"

namespace {

using ernet::cpu::MapShape;
using ernet::cpu::Storage;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainElements = 32768;  // below this, a second thread costs more than it brings

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      STD_TORCH_CHECK(false, "ernet: ", name, " must be float32, float64, bfloat16 or float16");
  }
  return Storage::f32;
}

ScalarType acc_type(Storage storage) { return storage == Storage::f64 ? ScalarType::Double : ScalarType::Float; }

bool is_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

// True if memory runs [N][C][H][W]; the layouts coincide where C or H * W is 1. Empty tensors are of any layout.
bool is_planar(const Tensor& t) { return t.is_contiguous() || t.numel() == 0; }

// Maps of one operator have one shape, dtype, device and one dense layout.
struct MapChecker {
  const Tensor& first;
  bool planar, channels_last;

  MapChecker(const Tensor& map, const char* name) : first(map) {
    STD_TORCH_CHECK(map.dim() == 4, "ernet: ", name, " must have 4 dimensions [N, C, H, W]; got ", shape_text(map));
    STD_TORCH_CHECK(map.is_cpu(), "ernet: ", name, " must be on the CPU here");
    planar = is_planar(map);
    channels_last = map.numel() == 0 || is_channels_last(map);
  }

  void add(const Tensor& map, const char* name) {
    STD_TORCH_CHECK(map.dim() == 4 && shape_text(map) == shape_text(first), "ernet: all maps must have one shape; ",
                    name, " has ", shape_text(map), ", expected ", shape_text(first));
    STD_TORCH_CHECK(map.scalar_type() == first.scalar_type(), "ernet: all maps must have one dtype; ", name,
                    " differs");
    STD_TORCH_CHECK(map.is_cpu(), "ernet: all maps must be on one device; ", name, " is not on the CPU");
    planar = planar && is_planar(map);
    channels_last = channels_last && (map.numel() == 0 || is_channels_last(map));
  }

  MapShape shape(bool per_sample) const {
    STD_TORCH_CHECK(planar || channels_last,
                    "ernet: all maps must be dense in one layout, contiguous or channels-last. Call .contiguous() or "
                    ".contiguous(memory_format=torch.channels_last) on the others");
    return {first.size(0), first.size(1), first.size(2) * first.size(3), !planar, per_sample};
  }
};

// Checks a coefficient tensor against `sizes` and returns its data.
const void* coefficients(const Tensor& t, const char* name, const std::vector<int64_t>& sizes, Storage storage) {
  std::string wanted = "[";
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    wanted += (i ? ", " : "") + std::to_string(sizes[i]);
    same = same && t.size(static_cast<int64_t>(i)) == sizes[i];
  }
  STD_TORCH_CHECK(same, "ernet: ", name, " must have shape ", wanted, "]; got ", shape_text(t));
  STD_TORCH_CHECK(t.is_cpu(), "ernet: ", name, " must be on the device of the maps");
  STD_TORCH_CHECK(
      t.scalar_type() == acc_type(storage), "ernet: ", name, " must be ",
      storage == Storage::f64 ? "float64 for float64 maps" : "float32 for float32, bfloat16 and float16 maps");
  STD_TORCH_CHECK(t.is_contiguous() || t.numel() == 0, "ernet: ", name, " must be contiguous");
  return t.const_data_ptr();
}

std::vector<int64_t> channel_sizes(const MapShape& s) {
  return s.per_sample ? std::vector<int64_t>{s.N, s.C} : std::vector<int64_t>{s.C};
}

std::vector<const void*> pointers(const std::vector<Tensor>& maps) {
  std::vector<const void*> result;
  result.reserve(maps.size());
  for (const Tensor& map : maps) result.push_back(map.const_data_ptr());
  return result;
}

int64_t grain(const MapShape& shape, int64_t num_maps, bool reduction) {
  const int64_t items = kGrainElements / (ernet::cpu::item_elements(shape, reduction) * (num_maps > 0 ? num_maps : 1));
  return items > 0 ? items : 1;
}

// Partial results: every item writes its own, so they need no value but for empty maps, which have no items.
std::unique_ptr<double[]> partial_results(int64_t count, bool empty) {
  std::unique_ptr<double[]> partial(new double[static_cast<size_t>(count)]);
  if (empty) std::fill_n(partial.get(), count, 0.0);
  return partial;
}

Tensor like_channels(const Tensor& map, const std::vector<int64_t>& sizes, Storage storage) {
  return torch::stable::new_empty(map, sizes, acc_type(storage));
}

// An uninitialised map like `map`, which is dense. The memory of large ones is that of others that were freed.
Tensor empty_map_like(const Tensor& map) {
  const size_t bytes = static_cast<size_t>(map.numel()) * static_cast<size_t>(map.element_size());
  void* const buffer = ernet::cpu::take_map_buffer(bytes);
  if (buffer == nullptr) return torch::stable::empty_like(map);
  const auto give_back = [bytes](void* data) { ernet::cpu::give_map_buffer(data, bytes); };
  return torch::stable::from_blob(buffer, map.sizes(), map.strides(), map.device(), map.scalar_type(), give_back);
}

// Outputs this large are written past the cache. A stage's maps do not fit there together, and an ordinary store of a
// line that is not in the cache reads it first: with 12 MiB maps a stage's tails take 13 % longer, with 25 MiB 30 %.
constexpr size_t kStreamBytes = size_t{6} << 20;
bool streams(const Tensor& map) {
  return static_cast<size_t>(map.numel()) * static_cast<size_t>(map.element_size()) >= kStreamBytes;
}

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x, bool per_sample) {
  const MapChecker checker(x, "x");
  const Storage storage = storage_of(x, "x");
  const MapShape shape = checker.shape(per_sample);
  Tensor mean = like_channels(x, channel_sizes(shape), storage);
  Tensor var = like_channels(x, channel_sizes(shape), storage);
  const int64_t partials = shape.groups() * ernet::cpu::slabs_per_group(shape) * 2 * shape.C;
  const std::unique_ptr<double[]> partial = partial_results(partials, x.numel() == 0);
  const ernet::cpu::ChannelMoments args{shape, x.const_data_ptr(), partial.get()};
  if (x.numel() > 0) {
    const auto loop = ernet::cpu::er_loops().channel_moments[static_cast<int>(storage)];
    torch::stable::parallel_for(0, ernet::cpu::reduce_items(shape), grain(shape, 1, true),
                                [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  }
  if (storage == Storage::f64) {
    ernet::cpu::merge_moments(args, static_cast<double*>(mean.mutable_data_ptr()),
                              static_cast<double*>(var.mutable_data_ptr()));
  } else {
    ernet::cpu::merge_moments(args, static_cast<float*>(mean.mutable_data_ptr()),
                              static_cast<float*>(var.mutable_data_ptr()));
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
  const ernet::cpu::WeightedSum args{
      shape, static_cast<int64_t>(maps.size()), data.data(), a_data, b_data, y.mutable_data_ptr(), relu, streams(y)};
  if (y.numel() > 0) {
    const auto loop = ernet::cpu::er_loops().weighted_sum[static_cast<int>(storage)];
    torch::stable::parallel_for(0, ernet::cpu::sum_items(shape), grain(shape, args.num_maps, false),
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
  const int64_t partials = shape.groups() * ernet::cpu::slabs_per_group(shape) * rows * shape.C;
  const std::unique_ptr<double[]> partial = partial_results(partials, dy.numel() == 0);
  const ernet::cpu::WeightedDot args{shape,
                                     rows - 1,
                                     dy.const_data_ptr(),
                                     y.has_value() ? y->const_data_ptr() : nullptr,
                                     y.has_value() ? g.mutable_data_ptr() : nullptr,
                                     data.data(),
                                     partial.get(),
                                     y.has_value() && streams(g)};
  if (dy.numel() > 0) {
    const auto loop = ernet::cpu::er_loops().weighted_dot[static_cast<int>(storage)];
    torch::stable::parallel_for(0, ernet::cpu::reduce_items(shape), grain(shape, rows, true),
                                [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  }
  if (storage == Storage::f64) {
    ernet::cpu::merge_dot(args, static_cast<double*>(da.mutable_data_ptr()),
                          static_cast<double*>(db.mutable_data_ptr()));
  } else {
    ernet::cpu::merge_dot(args, static_cast<float*>(da.mutable_data_ptr()), static_cast<float*>(db.mutable_data_ptr()));
  }
  return {da, db, g};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def("channel_moments(Tensor x, bool per_sample) -> (Tensor mean, Tensor var)");
  m.def("weighted_sum(Tensor[] maps, Tensor a, Tensor? b, bool relu) -> Tensor");
  m.def(
      "weighted_dot(Tensor dy, Tensor[] maps, Tensor? y, bool per_sample) "
      "-> (Tensor da, Tensor db, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("weighted_sum", TORCH_BOX(&weighted_sum));
  m.impl("weighted_dot", TORCH_BOX(&weighted_dot));
}
