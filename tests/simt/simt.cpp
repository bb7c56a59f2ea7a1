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

// For ThreadSanitizer this file is compiled without instrumentation, and says what orders the threads of a kernel.
#if SIMT_RACES
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simt {

thread_local Index thread_index, block_index, block_size, grid_size;
thread_local unsigned block_rank, cluster_blocks;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxCluster = 16;

// The kinds of barrier that order memory.
enum Scope { block_scope, warp_scope, cluster_scope, scopes };

enum class State { ready, at_barrier, at_warp_barrier, at_cluster_barrier, done };

// Where a thread or the scheduler goes on. The builtins cost a few instructions, swapcontext two system calls.
using Place = void* [5];

__attribute__((noinline, noreturn, no_sanitize("address"))) void go_to(Place& there) { __builtin_longjmp(there, 1); }

__attribute__((noinline, no_sanitize("address"))) void switch_to(Place& here, Place& there) {
  if (__builtin_setjmp(here) == 0) go_to(there);
}

__attribute__((noinline, no_sanitize("address"))) void start(Place& here, const ucontext_t& context) {
  if (__builtin_setjmp(here) == 0) setcontext(&context);
}

struct Fiber {
  ucontext_t context;  // of its beginning
  Place place;
  bool started;
  std::unique_ptr<char[]> stack;
  Index index;
  unsigned rank;  // of its block in the cluster
  State state;
  void* fake_stack = nullptr;
  void* watched = nullptr;       // as ThreadSanitizer knows it
  unsigned passed[scopes] = {};  // barriers
};

// A block's shared memory, which ends with the block.
struct Block {
  std::unique_ptr<unsigned char[]> dynamic;
  std::vector<std::pair<const void*, std::unique_ptr<unsigned char[]>>> variables;
  unsigned alive = 0;  // threads
};

// What the barriers of a cluster order, by address; barriers in turn, for a thread may be at the next one before
// another has left this one.
struct Order {
  char of_block[kMaxCluster][2], of_warp[kMaxCluster * kMaxThreads / 32][2], of_cluster[2];
};

struct Machine {
  std::vector<Fiber> fibers;
  Place scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  unsigned running = 0;
  unsigned count = 0;    // threads of a block
  unsigned cluster = 1;  // blocks that run together
  uint64_t first_block = 0;
  size_t shared_bytes = 0;
  std::vector<Block> blocks;  // that run together
  std::unique_ptr<Order> order;
  std::vector<void*> ended;  // threads of this launch, as ThreadSanitizer knows them
  void* host = nullptr;      // the same for the thread that launches
  unsigned omitted = ~0u;    // the barrier of every thread, by number, that orders nothing
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t slots[kMaxCluster * kMaxThreads / 32][32];
  std::mt19937_64 random{1};
};

Machine machine;
char of_launch, of_fences;  // what the end of a launch and what fences order, by address

#if SIMT_RACES
// Memory that is allocated and freed in here is new to ThreadSanitizer whoever had it before.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
void release_order(void* at) { __tsan_release(at); }
void acquire_order(void* at) { __tsan_acquire(at); }
void watch(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }

void watch_new(Fiber& fiber) {
  fiber.stack.reset();  // another thread's traces on it are none of this one's
  fiber.watched = __tsan_create_fiber(0);
  machine.ended.push_back(fiber.watched);
}

// Threads of all blocks are known until the launch ends: those of one block and of another are not ordered.
void end_watching() {
  acquire_order(&of_launch);
  for (void* fiber : machine.ended) __tsan_destroy_fiber(fiber);
  machine.ended.clear();
}
#else
struct Unwatched {
  Unwatched() {}
};
void release_order(void*) {}
void acquire_order(void*) {}
void watch(void*) {}
void watch_new(Fiber&) {}
void end_watching() {}
#endif

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
  if (state == State::done) release_order(&of_launch);
  watch(machine.host);
  announce_switch(state == State::done ? nullptr : &self.fake_stack, machine.scheduler_stack,
                  machine.scheduler_stack_bytes);
  switch_to(self.place, machine.scheduler);
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
  watch(fiber.watched);
  announce_switch(&machine.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  if (fiber.started) {
    switch_to(machine.scheduler, fiber.place);
  } else {
    fiber.started = true;
    start(machine.scheduler, fiber.context);
  }
  finish_switch(machine.scheduler_fake_stack, nullptr, nullptr);
  if (fiber.state == State::done && --machine.blocks[fiber.rank].alive == 0) {
    const Unwatched freed;
    machine.blocks[fiber.rank] = {};
  }
}

void prepare(unsigned i, Index block) {
  Fiber& fiber = machine.fibers[i];
  fiber.index = index_of(i % machine.count, block);
  fiber.rank = i / machine.count;
  fiber.state = State::ready;
  fiber.started = false;
  fiber.fake_stack = nullptr;
  std::fill(fiber.passed, fiber.passed + scopes, 0);
  const Unwatched allocated;
  watch_new(fiber);
  if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
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

// No byte more than was asked for; on a GPU, too, a block finds anything in its shared memory.
std::unique_ptr<unsigned char[]> shared_memory(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  memset(memory.get(), 0xA5, bytes);
  return memory;
}

// Shared memory of its own for each block of a cluster.
void start_blocks() {
  const Unwatched allocated;
  machine.blocks.clear();
  machine.blocks.resize(machine.cluster);
  for (Block& block : machine.blocks) {
    block.dynamic = shared_memory(machine.shared_bytes);
    block.alive = machine.count;
  }
  machine.order.reset(new Order);
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

namespace {

// Waits, and is ordered after what the others of the scope did before.
void pass(Scope scope, State state, char (*order)[2]) {
  Fiber& self = machine.fibers[machine.running];
  unsigned number = 0;
  for (unsigned n : self.passed) number += n;
  char* at = &(*order)[self.passed[scope]++ % 2];
  if (number != machine.omitted) release_order(at);
  yield_as(state);
  if (number != machine.omitted) acquire_order(at);
}

}  // namespace

void barrier() { pass(block_scope, State::at_barrier, &machine.order->of_block[machine.fibers[machine.running].rank]); }
void warp_barrier() { pass(warp_scope, State::at_warp_barrier, &machine.order->of_warp[machine.running / 32]); }
void cluster_barrier() { pass(cluster_scope, State::at_cluster_barrier, &machine.order->of_cluster); }
void omit_barrier(unsigned number) { machine.omitted = number; }

void fence() {
  acquire_order(&of_fences);
  release_order(&of_fences);
}

uint64_t shuffle_bits(uint64_t value, unsigned from) {
  uint64_t* slots = machine.slots[machine.running / 32];
  slots[thread_index.x % 32] = value;
  yield_as(State::at_warp_barrier);  // which orders no memory
  const uint64_t result = from < 32 ? slots[from] : value;
  yield_as(State::at_warp_barrier);
  return result;
}

unsigned char* dynamic_shared() { return machine.blocks[block_rank].dynamic.get(); }

void* shared_variable(const void* name, size_t bytes) {
  const Unwatched allocated;
  auto& variables = machine.blocks[block_rank].variables;
  for (const auto& variable : variables) {
    if (variable.first == name) return variable.second.get();
  }
  variables.emplace_back(name, shared_memory(bytes));
  return variables.back().second.get();
}

void* map_shared(const void* p, unsigned rank) {
  const size_t offset = size_t(static_cast<const unsigned char*>(p) - dynamic_shared());
  if (offset >= machine.shared_bytes || rank >= machine.cluster) {
    fprintf(stderr, "simt: no shared memory of the cluster at this address or of rank %u\n", rank);
    abort();
  }
  if (machine.blocks[rank].alive == 0) {
    fprintf(stderr, "simt: shared memory of rank %u, whose block has returned\n", rank);
    abort();
  }
  return machine.blocks[rank].dynamic.get() + offset;
}

int clusters_at_a_time = 1;
Lists lists;

void record_list(bool first, int64_t keys, int64_t listed, bool missed) {
  lists.rounds += first;
  lists.keys += first ? keys : 0;
  lists.listed += listed;
  lists.missed += first && missed;
}

// By what the value and its argument are, so that the same argument has the same result, as on a GPU.
float off_by_ulps(float value, float argument) {
  const float bits[2] = {value, argument};
  uint32_t hash[2];
  memcpy(hash, bits, sizeof hash);
  hash[0] = (hash[0] ^ hash[1] * 0x9E3779B9u) * 0x85EBCA6Bu;
  const int ulps = int((hash[0] >> 16) % 5) - 2;
  for (int i = 0; i < abs(ulps) && fabsf(value) >= 0x1p-126f; ++i)
    value = nextafterf(value, ulps < 0 ? -INFINITY : INFINITY);
  return value;
}

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
#if SIMT_RACES
  machine.host = __tsan_get_current_fiber();
#endif
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
    start_blocks();
    run_cluster();
  }
  end_watching();
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
