// Gradients of an ER shortcut sum of maps that no block made, as one operator for the CPU: schema, argument checks and
// the implementation, by the loops of the other ER operators. Forward it is er_block, of a stage whose last map alone
// is a block's. Autograd and the fake kernel are in ernet_fast/er/whole_sum.py.
//
// One pass over g serves the gradients of all maps: a tile of it stays in cache while they are written.
#include <optional>
#include <tuple>
#include <vector>

#include "er_passes.h"
#include "er_vectors.h"

namespace ernet {
namespace {

constexpr int64_t kGradientElements = 16384;  // elements of g that stay in cache while every map streams past
static_assert(cpu::kDVar == cpu::kDMean + 1, "the totals of mean and variance are the gradients of the moments");

MapChecker checked(const std::vector<Tensor>& maps) {
  MapChecker checker = checked_maps(maps);
  STD_TORCH_CHECK(maps[0].numel() > 0, "ernet: maps must not be empty; got ", shape_text(maps[0]));
  return checker;
}

// Every dx_i in one pass over g, from the end: there the pass before has left g and the maps in cache.
void map_gradients(const MapShape& shape, Storage storage, const std::vector<cpu::WeightedSum>& sums) {
  if (sums.empty()) return;
  const auto loop = cpu::er_loops().weighted_sum[static_cast<int>(storage)];
  const int64_t together = std::max<int64_t>(1, kGradientElements / cpu::item_elements(shape, false));
  const int64_t num_sums = static_cast<int64_t>(sums.size());
  torch::stable::parallel_for(0, cpu::sum_items(shape), grain(shape, 2 * num_sums, false),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t first; end > begin; end = first) {
                                  first = std::max(begin, end - together);
                                  for (const cpu::WeightedSum& sum : sums) loop(sum, first, end);
                                }
                              });
}

struct Saved {
  const Tensor &weight, &table, &a;
  const OptionalTensor &running_mean, &running_var;
  double eps;
};

// dweight, and of each earlier map the coefficients of dx_i = a_i g + k1_i x_i + k0_i: rows [L][3][C].
template <typename A>
std::vector<A> gradient_rows(const Saved& saved, Storage storage, const A* da, const A* db, int64_t last, int64_t C,
                             double count, A* dweight) {
  std::vector<double> totals(static_cast<size_t>(last * cpu::kTotalRows * C));
  const double* const table = static_cast<const double*>(saved.table.const_data_ptr());
  const A* const weight = static_cast<const A*>(coefficients(saved.weight, "weight", {last, C}, storage));
  const bool use_running = saved.running_mean.has_value();
  const void *running_mean = nullptr, *running_var = nullptr;
  if (use_running) {
    running_mean = coefficients(*saved.running_mean, "running_mean", {last, C}, storage);
    running_var = coefficients(*saved.running_var, "running_var", {last, C}, storage);
  }
  over_channels(C, last + 1, [&](int64_t begin, int64_t end) {
    for (int64_t l = 0; l < last; ++l) {
      const cpu::PairGradient<A> pair{C,
                                      table + l * cpu::kTableRows * C,
                                      totals.data() + l * cpu::kTotalRows * C,
                                      weight + l * C,
                                      da + l * C,
                                      db,
                                      use_running ? static_cast<const A*>(running_mean) + l * C : nullptr,
                                      use_running ? static_cast<const A*>(running_var) + l * C : nullptr,
                                      saved.eps,
                                      dweight + l * C};
      run(pair, begin, end);
    }
  });
  const A* a = static_cast<const A*>(coefficients(saved.a, "a", {last + 1, C}, storage));
  std::vector<A> rows(static_cast<size_t>(last * 3 * C));
  for (int64_t l = 0; l < last; ++l) {
    A* const row = rows.data() + l * 3 * C;
    std::copy_n(a + l * C, C, row);
    if (use_running) continue;
    run(cpu::MomentsGradient<A>{C, table + (l * cpu::kTableRows + cpu::kMean) * C,
                                totals.data() + (l * cpu::kTotalRows + cpu::kDMean) * C, count, row + C, row + 2 * C},
        0, C);
  }
  return rows;
}

