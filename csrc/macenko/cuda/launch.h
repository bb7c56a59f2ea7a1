// Kernel launches, shared memory and approximations by macro, so that the same .cu files also compile for the CPU
// emulator of tests/simt.
#pragma once

#include <cuda_runtime.h>

#ifndef ERNET_LAUNCH
#define ERNET_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define ERNET_LAUNCH_CONFIGURED(config, kernel, ...) cudaLaunchKernelEx(&(config), kernel, __VA_ARGS__)
// What the emulator records of a list: nothing elsewhere.
#define ERNET_RECORD_LIST(first, keys, listed, missed) ((void)0)
// 2^z where code runs on the CPU: as far off as ex2.approx in the emulator.
#define ERNET_EX2_APPROX(z) exp2f(z)
// A variable in a block's static shared memory.
#define ERNET_SHARED(type, name) __shared__ type name
// A block's dynamic shared memory, at a multiple of 16.
#define ERNET_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
