// Which instruction set runs the ER loops and the algebra on per-channel vectors.
#include "er/coefficients.h"
#include "er/kernels.h"

namespace ernet::cpu {
namespace {

struct IsaLoops {
  Isa isa;
  const ErLoops& er;
  const CoefficientLoops& coefficients;
};

const IsaLoops& selected_loops() {
  static const IsaLoops compiled_in[] = {
#ifdef ERNET_HAS_AVX512
      {Isa::avx512, isa_avx512::er_loops, isa_avx512::coefficient_loops},
#endif
#ifdef ERNET_HAS_AVX2
      {Isa::avx2, isa_avx2::er_loops, isa_avx2::coefficient_loops},
#endif
      {Isa::portable, isa_portable::er_loops, isa_portable::coefficient_loops},
  };
  const IsaLoops* loops = compiled_in;
  while (loops->isa != selected_isa()) ++loops;  // one that is not compiled in cannot be selected
  return *loops;
}

}  // namespace

const ErLoops& er_loops() { return selected_loops().er; }
const CoefficientLoops& coefficient_loops() { return selected_loops().coefficients; }

}  // namespace ernet::cpu
