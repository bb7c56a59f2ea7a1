// Kernel launches by macro, so that the same .cu files also compile for the CPU emulator of tests/simt.
#pragma once

#include <cuda_runtime.h>

#ifndef ERNET_LAUNCH
#define ERNET_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
