// The loops behind the ER operators, free of torch. One table of functions per instruction set.
//
//   channel_moments   mean and sum of squared deviations of each channel
//   weighted_sum      y = sum_l a_l * x_l + b, then ReLU if asked
//   map_dots          g = dy (where y > 0);  of one map x, sum g_l * x for several g_l, sum g * x and sum g; or,
//   without
//                     x, sum g * x_l for several maps, and sum g
//
// In place of g there may be dy and a ReLU bitmask, which says where y > 0: a thirty-second of a map of float.
//
// A map is N samples of C channels of P pixels, either "planar" (NCHW: [N][C][P]) or channels-last ([N][P][C]).
// "Groups" are what has coefficients or sums of its own: 1 (per channel) or N (per sample and channel).
#pragma once

#include <stdint.h>

#include "er/coefficients.h"
#include "simd/isa.h"

namespace ernet::cpu {

enum class Storage : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kNumStorage = 4;

struct MapShape {
  int64_t N, C, P;
  bool channels_last;
  bool per_sample;

  int64_t groups() const { return per_sample ? N : 1; }
};

// Coefficients, and means and variances, are float for f32, bf16 and f16 maps and double for f64 maps ("acc" below).
struct WeightedSum {
  MapShape shape;
  int64_t num_maps;
  const void* const* maps;     // [num_maps]
  const uint8_t* const* bits;  // [num_maps], null for maps that count whole; or null: all do
  const void* a;               // acc [num_maps][groups][C]
  const void* b;               // acc [groups][C], or null for zero
  void* y;
  bool relu;
  bool stream;  // write y with non-temporal stores
};

// map_dots: maps that are read at once. More streams than that slow the prefetcher down.
constexpr int64_t kLaterAtOnce = 4;

// g_l are those of later blocks, each as a dy and its bits; and that of the block whose output y came from x, if any.
// Without x they are maps, and all inner products are with g.
struct MapDots {
  MapShape shape;
  const void* x;   // or null
  const void* dy;  // null: there is no such block, or its output has no gradient
  const void* y;   // null: no ReLU, g = dy
  uint8_t* bits;   // where y > 0; written where y is given and g is null
  void* g;         // g itself; written where y is given
  int64_t num_later;
  const void* const* later;          // [num_later]
  const uint8_t* const* later_bits;  // [num_later], null for those that count whole; or null: all do
  double* partial;  // [groups * slabs][rows()][C]: sums of g_l * x of a slab; with a dy, then of g * x and of g
  bool stream;      // write g with non-temporal stores

  int64_t rows() const { return num_later + (dy == nullptr ? 0 : x == nullptr ? 1 : 2); }
  int64_t num_streams() const { return rows() + 1; }
};

// Channels-last maps alone: the gradient of a map, y = sum_l a_l * g_l + a_z * z + b, and the inner products of the map
// before with the same g_l, which its own gradient is to need.
struct SumDots {
  MapShape shape;
  int64_t num_g;
  const void* const* g;        // [num_g], at least one
  const uint8_t* const* bits;  // [num_g], null for those that count whole
  const void* z;               // or null
  const void* a;               // acc [num_g + 1][groups][C], the last row that of z
  const void* b;               // acc [groups][C], or null for zero
  void* y;
  const void* before;
  double* partial;  // [groups * slabs][rows()][C]: sums of g_l * before of a slab
  bool stream;      // write y with non-temporal stores

  int64_t rows() const { return num_g; }
  int64_t num_streams() const { return num_g + 2; }
};

struct ChannelMoments {
  MapShape shape;
  const void* x;
  double* partial;  // [groups * slabs][2][C]: mean and sum of squared deviations of a slab

