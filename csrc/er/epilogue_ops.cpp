// The epilogue of an ER block with batch norm as one operator each way, for the CPU: schemas, argument checks and the
// implementation, by loops over feature maps and over per-channel vectors. Autograd is in ernet_fast/er/nodes.py, fake
// kernels in ernet_fast/er/epilogue.py.
//
// Forward goes by block: moments of z, coefficients, weighted sum of all maps up to z. Backward goes by map: the inner
// products of z with its own and every later g, gradients of per-channel vectors, and dz, a weighted sum of just those
// g and z. Channels are independent, so where a tile of some channels of these maps fits in the second-level cache, all
// of that is done channel tile by channel tile, and each map comes from memory once. Channels-last maps are not tiled;
// there the pass that writes dz takes the inner products of the map before with the g that it reads. Results are the
// same bits with and without tiles.
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
  bool relu = in.boolean();
};

template <typename A>
std::tuple<Tensor, Tensor> forward(const ForwardParameters& k, const MapShape& shape, Storage storage) {
  const int64_t index = static_cast<int64_t>(k.maps.size()) - 1;
  const double count = static_cast<double>(shape.N * shape.P);
  std::vector<std::unique_ptr<A[]>> moments;  // [2][C] of each map
  std::vector<Reduction<cpu::ChannelMoments, A>> passes;
  std::vector<BlockCoefficients<A>> files;  // of earlier maps, as they are
  for (int64_t i = k.filed; i <= index; ++i) {
    moments.emplace_back(new A[static_cast<size_t>(2 * shape.C)]);
    A *const mean = moments.back().get(), *const var = mean + shape.C;
    const void* const map = k.maps[static_cast<size_t>(i)].const_data_ptr();
    passes.emplace_back(storage, cpu::ChannelMoments{shape, map, nullptr}, mean, var);
    if (i == index) break;
    BlockCoefficients<A> file{};
    file.index = i;
    file.C = shape.C;
    file.table = table_of(k.table, i, shape.C);
    file.mean = k.measure_earlier ? mean : nullptr;
    file.var = k.measure_earlier ? var : nullptr;
    file.count = count;
    file.norm = BranchNorm::none;
    file.eps = k.epilogue.eps;
    files.push_back(file);
  }
  Vectors<A> vectors;
  Tensor a = cpu_output({index + 1, shape.C}, vector_type(std::is_same_v<A, double>), sizeof(A));
  const std::unique_ptr<A[]> b(new A[static_cast<size_t>(shape.C)]);
  const std::pair<const A*, const A*> own = {k.measure ? moments.back().get() : nullptr,
                                             k.measure ? moments.back().get() + shape.C : nullptr};
  BlockCoefficients<A> args = forward_arguments<A>(vectors, k.table, index, k.epilogue, own, count);
  args.a = data_of<A>(a);
  args.b = b.get();
  const std::vector<const void*> data = pointers(k.maps);
  const SumPass sum(shape, storage, k.maps[0], data, args.a, args.b, k.relu);
  over_channel_tiles(shape, index + 1, k.maps[0].element_size(), [&](const ChannelTile* tile) {
    for (size_t i = 0; k.measure_earlier && i < files.size(); ++i) over(tile, passes[i]);
    if (k.measure) over(tile, passes.back());
    over_vectors(tile, shape.C, index + 1, [&](int64_t begin, int64_t end) {
      for (const BlockCoefficients<A>& file : files) vector_loops<A>().block(file, begin, end);
      vector_loops<A>().block(args, begin, end);
    });
    over(tile, sum);
  });
  vectors.write_back();
  return {sum.y, a};
}

