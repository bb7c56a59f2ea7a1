// Gradients of an ER shortcut sum of maps that no block made, as one operator for the CPU: schema, argument checks and
// the implementation, by the loops of the other ER operators. Forward it is er_block, of a stage whose last map alone
// is a block's. Autograd and the fake kernel are in ernet_fast/er/shortcut_sum.py.
//
// Where a strip of some channels of all maps fits in the second-level cache, dots, algebra and the gradients of all
// maps are done strip by strip, and each map comes from memory once. Over whole maps one pass over g serves the
// gradients of all maps: a tile of it stays in cache while they are written.
#include <optional>
#include <tuple>
#include <vector>

#include "er/strips.h"

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

// What da and db say: dweight, and of each earlier map the coefficients of dx_i = a_i g + k1_i x_i + k0_i.
template <typename A>
class Algebra {
 public:
  Algebra(const Saved& saved, Storage storage, const A* da, const A* db, int64_t last, int64_t C, double count,
          A* dweight)
      : last_(last),
        C_(C),
        a_(static_cast<const A*>(coefficients(saved.a, "a", {last + 1, C}, storage))),
        totals_(static_cast<size_t>(last * cpu::kTotalRows * C)),
        rows_(static_cast<size_t>(last * 3 * C)) {
    const double* const table = static_cast<const double*>(saved.table.const_data_ptr());
    const A* const weight = static_cast<const A*>(coefficients(saved.weight, "weight", {last, C}, storage));
    const bool use_running = saved.running_mean.has_value();
    const A *mean = nullptr, *var = nullptr;
    if (use_running) {
      mean = static_cast<const A*>(coefficients(*saved.running_mean, "running_mean", {last, C}, storage));
      var = static_cast<const A*>(coefficients(*saved.running_var, "running_var", {last, C}, storage));
    }
    for (int64_t l = 0; l < last; ++l) {
      const double* const map = table + l * cpu::kTableRows * C;
      double* const totals = totals_.data() + l * cpu::kTotalRows * C;
      pairs_.push_back({C, map, totals, weight + l * C, da + l * C, db, use_running ? mean + l * C : nullptr,
                        use_running ? var + l * C : nullptr, saved.eps, dweight + l * C});
      if (use_running) continue;
      A* const row = rows_.data() + l * 3 * C;
      moments_.push_back({C, map + cpu::kMean * C, totals + cpu::kDMean * C, count, row + C, row + 2 * C});
    }
  }

  Algebra(const Algebra&) = delete;  // its calls point into its own vectors
  Algebra& operator=(const Algebra&) = delete;

  // [3][C]: a, and where statistics are those of the maps, k1 and k0.
  const A* row(int64_t l) const { return rows_.data() + l * 3 * C_; }

  void run(int64_t begin, int64_t end) {
    for (const cpu::PairGradient<A>& pair : pairs_) ernet::run(pair, begin, end);
    for (const cpu::MomentsGradient<A>& moments : moments_) ernet::run(moments, begin, end);
    for (int64_t l = 0; l < last_; ++l) {
      std::copy(a_ + l * C_ + begin, a_ + l * C_ + end, rows_.data() + l * 3 * C_ + begin);
    }
  }

 private:
  int64_t last_, C_;
  const A* a_;
  std::vector<double> totals_;
  std::vector<A> rows_;
  std::vector<cpu::PairGradient<A>> pairs_;
  std::vector<cpu::MomentsGradient<A>> moments_;
};

template <typename A>
std::tuple<std::vector<Tensor>, Tensor, Tensor> backward(const MapShape& shape, Storage storage, const Tensor& dy,
                                                         const std::vector<Tensor>& maps, const OptionalTensor& y,
                                                         const Saved& saved, const std::vector<bool>& needed) {
  const int64_t last = static_cast<int64_t>(maps.size()), C = shape.C;
  const std::vector<const void*> data = pointers(maps);
  std::vector<A> da(static_cast<size_t>(last * C)), db(static_cast<size_t>(C));
  Tensor g = y.has_value() ? empty_map_like(dy) : dy;
  void* const g_data = y.has_value() ? g.mutable_data_ptr() : nullptr;
  const DotPass<A> dots(shape, storage, dy, y, g_data, data, da.data(), db.data());
  Tensor dweight = like_channels(dy, {last, C}, storage);
  Algebra<A> algebra(saved, storage, da.data(), db.data(), last, C, static_cast<double>(shape.N * shape.P),
                     data_of<A>(dweight));
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
    const A* const row = algebra.row(l);
    sums.push_back({shape, measured ? 2 : 1, pair, nullptr, row, measured ? row + 2 * C : nullptr,
                    dmaps.back().mutable_data_ptr(), false, streams(dy)});
  }
  over_strips(shape, last + 1, dy.element_size(), [&](const Strip* strip) {
    over(strip, dots);
    over_vectors(strip, C, last + 1, [&](int64_t begin, int64_t end) { algebra.run(begin, end); });
    if (strip == nullptr) return map_gradients(shape, storage, sums);
    const auto loop = cpu::er_loops().weighted_sum_strip[static_cast<int>(storage)];
    for (const cpu::WeightedSum& sum : sums) loop(sum, *strip);
  });
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
