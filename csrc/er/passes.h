// The passes over maps that the ER operators are made of: each over whole maps by several threads, or over one strip.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "er/feature_maps.h"

namespace ernet {

using cpu::Strip;

inline Strip all_channels(const MapShape& shape) { return {0, shape.C}; }

// Mean and biased variance of each channel: mean, var [groups][C].
template <typename A>
class MomentsPass {
 public:
  MomentsPass(const MapShape& shape, Storage storage, const Tensor& x, A* mean, A* var)
      : partial_(partial_results(shape.groups() * cpu::slabs_per_group(shape) * 2 * shape.C, x.numel() == 0)),
        args_{shape, x.const_data_ptr(), partial_.get()},
        storage_(static_cast<int>(storage)),
        empty_(x.numel() == 0),
        mean_(mean),
        var_(var) {}

  void whole() const {
    if (!empty_) {
      const auto loop = cpu::er_loops().channel_moments[storage_];
      torch::stable::parallel_for(0, cpu::reduce_items(args_.shape), grain(args_.shape, 1, true),
                                  [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
    }
    cpu::merge_moments(args_, all_channels(args_.shape), mean_, var_);
  }

  void strip(const Strip& strip) const {
    cpu::er_loops().channel_moments_strip[storage_](args_, strip);
    cpu::merge_moments(args_, strip, mean_, var_);
  }

 private:
  std::unique_ptr<double[]> partial_;
  cpu::ChannelMoments args_;
  int storage_;
  bool empty_;
  A *mean_, *var_;
};

// y = sum_l a_l * x_l + b, then ReLU if asked; y is allocated. `bits`: as cpu::WeightedSum has them.
class SumPass {
 public:
  SumPass(const MapShape& shape, Storage storage, const Tensor& like, const std::vector<const void*>& maps,
          const void* a, const void* b, bool relu, const uint8_t* const* bits = nullptr)
      : y(empty_map_like(like)),
        args_{shape,        static_cast<int64_t>(maps.size()), maps.data(), bits, a, b, y.mutable_data_ptr(), relu,
              streams(like)},
        storage_(static_cast<int>(storage)) {}

  void whole() const {
    if (y.numel() == 0) return;
    const auto loop = cpu::er_loops().weighted_sum[storage_];
    torch::stable::parallel_for(0, cpu::sum_items(args_.shape), grain(args_.shape, args_.num_maps, false),
                                [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
  }

  void strip(const Strip& strip) const { cpu::er_loops().weighted_sum_strip[storage_](args_, strip); }

  const Tensor y;

 private:
  cpu::WeightedSum args_;
  int storage_;
};

// g = dy, or dy where y > 0, which is written; da [maps][groups][C] and db [groups][C] of the maps.
template <typename A>
class DotPass {
 public:
  DotPass(const MapShape& shape, Storage storage, const Tensor& dy, const std::optional<Tensor>& y, void* g,
          const std::vector<const void*>& maps, A* da, A* db)
      : partial_(partial_results(
            shape.groups() * cpu::slabs_per_group(shape) * (static_cast<int64_t>(maps.size()) + 1) * shape.C,
            dy.numel() == 0)),
        args_{shape,
              static_cast<int64_t>(maps.size()),
              dy.const_data_ptr(),
              y.has_value() ? y->const_data_ptr() : nullptr,
              g,
              maps.data(),
              partial_.get(),
              g != nullptr && streams(dy)},
        storage_(static_cast<int>(storage)),
        empty_(dy.numel() == 0),
        da_(da),
        db_(db) {}

  void whole() const {
    if (!empty_) {
      const auto loop = cpu::er_loops().weighted_dot[storage_];
      torch::stable::parallel_for(0, cpu::reduce_items(args_.shape), grain(args_.shape, args_.num_maps + 1, true),
                                  [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
    }
    cpu::merge_dot(args_, all_channels(args_.shape), da_, db_);
  }

  // What comes next in the strip reads g from the cache.
  void strip(const Strip& strip) const {
    cpu::WeightedDot args = args_;
    args.stream = false;
    cpu::er_loops().weighted_dot_strip[storage_](args, strip);
    cpu::merge_dot(args, strip, da_, db_);
  }

 private:
  std::unique_ptr<double[]> partial_;
  cpu::WeightedDot args_;
  int storage_;
  bool empty_;
  A *da_, *db_;
};

// The gradient `y` of a channels-last map like `like`, allocated, and the sums [args.num_g][C] of the map before;
// `args.y` and `args.partial` are set here.
template <typename A>
class SumDotsPass {
 public:
  SumDotsPass(Storage storage, const Tensor& like, const cpu::SumDots& args, A* sums)
      : y(empty_map_like(like)),
        partial_(partial_results(cpu::slabs_per_group(args.shape) * args.num_g * args.shape.C, false)),
        args_(args),
        storage_(static_cast<int>(storage)),
        sums_(sums) {
    args_.y = y.mutable_data_ptr();
    args_.partial = partial_.get();
    args_.stream = streams(like);
  }

  void whole() const {
    const auto loop = cpu::er_loops().sum_dots[storage_];
    torch::stable::parallel_for(0, cpu::reduce_items(args_.shape), grain(args_.shape, args_.num_g + 2, true),
                                [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
    cpu::merge_sum_dots(args_, sums_);
  }

  const Tensor y;

 private:
  std::unique_ptr<double[]> partial_;
  cpu::SumDots args_;
  int storage_;
  A* sums_;
};

// Sums [args.rows()][C] of one map with every g; `args.partial` is set here.
template <typename A>
class MapDotsPass {
 public:
  MapDotsPass(Storage storage, const cpu::MapDots& args, A* sums)
      : partial_(partial_results(cpu::slabs_per_group(args.shape) * args.rows() * args.shape.C, false)),
        args_(args),
        storage_(static_cast<int>(storage)),
        sums_(sums) {
    args_.partial = partial_.get();
  }

  void whole() const {
    const auto loop = cpu::er_loops().map_dots[storage_];
    torch::stable::parallel_for(0, cpu::reduce_items(args_.shape), grain(args_.shape, args_.rows() + 1, true),
                                [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
    cpu::merge_map_dots(args_, all_channels(args_.shape), sums_);
  }

  void strip(const Strip& strip) const {
    cpu::er_loops().map_dots_strip[storage_](args_, strip);
    cpu::merge_map_dots(args_, strip, sums_);
  }

 private:
  std::unique_ptr<double[]> partial_;
  cpu::MapDots args_;
  int storage_;
  A* sums_;
};

}  // namespace ernet
