// The tail of an ER block with batch norm as one operator each way, for the CPU: schemas, argument checks and the
// implementation, by loops over maps and over C-vectors. Autograd is in ernet_fast/er/nodes.py, fake kernels in
// ernet_fast/er/epilogue.py.
//
// Forward goes by block: moments of z, coefficients, weighted sum of all maps up to z. Backward goes by map: the dots
// of z with its own and every later g, gradients of C-vectors, and dz, a weighted sum of just those g and z. Channels
// have nothing to do with one another, so where a strip of some channels of these maps fits in the second-level cache,
// all of that is done strip by strip, and each map comes from memory once. Strips are of no use channels-last; there
// the pass that writes dz takes the dots of the map before with the g that it reads. Bits do not depend on strips.
#include <optional>
#include <tuple>
#include <vector>

#include "er/strips.h"
#include "memory/outputs.h"

namespace ernet {
namespace {

template <typename A>
struct Moments {
  explicit Moments(int64_t channels) : values(new A[static_cast<size_t>(2 * channels)]), channels(channels) {}

  A* mean() const { return values.get(); }
  A* var() const { return values.get() + channels; }

  std::unique_ptr<A[]> values;
  int64_t channels;
};

template <typename A>
std::tuple<Tensor, Tensor> forward(const std::vector<Tensor>& maps, const MapShape& shape, Storage storage,
                                   int64_t filed, bool measure_earlier, bool measure, const ForwardTensors& t,
                                   const ForwardNumbers& k, bool relu) {
  const double count = static_cast<double>(k.elements);
  std::vector<Moments<A>> moments;
  std::vector<MomentsPass<A>> passes;
  std::vector<BlockCoefficients<A>> files;  // of earlier maps, as they are
  for (int64_t i = filed; i <= k.index; ++i) {
    moments.emplace_back(shape.C);
    passes.emplace_back(shape, storage, maps[static_cast<size_t>(i)], moments.back().mean(), moments.back().var());
    if (i == k.index) break;
    BlockCoefficients<A> file{};
    file.index = i;
    file.C = shape.C;
    file.table = stage_rows(t.table, "table", kTableRows, i, shape.C);
    file.mean = measure_earlier ? moments.back().mean() : nullptr;
    file.var = measure_earlier ? moments.back().var() : nullptr;
    file.count = count;
    file.norm = BranchNorm::none;
    file.eps = k.eps;
    files.push_back(file);
  }
  Vectors<A> vectors;
  Tensor a = cpu_output({k.index + 1, shape.C}, vector_type(std::is_same_v<A, double>), sizeof(A));
  const std::unique_ptr<A[]> b(new A[static_cast<size_t>(shape.C)]);
  BlockCoefficients<A> args = forward_arguments<A>(
      vectors, t, k, {measure ? moments.back().mean() : nullptr, measure ? moments.back().var() : nullptr}, count);
  args.a = data_of<A>(a);
  args.b = b.get();
  const std::vector<const void*> data = pointers(maps);
  const SumPass sum(shape, storage, maps[0], data, args.a, args.b, relu);
  over_strips(shape, k.index + 1, maps[0].element_size(), [&](const Strip* strip) {
    for (size_t i = 0; measure_earlier && i < files.size(); ++i) over(strip, passes[i]);
    if (measure) over(strip, passes.back());
    over_vectors(strip, shape.C, k.index + 1, [&](int64_t begin, int64_t end) {
      for (const BlockCoefficients<A>& file : files) run(file, begin, end);
      run(args, begin, end);
    });
    over(strip, sum);
  });
  vectors.write_back();
  return {sum.y, a};
}

std::tuple<Tensor, Tensor> er_block(const std::vector<Tensor>& maps, const Tensor& table, int64_t filed,
                                    bool measure_earlier, bool measure, int64_t norm, const OptionalTensor& gamma,
                                    const OptionalTensor& beta, const OptionalTensor& norm_mean,
                                    const OptionalTensor& norm_var, const OptionalTensor& norm_batches,
                                    std::optional<double> norm_momentum, double norm_eps, const OptionalTensor& weight,
                                    const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                    const OptionalTensor& batches, bool use_running, std::optional<double> momentum,
                                    double eps, bool relu) {
  const MapChecker checker = checked_maps(maps);
  STD_TORCH_CHECK(maps[0].numel() > 0, "ernet: maps must not be empty; got ", shape_text(maps[0]));
  const Storage storage = storage_of(maps[0], "maps");
  const MapShape shape = checker.shape(false);
  const int64_t index = static_cast<int64_t>(maps.size()) - 1;
  STD_TORCH_CHECK(filed >= 0 && filed <= index, "ernet: filed must be 0 to ", index, ", the earlier maps; got ", filed);
  STD_TORCH_CHECK(weight.has_value(), "ernet: weight is missing");
  const ForwardTensors t{table,        gamma,  beta,         norm_mean,   norm_var,
                         norm_batches, weight, running_mean, running_var, batches};
  const ForwardNumbers k{index,    shape.N * shape.P, branch_norm(norm), norm_momentum,
                         norm_eps, use_running,       momentum,          eps};
  if (storage == Storage::f64)
    return forward<double>(maps, shape, storage, filed, measure_earlier, measure, t, k, relu);
  return forward<float>(maps, shape, storage, filed, measure_earlier, measure, t, k, relu);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What later blocks have left, one entry each: g as a dy and its bits, db, and what goes with their a, weight [> index,
// C].
struct Later {
  const std::vector<Tensor>&dy, &bits, &a, &db, &weight, &running_mean, &running_var, &dweight;

  size_t size() const { return dy.size(); }

  void check() const {
    const size_t n = dy.size();
    STD_TORCH_CHECK(bits.size() == n && a.size() == n && db.size() == n && weight.size() == n &&
                        running_mean.size() == n && running_var.size() == n && dweight.size() == n,
                    "ernet: all lists of later blocks must have one entry for each of the ", n, " dy");
  }
};

struct Gradient {
  int64_t index;
  const Tensor& z;
  const OptionalTensor &dy, &y, &a, &passed, &before, &known;
  const Tensor& table;
  BranchNorm norm;
  double eps;
  bool dots, measured, needed;
};

// The bits of map i begin i lines into their tensor: those of all maps at one place of their pages would have every
// load of one wait for a store to another.
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

// The row of map `index` of an acc tensor [> index, C].
template <typename A>
const A* row_of(const Tensor& t, const char* name, int64_t index, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) > index && t.size(1) == channels && t.is_cpu() && t.is_contiguous() &&
                      t.scalar_type() == vector_type(std::is_same_v<A, double>),
                  "ernet: ", name, " must be contiguous tensors [> ", index, ", ", channels, "] of ",
                  std::is_same_v<A, double> ? "float64" : "float32", "; got ", shape_text(t));
  return static_cast<const A*>(t.const_data_ptr()) + index * channels;
}

template <typename A>
const A* vector_of(const Tensor& t, const char* name, int64_t channels) {
  check_vector(t, name, {channels});
  STD_TORCH_CHECK(t.scalar_type() == vector_type(std::is_same_v<A, double>), "ernet: ", name, " has another dtype");
  return static_cast<const A*>(t.const_data_ptr());
}

// A row of a tensor of any floating dtype that later blocks have: weights, running statistics.
template <typename A>
const A* read_row(Vectors<A>& vectors, const Tensor& t, const char* name, int64_t index, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) > index, "ernet: ", name, " must have rows for map ", index);
  return vectors.read(t, name, {t.size(0), channels}) + index * channels;
}