  int64_t rows() const { return 2; }
  int64_t num_streams() const { return 1; }
};

// Bytes of a row of a ReLU bitmask, and of all rows of a map: planes in the planar layout, pixels in channels-last.
// Some more at their end may be read.
constexpr int64_t kBitsPast = 8;
int64_t bit_row_bytes(const MapShape& shape);
int64_t bit_bytes(const MapShape& shape);

// How the work is cut: by shape alone, never by the number of threads, so results do not depend on it.
// A reduction has groups() results a channel, each merged in order from slabs_per_group() partial results.
// In the planar layout a slab is a run of samples; channels-last, a run of pixels (of one group).
int64_t slabs_per_group(const MapShape& shape);

// Most channels of an item of a reduction. Channels-last: a pixel of up to 8 KiB of float is read as one run. Planar:
// so many that an item of small planes is a long run of each sample; their sums wait in vectors until the slab ends.
constexpr int64_t kPixelChannels = 2048;
constexpr int64_t kPlanarChannels = 64;
// Planar: most elements of an item's slab if it holds more than one channel.
constexpr int64_t kPlanarElements = 32768;
// Planar: most elements of one plane that a reduction takes at once. A larger plane is taken in chunks, and then it is
// the only channel of its item: the chunks of several channels would not lie one after the other in memory.
constexpr int64_t kPlaneChunk = 8192;
static_assert(kPlaneChunk % 64 == 0, "the ReLU bitmask of a chunk begins with a word");

// Independent work items of a reduction: some channels of one slab.
struct ReduceItem {
  int64_t slab;      // group * slabs_per_group + slab: the row of partial results
  int64_t begin;     // planar: the first sample; channels-last: the first pixel, counted from the start of the map
  int64_t count;     // of samples, of pixels
  int64_t channel;   // the first channel
  int64_t channels;  // how many
};
int64_t reduce_items(const MapShape& shape);
ReduceItem reduce_item(const MapShape& shape, int64_t item);
// Channels [channel, channel + channels) of row `slab` of partial results; at most reduce_channels(shape) of them.
ReduceItem slab_item(const MapShape& shape, int64_t slab, int64_t channel, int64_t channels);
int64_t reduce_channels(const MapShape& shape);
// Elements of each channel in slab `slab` of a group.
int64_t slab_elements(const MapShape& shape, int64_t slab);

struct PixelRange {
  int64_t group;  // which group the pixels belong to
  int64_t begin;  // first pixel, counted from the start of the map
  int64_t count;
};

// Independent work items of weighted_sum. Planar: item = n * C + c; channels-last: a run of pixels of one sample.
int64_t sum_items(const MapShape& shape);
PixelRange sum_item(const MapShape& shape, int64_t item);

// About how many elements of one map an item touches: for the grain of parallel_for.
int64_t item_elements(const MapShape& shape, bool reduction);

// Some channels of all maps of a block, [begin, end): what is done to them in one pass after another stays in the
// second-level cache. Batch norm alone, whose channels have nothing to do with one another.
struct ChannelTile {
  int64_t begin, end;
};
// How many channels a tile has, for a block of `num_maps` maps: by shape alone. All C where tiles would not help: then
// every pass goes over whole maps.
int64_t tile_channels(const MapShape& shape, int64_t num_maps, int64_t element_size);

// Merge the partial results of some channels, in order, in double, into arrays of A.
template <typename A>
void merge(const ChannelMoments& args, const ChannelTile& tile, A* mean, A* var);  // [groups][C] each
template <typename A>
void merge(const MapDots& args, const ChannelTile& tile, A* sums, A* last);  // [rows()][groups][C]; last: the last row
template <typename A> void merge(const SumDots& args, const ChannelTile& tile, A* sums, A* none);  // [num_g][groups][C]

// The loops of one operator, by storage type: over work items [begin, end), of which any partition gives the same bits;
// and all that those items do to the channels of a tile, with the same bits.
template <typename Arguments> struct MapLoops {
  void (*items[kNumStorage])(const Arguments&, int64_t begin, int64_t end);
  void (*channel_tile[kNumStorage])(const Arguments&, const ChannelTile&);
};

struct ErLoops {
  const MapLoops<WeightedSum>& weighted_sum;
  const MapLoops<MapDots>& map_dots;
  const MapLoops<SumDots>& sum_dots;
  const MapLoops<ChannelMoments>& channel_moments;
  const VectorLoops<float>& vectors_f32;
  const VectorLoops<double>& vectors_f64;
};

namespace isa_portable {
extern const ErLoops er_loops;
}
namespace isa_avx2 {
extern const ErLoops er_loops;
}
namespace isa_avx512 {
extern const ErLoops er_loops;
}

const ErLoops& er_loops();

}  // namespace ernet::cpu
