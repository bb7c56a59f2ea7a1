// The table of ER loops of one instruction set. Compiled once per instruction set.
#include "cpu/er_tables.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

extern const ErLoops er_loops;
const ErLoops er_loops = {
    {weighted_sum<float>, weighted_sum<double>, weighted_sum<bf16>, weighted_sum<f16>},
    {weighted_dot<float>, weighted_dot<double>, weighted_dot<bf16>, weighted_dot<f16>},
    {channel_moments<float>, channel_moments<double>, channel_moments<bf16>, channel_moments<f16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