std::tuple<Tensor, Tensor> er_block(const ForwardParameters& k) {
  const MapChecker checker = checked_maps(k.maps);
  STD_TORCH_CHECK(k.maps[0].numel() > 0, "ernet: maps must not be empty; got ", shape_text(k.maps[0]));
  const Storage storage = storage_of(k.maps[0], "maps");
  const MapShape shape = checker.shape(false);
  const int64_t earlier = static_cast<int64_t>(k.maps.size()) - 1;
  STD_TORCH_CHECK(k.filed >= 0 && k.filed <= earlier, "ernet: filed must be 0 to ", earlier, ", the earlier maps; got ",
                  k.filed);
  STD_TORCH_CHECK(k.epilogue.weight.has_value(), "ernet: weight is missing");
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
  std::vector<Tensor> later_a = in.tensors();
  std::vector<Tensor> later_db = in.tensors();
  std::vector<Tensor> later_weight = in.tensors();
  std::vector<Tensor> later_running_mean = in.tensors();
  std::vector<Tensor> later_running_var = in.tensors();
  std::vector<Tensor> later_dweight = in.tensors();
  OptionalTensor passed = in.optional_tensor();
  OptionalTensor before = in.optional_tensor();
  OptionalTensor known = in.optional_tensor();
  Tensor table = in.tensor();
  int64_t norm = in.integer();
  double eps = in.number();
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
template <typename A>
class MapGradient {
 public:
  MapGradient(const BackwardParameters& k, const MapShape& shape, Storage storage)
      : k_(k),
        shape_(shape),
        storage_(storage),
        C_(shape.C),
        num_later_(static_cast<int64_t>(k.later_dy.size())),
        reached_(k.dy.has_value()),
        sums_(array<A>(num_later_ + 2)),
        own_sums_(sums_.get() + num_later_ * shape.C),
        dmoments_(array<double>(2)) {
    STD_TORCH_CHECK(k.a.has_value() == reached_, "ernet: a and dy go together");
    STD_TORCH_CHECK(k.dots || !(reached_ && k.y.has_value()), "ernet: without dots, dy must be g itself and y None");
    prepare_dots();
    prepare_sum();
    prepare_algebra();
  }

  Gradients run() {
    over_channel_tiles(
        shape_, static_cast<int64_t>(terms_.size()) + 1, k_.z.element_size(), [&](const ChannelTile* tile) {
          if (dots_) over(tile, *dots_);
          over_vectors(tile, C_, num_later_ + 2, [&](int64_t begin, int64_t end) { algebra_->run(begin, end); });
          if (sum_) over(tile, *sum_);
          if (sum_dots_) over(nullptr, *sum_dots_);
        });
    if (k_.dots && reached_) std::copy_n(own_sums_ + C_, C_, data_of<A>(db_));
    return {dz_, bits_, db_, dgamma_, dbeta_, before_dots_};
  }

 private:
  template <typename T>
  std::unique_ptr<T[]> array(int64_t rows) const {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(rows * C_)]);
  }
  static ScalarType type() { return vector_type(std::is_same_v<A, double>); }
  Tensor vector(int64_t rows) const { return cpu_output({rows * C_}, type(), sizeof(A)); }

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
      STD_TORCH_CHECK(k_.known->dim() == 2 && k_.known->size(0) == num_later_,
                      "ernet: known must have a row for each of the ", num_later_, " later blocks; got ",
                      shape_text(*k_.known));
      if (num_later_ > 0) std::copy_n(row_of<A>(*k_.known, "known", 0, C_), num_later_ * C_, sums_.get());
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
                            nullptr};
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
    before_dots_ = vector(0);
    dz_ = cpu_output({0}, k_.z.scalar_type(), 1);
    if (!k_.needed || terms_.empty()) return;
    const int64_t num_terms = static_cast<int64_t>(terms_.size());
    rows_ = array<A>(num_terms + 1);  // and k0
    const A* const k0 = k_.measured ? rows_.get() + num_terms * C_ : nullptr;
    const bool with_before =
        k_.before.has_value() && k_.dots && num_g > 0 && shape_.channels_last && !k_.passed.has_value();
    if (!with_before) {
      sum_.emplace(shape_, storage_, k_.z, terms_, rows_.get(), k0, false, term_bits_.data());
      dz_ = sum_->y;
      return;
    }
    before_dots_ = cpu_output({num_g, C_}, type(), sizeof(A));
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
    sum_dots_.emplace(storage_, args, data_of<A>(before_dots_));
  }

  // What the inner products say of the per-channel vectors, and the coefficients of dz.
  void prepare_algebra() {
    const bool affine = k_.norm != 0;
    db_ = vector(reached_ ? 1 : 0);
    dgamma_ = vector(affine ? 1 : 0);
    dbeta_ = vector(affine ? 1 : 0);
    const LaterVectors later{k_.later_a,           k_.later_db,     k_.later_weight, k_.later_running_mean,
                             k_.later_running_var, k_.later_dweight};
    later.check(k_.later_dy.size());
    MapVectors<A> v{};
    v.C = C_;
    v.row = table_of(k_.table, k_.index, C_) + k_.index * kTableRows * C_;
    v.norm = branch_norm(k_.norm);
    v.eps = k_.eps;
    v.count = static_cast<double>(shape_.N * shape_.P);
    v.a = reached_ ? row_of<A>(*k_.a, "a", k_.index, C_) : nullptr;
    v.later = later_rows<A>(vectors_, later, k_.index, C_, k_.dots);
    v.sums = k_.dots ? sums_.get() : nullptr;
    v.own_sums = own_sums_;
    v.measured = k_.measured;
    v.pass_on = k_.passed.has_value();
    v.rows = rows_.get();
    v.k0 = v.rows == nullptr ? nullptr : v.rows + v.terms() * C_;
    v.dgamma = affine ? data_of<A>(dgamma_) : nullptr;
    v.dbeta = affine ? data_of<A>(dbeta_) : nullptr;
    v.dmoments = dmoments_.get();
    algebra_.emplace(std::move(v));
  }

  void add_term(const void* map, const uint8_t* bits) {
    terms_.push_back(map);
    term_bits_.push_back(bits);
  }

  const BackwardParameters& k_;
  const MapShape shape_;
  const Storage storage_;
  const int64_t C_, num_later_;
  const bool reached_;
  const std::unique_ptr<A[]> sums_;  // [num_later][C]; then, of its own g, those of g * z and of g
  A* const own_sums_;
  const std::unique_ptr<double[]> dmoments_;
  Tensor dz_, bits_, db_, dgamma_, dbeta_, before_dots_;
  uint8_t* own_bits_ = nullptr;
  std::vector<const void*> later_g_, terms_;
  std::vector<const uint8_t*> later_bits_, term_bits_;
  Vectors<A> vectors_;
  std::unique_ptr<A[]> rows_;
  std::optional<MapAlgebra<A>> algebra_;
  std::optional<Reduction<cpu::MapDots, A>> dots_;
  std::optional<SumPass> sum_;
  std::optional<Reduction<cpu::SumDots, A>> sum_dots_;
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
  const MapShape shape = checker.shape(false);
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
      "Tensor(g!)? batches, bool use_running, float? momentum, float eps, bool relu) -> (Tensor y, Tensor a)");
  m.def(
      "er_block_backward(int index, Tensor z, Tensor? dy, Tensor? y, Tensor? a, Tensor[] later_dy, "
      "Tensor[] later_bits, Tensor[] later_a, Tensor[] later_db, Tensor[] later_weight, "
      "Tensor[] later_running_mean, Tensor[] later_running_var, Tensor(a!)[] later_dweight, Tensor? passed, "
      "Tensor? before, Tensor? known, Tensor table, int norm, float eps, bool dots, bool measured, bool needed) "
      "-> (Tensor dz, Tensor bits, Tensor db, Tensor dgamma, Tensor dbeta, Tensor before_dots)");
}

STABLE_TORCH_LIBRARY_IMPL(ernet, CPU, m) {
  m.impl("er_block", &ernet::boxed<ernet::ForwardParameters, ernet::er_block>);
  m.impl("er_block_backward", &ernet::boxed<ernet::BackwardParameters, ernet::er_block_backward>);
}
