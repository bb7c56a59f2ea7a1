// Runs CUDA kernels on the CPU: force-included before a .cu file that g++ compiles (-x c++ -include simt.h).
//
// Each thread of a block is a fiber; fibers switch at __syncthreads, __syncwarp and shuffles, and are resumed in an
// order drawn from a seed, so that code that leans on a missing barrier gives different results. Blocks run one after
// the other, also in random order; those of a cluster run together. A block's shared memory is its own, and ends with
// it. Not covered: warps in lockstep, inline PTX.
//
// Compiled with -fsanitize=thread (and simt.cpp without, but with SIMT_RACES=1), accesses that no barrier or fence
// orders are reported whatever the schedule: barriers order memory, shuffles and atomics do not, and the blocks of a
// launch are concurrent although they run in turn.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

namespace simt {

struct Index {
  unsigned x, y, z;
};

// What the running fiber sees.
extern thread_local Index thread_index, block_index, block_size, grid_size;
extern thread_local unsigned block_rank, cluster_blocks;  // of the cluster that the block is in

void barrier();          // all threads of the block that have not returned
void warp_barrier();     // all threads of the warp that have not returned
void cluster_barrier();  // all threads of the cluster that have not returned
void fence();
void omit_barrier(unsigned number);  // the barrier that each thread comes to as this one, from 0, then orders nothing
unsigned char* dynamic_shared();     // of the running block
void* shared_variable(const void* name, size_t bytes);  // of the running block
// Where the block of this rank has what the running block has at `p`. Aborts if `p` is not in dynamic shared memory.
void* map_shared(const void* p, unsigned rank);
uint64_t shuffle_bits(uint64_t value, unsigned from);

struct Shape {
  Index grid;
  Index block;
  unsigned cluster;  // blocks, neighbours along x
  size_t shared_bytes;
};

// Runs `body(argument)` once for each thread of each block. Aborts with a message on a deadlock or an impossible
// launch.
void launch(const Shape& shape, void (*body)(void*), void* argument);

void set_seed(uint64_t seed);

extern int clusters_at_a_time;  // what the device says that it holds

inline Index as_index(dim3 d) { return {d.x, d.y, d.z}; }

template <class F> void launch_kernel(dim3 grid, dim3 block, F kernel) {
  launch({as_index(grid), as_index(block), 1, 0}, [](void* f) { (*static_cast<F*>(f))(); }, &kernel);
}

template <class F> cudaError_t launch_configured(const cudaLaunchConfig_t& config, F kernel) {
  const unsigned cluster = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  const Shape shape = {as_index(config.gridDim), as_index(config.blockDim), cluster, config.dynamicSmemBytes};
  launch(shape, [](void* f) { (*static_cast<F*>(f))(); }, &kernel);
  return cudaSuccess;
}

// The value of lane `from` if there is one, else the lane's own.
template <class T> T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot a lane");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(bits, from);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// What the fits of a run have listed, phase by phase, from set_seed on.
struct Lists {
  int64_t rounds, keys, listed, missed;
};
extern Lists lists;
// By every block that shares an image; `first` says which counts the image.
void record_list(bool first, int64_t keys, int64_t listed, bool missed);

float fused_towards_zero(float a, float b, float c);  // a b + c
float off_by_ulps(float value, float argument);       // by 2 at most, as approximate functions are

template <class T, class Better> T exchange_if(T* address, T value, Better better) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (better(value, old) &&
         !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace simt

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (simt::thread_index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define __syncthreads() simt::barrier()
#define __syncwarp(...) simt::warp_barrier()
#define __shfl_down_sync(mask, value, delta) simt::shuffle(value, simt::thread_index.x % 32 + (delta))
#define __shfl_up_sync(mask, value, delta) simt::shuffle(value, simt::thread_index.x % 32 - (delta))
#define __threadfence() simt::fence()
#define __ffs(bits) __builtin_ffs(bits)
#define __popc(bits) __builtin_popcount(bits)
#define __fdividef(x, y) simt::off_by_ulps((x) / (y), y)
#define __stcg(to, value) (*(to) = (value))

#define __clusterRelativeBlockRank() (simt::block_rank)
#define __clusterSizeInBlocks() (simt::cluster_blocks)
#define __cluster_barrier_arrive()
#define __cluster_barrier_arrive_relaxed()
#define __cluster_barrier_wait() simt::cluster_barrier()
#define __cluster_map_shared_rank(p, rank) simt::map_shared(p, rank)
#define ERNET_RECORD_LIST(first, keys, listed, missed) simt::record_list(first, keys, listed, missed)
#define ERNET_EX2_APPROX(z) simt::off_by_ulps(exp2f(z), z)
#define ERNET_SHARED(type, name) \
  static char name##_;           \
  type& name = *static_cast<type*>(simt::shared_variable(&name##_, sizeof(type)))
#define ERNET_DYNAMIC_SHARED(name) unsigned char* const name = simt::dynamic_shared()
#define ERNET_LAUNCH_CONFIGURED(config, kernel, ...) simt::launch_configured(config, [=] { kernel(__VA_ARGS__); })
#define ERNET_LAUNCH(kernel, grid, block, stream, ...) simt::launch_kernel(grid, block, [=] { kernel(__VA_ARGS__); })

template <class T> T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }

template <class T> T atomicExch(T* address, T value) { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); }

template <class T> T atomicMin(T* address, T value) {
  return simt::exchange_if(address, value, [](T a, T b) { return a < b; });
}

template <class T> T atomicMax(T* address, T value) {
  return simt::exchange_if(address, value, [](T a, T b) { return a > b; });
}

static inline double __longlong_as_double(long long bits) {
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float __fmaf_rz(float a, float b, float c) { return simt::fused_towards_zero(a, b, c); }

static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (unsigned k = 0; k < 4; ++k) result |= unsigned(bytes >> (8 * (selector >> 4 * k & 7)) & 255) << 8 * k;
  return result;
}

static inline float __int_as_float(int bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
