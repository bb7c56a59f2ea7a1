#include "simd/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ernet {

namespace {

constexpr Isa kBestFirst[] = {Isa::avx512vbmi, Isa::avx512, Isa::avx2, Isa::portable};

#if defined(ERNET_HAS_AVX512) || defined(ERNET_HAS_AVX512VBMI)
bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
}
#endif

Isa choose_isa() {
  const char* text = std::getenv("ERNET_ISA");
  const std::string forced = text == nullptr ? "" : text;
  for (Isa isa : kBestFirst) {
    if (forced.empty() ? isa_available(isa) : forced == isa_name(isa)) {
      if (isa_available(isa)) return isa;
      throw std::runtime_error("ERNET_ISA=" + forced +
                               ": this CPU or this build does not have it. Unset ERNET_ISA to use the best one.");
    }
  }
  throw std::runtime_error("ERNET_ISA=" + forced + "; expected portable, avx2, avx512 or avx512vbmi.");
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512vbmi"};
  return names[int(isa)];
}

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::portable: return true;
#ifdef ERNET_HAS_AVX2
    case Isa::avx2:  // x86-64-v3
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
#ifdef ERNET_HAS_AVX512
    case Isa::avx512:  // x86-64-v4
      return cpu_has_avx512();
#endif
#ifdef ERNET_HAS_AVX512VBMI
    case Isa::avx512vbmi:
      return cpu_has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("avx512vnni");
#endif
    default: return false;
  }
}

Isa finest_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

Isa selected_isa() { return finest_isa() == Isa::avx512vbmi ? Isa::avx512 : finest_isa(); }

}  // namespace ernet
