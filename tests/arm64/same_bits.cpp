// Prints what every processor is to compute with the same bits: fixed-point optical densities, whose integer sums are
// the moments of an image, and cosines and sines of angles.
#include <cinttypes>
#include <cstdio>
#include <initializer_list>

#include "macenko/steps/elementary.h"
#include "macenko/steps/od.h"

using ernet::macenko::bits_as;

int main() {
  for (double io : {3.0, 200.0, 240.0, 255.0, 256.0, 1023.5, 1024.0}) {
    for (double beta : {0.0, 0.15, 1.0}) {
      const auto table = ernet::macenko::make_od_table(io, beta);
      std::printf("Io %g, beta %g: tissue up to %d\n", io, beta, table.tissue_limit);
      for (int32_t fixed : table.fixed) std::printf("%" PRId32 "\n", fixed);
    }
  }
  for (int i = -1000; i <= 1000; ++i) {
    double cosine, sine;
    ernet::macenko::cos_sin(i * 0x1.00fp-8, cosine, sine);
    std::printf("%016" PRIx64 " %016" PRIx64 "\n", bits_as<uint64_t>(cosine), bits_as<uint64_t>(sine));
  }
}
