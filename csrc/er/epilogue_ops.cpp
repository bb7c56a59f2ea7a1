// The epilogue of an ER block as one operator each way, for the CPU: schemas, argument checks and the
// implementation, by loops over feature maps and over per-channel vectors. Autograd is in ernet_fast/er/nodes.py, fake
// kernels in ernet_fast/er/epilogue.py.
//
// Forward goes by block: moments of z, coefficients, weighted sum of all maps up to z. Backward goes by map: the inner
// products of z with its own and every later g, gradients of per-channel vectors, and dz, a weighted sum of just those
// g and z. Channels are independent, so where a tile of some channels of these maps fits in the second-level cache, all
// of that is done channel tile by channel tile, and each map comes from memory once. Channels-last maps are not tiled;
// there the pass that writes dz takes the inner products of the map before with the g that it reads. Results are the
// same bits with and without tiles. With group norm moments, inner products and coefficients are those of each sample,
// and channels of a group depend on one another: there are no tiles.
#include <optional>
#include <tuple>
#include <vector>

#include "er/map_algebra.h"
#include "er/passes.h"

namespace ernet {
namespace {

struct ForwardParameters {
  StackArguments& in;
  std::vector<Tensor> maps = in.tensors();
  Tensor table = in.tensor();
  int64_t filed = in.integer();
  bool measure_earlier = in.boolean();
  bool measure = in.boolean();
  EpilogueParameters epilogue{in};
  int64_t num_groups = in.integer();
  bool relu = in.boolean();
};

Grouping grouping_of(int64_t num_groups, const Tensor& map) {
  STD_TORCH_CHECK(num_groups >= 0 && (num_groups == 0 || map.size(1) % num_groups == 0), "ernet: num_groups must be 0 ",
                  "(batch norm) or divide the ", map.size(1), " channels; got ", num_groups);
  return {map.size(0), num_groups};
}

// work(begin, end) on per-channel vectors of whole groups, by several threads where `values` of a channel pay.
template <typename Work>
void over_channel_groups(int64_t channels, int64_t num_groups, int64_t values, const Work& work) {
  const int64_t width = channels / num_groups;
  torch::stable::parallel_for(0, num_groups, kGrainValues / (width * values) + 1,
                              [&](int64_t begin, int64_t end) { work(begin * width, end * width); });
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor> forward(const ForwardParameters& k, const MapShape& shape, Storage storage) {
  const int64_t index = static_cast<int64_t>(k.maps.size()) - 1;
  const int64_t width = shape.groups() * shape.C;
  const double count = static_cast<double>(shape.N * shape.P);
  const Grouping grouping{shape.N, k.num_groups};
  std::vector<std::unique_ptr<A[]>> moments;  // [2][groups][C] of each map
  std::vector<Reduction<cpu::ChannelMoments, A>> passes;
  std::vector<BlockCoefficients<A>> files;  // of earlier maps, as they are
  for (int64_t i = k.filed; i <= index; ++i) {
    moments.emplace_back(new A[static_cast<size_t>(2 * width)]);
    A *const mean = moments.back().get(), *const var = mean + width;
    const void* const map = k.maps[static_cast<size_t>(i)].const_data_ptr();
    passes.emplace_back(storage, cpu::ChannelMoments{shape, map, nullptr}, mean, var);
    if (i == index) break;
    BlockCoefficients<A> file{};
    file.index = i;
    file.C = shape.C;
    file.table = table_of(k.table, i, shape.C, grouping.table_rows());
    file.mean = k.measure_earlier ? mean : nullptr;
    file.var = k.measure_earlier ? var : nullptr;
    file.count = count;
    file.norm = BranchNorm::none;
    file.eps = k.epilogue.eps;
    file.samples = grouping.samples;
    file.num_groups = grouping.num_groups;
    files.push_back(file);
  }
  Vectors<A> vectors;
  std::vector<int64_t> sizes = channel_sizes(shape);
  Tensor b = cpu_output(sizes, vector_type(std::is_same_v<A, double>), sizeof(A));
  sizes.insert(sizes.begin(), index + 1);
  Tensor a = cpu_output(sizes, vector_type(std::is_same_v<A, double>), sizeof(A));
  const std::pair<const A*, const A*> own = {k.measure ? moments.back().get() : nullptr,
                                             k.measure ? moments.back().get() + width : nullptr};
  BlockCoefficients<A> args = forward_arguments<A>(vectors, k.table, index, k.epilogue, own, count, grouping);
  args.a = data_of<A>(a);
  args.b = data_of<A>(b);
  const std::vector<const void*> data = pointers(k.maps);
  const SumPass sum(shape, storage, k.maps[0], data, args.a, args.b, k.relu);
  over_channel_tiles(shape, index + 1, k.maps[0].element_size(), [&](const ChannelTile* tile) {
    for (size_t i = 0; k.measure_earlier && i < files.size(); ++i) over(tile, passes[i]);
    if (k.measure) over(tile, passes.back());
    const auto block = k.num_groups > 0 ? vector_loops<A>().group_block : vector_loops<A>().block;
    const auto algebra = [&](int64_t begin, int64_t end) {
      for (const BlockCoefficients<A>& file : files) block(file, begin, end);
      block(args, begin, end);
    };
    if (k.num_groups > 0) {
      over_channel_groups(shape.C, k.num_groups, (index + 1) * shape.N, algebra);
    } else {
      over_vectors(tile, shape.C, index + 1, algebra);
    }
    over(tile, sum);
  });
  vectors.write_back();
  return {sum.y, a, b};
}

std::tuple<Tensor, Tensor, Tensor> er_block(const ForwardParameters& k) {
  const MapChecker checker = checked_maps(k.maps);
  STD_TORCH_CHECK(k.maps[0].numel() > 0, "ernet: maps must not be empty; got ", shape_text(k.maps[0]));
  const Storage storage = storage_of(k.maps[0], "maps");
  const MapShape shape = checker.shape(grouping_of(k.num_groups, k.maps[0]).num_groups > 0);
  const int64_t earlier = static_cast<int64_t>(k.maps.size()) - 1;
  STD_TORCH_CHECK(k.filed >= 0 && k.filed <= earlier, "ernet: filed must be 0 to ", earlier, ", the earlier maps; got ",
                  k.filed);
  STD_TORCH_CHECK(k.epilogue.weight.has_value(), "ernet: weight is missing");
  STD_TORCH_CHECK(k.num_groups == 0 || !k.epilogue.running_mean.has_value(),
                  "ernet: group norm has no running_mean and running_var");
  STD_TORCH_CHECK(k.num_groups == 0 || k.measure_earlier, "ernet: group norm needs measure_earlier");
  return storage == Storage::f64 ? forward<double>(k, shape, storage) : forward<float>(k, shape, storage);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Lists: what later blocks have left, one entry each; their g as a dy and its ReLU bitmask.
struct BackwardParameters {
  StackArguments& in;
  int64_t index = in.integer();
  Tensor z = in.tensor();
  OptionalTensor dy = in.optional_tensor();
  OptionalTensor y = in.optional_tensor();
  OptionalTensor a = in.optional_tensor();
  std::vector<Tensor> later_dy = in.tensors();
  std::vector<Tensor> later_bits = in.tensors();
  LaterVectors later{in};
  OptionalTensor passed = in.optional_tensor();
  OptionalTensor before = in.optional_tensor();
  OptionalTensor known = in.optional_tensor();
  Tensor table = in.tensor();
  int64_t norm = in.integer();
  double eps = in.number();
  int64_t num_groups = in.integer();
  bool dots = in.boolean();
  bool measured = in.boolean();
  bool needed = in.boolean();
};

// The ReLU bitmask of map i begins i lines into its tensor: those of all maps at one place of their pages would have
// every load of one wait for a store to another.
constexpr int64_t kLeadBytes = 64, kLeads = 64;
int64_t lead_bytes(int64_t index) { return index % kLeads * kLeadBytes; }

const uint8_t* checked_bits(const Tensor& bits, const MapShape& shape) {
  if (bits.numel() == 0) return nullptr;
  const int64_t lead = bits.numel() - cpu::bit_bytes(shape);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_cpu() && bits.is_contiguous() && lead >= 0 &&
                      lead < kLeads * kLeadBytes,
                  "ernet: later_bits must be the bits that this operator returns for maps of this shape");
  return static_cast<const uint8_t*>(bits.const_data_ptr()) + lead;
}

// Backward of one map. What the passes and the algebra need is laid out first; then all of it runs, channel tile by
// tile or over whole maps.
template <typename A> class MapGradient {
 public:
  MapGradient(const BackwardParameters& k, const MapShape& shape, Storage storage)
      : k_(k),
        shape_(shape),
        storage_(storage),
        C_(shape.C),
        width_(shape.groups() * shape.C),
        num_later_(static_cast<int64_t>(k.later_dy.size())),
        reached_(k.dy.has_value()),
        sums_(array<double>((num_later_ + 2) * width_)),
        own_sums_(sums_.get() + num_later_ * width_) {
    STD_TORCH_CHECK(k.a.has_value() == reached_, "ernet: a and dy go together");
    STD_TORCH_CHECK(k.dots || !(reached_ && k.y.has_value()), "ernet: without dots, dy must be g itself and y None");
    prepare_dots();
    prepare_sum();
    k.num_groups > 0 ? prepare_group_algebra() : prepare_algebra();
  }

  Gradients run() {
    over_channel_tiles(
        shape_, static_cast<int64_t>(terms_.size()) + 1, k_.z.element_size(), [&](const ChannelTile* tile) {
          if (dots_) over(tile, *dots_);
          if (algebra_)
            over_vectors(tile, C_, num_later_ + 2, [&](int64_t begin, int64_t end) { algebra_->run(begin, end); });
          if (group_.scratch != nullptr) run_group_algebra();
          if (sum_) over(tile, *sum_);
          if (sum_dots_) over(nullptr, *sum_dots_);
        });
    if (k_.dots && reached_) std::copy_n(own_sums_ + width_, width_, data_of<double>(db_));
    return {dz_, bits_, db_, dgamma_, dbeta_, before_dots_};
  }

 private:
  template <typename T> static std::unique_ptr<T[]> array(int64_t size) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);
  }
  Tensor vector(bool there) const {
    return cpu_output({there ? C_ : 0}, vector_type(std::is_same_v<A, double>), sizeof(A));
  }
  std::vector<int64_t> sizes() const { return channel_sizes(shape_); }

