// The loop templates of one instruction set, gathered by er_tables_loops.cpp into its ErLoops table.
#pragma once

#include "cpu/er_loops.h"
#include "cpu/vec.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

template <typename T>
void weighted_sum(const WeightedSum& args, int64_t begin, int64_t end);
template <typename T>
void weighted_dot(const WeightedDot& args, int64_t begin, int64_t end);
template <typename T>
void channel_moments(const ChannelMoments& args, int64_t begin, int64_t end);

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
