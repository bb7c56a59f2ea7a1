#include "macenko/cpu/image.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace ernet::cpu {

namespace {

// A block's pixels stay in the first-level cache between its reconstruction and its scaling.
constexpr int64_t kScaledBlock = 1024;

float scaled(double value, const NetworkInput& out, int channel) {
  return float((value / out.range - out.mean[channel]) / out.std[channel]);
}

// Scaled values of every grey level and channel.
template <class Out> struct LevelTable {
  Out value[3][256];

  explicit LevelTable(const NetworkInput& out) {
    for (int c = 0; c < 3; ++c) {
      for (int level = 0; level < 256; ++level) value[c][level] = Out(scaled(level, out, c));
    }
  }
};

template <class T, class Out>
void scale_block(const T* level, const ImageView& block, const NetworkInput& out, const LevelTable<Out>* table,
                 Out* result) {
  for (int64_t i = 0; i < block.pixels; ++i) {
    for (int c = 0; c < 3; ++c) {
      const T value = level[i * block.pixel_stride + c * block.channel_stride];
      if constexpr (sizeof(T) == 1) {
        result[3 * i + c] = table->value[c][value];
      } else {
        result[3 * i + c] = Out(scaled(double(value), out, c));
      }
    }
  }
}

template <class T, class Out>
void reconstruct_strip(const ImageView& image, PixelSpan span, Pixel type, Reconstruction r, const NetworkInput& out,
                       const LevelTable<Out>* table) {
  const MacenkoLoops& loops = macenko_loops(type);
  const T* data = static_cast<const T*>(image.data);
  T planes[3 * kScaledBlock];  // of a planar image, whose own planes lie too far apart for a small result
  T level[3 * kScaledBlock];
  r.out = level;
  for (int64_t begin = span.begin; begin < span.end; begin += kScaledBlock) {
    const int64_t count = span.end - begin < kScaledBlock ? span.end - begin : kScaledBlock;
    ImageView block = {data + begin * image.pixel_stride, image.pixel_stride, image.channel_stride, count, image.scale};
    if (image.pixel_stride == 1) {
      for (int c = 0; c < 3; ++c) {
        std::memcpy(planes + c * kScaledBlock, data + begin + c * image.channel_stride, size_t(count) * sizeof(T));
      }
      block.data = planes;
      block.channel_stride = kScaledBlock;
    }
    if (image.levels != nullptr) {
      block.levels = image.levels + begin * image.pixel_stride;
      block.level_channel_stride = image.level_channel_stride;
    }
    loops.reconstruct(block, {0, count}, &r, 1);
    scale_block<T, Out>(level, block, out, table, static_cast<Out*>(out.data) + 3 * begin);
  }
}

// `r` is null where the image stays as it is.
template <class T, class Out>
void write_strips(Pixel type, const ImageView& image, const Reconstruction* r, const Strips& strips,
                  const NetworkInput& out) {
  const LevelTable<Out> table(out);
  const auto fused = macenko_loops(type).reconstruct_scaled;
  const ScaledLevels scaled = {int(sizeof(Out)), table.value, out.data};
  strips.run(strips.tasks, [&](int64_t strip) {
    const PixelSpan span = span_of_strip(image.pixels, strip, strips.tasks);
    if (r == nullptr) {
      const T* data = static_cast<const T*>(image.data) + span.begin * image.pixel_stride;
      const ImageView part = {data, image.pixel_stride, image.channel_stride, span.end - span.begin, image.scale};
      scale_block<T, Out>(data, part, out, &table, static_cast<Out*>(out.data) + 3 * span.begin);
    } else if (fused != nullptr && r->single) {
      fused(image, span, *r, scaled);
    } else {
      reconstruct_strip<T, Out>(image, span, type, *r, out, &table);
    }
  });
}

template <class Out>
void write_as(Pixel type, const ImageView& image, const Reconstruction* r, const Strips& strips,
              const NetworkInput& out) {
  const auto write = type == Pixel::u8    ? write_strips<uint8_t, Out>
                     : type == Pixel::f32 ? write_strips<float, Out>
                                          : write_strips<double, Out>;
  write(type, image, r, strips, out);
}

}  // namespace

void macenko_scaled(Pixel type, const ImageView& image, const Reconstruction* r, const Strips& strips,
                    const NetworkInput& out) {
  switch (out.type) {
    case NetworkType::f32: return write_as<float>(type, image, r, strips, out);
    case NetworkType::bf16: return write_as<c10::BFloat16>(type, image, r, strips, out);
    case NetworkType::f16: return write_as<c10::Half>(type, image, r, strips, out);
  }
}

}  // namespace ernet::cpu
