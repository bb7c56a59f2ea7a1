#include "macenko/cpu/levels.h"

#include <algorithm>
#include <atomic>

namespace ernet::cpu {

namespace {

constexpr int64_t kPixelsPerLook = 4096;

}  // namespace

WholeLevels::WholeLevels(Pixel type, ImageView& image, const Strips& strips) {
  const auto whole_levels = macenko_loops(type).whole_levels;
  if (whole_levels == nullptr || image.pixels == 0) return;
  const bool planar = image.pixel_stride == 1;
  const int64_t value_bytes = type == Pixel::f32 ? 4 : 8, channel_stride = planar ? image.pixels : 1;
  const auto* const data = static_cast<const unsigned char*>(image.data);
  const auto look = [&](int64_t begin, int64_t end, uint8_t* levels) {
    if (!planar)
      return whole_levels(data + 3 * begin * value_bytes, 3 * (end - begin), image.scale, levels + 3 * begin);
    for (int k = 0; k < 3; ++k) {
      const auto* const plane = data + (k * image.channel_stride + begin) * value_bytes;
      if (!whole_levels(plane, end - begin, image.scale, levels + k * channel_stride + begin)) return false;
    }
    return true;
  };
  auto* const levels = static_cast<uint8_t*>(room_.take(size_t(3 * image.pixels)));
  std::atomic<bool> whole{true};
  strips.run(strips.tasks, [&](int64_t strip) {
    const PixelSpan span = span_of_strip(image.pixels, strip, strips.tasks);
    for (int64_t begin = span.begin; begin < span.end && whole; begin += kPixelsPerLook) {
      if (!look(begin, std::min(begin + kPixelsPerLook, span.end), levels)) whole = false;
    }
  });
  if (!whole) return;
  image.levels = levels;
  image.level_channel_stride = channel_stride;
}

}  // namespace ernet::cpu