  // The inner products of z with its own g, and, where they are not known, with every later one.
  void prepare_dots() {
    const bool gated = reached_ && k_.y.has_value(), known = k_.known.has_value();
    // Not from the memory that is kept for maps: a size of its own would have a map's given back to the system.
    const int64_t bytes = gated ? lead_bytes(k_.index) + cpu::bit_bytes(shape_) : 0;
    bits_ = allocated_output({bytes}, {1}, ScalarType::Byte, static_cast<size_t>(bytes));
    own_bits_ = gated ? data_of<uint8_t>(bits_) + lead_bytes(k_.index) : nullptr;
    for (size_t l = 0; l < k_.later_dy.size(); ++l) {
      later_g_.push_back(k_.later_dy[l].const_data_ptr());
      later_bits_.push_back(checked_bits(k_.later_bits[l], shape_));
    }
    if (known) {
      STD_TORCH_CHECK(k_.known->dim() == 2 + shape_.per_sample && k_.known->size(0) == num_later_,
                      "ernet: known must have a row for each of the ", num_later_, " later blocks; got ",
                      shape_text(*k_.known));
      if (num_later_ > 0) std::copy_n(row_of<double>(*k_.known, "known", 0, width_), num_later_ * width_, sums_.get());
    }
    const cpu::MapDots args{shape_,
                            k_.z.const_data_ptr(),
                            reached_ ? k_.dy->const_data_ptr() : nullptr,
                            gated ? k_.y->const_data_ptr() : nullptr,
                            own_bits_,
                            nullptr,
                            known ? 0 : num_later_,
                            later_g_.data(),
                            later_bits_.data(),
                            nullptr,
                            false};
    if (k_.dots && args.rows() > 0) dots_.emplace(storage_, args, known ? own_sums_ : sums_.get());
  }

