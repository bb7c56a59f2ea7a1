#include "macenko/cuda/plan.h"

namespace ernet::cuda {

namespace {

// A smaller share leaves most of a block's threads without pixels.
constexpr int64_t kLeastShare = 2048;

int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

bool fits(const Device& device, int64_t pixels, int blocks, bool network) {
  return team_shared_bytes(network) + 1024 + 3 * pixels_of_share(pixels, blocks) <= device.block_shared_bytes;
}

int most_blocks(const Device& device) {
  if (device.major < 9) return 1;
  // Compute capability 9.0 and 10.0 have room for clusters that are not portable.
  return device.major <= 10 ? 2 * kPortableCluster : kPortableCluster;
}

// The fewest blocks that hold an image together; more if there are too few images to keep the device busy. 0 if none
// do.
int blocks_of_team(const Device& device, const Images& images, bool network) {
  int blocks = 1;
  while (blocks <= most_blocks(device) && !fits(device, images.pixels, blocks, network)) blocks *= 2;
  if (blocks > most_blocks(device)) return 0;
  while (2 * blocks <= smallest(kPortableCluster, most_blocks(device)) &&
         2 * blocks * images.count <= device.multiprocessors && images.pixels >= 2 * blocks * kLeastShare) {
    blocks *= 2;
  }
  return blocks;
}

Plan team_plan(const Device& device, const Images& images, bool network, int blocks) {
  const int64_t share = pixels_of_share(images.pixels, blocks);
  const int64_t bytes = team_shared_bytes(network) + 3 * share;
  // The table is repeated where there is room, up to once a bank, but not to the cost of another block beside this one.
  int shift = 0;
  while (shift < 5 && bytes + (2048 << shift) <= device.block_shared_bytes && (2048 << shift) <= 3 * share / 4) ++shift;
  const int64_t threads = smallest(kMostThreads, largest(kLeastThreads, (share / 16 + 31) / 32 * 32));
  return {blocks == 1 ? PlanKind::resident : PlanKind::cluster,
          blocks,
          int(threads),
          shift,
          bytes + (1024 << shift),
          kListedOfThread};
}

}  // namespace

Plan choose_plan(const Device& device, const Images& images, bool network, PlanKind wanted, int blocks) {
  const Plan streaming = {PlanKind::streaming, 1, 0, 0, 0, 0};
  const Plan none = {PlanKind::automatic, 0, 0, 0, 0, 0};
  if (wanted == PlanKind::streaming) return streaming;
  // Shared memory holds 8-bit images only.
  if (images.type != Pixel::u8) return wanted == PlanKind::automatic ? streaming : none;
  if (wanted == PlanKind::automatic) {
    const int chosen = blocks_of_team(device, images, network);
    // A block has an image for itself for some 100 us; a few images are done sooner by all multiprocessors together.
    const bool busy = chosen > 1 || 4 * images.count >= device.multiprocessors || images.pixels <= 4 * kLeastShare;
    return chosen > 0 && busy ? team_plan(device, images, network, chosen) : streaming;
  }
  if (wanted == PlanKind::resident) blocks = 1;
  if (wanted == PlanKind::cluster && blocks == 0) {
    for (blocks = 2; blocks < most_blocks(device) && !fits(device, images.pixels, blocks, network);) blocks *= 2;
  }
  const bool power = blocks > 0 && (blocks & (blocks - 1)) == 0;
  const bool serves = power && blocks <= most_blocks(device) && fits(device, images.pixels, blocks, network);
  return serves ? team_plan(device, images, network, blocks) : none;
}

}  // namespace ernet::cuda
