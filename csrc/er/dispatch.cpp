// Which instruction set runs the loops on maps and the algebra on per-channel vectors.
#include "er/kernels.h"

namespace ernet::cpu {

const ErLoops& er_loops() {
  struct IsaLoops {
    Isa isa;
    const ErLoops& loops;
  };
  static const IsaLoops compiled_in[] = {
#ifdef ERNET_HAS_AVX512
      {Isa::avx512, isa_avx512::er_loops},
#endif
#ifdef ERNET_HAS_AVX2
      {Isa::avx2, isa_avx2::er_loops},
#endif
      {Isa::portable, isa_portable::er_loops},
  };
  static const IsaLoops* const selected = [] {
    const IsaLoops* entry = compiled_in;
    while (entry->isa != selected_isa()) ++entry;  // one that is not compiled in cannot be selected
    return entry;
  }();
  return selected->loops;
}

}  // namespace ernet::cpu
