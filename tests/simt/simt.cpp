// The scheduler behind simt.h.
#include <fenv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "simt.h"

// Under AddressSanitizer each switch of stacks is announced, or it would read one fiber's stack as another's overflow.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

// Bounds of the shared memory of all kernels, set by the linker.
extern "C" char __start_simt_shared[] __attribute__((weak));
extern "C" char __stop_simt_shared[] __attribute__((weak));

namespace simt {

thread_local Index thread_index, block_index, block_size, grid_size;
thread_local unsigned block_rank, cluster_blocks;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxCluster = 16;

enum class State { ready, at_barrier, at_warp_barrier, at_cluster_barrier, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Index index;
  unsigned rank;  // of its block in the cluster
  State state;
  void* fake_stack = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  unsigned running = 0;
  unsigned count = 0;    // threads of a block
  unsigned cluster = 1;  // blocks that run together
  uint64_t first_block = 0;
  size_t shared_bytes = 0;
  std::vector<std::unique_ptr<unsigned char[]>> shared;  // one for each of those blocks
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t slots[kMaxCluster * kMaxThreads / 32][32];
  std::mt19937_64 random{1};
};

Machine machine;

void announce_switch(void** save, const void* stack, size_t bytes) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

void finish_switch(void* saved, const void** from, size_t* bytes) {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(saved, from, bytes);
#else
  (void)saved, (void)from, (void)bytes;
#endif
}

void yield_as(State state) {
  Fiber& self = machine.fibers[machine.running];
  self.state = state;
  // A fiber that is done gives its fake stack back.
  announce_switch(state == State::done ? nullptr : &self.fake_stack, machine.scheduler_stack,
                  machine.scheduler_stack_bytes);
  swapcontext(&self.context, &machine.scheduler);
  finish_switch(self.fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
}

void fiber_main() {
  finish_switch(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  machine.body(machine.argument);
  yield_as(State::done);
}

Index index_of(uint64_t i, Index size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / (uint64_t(size.x) * size.y))};
}

void resume(unsigned i) {
  Fiber& fiber = machine.fibers[i];
  machine.running = i;
  thread_index = fiber.index;
  block_rank = fiber.rank;
  block_index = index_of(machine.first_block + fiber.rank, grid_size);
  announce_switch(&machine.scheduler_fake_stack, fiber.stack.data(), fiber.stack.size());
  swapcontext(&machine.scheduler, &fiber.context);
  finish_switch(machine.scheduler_fake_stack, nullptr, nullptr);
}

void prepare(unsigned i, Index block) {
  Fiber& fiber = machine.fibers[i];
  fiber.index = index_of(i % machine.count, block);
  fiber.rank = i / machine.count;
  fiber.state = State::ready;
  fiber.fake_stack = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// Lets threads first..last pass if all that have not returned wait in `state`.
bool release(unsigned first, unsigned last, State state) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    const State s = machine.fibers[i].state;
    if (s != State::done && s != state) return false;
    any |= s == state;
  }
  if (!any) return false;
  for (unsigned i = first; i < last; ++i) {
    if (machine.fibers[i].state == state) machine.fibers[i].state = State::ready;
  }
  return true;
}

// On a GPU, too, a block finds anything in its shared memory. Under AddressSanitizer there are red zones between
// variables.
__attribute__((no_sanitize("address"))) void poison_shared() {
  for (volatile char* p = __start_simt_shared; p < __stop_simt_shared; ++p) *p = char(0xA5);
}

// Dynamic shared memory of its own for each block of a cluster, and no byte more than was asked for.
void allocate_shared() {
  machine.shared.clear();
  for (unsigned rank = 0; rank < machine.cluster; ++rank) {
    machine.shared.emplace_back(new unsigned char[machine.shared_bytes]);
    memset(machine.shared.back().get(), 0xA5, machine.shared_bytes);
  }
}