  // dz, the weighted sum of g, z and what is passed on; over whole maps also the inner products of the map before with
  // every g.
  void prepare_sum() {
    if (reached_) add_term(k_.dy->const_data_ptr(), own_bits_);
    for (size_t l = 0; l < later_g_.size(); ++l) add_term(later_g_[l], later_bits_[l]);
    const int64_t num_g = static_cast<int64_t>(terms_.size());
    if (k_.measured) add_term(k_.z.const_data_ptr(), nullptr);
    if (k_.passed.has_value()) add_term(k_.passed->const_data_ptr(), nullptr);
    before_dots_ = cpu_output({0}, ScalarType::Double, sizeof(double));
    dz_ = cpu_output({0}, k_.z.scalar_type(), 1);
    if (!k_.needed || terms_.empty()) return;
    const int64_t num_terms = static_cast<int64_t>(terms_.size());
    rows_ = array<A>((num_terms + 1) * width_);  // and k0
    const A* const k0 = k_.measured ? rows_.get() + num_terms * width_ : nullptr;
    const bool with_before =
        k_.before.has_value() && k_.dots && num_g > 0 && shape_.channels_last && !k_.passed.has_value();
    if (!with_before) {
      sum_.emplace(shape_, storage_, k_.z, terms_, rows_.get(), k0, false, term_bits_.data());
      dz_ = sum_->y;
      return;
    }
    std::vector<int64_t> dots_sizes = sizes();
    dots_sizes.insert(dots_sizes.begin(), num_g);
    before_dots_ = cpu_output(dots_sizes, ScalarType::Double, sizeof(double));
    dz_ = empty_map_like(k_.z);
    const cpu::SumDots args{shape_,
                            num_g,
                            terms_.data(),
                            term_bits_.data(),
                            k_.measured ? k_.z.const_data_ptr() : nullptr,
                            rows_.get(),
                            k0,
                            dz_.mutable_data_ptr(),
                            k_.before->const_data_ptr(),
                            nullptr,
                            streams(k_.z)};
    sum_dots_.emplace(storage_, args, data_of<double>(before_dots_));
  }

