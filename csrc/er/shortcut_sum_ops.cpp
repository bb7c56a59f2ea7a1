// Gradients of an ER shortcut sum of maps that no block made, as one operator for the CPU: schema, argument checks and
// the implementation, by the loops of the other ER operators. Forward it is er_block, of a stage whose last map alone
// is a block's. Autograd and the fake kernel are in ernet_fast/er/shortcut_sum.py.
//
// Where a tile of some channels of all maps fits in the second-level cache, inner products, algebra and the gradients
// of all maps are done tile by tile, and each map comes from memory once. Over whole maps one pass over g serves the
// gradients of all maps: a tile of it stays in cache while they are written.
#include <optional>
#include <tuple>
#include <vector>

#include "er/map_algebra.h"
#include "er/passes.h"

namespace ernet {
namespace {

MapChecker checked(const std::vector<Tensor>& maps) {
  MapChecker checker = checked_maps(maps);
  STD_TORCH_CHECK(maps[0].numel() > 0, "ernet: maps must not be empty; got ", shape_text(maps[0]));
  return checker;
}

// Every dx_i in one pass over g, from the end: there the pass before has left g and the maps in cache.
void map_gradients(const MapShape& shape, Storage storage, int64_t element_size,
                   const std::vector<cpu::WeightedSum>& sums) {
  if (sums.empty()) return;
  const auto loop = cpu::er_loops().weighted_sum.items[static_cast<int>(storage)];
  const int64_t item_bytes = cpu::item_elements(shape, false) * element_size;
  const int64_t together = std::max<int64_t>(1, cpu::cache_shares().gradient / item_bytes);
  const int64_t num_sums = static_cast<int64_t>(sums.size());
  torch::stable::parallel_for(0, cpu::sum_items(shape), grain(shape, 2 * num_sums, false),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t first; end > begin; end = first) {
                                  first = std::max(begin, end - together);
                                  for (const cpu::WeightedSum& sum : sums) loop(sum, first, end);
                                }
                              });
}

struct BackwardParameters {
  StackArguments& in;
  Tensor dy = in.tensor();
  std::vector<Tensor> maps = in.tensors();
  OptionalTensor y = in.optional_tensor();
  Tensor weight = in.tensor();
  Tensor table = in.tensor();
  Tensor a = in.tensor();
  OptionalTensor running_mean = in.optional_tensor();
  OptionalTensor running_var = in.optional_tensor();
  double eps = in.number();
  std::vector<bool> needed = in.booleans();

  bool measured() const { return !running_mean.has_value(); }
};

// What da and db say of every earlier map: dweight, and coefficients of dx_i = a_i g + k1_i x_i + k0_i.
template <typename A> class Algebra {
 public:
  Algebra(const BackwardParameters& k, Storage storage, int64_t C, double count, A* dweight)
      : C_(C),
        last_(static_cast<int64_t>(k.maps.size())),
        da_(new double[static_cast<size_t>(last_ * C)]),
        db_(new double[static_cast<size_t>(C)]),
        rows_(array(3 * last_)) {
    const std::vector<int64_t> sizes = {last_, C};
    const auto acc = [&](const Tensor& t, const char* name) {
      return static_cast<const A*>(coefficients(t, name, sizes, storage));
    };
    const A* const a = static_cast<const A*>(coefficients(k.a, "a", {last_ + 1, C}, storage));
    const A* const weight = acc(k.weight, "weight");
    const A* const mean = k.measured() ? nullptr : acc(*k.running_mean, "running_mean");
    const A* const var = k.measured() ? nullptr : acc(*k.running_var, "running_var");
    const double* const table = static_cast<const double*>(k.table.const_data_ptr());
    dmoments_.reset(new double[static_cast<size_t>(last_ * 2 * C)]);
    for (int64_t l = 0; l < last_; ++l) {
      const int64_t at = l * C;
      MapVectors<A> v{};
      v.C = C;
      v.row = table + l * kTableRows * C;
      v.norm = BranchNorm::none;
      v.eps = k.eps;
      v.count = count;
      v.later = {{a + at, db_.get(), weight + at, mean == nullptr ? nullptr : mean + at,
                  var == nullptr ? nullptr : var + at, dweight + at}};
      v.sums = da_.get() + at;
      v.measured = k.measured();
      v.rows = rows_.get() + 3 * at;
      v.k0 = v.rows + 2 * C;
      v.dmoments = dmoments_.get() + 2 * at;
      maps_.emplace_back(std::move(v));
    }
  }

  // [maps][C] and [C], to be filled before run().
  double* da() const { return da_.get(); }
  double* db() const { return db_.get(); }
  // [3][C]: a, and where statistics are those of the maps, k1 and k0.
  const A* row(int64_t l) const { return rows_.get() + l * 3 * C_; }

  void run(int64_t begin, int64_t end) const {
    for (const MapAlgebra<A>& map : maps_) map.run(begin, end);
  }

 private:
  std::unique_ptr<A[]> array(int64_t rows) const { return std::unique_ptr<A[]>(new A[static_cast<size_t>(rows * C_)]); }

  const int64_t C_, last_;
  const std::unique_ptr<double[]> da_, db_;
  const std::unique_ptr<A[]> rows_;
  std::unique_ptr<double[]> dmoments_;
  std::vector<MapAlgebra<A>> maps_;
};

