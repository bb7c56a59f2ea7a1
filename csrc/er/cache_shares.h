// What the ER operators make of the sizes of this machine's caches.
#pragma once

#include "simd/caches.h"

namespace ernet::cpu {

// Bytes. Results do not depend on them: sums are cut by shape and by the constants of er/kernels.h and of the loops,
// which do not change with the machine.
struct CacheShares {
  int64_t channel_tile;  // what the maps of a channel tile take
  int64_t gradient;      // of a gradient that stays in the second-level cache while all maps stream past
};
const CacheShares& cache_shares();

}  // namespace ernet::cpu
