// Memory for the large outputs of the CPU operators, used again instead of asked of the system anew.
//
// Page faults of fresh memory cost three to four times the pass that writes a map. So the memory of a freed output is
// kept for the next that fits: of the same size, or at most a quarter smaller. New memory comes in huge pages.
//
// Bounds: no more than limit bytes are kept; and what is kept and in use never exceeds the most that was in use since
// the limit was set by more than a quarter (forward and backward passes want different sizes) or a 32nd of the limit:
// the oldest goes first.
#pragma once

#include <stddef.h>

namespace ernet::cpu {

constexpr size_t kLeastMapBuffer = size_t{64} << 10;           // bytes; the allocator serves smaller outputs as well
constexpr size_t kDefaultMapBufferLimit = size_t{2048} << 20;  // bytes

// `bytes` of undefined memory, aligned to a page; null if they are too few, the limit is 0 or the system has none: the
// caller then uses its allocator. `*bytes` becomes the size to give back. Any thread may call these functions.
void* take_map_buffer(size_t* bytes);
void give_map_buffer(void* buffer, size_t bytes);

// Bytes kept at this moment for outputs to come.
size_t kept_map_bytes();
// How many may be kept; 0 switches all of this off. At first ERNET_KEEP_MB (in MiB), else kDefaultMapBufferLimit.
size_t map_buffer_limit();
void set_map_buffer_limit(size_t bytes);
// Buffers taken so far: those that were kept ones, and those newly asked of the system.
struct MapBufferCounts {
  size_t reused, fresh;
};
MapBufferCounts map_buffer_counts();
// For tests: fill every buffer with bits that are NaN in all floating types before it is handed out.
void poison_map_buffers(bool wanted);
bool map_buffers_poisoned();

}  // namespace ernet::cpu
