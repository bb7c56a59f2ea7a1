// The plan that is asked for, for comparisons: by the environment variable ERNET_MACENKO_PLAN, which is read once, or
// since then by a call.
#pragma once

namespace ernet::cuda {

// auto (what is best for the images), streaming, resident, cluster, or cluster2 to cluster16. Throws
// std::invalid_argument for anything else.
void request_plan(const char* text);

// Reads the environment variable, with the same error.
void read_requested_plan();

}  // namespace ernet::cuda
