// Reconstruction of 8-bit images, as bytes laid out as they are.
#include "macenko/cpu/simd/reconstruct_u8_vbmi.h"

#ifdef ERNET_VBMI
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

void reconstruct_vbmi(const ImageView& image, PixelSpan span, const Reconstruction& r) {
  rebuild_pixels(image, span, r, [&](int64_t begin, int64_t count, const Levels& levels) {
    store_levels(image, begin, count, r.out, levels);
  });
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
