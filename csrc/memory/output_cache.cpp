#include "memory/output_cache.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

namespace ernet::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMostKept = 256;      // buffers; the oldest makes room
constexpr size_t kMarginShare = 4;  // what is kept and live may exceed the most that was live by this share of it,
// or of the limit: where no gradients are wanted the maps of one stage are live at a time, and all stages' take twice
// as much. For gradients, which keep all of them, the first is the larger.
constexpr size_t kLimitShare = 32;
constexpr size_t kSlackShare = 4;  // a buffer may exceed what is asked for by this share

using Entry = std::unique_lock<std::mutex>;
constexpr int kTries = 64;  // to enter; then a thread does without

struct Kept {
  void* buffer;
  size_t bytes;
};

size_t first_limit() {
  const char* text = getenv("ERNET_KEEP_MB");
  if (text == nullptr || *text == '\0') return kDefaultMapBufferLimit;
  char* end = nullptr;
  errno = 0;
  const unsigned long long megabytes = strtoull(text, &end, 10);
  if (errno != 0 || *end != '\0' || *text < '0' || *text > '9' || megabytes > (SIZE_MAX >> 20)) {
    throw std::runtime_error(std::string("ERNET_KEEP_MB=") + text +
                             "; expected a whole number of MiB to keep for later outputs, 0 for none.");
  }
  return static_cast<size_t>(megabytes) << 20;
}

// Never destroyed: tensors may be freed after static objects are. A thread that finds it busy for long does without, so
// that a fork while another thread was inside can block nobody.
struct Buffers {
  std::mutex busy;
  std::atomic<size_t> limit{first_limit()};
  std::atomic<size_t> kept_bytes{0}, reused{0}, fresh{0};
  std::atomic<size_t> live_bytes{0}, most_live_bytes{0};
  std::atomic<bool> poison{false};
  Kept kept[kMostKept];  // oldest first
  int count = 0;

  void remove(int index) {
    kept_bytes -= kept[index].bytes;
    memmove(kept + index, kept + index + 1, static_cast<size_t>(--count - index) * sizeof(Kept));
  }
};

Buffers& buffers() {
  static Buffers* const instance = new Buffers;
  return *instance;
}

// Inside, but for the rare case above.
Entry enter(Buffers& all) {
  Entry entry(all.busy, std::try_to_lock);
  for (int i = 1; i < kTries && !entry; ++i) {
    std::this_thread::yield();
    entry.try_lock();
  }
  return entry;
}

// Pages are of 4 KiB on x86-64 and of 4, 16 or 64 KiB on arm64.
size_t whole_pages(size_t bytes) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// Fresh memory that starts on the boundary of a huge page if it is as large as one.
void* map_memory(size_t bytes) {
  const size_t margin = bytes >= kHugePage ? kHugePage : 0;
  void* const whole = mmap(nullptr, bytes + margin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(whole);
  if (margin != 0) {
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(whole) % kHugePage) % kHugePage;
    if (before != 0) munmap(whole, before);
    start += before;
    if (margin != before) munmap(start + bytes, margin - before);
  }
#if defined(MADV_HUGEPAGE)
  if (margin != 0) madvise(start, bytes, MADV_HUGEPAGE);  // advice: a system without huge pages declines it
#endif
#if defined(MADV_POPULATE_WRITE)
  madvise(start, bytes, MADV_POPULATE_WRITE);  // all faults in one call; Linux before 5.14 declines it
#endif
  return start;
}

// Counts a buffer that is handed out.
void add_live(Buffers& all, size_t bytes) {
  const size_t live = all.live_bytes += bytes;
  size_t most = all.most_live_bytes;
  while (live > most && !all.most_live_bytes.compare_exchange_weak(most, live)) {
  }
}

// Gives the oldest buffers back to the system until `bytes` of them are gone or none is left.
void drop_oldest(Buffers& all, size_t bytes) {
  for (size_t dropped = 0; dropped < bytes && all.count > 0;) {
    const Kept oldest = all.kept[0];
    all.remove(0);
    munmap(oldest.buffer, oldest.bytes);
    dropped += oldest.bytes;
  }
}

// The smallest kept buffer that fits, of equals the one that was freed last; or null. `*bytes` becomes its size.
void* find_kept(Buffers& all, size_t* bytes) {
  int best = -1;
  for (int i = all.count - 1; i >= 0 && (best < 0 || all.kept[best].bytes > *bytes); --i) {
    const size_t size = all.kept[i].bytes;
    const bool fits = size >= *bytes && size - *bytes <= *bytes / kSlackShare;
    if (fits && (best < 0 || size < all.kept[best].bytes)) best = i;
  }
  if (best < 0) return nullptr;
  void* const buffer = all.kept[best].buffer;
  *bytes = all.kept[best].bytes;
  all.remove(best);
  return buffer;
}

}  // namespace

void* take_map_buffer(size_t* bytes) {
  Buffers& all = buffers();
  if (*bytes < kLeastMapBuffer || all.limit == 0) return nullptr;
  *bytes = whole_pages(*bytes);
  void* buffer = nullptr;
  if (const Entry entry = enter(all); entry) {
    buffer = find_kept(all, bytes);
    add_live(all, *bytes);
    const size_t most = all.most_live_bytes, all_bytes = all.live_bytes + all.kept_bytes;
    const size_t allowed = most + std::max(most / kMarginShare, all.limit / kLimitShare);
    if (buffer == nullptr && all_bytes > allowed) drop_oldest(all, all_bytes - allowed);
  } else {
    add_live(all, *bytes);
  }
  (buffer != nullptr ? all.reused : all.fresh) += 1;
  if (buffer == nullptr) buffer = map_memory(*bytes);
  if (buffer == nullptr) {
    all.live_bytes -= *bytes;
  } else if (all.poison) {
    memset(buffer, 0xff, *bytes);
  }
  return buffer;
}

void give_map_buffer(void* buffer, size_t bytes) {
  Buffers& all = buffers();
  all.live_bytes -= bytes;
  const size_t limit = all.limit;
  if (bytes <= limit) {
    if (const Entry entry = enter(all); entry) {
      if (all.kept_bytes + bytes > limit) drop_oldest(all, all.kept_bytes + bytes - limit);
      if (all.count == kMostKept) drop_oldest(all, 1);
      all.kept[all.count++] = {buffer, bytes};
      all.kept_bytes += bytes;
      return;
    }
  }
  munmap(buffer, bytes);
}

size_t kept_map_bytes() { return buffers().kept_bytes; }

size_t map_buffer_limit() { return buffers().limit; }

void set_map_buffer_limit(size_t bytes) {
  Buffers& all = buffers();
  all.limit = bytes;
  all.most_live_bytes = all.live_bytes.load();
  if (const Entry entry = enter(all); entry && all.kept_bytes > bytes) drop_oldest(all, all.kept_bytes - bytes);
}

MapBufferCounts map_buffer_counts() { return {buffers().reused, buffers().fresh}; }

void poison_map_buffers(bool wanted) { buffers().poison = wanted; }

bool map_buffers_poisoned() { return buffers().poison; }

}  // namespace ernet::cpu
