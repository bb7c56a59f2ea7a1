#include "macenko/cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "macenko/cuda/requested_plan.h"
#include "macenko/steps/tails.h"

namespace ernet::cuda {

namespace {

// A smaller share leaves most of a block's threads without pixels.
constexpr int64_t kLeastShare = 2048;

bool fits(const Device& device, int64_t pixels, int blocks, bool network) {
  return resident_shared_bytes(network) + 1024 + 3 * pixels_of_share(pixels, blocks) <= device.block_shared_bytes;
}

int most_blocks(const Device& device) {
  if (device.major < 9) return 1;
  // Compute capability 9.0 and 10.0 have room for clusters that are not portable.
  return device.major <= 10 ? 2 * kPortableCluster : kPortableCluster;
}

// The fewest blocks that hold an image together; more if there are too few images to keep the device busy. 0 if none
// do.
int blocks_of_image(const Device& device, const Images& images, bool network) {
  int blocks = 1;
  while (blocks <= most_blocks(device) && !fits(device, images.pixels, blocks, network)) blocks *= 2;
  if (blocks > most_blocks(device)) return 0;
  while (2 * blocks <= std::min<int64_t>(kPortableCluster, most_blocks(device)) &&
         2 * blocks * images.count <= device.multiprocessors && images.pixels >= 2 * blocks * kLeastShare) {
    blocks *= 2;
  }
  return blocks;
}

// Whether a multiprocessor has the memory for so many blocks of `bytes`, of which each takes 1 KB more.
bool holds(const Device& device, int64_t blocks, int64_t bytes) {
  return blocks * (bytes + 1024) <= device.block_shared_bytes + 1024;
}

// Threads whose lists hold what a sample of a block's share finds for percentiles of 1 % at both ends: with k keys of
// the sample beyond a border (tails.h), 2 k pixels for each sampled one, and three standard deviations of that.
int64_t threads_of_list(int64_t pixels, int blocks) {
  const double step = double(ernet::macenko::sample_step(pixels));
  const double rank = 0.01 * double(pixels) / step;
  const double keys = rank + 3.5 * std::sqrt(rank) + 2;
  const double listed = step * (2 * keys + 3 * std::sqrt(2 * keys)) / blocks;
  return int64_t(std::ceil(listed / kListedOfThread / 32)) * 32;
}

// Blocks that share a multiprocessor, so that the serial steps of one image pass beside the work on another: where
// there are so many images, and memory and registers for so many blocks with lists that suffice.
int64_t blocks_together(const Device& device, const Images& images, int blocks, int64_t bytes) {
  const int64_t least = std::max<int64_t>(kLeastThreads, threads_of_list(images.pixels, blocks));
  const int64_t wanted = (images.count * blocks + device.multiprocessors - 1) / device.multiprocessors;
  int64_t together = 1;
  while (together < wanted && (together + 1) * least <= kMostThreads && holds(device, together + 1, bytes)) ++together;
  return together;
}

Plan resident_plan(const Device& device, const Images& images, bool network, int blocks) {
  const int64_t share = pixels_of_share(images.pixels, blocks);
  const int64_t bytes = resident_shared_bytes(network) + 3 * share;
  const int64_t together = blocks_together(device, images, blocks, bytes + 1024);
  // The table is repeated where there is room, up to once a bank, but not to the cost of another block beside this one.
  int shift = 0;
  while (shift < 5 && holds(device, together, bytes + (2048 << shift)) && (2048 << shift) <= 3 * share / 4) ++shift;
  const int64_t most = kMostThreads / together / 32 * 32;
  const int64_t threads = std::min<int64_t>(most, std::max<int64_t>(kLeastThreads, (share / 16 + 31) / 32 * 32));
  return {blocks == 1 ? PlanKind::resident : PlanKind::cluster,
          blocks,
          int(threads),
          shift,
          bytes + (1024 << shift),
          kListedOfThread};
}

PlanRequest parse_plan(const std::string& text) {
  if (text.empty() || text == "auto") return {PlanKind::automatic, 0};
  if (text == "streaming") return {PlanKind::streaming, 0};
  if (text == "resident") return {PlanKind::resident, 0};
  if (text.rfind("cluster", 0) == 0) return {PlanKind::cluster, std::atoi(text.c_str() + 7)};
  throw std::invalid_argument("ERNET_MACENKO_PLAN=" + text +
                              "; expected auto, streaming, resident, cluster, or cluster2 to cluster16");
}

std::atomic<PlanRequest>& request() {
  static std::atomic<PlanRequest> asked{[] {
    const char* text = std::getenv("ERNET_MACENKO_PLAN");
    return parse_plan(text == nullptr ? "" : text);
  }()};
  return asked;
}

}  // namespace

void request_plan(const char* text) { request() = parse_plan(text); }

void read_requested_plan() { request(); }

PlanRequest requested_plan() { return request(); }

Plan choose_plan(const Device& device, const Images& images, bool network, PlanRequest wanted) {
  const Plan streaming = {PlanKind::streaming, 1, 0, 0, 0, 0};
  const Plan none = {PlanKind::automatic, 0, 0, 0, 0, 0};
  if (wanted.kind == PlanKind::streaming) return streaming;
  // Shared memory holds 8-bit images only.
  if (images.type != Pixel::u8) return wanted.kind == PlanKind::automatic ? streaming : none;
  if (wanted.kind == PlanKind::automatic) {
    const int chosen = blocks_of_image(device, images, network);
    // A block has an image for itself for some 100 us; a few images are done sooner by all multiprocessors together.
    const bool busy = chosen > 1 || 4 * images.count >= device.multiprocessors || images.pixels <= 4 * kLeastShare;
    return chosen > 0 && busy ? resident_plan(device, images, network, chosen) : streaming;
  }
  int blocks = wanted.kind == PlanKind::resident ? 1 : wanted.blocks;
  if (blocks == 0) {
    for (blocks = 2; blocks < most_blocks(device) && !fits(device, images.pixels, blocks, network);) blocks *= 2;
  }
  const bool power = blocks > 0 && (blocks & (blocks - 1)) == 0;
  const bool supported = power && blocks <= most_blocks(device) && fits(device, images.pixels, blocks, network);
  return supported ? resident_plan(device, images, network, blocks) : none;
}

}  // namespace ernet::cuda