  // What is returned of per-channel vectors.
  void prepare_vectors() {
    const bool affine = k_.norm != 0;
    db_ = cpu_output(reached_ ? sizes() : std::vector<int64_t>{0}, ScalarType::Double, sizeof(double));
    dgamma_ = vector(affine);
    dbeta_ = vector(affine);
    k_.later.check(k_.later_dy.size());
  }

  // What the inner products say of the per-channel vectors, and the coefficients of dz.
  void prepare_algebra() {
    prepare_vectors();
    dmoments_ = array<double>(2 * C_);
    MapVectors<A> v{};
    v.C = C_;
    v.row = table_of(k_.table, k_.index, C_) + k_.index * kTableRows * C_;
    v.norm = branch_norm(k_.norm);
    v.eps = k_.eps;
    v.count = static_cast<double>(shape_.N * shape_.P);
    v.a = reached_ ? row_of<A>(*k_.a, "a", k_.index, C_) : nullptr;
    v.later = later_rows<A>(vectors_, k_.later, k_.index, C_, k_.dots);
    v.sums = k_.dots ? sums_.get() : nullptr;
    v.own_sums = own_sums_;
    v.measured = k_.measured;
    v.pass_on = k_.passed.has_value();
    v.rows = rows_.get();
    v.k0 = v.rows == nullptr ? nullptr : v.rows + v.terms() * C_;
    v.dgamma = k_.norm != 0 ? data_of<A>(dgamma_) : nullptr;
    v.dbeta = k_.norm != 0 ? data_of<A>(dbeta_) : nullptr;
    v.dmoments = dmoments_.get();
    algebra_.emplace(std::move(v));
  }

  // The same with group norm. Coefficients with which blocks read the map, and ones, are rows as they are.
  void prepare_group_algebra() {
    prepare_vectors();
    const LaterVectors& later = k_.later;
    const Grouping grouping = grouping_of(k_.num_groups, k_.z);
    const double* const table = table_of(k_.table, k_.index, C_, grouping.table_rows());
    A* row = rows_.get();
    const auto add_row = [&](const A* from) {
      if (row != nullptr) row = std::copy_n(from, width_, row);
    };
    if (reached_) add_row(row_of<A>(*k_.a, "a", k_.index, width_));
    for (size_t l = 0; l < later.a.size(); ++l) {
      add_row(row_of<A>(later.a[l], "later_a", k_.index, width_));
      if (!k_.dots) continue;
      STD_TORCH_CHECK(later.running_mean[l].numel() == 0, "ernet: group norm has no later_running_mean");
      readers_.push_back({sums_.get() + static_cast<int64_t>(l) * width_,
                          vector_of<double>(later.db[l], "later_db", sizes()),
                          read_row(vectors_, later.weight[l], "later_weight", k_.index, C_),
                          const_cast<A*>(row_of<A>(later.dweight[l], "later_dweight", k_.index, C_))});
    }
    const bool moments = k_.measured && row != nullptr;
    if (k_.passed.has_value() && row != nullptr) std::fill_n(row + (moments ? width_ : 0), width_, A(1));
    if (!k_.dots) {
      for (const Tensor& vector : {dgamma_, dbeta_}) std::fill_n(data_of<A>(vector), vector.numel(), A(0));
      if (moments) std::fill_n(row, width_, A(0));
      if (moments) std::fill_n(rows_.get() + static_cast<int64_t>(terms_.size()) * width_, width_, A(0));
      return;
    }
    scratch_ = array<double>(cpu::group_scratch_rows(shape_.N) * C_);
    const bool own = reached_, affine = k_.norm != 0;
    group_ = {C_,
              shape_.N,
              k_.num_groups,
              table + k_.index * grouping.table_rows() * C_,
              branch_norm(k_.norm),
              static_cast<double>(shape_.P),
              readers_.data(),
              static_cast<int64_t>(readers_.size()),
              own ? own_sums_ : nullptr,
              own ? own_sums_ + width_ : nullptr,
              affine ? data_of<A>(dgamma_) : nullptr,
              affine ? data_of<A>(dbeta_) : nullptr,
              moments ? row : nullptr,
              moments ? rows_.get() + static_cast<int64_t>(terms_.size()) * width_ : nullptr,
              scratch_.get()};
  }