using Gradients = std::tuple<std::vector<Tensor>, Tensor, Tensor>;

template <typename A> Gradients backward(const BackwardParameters& k, const MapShape& shape, Storage storage) {
  const int64_t last = static_cast<int64_t>(k.maps.size()), C = shape.C;
  const std::vector<const void*> data = pointers(k.maps);
  const Tensor g = k.y.has_value() ? empty_map_like(k.dy) : k.dy;
  const Tensor dweight = like_channels(k.dy, {last, C}, storage);
  const Algebra<A> algebra(k, storage, C, static_cast<double>(shape.N * shape.P), data_of<A>(dweight));
  const cpu::MapDots args = gradient_dots(shape, k.dy, k.y, g, data);
  const Reduction dots(storage, args, algebra.da(), algebra.db());
  std::vector<Tensor> dmaps;
  std::vector<const void*> inputs(static_cast<size_t>(2 * last));  // of each map: g, x
  std::vector<cpu::WeightedSum> sums;
  for (int64_t l = 0; l < last; ++l) {
    if (!k.needed[static_cast<size_t>(l)]) continue;
    const void** const pair = inputs.data() + 2 * l;
    pair[0] = g.const_data_ptr();
    pair[1] = data[static_cast<size_t>(l)];
    dmaps.push_back(empty_map_like(k.dy));
    const A* const row = algebra.row(l);
    sums.push_back({shape, k.measured() ? 2 : 1, pair, nullptr, row, k.measured() ? row + 2 * C : nullptr,
                    dmaps.back().mutable_data_ptr(), false, streams(k.dy)});
  }
  over_channel_tiles(shape, last + 1, k.dy.element_size(), [&](const ChannelTile* tile) {
    over(tile, dots);
    over_vectors(tile, C, last + 1, [&](int64_t begin, int64_t end) { algebra.run(begin, end); });
    if (tile == nullptr) return map_gradients(shape, storage, k.dy.element_size(), sums);
    const auto loop = cpu::er_loops().weighted_sum.channel_tile[static_cast<int>(storage)];
    for (const cpu::WeightedSum& sum : sums) loop(sum, *tile);
  });
  return {dmaps, dweight, k.y.has_value() ? g : torch::stable::new_empty(k.dy, {0})};  // without y it is dy itself
}

Gradients shortcut_sum_backward(const BackwardParameters& k) {
  MapChecker checker = checked(k.maps);
  checker.add(k.dy, "dy");
  if (k.y.has_value()) checker.add(*k.y, "y");
  const MapShape shape = checker.shape(false);
  const Storage storage = storage_of(k.dy, "dy");
  const int64_t num_maps = static_cast<int64_t>(k.maps.size());
  STD_TORCH_CHECK(k.needed.size() == k.maps.size(), "ernet: needed must have one entry for each of the ", num_maps,
                  " maps; got ", k.needed.size());
  STD_TORCH_CHECK(k.running_mean.has_value() == k.running_var.has_value(),
                  "ernet: running_mean and running_var go together");
  coefficients(k.table, "table", {num_maps + 1, kTableRows, shape.C}, Storage::f64);
  return storage == Storage::f64 ? backward<double>(k, shape, storage) : backward<float>(k, shape, storage);
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def(
      "shortcut_sum_backward(Tensor dy, Tensor[] maps, Tensor? y, Tensor weight, Tensor table, Tensor a, "
      "Tensor? running_mean, Tensor? running_var, float eps, bool[] needed) "
      "-> (Tensor[] dmaps, Tensor dweight, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("shortcut_sum_backward", &ernet::boxed<ernet::BackwardParameters, ernet::shortcut_sum_backward>);
}
