// Moments of 8-bit images: fixed-point ODs of the tissue pixels by a polynomial (macenko/steps/od.h), exact integer
// products. On the way the words that later passes read are written, where there is room for them.
#include "macenko/cpu/simd/u8.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

using macenko::OdTable;

void moments_of_bytes(const ImageView& image, PixelSpan span, const OdTable& table, double io, double,
                      MomentSums& sums) {
  ByteBlock block;
  alignas(64) int32_t fixed[3][kBlock];
  const int32_t origin = word_origin(io);
  // ODs fall with the level: those of tissue are the ones from its brightest level's on.
  const int32_t least = table.tissue_limit < 0 ? INT32_MAX : table.fixed[table.tissue_limit];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load_levels(image, begin, count, block);
    fixed_densities(block, count, table, fixed);
    if (image.words != nullptr) words_of(fixed, count, origin, image.words + begin, image.pixels);
    for (int k = 0; k < 3; ++k) {
      for (int i = count; i < kBlock; ++i) fixed[k][i] = INT32_MIN;
    }
    sums.count += keep_tissue(fixed, least);
    add_fixed(fixed, sums);
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