  void run_group_algebra() const {
    over_channel_groups(C_, k_.num_groups, (num_later_ + 2) * shape_.N,
                        [&](int64_t begin, int64_t end) { vector_loops<A>().group_gradient(group_, begin, end); });
  }

  void add_term(const void* map, const uint8_t* bits) {
    terms_.push_back(map);
    term_bits_.push_back(bits);
  }

  const BackwardParameters& k_;
  const MapShape shape_;
  const Storage storage_;
  const int64_t C_, width_, num_later_;
  const bool reached_;
  const std::unique_ptr<double[]> sums_;  // [num_later][groups][C]; then, of its own g, those of g * z and of g
  double* const own_sums_;
  std::unique_ptr<double[]> dmoments_, scratch_;
  Tensor dz_, bits_, db_, dgamma_, dbeta_, before_dots_;
  uint8_t* own_bits_ = nullptr;
  std::vector<const void*> later_g_, terms_;
  std::vector<const uint8_t*> later_bits_, term_bits_;
  Vectors<A> vectors_;
  std::unique_ptr<A[]> rows_;
  std::optional<MapAlgebra<A>> algebra_;  // batch norm
  std::vector<cpu::GroupReader<A>> readers_;
  cpu::GroupGradient<A> group_{};
  std::optional<Reduction<cpu::MapDots, double>> dots_;
  std::optional<SumPass> sum_;
  std::optional<Reduction<cpu::SumDots, double>> sum_dots_;
};

Gradients er_block_backward(const BackwardParameters& k) {
  MapChecker checker(k.z, "z");
  if (k.dy.has_value()) checker.add(*k.dy, "dy");
  if (k.y.has_value()) checker.add(*k.y, "y");
  for (const Tensor& map : k.later_dy) checker.add(map, "later_dy");
  if (k.passed.has_value()) checker.add(*k.passed, "passed");
  if (k.before.has_value()) checker.add(*k.before, "before");
  STD_TORCH_CHECK(k.z.numel() > 0, "ernet: z must not be empty; got ", shape_text(k.z));
  STD_TORCH_CHECK(k.later_bits.size() == k.later_dy.size(),
                  "ernet: all lists of later blocks must have one entry for "
                  "each of the ",
                  k.later_dy.size(), " dy");
  const Storage storage = storage_of(k.z, "z");
  const MapShape shape = checker.shape(grouping_of(k.num_groups, k.z).num_groups > 0);
  return storage == Storage::f64 ? MapGradient<double>(k, shape, storage).run()
                                 : MapGradient<float>(k, shape, storage).run();
}

}  // namespace
}  // namespace ernet

STABLE_TORCH_LIBRARY_FRAGMENT(ernet, m) {
  m.def(
      "er_block(Tensor[] maps, Tensor(a!) table, int filed, bool measure_earlier, bool measure, int norm, "
      "Tensor? gamma, Tensor? beta, Tensor(b!)? norm_mean, Tensor(c!)? norm_var, Tensor(d!)? norm_batches, "
      "float? norm_momentum, float norm_eps, Tensor? weight, Tensor(e!)? running_mean, Tensor(f!)? running_var, "
      "Tensor(g!)? batches, bool use_running, float? momentum, float eps, int num_groups, bool relu) "
      "-> (Tensor y, Tensor a, Tensor b)");
  m.def(
      "er_block_backward(int index, Tensor z, Tensor? dy, Tensor? y, Tensor? a, Tensor[] later_dy, "
      "Tensor[] later_bits, Tensor[] later_a, Tensor[] later_db, Tensor[] later_weight, "
      "Tensor[] later_running_mean, Tensor[] later_running_var, Tensor(a!)[] later_dweight, Tensor? passed, "
      "Tensor? before, Tensor? known, Tensor table, int norm, float eps, int num_groups, bool dots, bool measured, "
      "bool needed) "
      "-> (Tensor dz, Tensor bits, Tensor db, Tensor dgamma, Tensor dbeta, Tensor before_dots)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("er_block", &ernet::boxed<ernet::ForwardParameters, ernet::er_block>);
  m.impl("er_block_backward", &ernet::boxed<ernet::BackwardParameters, ernet::er_block_backward>);
}