// Backward of one map. What the passes and the algebra need is laid out first; then all of it runs, strip by strip or
// over whole maps.
template <typename A>
class MapGradient {
 public:
  MapGradient(const Gradient& k, const Later& later, const MapShape& shape, Storage storage)
      : k_(k),
        later_(later),
        shape_(shape),
        storage_(storage),
        C_(shape.C),
        num_later_(static_cast<int64_t>(later.size())),
        reached_(k.dy.has_value()),
        row_(stage_rows(k.table, "table", kTableRows, k.index, shape.C) + k.index * kTableRows * shape.C),
        sums_(array<A>(num_later_ + 2)),
        own_sums_(sums_.get() + num_later_ * shape.C),
        totals_(array<double>(kTotalRows)),
        dmoments_(array<double>(2)) {
    STD_TORCH_CHECK(k.a.has_value() == reached_, "ernet: a and dy go together");
    STD_TORCH_CHECK(k.dots || !(reached_ && k.y.has_value()), "ernet: without dots, dy must be g itself and y None");
    prepare_dots();
    prepare_algebra();
    prepare_sum();
  }

  Gradients run() {
    over_strips(shape_, static_cast<int64_t>(terms_.size()) + 1, k_.z.element_size(), [&](const Strip* strip) {
      if (dots_) over(strip, *dots_);
      over_vectors(strip, C_, num_later_ + 2, [&](int64_t begin, int64_t end) {
        for (const cpu::PairGradient<A>& pair : pairs_) ernet::run(pair, begin, end);
        ernet::run(own_, begin, end);
        if (sum_ || sum_dots_) rows_of_dz_.fill(begin, end);
      });
      if (sum_) over(strip, *sum_);
      if (sum_dots_) sum_dots_->whole();
    });
    if (own_.db != nullptr) std::copy_n(own_.db, C_, data_of<A>(db_));
    const Tensor none = cpu_output({0}, k_.z.scalar_type(), 1);
    return {sum_ ? sum_->y : sum_dots_ ? sum_dots_->y : none, bits_, db_, dgamma_, dbeta_, before_dots_};
  }

