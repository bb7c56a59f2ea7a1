// Memory for the large outputs of the CPU operators, used again instead of asked of the system anew.
//
// The first touch of fresh memory costs a page fault every 4 KiB, three to four times the time of the pass that writes
// a map. So the memory of a freed output is kept for the next output that fits: of the same size, or else at most a
// quarter smaller, as where images of several sizes alternate. New memory comes in huge pages where the system has
// them.
//
// Bounds: no more than limit bytes are kept; and what is kept and in use together never exceeds the most that was in
// use since the limit was set by more than a quarter: before new memory is asked for, other sizes, oldest first, go
// back to the system. Without that quarter a training step, whose forward and backward pass want different sizes, would
// find some of its memory gone every time.
#pragma once

#include <stddef.h>

namespace ernet::cpu {

constexpr size_t kLeastMapBuffer = size_t{256} << 10;          // bytes; the allocator serves smaller outputs as well
constexpr size_t kDefaultMapBufferLimit = size_t{2048} << 20;  // bytes

// `bytes` of memory, aligned to a page, its content undefined; null if they are too few for this, if nothing may be
// kept (limit 0) or if the system has none: the caller then uses its allocator. `*bytes` becomes the buffer's own size,
// with which it must be given back. Any thread may call these functions.
void* take_map_buffer(size_t* bytes);
void give_map_buffer(void* buffer, size_t bytes);

// Bytes kept at this moment for outputs to come.
size_t kept_map_bytes();
// How many may be kept. What exceeds a new limit goes back to the system at once; 0 switches all of this off. The first
// limit is that of the environment variable ERNET_KEEP_MB (in MiB), else kDefaultMapBufferLimit.
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
