// The table of ER loops of one instruction set. Compiled once per instruction set.
#include "er/simd/table.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

extern const ErLoops er_loops;
const ErLoops er_loops = {
    {weighted_sum<float>, weighted_sum<double>, weighted_sum<bf16>, weighted_sum<f16>},
    {weighted_dot<float>, weighted_dot<double>, weighted_dot<bf16>, weighted_dot<f16>},
    {map_dots<float>, map_dots<double>, map_dots<bf16>, map_dots<f16>},
    {sum_dots<float>, sum_dots<double>, sum_dots<bf16>, sum_dots<f16>},
    {channel_moments<float>, channel_moments<double>, channel_moments<bf16>, channel_moments<f16>},
    {weighted_sum_strip<float>, weighted_sum_strip<double>, weighted_sum_strip<bf16>, weighted_sum_strip<f16>},
    {weighted_dot_strip<float>, weighted_dot_strip<double>, weighted_dot_strip<bf16>, weighted_dot_strip<f16>},
    {map_dots_strip<float>, map_dots_strip<double>, map_dots_strip<bf16>, map_dots_strip<f16>},
    {channel_moments_strip<float>, channel_moments_strip<double>, channel_moments_strip<bf16>,
     channel_moments_strip<f16>},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
