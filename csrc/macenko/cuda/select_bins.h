// Between two passes: a block finds the bins that hold the ranks sought, or picks the order statistics out of a few
// kept keys, and moves the fit of its image on.
#pragma once

#include <cuda_runtime.h>

#include "macenko/cuda/launch.h"
#include "macenko/cuda/passes.h"

namespace ernet::cuda {

// By all threads of a block.
__device__ __forceinline__ void copy_state(const FitState& from, FitState& to) {
  static_assert(sizeof(FitState) % 8 == 0, "copied by words");
  const auto* source = reinterpret_cast<const unsigned long long*>(&from);
  auto* target = reinterpret_cast<unsigned long long*>(&to);
  for (unsigned i = threadIdx.x; i < sizeof(FitState) / 8; i += blockDim.x) target[i] = source[i];
}

// What a pass has counted, in `source`'s bins, kept keys and counters.
template <class Source, class Load> struct Counts {
  const Source* source;
  __device__ __forceinline__ unsigned long long count(int t, int bin) const { return Load()(source->bins[t][bin]); }
  __device__ __forceinline__ unsigned long long key(int t, int i) const { return Load()(source->kept[t][i]); }
  __device__ __forceinline__ int64_t below(int t) const { return int64_t(Load()(source->counters.below[t])); }
  __device__ __forceinline__ uint64_t largest(int t) const { return Load()(source->counters.largest[t]); }
  __device__ __forceinline__ uint64_t smallest(int t) const { return Load()(source->counters.smallest[t]); }
  __device__ __forceinline__ unsigned inside(int t) const { return Load()(source->counters.inside[t]); }
  __device__ __forceinline__ int64_t within(int t) const { return int64_t(Load()(source->counters.within[t])); }
  __device__ __forceinline__ int64_t listed() const { return int64_t(Load()(source->counters.listed)); }
  __device__ __forceinline__ bool overflown() const { return Load()(source->counters.overflown) != 0; }
};

struct ResolveScratch {
  long long of_warp[kMaxWarps];
  macenko::RankBins found;
  unsigned long long statistic[2][2];
};

__device__ __forceinline__ long long inclusive_sum_of_warp(long long value) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const long long other = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane >= delta) value += other;
  }
  return value;
}

// The bins that hold the keys of two ranks. Every thread of the block calls this; ends with a barrier.
template <class CountOf>
__device__ __forceinline__ void find_bins(const CountOf& count_of, int64_t rank_lower, int64_t rank_upper,
                                          ResolveScratch& scratch, int32_t found[2], int bins = kBins) {
  const int threads = int(blockDim.x);
  const int chunk = (bins + threads - 1) / threads;
  const int begin = int(threadIdx.x) * chunk;
  const int end = begin + chunk < bins ? begin + chunk : bins;
  long long sum = 0;
  for (int i = begin; i < end; ++i) sum += static_cast<long long>(count_of(i));
  const long long inclusive = inclusive_sum_of_warp(sum);
  if (threadIdx.x % 32 == 31) scratch.of_warp[threadIdx.x / 32] = inclusive;
  __syncthreads();
  long long before = inclusive - sum;
  for (unsigned w = 0; w < threadIdx.x / 32; ++w) before += scratch.of_warp[w];
  for (int j = 0; j < 2; ++j) {
    const long long rank = j == 0 ? rank_lower : rank_upper;
    if (rank >= before && rank < before + sum) {
      long long passed = before;
      int bin = begin;
      for (; bin < end - 1; ++bin) {
        passed += static_cast<long long>(count_of(bin));
        if (rank < passed) break;
      }
      found[j] = bin;
    }
  }
  __syncthreads();
}

// The keys of two ranks among `count` kept ones, each of which has its own rank. Ends with a barrier.
template <class KeyOf>
__device__ __forceinline__ void pick_kept(const KeyOf& key_of, int count, int64_t rank_lower, int64_t rank_upper,
                                          unsigned long long statistic[2]) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const unsigned long long key = key_of(i);
    int rank = 0;
    for (int j = 0; j < count; ++j) {
      const unsigned long long other = key_of(j);
      rank += other < key || (other == key && j < i);
    }
    if (rank == rank_lower) statistic[0] = key;
    if (rank == rank_upper) statistic[1] = key;
  }
  __syncthreads();
}

