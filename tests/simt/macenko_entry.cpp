// C functions over the Macenko launchers, for ctypes.
#include "cuda/macenko.h"
#include "cuda/plan.h"
#include "simt.h"

using namespace ernet::cuda;

extern "C" {

void simt_seed(uint64_t seed) { simt::set_seed(seed); }

int64_t simt_moments_workspace(const Images* images) { return macenko_moments_workspace(*images); }

int simt_moments(const Images* images, double io, double beta, void* workspace, double* moments) {
  return macenko_moments(*images, io, beta, workspace, moments, nullptr);
}

int simt_reconstruct(const Images* images, const Recipe* recipe, double io, const Output* out) {
  return macenko_reconstruct(*images, *recipe, io, *out, nullptr);
}

int simt_separate(const Images* images, const Separation* what, double io) {
  return macenko_separate(*images, *what, io, nullptr);
}

int64_t simt_streaming_workspace(const Images* images, int64_t cache_bytes) {
  return macenko_streaming_workspace(*images, cache_bytes);
}

int simt_streaming(const Images* images, const Parameters* parameters, int64_t cache_bytes, void* workspace,
                   const FitResult* fit, const Recipe* recipe, const Output* out) {
  return macenko_streaming(*images, *parameters, cache_bytes, workspace, *fit, recipe, out, nullptr);
}

// How often statistics were looked for in a list, keys and listed pixels of all these times, and how often in vain.
void simt_lists(int64_t numbers[4]) {
  const simt::Lists& lists = simt::lists;
  numbers[0] = lists.rounds;
  numbers[1] = lists.keys;
  numbers[2] = lists.listed;
  numbers[3] = lists.missed;
}

// kind, blocks, threads, light_shift, shared_bytes and listed of the plan.
void simt_choose_plan(const Device* device, const Images* images, bool network, int wanted, int blocks,
                      int64_t plan[6]) {
  const Plan chosen = choose_plan(*device, *images, network, PlanKind(wanted), blocks);
  plan[0] = int(chosen.kind);
  plan[1] = chosen.blocks;
  plan[2] = chosen.threads;
  plan[3] = chosen.light_shift;
  plan[4] = chosen.shared_bytes;
  plan[5] = chosen.listed;
}

int simt_team(const Images* images, const Parameters* parameters, const int64_t numbers[6], int multiprocessors,
              const FitResult* fit, const Recipe* recipe, const Output* out) {
  const Plan plan = {PlanKind(numbers[0]), int(numbers[1]), int(numbers[2]),
                     int(numbers[3]),      numbers[4],      int(numbers[5])};
  const Device device = {9, multiprocessors, 0, 0};
  simt::clusters_at_a_time = multiprocessors / plan.blocks;
  return macenko_team(*images, *parameters, plan, device, *fit, recipe, out, nullptr);
}
}
