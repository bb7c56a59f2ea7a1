#include "simd/caches.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ernet {

namespace {

// Where the system says nothing, as in some virtual machines.
constexpr CacheSizes kAssumed = {32 << 10, 1 << 20, 2 << 20, "assumed: the system does not say"};

// The bytes that "48K", "2M", "1G" or "65536" at `text` stands for, and what follows it; 0 for anything else.
int64_t read_size(const char* text, const char** end) {
  *end = text;
  if (*text < '0' || *text > '9') return 0;
  char* unit = nullptr;
  const unsigned long long number = std::strtoull(text, &unit, 10);
  const int shift = *unit == 'K' ? 10 : *unit == 'M' ? 20 : *unit == 'G' ? 30 : 0;
  *end = shift > 0 ? unit + 1 : unit;
  return number < (1ull << 32) ? static_cast<int64_t>(number << shift) : 0;
}

CacheSizes given(const std::string& text) {
  int64_t sizes[3];
  if (!read_sizes(text.c_str(), sizes, 3)) {
    throw std::runtime_error("ERNET_CACHES=" + text +
                             "; expected the sizes of the first-level data cache, of the second-level cache and of one "
                             "CPU's share of the last-level cache, such as 32K,512K,4M.");
  }
  return {sizes[0], sizes[1], sizes[2], "ERNET_CACHES"};
}

// How many CPUs "0-7,64-71" names, at least one.
int64_t cpus_in(const std::string& list) {
  int64_t cpus = 0;
  std::istringstream ranges(list);
  for (std::string range; std::getline(ranges, range, ',');) {
    long first = 0, last = 0;
    const int numbers = std::sscanf(range.c_str(), "%ld-%ld", &first, &last);
    if (numbers > 0) cpus += numbers == 2 ? last - first + 1 : 1;
  }
  return cpus > 0 ? cpus : 1;
}

// Linux's file on a cache of the first CPU; empty where there is none.
std::string described(int index, const char* what) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/" + what);
  std::string text;
  std::getline(file, text);
  return text;
}

CacheSizes reported() {
  CacheSizes sizes = {0, 0, 0, "reported by the system"};
  for (int index = 0; index < 8; ++index) {
    const std::string level = described(index, "level"), size = described(index, "size");
    if (level.empty()) break;
    const char* end = nullptr;
    const int64_t bytes = read_size(size.c_str(), &end);
    if (described(index, "type") == "Instruction") continue;
    if (level == "1") sizes.first = bytes;
    if (level == "2") sizes.second = bytes;
    if (level == "3") sizes.last = bytes / cpus_in(described(index, "shared_cpu_list"));
  }
  return sizes;
}

CacheSizes find_sizes() {
  const char* text = std::getenv("ERNET_CACHES");
  if (text != nullptr && *text != '\0') return given(text);
  CacheSizes sizes = reported();
  if (sizes.first <= 0 || sizes.second <= 0) return kAssumed;
  if (sizes.last <= 0) sizes.last = sizes.second;
  return sizes;
}

}  // namespace

bool read_sizes(const char* text, int64_t* sizes, int count) {
  bool right = true;
  for (int i = 0; i < count; ++i) {
    right = right && (i == 0 || *text++ == ',');
    sizes[i] = right ? read_size(text, &text) : 0;
    right = right && sizes[i] > 0;
  }
  return right && *text == '\0';
}

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = find_sizes();
  return sizes;
}

}  // namespace ernet