template <typename A>
std::tuple<std::vector<Tensor>, Tensor, Tensor> backward(const MapShape& shape, Storage storage, const Tensor& dy,
                                                         const std::vector<Tensor>& maps, const OptionalTensor& y,
                                                         const Saved& saved, const std::vector<bool>& needed) {
  const int64_t last = static_cast<int64_t>(maps.size()), C = shape.C;
  const std::vector<const void*> data = pointers(maps);
  std::vector<A> da(static_cast<size_t>(last * C)), db(static_cast<size_t>(C));
  Tensor g = y.has_value() ? empty_map_like(dy) : dy;
  void* const g_data = y.has_value() ? g.mutable_data_ptr() : nullptr;
  DotPass<A>(shape, storage, dy, y, g_data, data, da.data(), db.data()).whole();
  Tensor dweight = like_channels(dy, {last, C}, storage);
  const std::vector<A> rows = gradient_rows(saved, storage, da.data(), db.data(), last, C,
                                            static_cast<double>(shape.N * shape.P), data_of<A>(dweight));
  const bool measured = !saved.running_mean.has_value();
  std::vector<Tensor> dmaps;
  std::vector<const void*> inputs(static_cast<size_t>(2 * last));  // of each map: g, x
  std::vector<cpu::WeightedSum> sums;
  for (int64_t l = 0; l < last; ++l) {
    if (!needed[static_cast<size_t>(l)]) continue;
    const void** const pair = inputs.data() + 2 * l;
    pair[0] = g.const_data_ptr();
    pair[1] = data[static_cast<size_t>(l)];
    dmaps.push_back(empty_map_like(dy));
    const A* const row = rows.data() + l * 3 * C;
    sums.push_back({shape, measured ? 2 : 1, pair, nullptr, row, measured ? row + 2 * C : nullptr,
                    dmaps.back().mutable_data_ptr(), false, streams(dy)});
  }
  map_gradients(shape, storage, sums);
  return {dmaps, dweight, y.has_value() ? g : torch::stable::new_empty(dy, {0})};  // without y it is dy itself
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> shortcut_sum_backward(const Tensor& dy, const std::vector<Tensor>& maps,
                                                                      const OptionalTensor& y, const Tensor& weight,
                                                                      const Tensor& table, const Tensor& a,
                                                                      const OptionalTensor& running_mean,
                                                                      const OptionalTensor& running_var, double eps,
                                                                      const std::vector<bool>& needed) {
  MapChecker checker = checked(maps);
  checker.add(dy, "dy");
  if (y.has_value()) checker.add(*y, "y");
  const MapShape shape = checker.shape(false);
  const Storage storage = storage_of(dy, "dy");
  const int64_t num_maps = static_cast<int64_t>(maps.size());
  STD_TORCH_CHECK(needed.size() == maps.size(), "ernet: needed must have one entry for each of the ", num_maps,
                  " maps; got ", needed.size());
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "ernet: running_mean and running_var go together");
  coefficients(table, "table", {num_maps + 1, cpu::kTableRows, shape.C}, Storage::f64);
  const Saved saved{weight, table, a, running_mean, running_var, eps};
  if (storage == Storage::f64) return backward<double>(shape, storage, dy, maps, y, saved, needed);
  return backward<float>(shape, storage, dy, maps, y, saved, needed);
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def(
      "shortcut_sum_backward(Tensor dy, Tensor[] maps, Tensor? y, Tensor weight, Tensor table, Tensor a, "
      "Tensor? running_mean, Tensor? running_var, float eps, bool[] needed) "
      "-> (Tensor[] dmaps, Tensor dweight, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) { m.impl("shortcut_sum_backward", TORCH_BOX(&ernet::shortcut_sum_backward)); }
