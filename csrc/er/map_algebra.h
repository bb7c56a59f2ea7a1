// The algebra of one feature map's backward pass: from the inner products of the map with all gradients that depend on
// it to the gradients of its own per-channel vectors, and to its own gradient dz as a weighted sum of maps.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "er/channel_vectors.h"

namespace ernet {

// A later block that reads the map and whose sum has a gradient g: rows [C] of this map. Null: absent.
template <typename A> struct LaterRows {
  const A* a;  // with which it reads the map
  const double* db = nullptr;
  const A* weight = nullptr;
  const A* running_mean = nullptr;  // null: the map was normalised with its measured moments
  const A* running_var = nullptr;
  A* dweight = nullptr;
};

template <typename A> struct MapVectors {
  int64_t C;
  const double* row;  // of the map in the stage's table
  BranchNorm norm;
  double eps;                       // of the shortcuts' variances
  double count;                     // values a channel
  const A* a;                       // of the map's own block, or null where that block's output has no gradient
  std::vector<LaterRows<A>> later;  // in the order of the rows of sums
  const double* sums;               // [later][C] inner products with each g; null: all gradients of vectors are 0
  const double* own_sums;           // [2][C]: sums of g * z and of g of the map's own block; null without a
  bool measured, pass_on;           // z, and a gradient passed on, are terms of dz
  A* rows;                          // [terms()][C], or null
  A* k0;                            // [C]
  A* dgamma;                        // [C], or null
  A* dbeta;
  double* dmoments;  // [2][C]

  int64_t terms() const { return (a != nullptr) + static_cast<int64_t>(later.size()) + measured + pass_on; }
};

template <typename A> class MapAlgebra {
 public:
  explicit MapAlgebra(MapVectors<A> vectors)
      : v_(std::move(vectors)), totals_(new double[static_cast<size_t>(kTotalRows * v_.C)]) {}

  void run(int64_t begin, int64_t end) const {
    if (v_.sums == nullptr) {
      for (int64_t i = 0; i < 2; ++i) std::fill(v_.dmoments + i * v_.C + begin, v_.dmoments + i * v_.C + end, 0.0);
      for (A* const vector : {v_.dgamma, v_.dbeta}) {
        if (vector != nullptr) std::fill(vector + begin, vector + end, A(0));
      }
    } else {
      gradients(begin, end);
    }
    if (v_.rows != nullptr) rows_of_dz(begin, end);
  }

 private:
  // Of the later blocks' weights, of gamma and beta, and of the moments.
  void gradients(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < kTotalRows; ++i) {
      std::fill(totals_.get() + i * v_.C + begin, totals_.get() + i * v_.C + end, 0.0);
    }
    const cpu::VectorLoops<A>& loops = vector_loops<A>();
    const double* sums = v_.sums;
    for (const LaterRows<A>& later : v_.later) {
      loops.pair({v_.C, v_.row, totals_.get(), later.weight, sums, later.db, later.running_mean, later.running_var,
                  v_.eps, later.dweight},
                 begin, end);
      sums += v_.C;
    }
    const double* const own = v_.a == nullptr ? nullptr : v_.own_sums;
    loops.own({v_.C, v_.row, totals_.get(), own, own == nullptr ? nullptr : own + v_.C, v_.norm, v_.dgamma, v_.dbeta,
               v_.dmoments},
              begin, end);
  }

  // Coefficients of dz: those with which blocks read the map, k1, and ones for a gradient passed on; and k0.
  void rows_of_dz(int64_t begin, int64_t end) const {
    A* row = v_.rows;
    const auto add = [&](const A* reader) {
      std::copy(reader + begin, reader + end, row + begin);
      row += v_.C;
    };
    if (v_.a != nullptr) add(v_.a);
    for (const LaterRows<A>& later : v_.later) add(later.a);
    if (v_.measured) {
      const double* const mean = v_.row + cpu::kMean * v_.C;
      vector_loops<A>().moments({v_.C, mean, v_.dmoments, v_.count, row, v_.k0}, begin, end);
      row += v_.C;
    }
    if (v_.pass_on) std::fill(row + begin, row + end, A(1));
  }

  MapVectors<A> v_;
  std::unique_ptr<double[]> totals_;  // [kTotalRows][C]
};

// What later blocks have left for the map, one entry each, in the order of the schemas.
struct LaterVectors {
  StackArguments& in;
  std::vector<Tensor> a = in.tensors(), db = in.tensors(), weight = in.tensors(), running_mean = in.tensors(),
                      running_var = in.tensors(), dweight = in.tensors();

  void check(size_t n) const {
    STD_TORCH_CHECK(a.size() == n && db.size() == n && weight.size() == n && running_mean.size() == n &&
                        running_var.size() == n && dweight.size() == n,
                    "ernet: all lists of later blocks must have one entry for each of the ", n,
                    " gradients of later blocks");
  }
};

// The row of map `index` of a tensor of A [> index, ...], with `width` values a row.
template <typename A> const A* row_of(const Tensor& t, const char* name, int64_t index, int64_t width) {
  STD_TORCH_CHECK(t.dim() >= 2 && t.size(0) > index && t.numel() == t.size(0) * width && t.is_cpu() &&
                      t.is_contiguous() && t.scalar_type() == vector_type(std::is_same_v<A, double>),
                  "ernet: ", name, " must be contiguous tensors [> ", index, ", ", width, "] of ",
                  std::is_same_v<A, double> ? "float64" : "float32", "; got ", shape_text(t));
  return static_cast<const A*>(t.const_data_ptr()) + index * width;
}

template <typename A> const A* vector_of(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  check_vector(t, name, sizes);
  STD_TORCH_CHECK(t.scalar_type() == vector_type(std::is_same_v<A, double>), "ernet: ", name, " must be ",
                  std::is_same_v<A, double> ? "float64" : "float32");
  return static_cast<const A*>(t.const_data_ptr());
}

// A row of a tensor of any floating dtype that later blocks have: weights, running statistics.
template <typename A>
const A* read_row(Vectors<A>& vectors, const Tensor& t, const char* name, int64_t index, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) > index, "ernet: ", name, " must have rows for map ", index, "; got ",
                  shape_text(t));
  return vectors.read(t, name, {t.size(0), channels}) + index * channels;
}

// The rows of map `index`; without inner products only those of a.
template <typename A>
std::vector<LaterRows<A>> later_rows(Vectors<A>& vectors, const LaterVectors& t, int64_t index, int64_t C, bool dots) {
  std::vector<LaterRows<A>> rows;
  for (size_t l = 0; l < t.a.size(); ++l) {
    rows.push_back({row_of<A>(t.a[l], "later_a", index, C)});
    if (!dots) continue;
    LaterRows<A>& row = rows.back();
    row.db = vector_of<double>(t.db[l], "later_db", {C});
    row.weight = read_row(vectors, t.weight[l], "later_weight", index, C);
    const bool running = t.running_mean[l].numel() > 0;
    STD_TORCH_CHECK(running == (t.running_var[l].numel() > 0),
                    "ernet: later_running_mean and later_running_var go together");
    if (running) {
      row.running_mean = read_row(vectors, t.running_mean[l], "later_running_mean", index, C);
      row.running_var = read_row(vectors, t.running_var[l], "later_running_var", index, C);
    }
    row.dweight = const_cast<A*>(row_of<A>(t.dweight[l], "later_dweight", index, C));
  }
  return rows;
}

}  // namespace ernet
