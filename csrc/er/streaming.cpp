#include "er/streaming.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "er/kernels.h"
#include "simd/caches.h"

namespace ernet::cpu {

std::atomic<int64_t> fetch_ahead_bytes{2048};

namespace {

constexpr int kRounds = 5;
constexpr int64_t kAhead[] = {2048, 512, 1024, 4096};  // the first unless another is better
constexpr double kBetter = 0.95;                       // less is noise

// Sums of three maps into a fourth, each larger than the second-level cache. They are cold: every pass takes the next
// part of memory that is larger than a CPU's share of the last-level cache. Maps that stay there would mislead, because
// those of a network do not.
class Probe {
 public:
  explicit Probe(const CacheSizes& caches) {
    const int64_t map = std::clamp(caches.second + caches.second / 2, int64_t{1} << 20, kMostBytes / 8);
    shape_ = {1, kChannels, map / (kChannels * 4), true, false};
    map_ = static_cast<size_t>(shape_.P * kChannels);
    const int64_t bytes = std::clamp(2 * caches.last, 8 * map, kMostBytes);
    parts_ = static_cast<size_t>(bytes) / (kStreams * map_ * 4);
    constexpr size_t kLine = 16;
    memory_.reset(new float[parts_ * kStreams * map_ + kLine]);
    first_ = memory_.get() + (kLine - reinterpret_cast<uintptr_t>(memory_.get()) / 4 % kLine) % kLine;
    std::fill_n(first_, parts_ * kStreams * map_, 1.0f);
    factors_.assign(kMaps * kChannels, 0.25f);
  }

  // Seconds of a sum.
  double seconds(int64_t fetch_ahead, bool non_temporal) {
    fetch_ahead_bytes.store(fetch_ahead, std::memory_order_relaxed);
    float* const part = first_ + part_ * kStreams * map_;
    part_ = (part_ + 1) % parts_;
    const void* maps[kMaps];
    for (size_t l = 0; l < kMaps; ++l) maps[l] = part + l * map_;
    float* const y = part + kMaps * map_;
    const WeightedSum sum = {shape_, kMaps, maps, nullptr, factors_.data(), nullptr, y, true, non_temporal};
    const auto begin = std::chrono::steady_clock::now();
    er_loops().weighted_sum.items[static_cast<int>(Storage::f32)](sum, 0, sum_items(shape_));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  static constexpr int64_t kChannels = 1024, kMostBytes = int64_t{32} << 20;
  static constexpr size_t kMaps = 3, kStreams = kMaps + 1;
  MapShape shape_;
  size_t map_, parts_, part_ = 0;  // elements of a map; parts of the memory, and the next one
  std::unique_ptr<float[]> memory_;
  float* first_;
  std::vector<float> factors_;
};

// The best of several rounds, in which candidates take turns: the first, unless another is clearly better.
template <typename Candidate, size_t kCount, typename Time>
Candidate best(const Candidate (&candidates)[kCount], const Time& time) {
  double least[kCount];
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < kCount; ++i) {
      const double seconds = time(candidates[i]);
      least[i] = round == 0 ? seconds : std::min(least[i], seconds);
    }
  }
  const size_t quickest = static_cast<size_t>(std::min_element(least, least + kCount) - least);
  return candidates[least[quickest] < kBetter * least[0] ? quickest : 0];
}

Streaming probe(const CacheSizes& caches) {
  constexpr bool kStores[] = {true, false};
  const auto begin = std::chrono::steady_clock::now();
  Probe maps(caches);
  const int64_t ahead = best(kAhead, [&](int64_t bytes) { return maps.seconds(bytes, true); });
  const bool non_temporal = best(kStores, [&](bool wanted) { return maps.seconds(ahead, wanted); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return {ahead, non_temporal ? caches.second : INT64_MAX, "a probe", seconds.count()};
}

// ERNET_STREAMING, or null.
const char* wanted() {
  const char* text = std::getenv("ERNET_STREAMING");
  return text == nullptr || *text == '\0' ? nullptr : text;
}

Streaming given(const char* text) {
  int64_t sizes[2];
  if (!read_sizes(text, sizes, 2)) {
    throw std::runtime_error(std::string("ERNET_STREAMING=") + text +
                             "; expected how many bytes ahead maps are prefetched and from how many bytes on outputs "
                             "are written past the caches, such as 2K,512K.");
  }
  return {sizes[0], sizes[1], "ERNET_STREAMING", 0};
}

}  // namespace

void check_streaming() {
  if (wanted() != nullptr) given(wanted());
}

const Streaming& streaming() {
  static const Streaming found = [] {
    const Streaming chosen = wanted() != nullptr ? given(wanted()) : probe(cache_sizes());
    fetch_ahead_bytes.store(chosen.fetch_ahead, std::memory_order_relaxed);
    return chosen;
  }();
  return found;
}

}  // namespace ernet::cpu
