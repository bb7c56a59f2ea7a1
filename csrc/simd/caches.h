// The sizes of this machine's data caches, by which work is cut where results do not depend on it.
#pragma once

#include <stdint.h>

namespace ernet {

// Bytes of the first-level data cache and of the second-level cache, and one CPU's share of the last-level cache.
struct CacheSizes {
  int64_t first, second, last;
  const char* source;  // who says so
};

// As the environment variable ERNET_CACHES gives them ("32K,512K,4M"), else as Linux reports them for the first CPU,
// else those of an ordinary server. They are found once. Another form of the variable is an error.
const CacheSizes& cache_sizes();

// "32K,512K,4M" or bytes in full, `count` sizes above zero; false for anything else.
bool read_sizes(const char* text, int64_t* sizes, int count);

}  // namespace ernet
