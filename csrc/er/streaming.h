// How maps stream through this machine's caches, as a probe finds out once in a process.
#pragma once

#include <stdint.h>

#include <atomic>

namespace ernet::cpu {

// Bytes. Results do not depend on them.
struct Streaming {
  int64_t fetch_ahead;  // how far ahead of the loops a map that streams past is prefetched
  int64_t stores;       // outputs this large are written with non-temporal stores
  const char* source;   // who says so
  double seconds;       // that the probe took
};

// As the environment variable ERNET_STREAMING gives them ("2K,512K"), else as the probe finds them, when it is first
// called. Another form of the variable is an error.
const Streaming& streaming();

// Throws if ERNET_STREAMING has another form; nothing is probed.
void check_streaming();

// What the loops read: 2 KiB until the probe has chosen. The hardware's own prefetching ends with each page of 4 KiB,
// which most maps that others have made consist of.
extern std::atomic<int64_t> fetch_ahead_bytes;

}  // namespace ernet::cpu
