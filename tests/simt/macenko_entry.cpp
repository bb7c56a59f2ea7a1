// C functions over the Macenko launchers, for ctypes.
#include "macenko/cuda/kernels.h"
#include "macenko/cuda/plan.h"
#include "macenko/steps/fit_state.h"
#include "simt.h"

using namespace ernet::cuda;
namespace macenko = ernet::macenko;

namespace {

// Of `count` colours those that a form leaves out although their exact key is not beyond the border, and those listed.
template <class KeyOf>
void try_form(const float form[4], const double* od, const uint8_t* colours, int64_t count, double border,
              macenko::End end, const KeyOf& key_of, int64_t found[2]) {
  found[0] = found[1] = 0;
  for (int64_t i = 0; i < count; ++i) {
    double density[3];
    float light[3];
    for (int k = 0; k < 3; ++k) {
      density[k] = od[colours[3 * i + k]];
      light[k] = float(density[k] * -1.44269504088896340736);
    }
    const float value = fmaf(form[0], light[0], fmaf(form[1], light[1], fmaf(form[2], light[2], form[3])));
    const double key = key_of(density);
    const bool beyond = end == macenko::End::low ? key > border : key < border;
    found[0] += !(value >= 0.0f) && !beyond;
    found[1] += value >= 0.0f;
  }
}

}  // namespace

extern "C" {

void simt_seed(uint64_t seed) { simt::set_seed(seed); }
void simt_omit_barrier(unsigned number) { simt::omit_barrier(number); }

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

// kind, blocks, threads, table_shift, shared_bytes and listed of the plan.
void simt_choose_plan(const Device* device, const Images* images, bool network, int wanted, int blocks,
                      int64_t plan[6]) {
  const Plan chosen = choose_plan(*device, *images, network, {PlanKind(wanted), blocks});
  plan[0] = int(chosen.kind);
  plan[1] = chosen.blocks;
  plan[2] = chosen.threads;
  plan[3] = chosen.table_shift;
  plan[4] = chosen.shared_bytes;
  plan[5] = chosen.listed;
}

int simt_resident(const Images* images, const Parameters* parameters, const int64_t numbers[6], int multiprocessors,
                  const FitResult* fit, const Recipe* recipe, const Output* out) {
  const Plan plan = {PlanKind(numbers[0]), int(numbers[1]), int(numbers[2]),
                     int(numbers[3]),      numbers[4],      int(numbers[5])};
  const Device device = {9, multiprocessors, 0, 0};
  simt::clusters_at_a_time = multiprocessors / plan.blocks;
  return macenko_resident(*images, *parameters, plan, device, *fit, recipe, out, nullptr);
}

// The pixels that a sample takes.
int64_t simt_sample_step(int64_t pixels) { return macenko::sample_step(pixels); }
int64_t simt_sampled_pixel(int64_t stratum, int64_t step) { return macenko::sampled_pixel(stratum, step); }

// Forms for a border: pseudo-angle `border` in the plane rows[0], rows[1], or the concentration rows[0] . OD.
void simt_try_form(const double rows[6], double io, double border, bool angles, bool low, const uint8_t* colours,
                   int64_t count, int64_t found[2]) {
  const macenko::OdTable levels = macenko::make_od_table(io, 0);
  macenko::FitParameters p = {};
  p.od_min = levels.od[255];
  p.od_max = levels.od[0];
  const macenko::End end = low ? macenko::End::low : macenko::End::high;
  macenko::FitState state = {};
  float form[4];
  if (angles) {
    for (int k = 0; k < 3; ++k) {
      state.plane.first[k] = rows[k];
      state.plane.second[k] = rows[3 + k];
    }
    macenko::set_angle_form(border, end, p, state, form);
    const auto key = [&](const double* od) {
      return macenko::pseudo_angle(macenko::dot3(rows, od), macenko::dot3(rows + 3, od));
    };
    return try_form(form, levels.od, colours, count, border, end, key, found);
  }
  macenko::set_form(rows, border, p, form);
  const auto key = [&](const double* od) { return macenko::dot3(rows, od); };
  try_form(form, levels.od, colours, count, border, end, key, found);
}
}
