// weighted_sum: y = sum_l a_l * x_l + b, then ReLU. Every map is read once and y is written once. Runs of memory are
// taken from the last to the first: the reduction that most often comes before runs the other way, and what it read
// last is still in the cache. Within a run memory is read forward, as prefetchers like it. Compiled once per
// instruction set.
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

const MapLoops<WeightedSum>& loops_of(const WeightedSum& args) {
  return args.shape.channels_last ? channels_last_sum_loops : planar_sum_loops;
}

template <Storage kStorage> void items(const WeightedSum& args, int64_t begin, int64_t end) {
  loops_of(args).items[static_cast<int>(kStorage)](args, begin, end);
  if (args.stream) stream_fence();
}

template <Storage kStorage> void channel_tile(const WeightedSum& args, const ChannelTile& tile) {
  loops_of(args).channel_tile[static_cast<int>(kStorage)](args, tile);
  if (args.stream) stream_fence();
}

}  // namespace

const MapLoops<WeightedSum> weighted_sum_loops = {
    {items<Storage::f32>, items<Storage::f64>, items<Storage::bf16>, items<Storage::f16>},
    {channel_tile<Storage::f32>, channel_tile<Storage::f64>, channel_tile<Storage::bf16>, channel_tile<Storage::f16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
