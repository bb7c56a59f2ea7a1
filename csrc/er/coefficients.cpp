// Which instruction set runs the algebra on C-vectors.
#include "er/coefficients.h"

namespace ernet::cpu {

const CoefficientLoops& coefficient_loops() {
  switch (selected_isa()) {
#ifdef ERNET_HAS_AVX512
    case Isa::avx512:
      return isa_avx512::coefficient_loops;
#endif
#ifdef ERNET_HAS_AVX2
    case Isa::avx2:
      return isa_avx2::coefficient_loops;
#endif
    default:
      return isa_portable::coefficient_loops;
  }
}

}  // namespace ernet::cpu
