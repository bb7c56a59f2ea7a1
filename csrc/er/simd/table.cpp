// The table of ER loops of one instruction set. Compiled once per instruction set.
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

extern const ErLoops er_loops;
const ErLoops er_loops = {weighted_sum_loops,    map_dots_loops,   sum_dots_loops,
                          channel_moments_loops, vector_loops_f32, vector_loops_f64};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
