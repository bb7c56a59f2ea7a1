// Instruction sets: which are compiled in, which one runs.
//
// The loops in */simd/*.cpp are compiled once per instruction set, each time inside its own namespace
// (ERNET_ISA_NAMESPACE), and the dispatcher picks a table of function pointers at run time. Such files must not include
// torch or any C++ standard library header with inline functions: the linker keeps one copy of those, and it could be
// the AVX-512 one, which then crashes on a machine without it.
#pragma once

#define ERNET_CONCAT_(a, b) a##b
#define ERNET_CONCAT(a, b) ERNET_CONCAT_(a, b)
#ifdef ERNET_ISA
#define ERNET_ISA_NAMESPACE ERNET_CONCAT(isa_, ERNET_ISA)
#endif

namespace ernet {

// `avx512` is x86-64-v4; `avx512vbmi` adds VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later), for the loops of stain
// normalisation alone.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512vbmi = 3 };

// The instruction set in use: the best that is compiled in and that this CPU has, or the one that the environment
// variable ERNET_ISA names (portable, avx2, avx512, avx512vbmi). It is chosen once. An unknown or unavailable name
// gives an error.
Isa finest_isa();

// The same without extensions, for loops that are compiled for portable, avx2 and avx512 alone.
Isa selected_isa();

const char* isa_name(Isa isa);

// True if the code for `isa` is compiled in and this CPU can run it.
bool isa_available(Isa isa);

}  // namespace ernet
