#include "simd/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ernet {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512vbmi:
      return "avx512vbmi";
  }
  return "unknown";
}

#if defined(ERNET_HAS_AVX512) || defined(ERNET_HAS_AVX512VBMI)
static bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
}
#endif

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:  // x86-64-v3
#ifdef ERNET_HAS_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
      return false;
#endif
    case Isa::avx512:  // x86-64-v4
#ifdef ERNET_HAS_AVX512
      return cpu_has_avx512();
#else
      return false;
#endif
    case Isa::avx512vbmi:
#ifdef ERNET_HAS_AVX512VBMI
      return cpu_has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("avx512vnni");
#else
      return false;
#endif
  }
  return false;
}

static Isa choose_isa() {
  const char* forced = std::getenv("ERNET_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vbmi}) {
      if (std::strcmp(forced, isa_name(isa)) == 0) {
        if (!isa_available(isa)) {
          throw std::runtime_error(std::string("ERNET_ISA=") + forced +
                                   ": this CPU or this build does not have it. Unset ERNET_ISA to use the best one.");
        }
        return isa;
      }
    }
    throw std::runtime_error(std::string("ERNET_ISA=") + forced + "; expected portable, avx2, avx512 or avx512vbmi.");
  }
  for (Isa isa : {Isa::avx512vbmi, Isa::avx512, Isa::avx2}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::portable;
}

Isa finest_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

Isa selected_isa() { return finest_isa() == Isa::avx512vbmi ? Isa::avx512 : finest_isa(); }

}  // namespace ernet