// Takes the counts of a pass over exact keys, of which `below` are below the interval, into selection t, whose
// statistics are in the interval.
template <class Counted>
__device__ __forceinline__ void resolve_selection(const Counted& counted, int t, int64_t below, FitState& state,
                                                  ResolveScratch& scratch) {
  Selection& s = state.selection[t];
  if (s.stage == Stage::done) return;
  const bool first = threadIdx.x == 0;
  if (s.stage == Stage::split) {
    __syncthreads();
    if (first) macenko::finish_selection(counted.largest(t), counted.smallest(t), s);
    return;
  }
  const unsigned inside = counted.inside(t);
  if (inside <= unsigned(kKeptKeys)) {
    pick_kept([&](int i) { return counted.key(t, i); }, int(inside), s.rank_lower - below, s.rank_upper - below,
              scratch.statistic[t]);
    if (first) macenko::finish_selection(scratch.statistic[t][0], scratch.statistic[t][1], s);
  } else {
    int32_t* found = scratch.found.bin[t];
    find_bins([&](int i) { return counted.count(t, i); }, s.rank_lower - below, s.rank_upper - below, scratch, found);
    if (first) macenko::narrow(found[0], found[1], s);
  }
}

// Takes the counts of a list into selection t; true if the list does not hold its statistics.
template <class Counted>
__device__ __forceinline__ bool resolve_listed(const Counted& counted, int t, FitState& state,
                                               ResolveScratch& scratch) {
  Selection& s = state.selection[t];
  const macenko::End end = macenko::end_of(state.phase, t);
  // Pixels that are not listed are further from the end.
  const int64_t below = counted.below(t) + (end == macenko::End::high ? state.keys - counted.listed() : 0);
  macenko::Found found = macenko::Found::inside;
  if (s.stage == Stage::count) {
    Selection placed = s;
    found = macenko::place_in_tail(below, counted.within(t), end, placed);
    __syncthreads();
    if (found == macenko::Found::elsewhere && threadIdx.x == 0) s = placed;
  }
  if (found == macenko::Found::inside) resolve_selection(counted, t, below, state, scratch);
  return found == macenko::Found::missed;
}

// Finds the borders that a sample tells. Every thread of the block calls this; ends with a barrier.
template <class Counted>
__device__ __forceinline__ void resolve_sample(const Counted& counted, const macenko::FitParameters& p, FitState& state,
                                               ResolveScratch& scratch) {
  const bool angles = macenko::counts_angles(state.phase);
  for (int t = 0; t < 2; ++t) {
    const macenko::SampleRanks ranks =
        macenko::sample_ranks(state.selection[t], macenko::end_of(state.phase, t), state.keys, counted.within(0));
    int32_t* found = scratch.found.bin[t];
    if (threadIdx.x < 2) found[threadIdx.x] = 0;  // of an empty sample
    if (threadIdx.x == 0) scratch.found.open[t] = ranks.open;
    const auto count_of = [&](int i) { return angles ? counted.count(i / kBins, i % kBins) : counted.count(t, i); };
    find_bins(count_of, ranks.border, ranks.inner, scratch, found, angles ? 2 * kBins : kBins);
  }
  if (threadIdx.x == 0) macenko::end_sample(scratch.found, p, state);
  __syncthreads();
}

// Takes what a pass over a list has counted into the selections. Every thread of the block calls this; ends with a
// barrier.
template <class Counted>
__device__ __forceinline__ void resolve_list(const Counted& counted, FitState& state, ResolveScratch& scratch) {
  bool missed = counted.overflown();
  for (int t = 0; t < 2 && !missed; ++t) missed = resolve_listed(counted, t, state, scratch);
  __syncthreads();
  if (threadIdx.x == 0) state.missed = missed;
  __syncthreads();
}

// Moves `state` on by what a pass has counted. Every thread of the block calls this; ends with a barrier.
template <class Counted>
__device__ __forceinline__ void resolve(const Counted& counted, const macenko::FitParameters& p, FitState& state,
                                        ResolveScratch& scratch) {
  const Phase phase = state.phase;
  if (phase == Phase::angle_coarse || phase == Phase::concentration_coarse) {
    for (int t = 0; t < 2; ++t) {
      const Selection& s = state.selection[t];
      const int which = phase == Phase::angle_coarse ? 0 : t;
      find_bins([&](int i) { return counted.count(which, i); }, s.rank_lower, s.rank_upper, scratch,
                scratch.found.bin[t]);
    }
    if (threadIdx.x == 0) macenko::end_coarse(scratch.found, state);
  } else {
    for (int t = 0; t < 2; ++t) resolve_selection(counted, t, counted.below(t), state, scratch);
    __syncthreads();  // a fit that moves on begins its selections anew
    if (threadIdx.x == 0) macenko::end_exact(p, state);
  }
  __syncthreads();
}

}  // namespace ernet::cuda