 private:
  template <typename T>
  std::unique_ptr<T[]> array(int64_t rows) const {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(rows * C_)]);
  }
  static ScalarType type() { return vector_type(std::is_same_v<A, double>); }
  Tensor vector(int64_t rows) const { return cpu_output({rows * C_}, type(), sizeof(A)); }

  // The dots of z with its own g, and, where they are not known, with every later one.
  void prepare_dots() {
    const bool gated = reached_ && k_.y.has_value(), known = k_.known.has_value();
    // Not from the memory that is kept for maps: a size of its own would have a map's given back to the system.
    const int64_t bytes = gated ? lead_bytes(k_.index) + cpu::bit_bytes(shape_) : 0;
    bits_ = allocated_output({bytes}, {1}, ScalarType::Byte, static_cast<size_t>(bytes));
    own_bits_ = gated ? data_of<uint8_t>(bits_) + lead_bytes(k_.index) : nullptr;
    for (size_t l = 0; l < later_.size(); ++l) {
      later_g_.push_back(later_.dy[l].const_data_ptr());
      later_bits_.push_back(checked_bits(later_.bits[l], shape_));
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
                            known ? 0 : num_later_,
                            later_g_.data(),
                            later_bits_.data(),
                            nullptr};
    if (k_.dots && args.rows() > 0) dots_.emplace(storage_, args, known ? own_sums_ : sums_.get());
  }

  // What the dots say of the C-vectors.
  void prepare_algebra() {
    const bool affine = k_.norm != BranchNorm::none, own = k_.dots && reached_;
    db_ = vector(reached_ ? 1 : 0);
    dgamma_ = vector(affine ? 1 : 0);
    dbeta_ = vector(affine ? 1 : 0);
    std::fill_n(totals_.get(), kTotalRows * C_, 0.0);
    for (size_t l = 0; k_.dots && l < later_.size(); ++l) {
      const bool running = later_.running_mean[l].numel() > 0;
      pairs_.push_back(
          {C_, row_, totals_.get(), read_row(vectors_, later_.weight[l], "later_weight", k_.index, C_),
           sums_.get() + static_cast<int64_t>(l) * C_, vector_of<A>(later_.db[l], "later_db", C_),
           running ? read_row(vectors_, later_.running_mean[l], "later_running_mean", k_.index, C_) : nullptr,
           running ? read_row(vectors_, later_.running_var[l], "later_running_var", k_.index, C_) : nullptr, k_.eps,
           const_cast<A*>(row_of<A>(later_.dweight[l], "later_dweight", k_.index, C_))});
    }
    own_ = {C_,
            row_,
            totals_.get(),
            own ? own_sums_ : nullptr,
            own ? own_sums_ + C_ : nullptr,
            k_.norm,
            affine ? data_of<A>(dgamma_) : nullptr,
            affine ? data_of<A>(dbeta_) : nullptr,
            dmoments_.get()};
  }

  // dz, the weighted sum of g, z and what is passed on; over whole maps also the dots of the map before with every g.
  void prepare_sum() {
    std::vector<const A*> readers;
    if (reached_) readers.push_back(row_of<A>(*k_.a, "a", k_.index, C_));
    for (const Tensor& a : later_.a) readers.push_back(row_of<A>(a, "later_a", k_.index, C_));
    if (reached_) add_term(k_.dy->const_data_ptr(), own_bits_);
    for (size_t l = 0; l < later_g_.size(); ++l) add_term(later_g_[l], later_bits_[l]);
    const int64_t num_g = static_cast<int64_t>(terms_.size());
    if (k_.measured) add_term(k_.z.const_data_ptr(), nullptr);
    if (k_.passed.has_value()) add_term(k_.passed->const_data_ptr(), nullptr);
    const int64_t num_terms = static_cast<int64_t>(terms_.size());
    rows_ = array<A>(num_terms + 1);  // and k0
    A* const k0 = k_.measured ? rows_.get() + num_terms * C_ : nullptr;
    const double count = static_cast<double>(shape_.N * shape_.P);
    rows_of_dz_ = {readers,
                   k_.measured,
                   k_.passed.has_value(),
                   {C_, row_ + cpu::kMean * C_, dmoments_.get(), count, nullptr, k0},
                   rows_.get(),
                   C_};
    before_dots_ = vector(0);
    if (!k_.needed || terms_.empty()) return;
    const bool with_before =
        k_.before.has_value() && k_.dots && num_g > 0 && shape_.channels_last && !k_.passed.has_value();
    if (!with_before) {
      sum_.emplace(shape_, storage_, k_.z, terms_, rows_.get(), k0, false, term_bits_.data());
      return;
    }
    before_dots_ = cpu_output({num_g, C_}, type(), sizeof(A));
    const cpu::SumDots args{
        shape_,      num_g, terms_.data(), term_bits_.data(),           k_.measured ? k_.z.const_data_ptr() : nullptr,
        rows_.get(), k0,    nullptr,       k_.before->const_data_ptr(), nullptr,
        false};
    sum_dots_.emplace(storage_, k_.z, args, data_of<A>(before_dots_));
  }

  void add_term(const void* map, const uint8_t* bits) {
    terms_.push_back(map);
    term_bits_.push_back(bits);
  }

  const Gradient& k_;
  const Later& later_;
  const MapShape shape_;
  const Storage storage_;
  const int64_t C_, num_later_;
  const bool reached_;
  const double* const row_;
  const std::unique_ptr<A[]> sums_;  // [num_later][C]; then, of its own g, those of g * z and of g
  A* const own_sums_;
  const std::unique_ptr<double[]> totals_, dmoments_;
  Tensor bits_, db_, dgamma_, dbeta_, before_dots_;
  uint8_t* own_bits_ = nullptr;
  std::vector<const void*> later_g_, terms_;
  std::vector<const uint8_t*> later_bits_, term_bits_;
  Vectors<A> vectors_;
  std::vector<cpu::PairGradient<A>> pairs_;
  cpu::OwnGradient<A> own_{};
  std::unique_ptr<A[]> rows_;
  GradientRows<A> rows_of_dz_{};
  std::optional<MapDotsPass<A>> dots_;
  std::optional<SumPass> sum_;
  std::optional<SumDotsPass<A>> sum_dots_;
};

