// The whole ER shortcut sum with norm="batch" as one operator each way, for the CPU: schemas, argument checks and the
// implementation, by the loops of the other ER operators. Autograd and fake kernels are in ernet_fast/er/whole_sum.py.
//
// The maps are a stage of their own whose last map alone is a block's output, x = z for every map. In backward one pass
// over g serves the gradients of all maps: a tile of it stays in cache while they are written.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/er_coefficients.h"
#include "er_maps.h"

namespace ernet {
namespace {

using cpu::BlockCoefficients;
using cpu::BlockCoefficientsBackward;
using cpu::MomentsGradient;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGradientElements = 16384;  // elements of g that stay in cache while every map streams past
constexpr int64_t kGrainValues = 32768;       // values of C-vectors below which a second thread costs more
static_assert(cpu::kDVar == cpu::kDMean + 1, "the totals of mean and variance are the gradients of the moments");

MapChecker checked_maps(const std::vector<Tensor>& maps) {
  STD_TORCH_CHECK(!maps.empty(), "ernet: maps must hold at least one map");
  MapChecker checker(maps[0], "maps[0]");
  for (size_t i = 1; i < maps.size(); ++i) checker.add(maps[i], ("maps[" + std::to_string(i) + "]").c_str());
  STD_TORCH_CHECK(maps[0].numel() > 0, "ernet: maps must not be empty; got ", shape_text(maps[0]));
  return checker;
}

void loop(const BlockCoefficients<float>& k, int64_t c0, int64_t c1) {
  cpu::coefficient_loops().forward_f32(k, c0, c1);
}
void loop(const BlockCoefficients<double>& k, int64_t c0, int64_t c1) {
  cpu::coefficient_loops().forward_f64(k, c0, c1);
}
void loop(const BlockCoefficientsBackward<float>& k, int64_t c0, int64_t c1) {
  cpu::coefficient_loops().backward_f32(k, c0, c1);
}
void loop(const BlockCoefficientsBackward<double>& k, int64_t c0, int64_t c1) {
  cpu::coefficient_loops().backward_f64(k, c0, c1);
}

template <typename Arguments>
void over_channels(const Arguments& args) {
  torch::stable::parallel_for(0, args.C, std::max<int64_t>(1, kGrainValues / (args.index + 1)),
                              [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

void gradient(const MomentsGradient<float>& args) { cpu::coefficient_loops().gradient_f32(args, 0, args.C); }
void gradient(const MomentsGradient<double>& args) { cpu::coefficient_loops().gradient_f64(args, 0, args.C); }

// Mean and biased variance of each channel.
template <typename A>
void measure(const MapShape& shape, Storage storage, const Tensor& x, A* mean, A* var) {
  const std::unique_ptr<double[]> partial = partial_results(cpu::slabs_per_group(shape) * 2 * shape.C, false);
  const cpu::ChannelMoments args{shape, x.const_data_ptr(), partial.get()};
  const auto loop = cpu::er_loops().channel_moments[static_cast<int>(storage)];
  torch::stable::parallel_for(0, cpu::reduce_items(shape), grain(shape, 1, true),
                              [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  cpu::merge_moments(args, mean, var);
}

struct Running {
  const OptionalTensor &mean, &var;
  bool use;
  double momentum;
};

// The table of the maps, and a and b of their sum.
template <typename A>
void coefficients_of(const std::vector<Tensor>& maps, const MapShape& shape, Storage storage, const Tensor& weight,
                     const Running& running, double eps, double* table, A* a, A* b) {
  const int64_t last = static_cast<int64_t>(maps.size()) - 1;
  std::vector<A> moments(static_cast<size_t>(2 * shape.C));
  BlockCoefficients<A> args{};
  args.C = shape.C;
  args.table = table;
  args.count = static_cast<double>(shape.N * shape.P);
  args.norm = cpu::BranchNorm::none;
  args.eps = eps;
  if (!running.use) {
    args.mean = moments.data();
    args.var = moments.data() + shape.C;
  }
  for (args.index = 0; args.index < last; ++args.index) {
    if (!running.use) {
      measure(shape, storage, maps[static_cast<size_t>(args.index)], moments.data(), moments.data() + shape.C);
    }
    over_channels(args);
  }
  args.mean = args.var = nullptr;
  args.weight = static_cast<const A*>(coefficients(weight, "weight", {last, shape.C}, storage));
  args.use_running = running.use;
  args.momentum = running.momentum;
  args.a = a;
  args.b = b;
  if (running.mean.has_value()) {
    coefficients(*running.mean, "running_mean", {last, shape.C}, storage);
    coefficients(*running.var, "running_var", {last, shape.C}, storage);
    args.running_mean = static_cast<A*>(running.mean->mutable_data_ptr());
    args.running_var = static_cast<A*>(running.var->mutable_data_ptr());
  }
  over_channels(args);
}

std::tuple<Tensor, Tensor, Tensor> shortcut_sum(const std::vector<Tensor>& maps, const Tensor& weight,
                                                const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                                bool use_running, double momentum, double eps, bool relu) {
  const MapChecker checker = checked_maps(maps);
  const MapShape shape = checker.shape(false);
  const Storage storage = storage_of(maps[0], "maps");
  const int64_t num_maps = static_cast<int64_t>(maps.size()), C = shape.C;
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "ernet: running_mean and running_var go together");
  STD_TORCH_CHECK(!use_running || running_mean.has_value(), "ernet: use_running needs running_mean and running_var");
  coefficients(weight, "weight", {num_maps - 1, C}, storage);  // before anything is moved
  Tensor table = torch::stable::new_empty(maps[0], {num_maps, cpu::kTableRows, C}, ScalarType::Double);
  Tensor a = like_channels(maps[0], {num_maps, C}, storage), b = like_channels(maps[0], {C}, storage);
  double* const rows = static_cast<double*>(table.mutable_data_ptr());
  const Running running{running_mean, running_var, use_running, momentum};
  if (storage == Storage::f64) {
    coefficients_of(maps, shape, storage, weight, running, eps, rows, static_cast<double*>(a.mutable_data_ptr()),
                    static_cast<double*>(b.mutable_data_ptr()));
  } else {
    coefficients_of(maps, shape, storage, weight, running, eps, rows, static_cast<float*>(a.mutable_data_ptr()),
                    static_cast<float*>(b.mutable_data_ptr()));
  }
  Tensor y = empty_map_like(maps[0]);
  const std::vector<const void*> data = pointers(maps);
  const cpu::WeightedSum args{
      shape, num_maps, data.data(), a.const_data_ptr(), b.const_data_ptr(), y.mutable_data_ptr(), relu, streams(y)};
  const auto loop = cpu::er_loops().weighted_sum[static_cast<int>(storage)];
  torch::stable::parallel_for(0, cpu::sum_items(shape), grain(shape, num_maps, false),
                              [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  return {y, table, a};
}

// g of the pass, and da [L][C], db [C].
template <typename A>
Tensor dot(const MapShape& shape, Storage storage, const Tensor& dy, const std::vector<const void*>& maps,
           const OptionalTensor& y, A* da, A* db) {
  Tensor g = y.has_value() ? empty_map_like(dy) : dy;
  const int64_t num_maps = static_cast<int64_t>(maps.size());
  const int64_t partials = cpu::slabs_per_group(shape) * (num_maps + 1) * shape.C;
  const std::unique_ptr<double[]> partial = partial_results(partials, false);
  const cpu::WeightedDot args{shape,
                              num_maps,
                              dy.const_data_ptr(),
                              y.has_value() ? y->const_data_ptr() : nullptr,
                              y.has_value() ? g.mutable_data_ptr() : nullptr,
                              maps.data(),
                              partial.get(),
                              y.has_value() && streams(g)};
  const auto loop = cpu::er_loops().weighted_dot[static_cast<int>(storage)];
  torch::stable::parallel_for(0, cpu::reduce_items(shape), grain(shape, num_maps + 1, true),
                              [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  cpu::merge_dot(args, da, db);
  return g;
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
  std::vector<double> totals(static_cast<size_t>((last + 1) * cpu::kTotalRows * C)), unused(static_cast<size_t>(2 * C));
  BlockCoefficientsBackward<A> args{};
  args.index = last;
  args.C = C;
  args.table = static_cast<const double*>(saved.table.const_data_ptr());
  args.da = da;
  args.db = db;
  args.totals = totals.data();
  args.count = count;
  args.norm = cpu::BranchNorm::none;
  args.weight = static_cast<const A*>(coefficients(saved.weight, "weight", {last, C}, storage));
  args.use_running = saved.running_mean.has_value();
  if (args.use_running) {
    args.running_mean = static_cast<const A*>(coefficients(*saved.running_mean, "running_mean", {last, C}, storage));
    args.running_var = static_cast<const A*>(coefficients(*saved.running_var, "running_var", {last, C}, storage));
  }
  args.eps = saved.eps;
  args.dweight = dweight;
  args.dmoments = unused.data();
  over_channels(args);
  const A* a = static_cast<const A*>(coefficients(saved.a, "a", {last + 1, C}, storage));
  std::vector<A> rows(static_cast<size_t>(last * 3 * C));
  for (int64_t l = 0; l < last; ++l) {
    A* const row = rows.data() + l * 3 * C;
    std::copy_n(a + l * C, C, row);
    if (args.use_running) continue;
    gradient(MomentsGradient<A>{C, args.table + (l * cpu::kTableRows + cpu::kMean) * C,
                                totals.data() + (l * cpu::kTotalRows + cpu::kDMean) * C, count, row + C, row + 2 * C});
  }
  return rows;
}

template <typename A>
std::tuple<std::vector<Tensor>, Tensor, Tensor> backward(const MapShape& shape, Storage storage, const Tensor& dy,
                                                         const std::vector<Tensor>& maps, const OptionalTensor& y,
                                                         const Saved& saved, const std::vector<bool>& needed) {
  const int64_t last = static_cast<int64_t>(maps.size()), C = shape.C;
  const std::vector<const void*> data = pointers(maps);
  std::vector<A> da(static_cast<size_t>((last + 1) * C)), db(static_cast<size_t>(C));  // that of x_l stays 0, unused
  Tensor g = dot(shape, storage, dy, data, y, da.data(), db.data());
  Tensor dweight = like_channels(dy, {last, C}, storage);
  const std::vector<A> rows =
      gradient_rows(saved, storage, da.data(), db.data(), last, C, static_cast<double>(shape.N * shape.P),
                    static_cast<A*>(dweight.mutable_data_ptr()));
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
    sums.push_back({shape, measured ? 2 : 1, pair, row, measured ? row + 2 * C : nullptr,
                    dmaps.back().mutable_data_ptr(), false, streams(dy)});
  }
  map_gradients(shape, storage, sums);
  if (!y.has_value()) g = torch::stable::new_empty(dy, {0});  // it is dy itself
  return {dmaps, dweight, g};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> shortcut_sum_backward(const Tensor& dy, const std::vector<Tensor>& maps,
                                                                      const OptionalTensor& y, const Tensor& weight,
                                                                      const Tensor& table, const Tensor& a,
                                                                      const OptionalTensor& running_mean,
                                                                      const OptionalTensor& running_var, double eps,
                                                                      const std::vector<bool>& needed) {
  MapChecker checker = checked_maps(maps);
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
      "shortcut_sum(Tensor[] maps, Tensor weight, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "bool use_running, float momentum, float eps, bool relu) -> (Tensor y, Tensor table, Tensor a)");
  m.def(
      "shortcut_sum_backward(Tensor dy, Tensor[] maps, Tensor? y, Tensor weight, Tensor table, Tensor a, "
      "Tensor? running_mean, Tensor? running_var, float eps, bool[] needed) "
      "-> (Tensor[] dmaps, Tensor dweight, Tensor g)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("shortcut_sum", TORCH_BOX(&ernet::shortcut_sum));
  m.impl("shortcut_sum_backward", TORCH_BOX(&ernet::shortcut_sum_backward));
}