// The blocks of one cluster.
void run_cluster() {
  const unsigned threads = machine.count * machine.cluster;
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), machine.random);
    bool progress = false;
    bool finished = true;
    for (unsigned i : order) {
      if (machine.fibers[i].state == State::ready) {
        resume(i);
        progress = true;
      }
    }
    for (unsigned first = 0; first < threads; first += machine.count) {
      const unsigned last = first + machine.count;
      for (unsigned warp = first; warp < last; warp += 32) {
        progress |= release(warp, std::min(warp + 32, last), State::at_warp_barrier);
      }
      progress |= release(first, last, State::at_barrier);
    }
    progress |= release(0, threads, State::at_cluster_barrier);
    for (unsigned i = 0; i < threads; ++i) finished &= machine.fibers[i].state == State::done;
    if (finished) return;
    if (!progress) {
      fprintf(stderr, "simt: deadlock: threads wait at different barriers\n");
      abort();
    }
  }
}

void check_shape(const Shape& shape, uint64_t threads, uint64_t blocks) {
  const bool clusters = shape.cluster >= 1 && shape.cluster <= kMaxCluster && blocks % shape.cluster == 0;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || shape.grid.y > 65535 || shape.grid.z > 65535 ||
      !clusters || (shape.cluster > 1 && threads % 32 != 0)) {
    fprintf(stderr, "simt: impossible launch of %llu blocks of %llu threads in clusters of %u\n",
            (unsigned long long)blocks, (unsigned long long)threads, shape.cluster);
    abort();
  }
}

}  // namespace

void barrier() { yield_as(State::at_barrier); }
void warp_barrier() { yield_as(State::at_warp_barrier); }
uint64_t* exchange_slot(unsigned lane) { return &machine.slots[machine.running / 32][lane]; }
void cluster_barrier() { yield_as(State::at_cluster_barrier); }
unsigned char* dynamic_shared() { return machine.shared[block_rank].get(); }

void* map_shared(const void* p, unsigned rank) {
  const size_t offset = size_t(static_cast<const unsigned char*>(p) - dynamic_shared());
  if (offset >= machine.shared_bytes || rank >= machine.cluster) {
    fprintf(stderr, "simt: no shared memory of the cluster at this address or of rank %u\n", rank);
    abort();
  }
  return machine.shared[rank].get() + offset;
}

int clusters_at_a_time = 1;
Lists lists;

float fused_towards_zero(float a, float b, float c) {
  const int before = fegetround();
  fesetround(FE_TOWARDZERO);
  volatile float x = a, y = b, z = c;  // not to be moved out of this rounding
  volatile float result = fmaf(x, y, z);
  fesetround(before);
  return result;
}

void set_seed(uint64_t seed) {
  machine.random.seed(seed);
  lists = {};
}

void launch(const Shape& shape, void (*body)(void*), void* argument) {
  const uint64_t threads = uint64_t(shape.block.x) * shape.block.y * shape.block.z;
  const uint64_t blocks = uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  check_shape(shape, threads, blocks);
  machine.count = unsigned(threads);
  machine.cluster = cluster_blocks = shape.cluster;
  machine.shared_bytes = shape.shared_bytes;
  const unsigned together = machine.count * machine.cluster;
  if (machine.fibers.size() < together) machine.fibers.resize(together);
  machine.body = body;
  machine.argument = argument;
  block_size = shape.block;
  grid_size = shape.grid;
  std::vector<uint64_t> order(blocks / shape.cluster);
  for (uint64_t c = 0; c < order.size(); ++c) order[c] = c;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (uint64_t c : order) {
    machine.first_block = c * shape.cluster;
    for (unsigned i = 0; i < together; ++i) prepare(i, shape.block);
    poison_shared();
    allocate_shared();
    run_cluster();
  }
  machine.shared.clear();
}

}  // namespace simt

// The runtime calls that the launchers make.
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
extern "C" cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = simt::clusters_at_a_time;
  return cudaSuccess;
}
extern "C" cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