Gradients er_block_backward(int64_t index, const Tensor& z, const OptionalTensor& dy, const OptionalTensor& y,
                            const OptionalTensor& a, const std::vector<Tensor>& later_dy,
                            const std::vector<Tensor>& later_bits, const std::vector<Tensor>& later_a,
                            const std::vector<Tensor>& later_db, const std::vector<Tensor>& later_weight,
                            const std::vector<Tensor>& later_running_mean, const std::vector<Tensor>& later_running_var,
                            const std::vector<Tensor>& later_dweight, const OptionalTensor& passed,
                            const OptionalTensor& before, const OptionalTensor& known, const Tensor& table,
                            int64_t norm, double eps, bool dots, bool measured, bool needed) {
  MapChecker checker(z, "z");
  if (dy.has_value()) checker.add(*dy, "dy");
  if (y.has_value()) checker.add(*y, "y");
  for (const Tensor& map : later_dy) checker.add(map, "later_dy");
  if (passed.has_value()) checker.add(*passed, "passed");
  if (before.has_value()) checker.add(*before, "before");
  STD_TORCH_CHECK(z.numel() > 0, "ernet: z must not be empty; got ", shape_text(z));
  const Storage storage = storage_of(z, "z");
  const MapShape shape = checker.shape(false);
  const Later later{later_dy,     later_bits,         later_a,           later_db,
                    later_weight, later_running_mean, later_running_var, later_dweight};
  later.check();
  const Gradient k{index, z, dy, y, a, passed, before, known, table, branch_norm(norm), eps, dots, measured, needed};
  return storage == Storage::f64 ? MapGradient<double>(k, later, shape, storage).run()
                                 : MapGradient<float>(k, later, shape, storage).run();
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
  m.impl("er_block", TORCH_BOX(&ernet::er_block));
  m.impl("er_block_backward", TORCH_BOX(&ernet::er_block_backward));
}
