// The passes over maps that the ER operators are made of: each over whole maps by several threads, or over one channel
// tile; and all passes and the algebra of an operator in one go, channel tile by channel tile.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "er/feature_maps.h"

namespace ernet {

using cpu::ChannelTile;

inline const auto& loops_of(const cpu::WeightedSum&) { return cpu::er_loops().weighted_sum; }
inline const auto& loops_of(const cpu::MapDots&) { return cpu::er_loops().map_dots; }
inline const auto& loops_of(const cpu::SumDots&) { return cpu::er_loops().sum_dots; }
inline const auto& loops_of(const cpu::ChannelMoments&) { return cpu::er_loops().channel_moments; }

// A pass that reduces maps to sums a channel, in the arrays `out` and `last` as cpu::merge() has them. `args.partial`
// is set here.
template <typename Arguments, typename A> class Reduction {
 public:
  Reduction(Storage storage, const Arguments& args, A* out, A* last = nullptr)
      : args_(args), storage_(static_cast<int>(storage)), out_(out), last_(last) {
    const MapShape& s = args.shape;
    const int64_t count = s.groups() * cpu::slabs_per_group(s) * args.rows() * s.C;
    partial_.reset(new double[static_cast<size_t>(count)]);  // every item writes its own; empty maps have no items
    empty_ = s.N * s.C * s.P == 0;
    if (empty_) std::fill_n(partial_.get(), count, 0.0);
    args_.partial = partial_.get();
  }

  void whole() const {
    const MapShape& s = args_.shape;
    if (!empty_) {
      const auto loop = loops_of(args_).items[storage_];
      torch::stable::parallel_for(0, cpu::reduce_items(s), grain(s, args_.num_streams(), true),
                                  [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
    }
    cpu::merge(args_, {0, s.C}, out_, last_);
  }

  void channel_tile(const ChannelTile& tile) const {
    Arguments args = args_;
    // What comes next in the tile reads g from the cache.
    if constexpr (std::is_same_v<Arguments, cpu::MapDots>) args.stream = false;
    loops_of(args).channel_tile[storage_](args, tile);
    cpu::merge(args, tile, out_, last_);
  }

 private:
  Arguments args_;
  int storage_;
  A *out_, *last_;
  std::unique_ptr<double[]> partial_;
  bool empty_;
};

// Of g = dy where y > 0, which is written to `g`, the inner products with all maps, and its sum.
inline cpu::MapDots gradient_dots(const MapShape& shape, const Tensor& dy, const OptionalTensor& y, const Tensor& g,
                                  const std::vector<const void*>& maps) {
  const bool masks = y.has_value();
  const int64_t num_maps = static_cast<int64_t>(maps.size());
  // all but the first few maps take g from the cache
  const bool stream = masks && num_maps <= cpu::kLaterAtOnce && streams(dy);
  return {shape,
          nullptr,
          dy.const_data_ptr(),
          masks ? y->const_data_ptr() : nullptr,
          nullptr,
          masks ? g.mutable_data_ptr() : nullptr,
          num_maps,
          maps.data(),
          nullptr,
          nullptr,
          stream};
}

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
    const auto loop = loops_of(args_).items[storage_];
    torch::stable::parallel_for(0, cpu::sum_items(args_.shape), grain(args_.shape, args_.num_maps, false),
                                [&](int64_t begin, int64_t end) { loop(args_, begin, end); });
  }

  void channel_tile(const ChannelTile& tile) const { loops_of(args_).channel_tile[storage_](args_, tile); }

  const Tensor y;

 private:
  cpu::WeightedSum args_;
  int storage_;
};

// Runs `steps` for every channel tile, or for whole maps: null. Fewer tiles than threads would leave some without work.
template <typename Steps>
void over_channel_tiles(const MapShape& shape, int64_t num_maps, int64_t element_size, const Steps& steps) {
  const int64_t width = cpu::tile_channels(shape, num_maps, element_size);
  const int64_t tiles = (shape.C + width - 1) / width;
  if (tiles < std::max<int64_t>(2, torch::stable::get_num_threads())) return steps(nullptr);
  const int64_t elements = width * shape.N * shape.P * num_maps;
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kGrainElements / elements),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const ChannelTile tile{i * width, std::min(shape.C, (i + 1) * width)};
                                  steps(&tile);
                                }
                              });
}

template <typename Pass> void over(const ChannelTile* tile, const Pass& pass) {
  tile == nullptr ? pass.whole() : pass.channel_tile(*tile);
}

// work(begin, end) on the per-channel vectors of the tile; on all of them by several threads where `rows` values a
// channel pay.
template <typename Work> void over_vectors(const ChannelTile* tile, int64_t channels, int64_t rows, const Work& work) {
  tile == nullptr ? over_channels(channels, rows, work) : work(tile->begin, tile->end);
}

}  // namespace ernet
