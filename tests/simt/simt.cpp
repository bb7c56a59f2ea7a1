// The scheduler behind simt.h.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
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

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;

enum class State { ready, at_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Index index;
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
  unsigned count = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t slots[kMaxThreads / 32][32];
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

void resume(unsigned i) {
  Fiber& fiber = machine.fibers[i];
  machine.running = i;
  thread_index = fiber.index;
  announce_switch(&machine.scheduler_fake_stack, fiber.stack.data(), fiber.stack.size());
  swapcontext(&machine.scheduler, &fiber.context);
  finish_switch(machine.scheduler_fake_stack, nullptr, nullptr);
}

void prepare(unsigned i, Index block) {
  Fiber& fiber = machine.fibers[i];
  fiber.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
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

void run_block() {
  std::vector<unsigned> order(machine.count);
  for (unsigned i = 0; i < machine.count; ++i) order[i] = i;
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
    for (unsigned warp = 0; warp < machine.count; warp += 32) {
      progress |= release(warp, std::min(warp + 32, machine.count), State::at_warp_barrier);
    }
    progress |= release(0, machine.count, State::at_barrier);
    for (unsigned i = 0; i < machine.count; ++i) finished &= machine.fibers[i].state == State::done;
    if (finished) return;
    if (!progress) {
      fprintf(stderr, "simt: deadlock: threads of a block wait at different barriers\n");
      abort();
    }
  }
}

}  // namespace

void barrier() { yield_as(State::at_barrier); }
void warp_barrier() { yield_as(State::at_warp_barrier); }
uint64_t* exchange_slot(unsigned lane) { return &machine.slots[machine.running / 32][lane]; }
void set_seed(uint64_t seed) { machine.random.seed(seed); }

void launch(Index grid, Index block, void (*body)(void*), void* argument) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    fprintf(stderr, "simt: impossible launch of %llu blocks of %llu threads\n", (unsigned long long)blocks,
            (unsigned long long)threads);
    abort();
  }
  machine.count = unsigned(threads);
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.body = body;
  machine.argument = argument;
  block_size = block;
  grid_size = grid;
  std::vector<uint64_t> order(blocks);
  for (uint64_t b = 0; b < blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (uint64_t b : order) {
    block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t(grid.x) * grid.y))};
    for (unsigned i = 0; i < machine.count; ++i) prepare(i, block);
    poison_shared();
    run_block();
  }
}

}  // namespace simt

// The runtime calls that the launchers make.
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
