#include "cpu/macenko_scaled.h"

#include <cmath>
#include <cstring>

namespace ernet::cpu {

namespace {

// A block's pixels stay in the first-level cache between its reconstruction and its scaling.
constexpr int64_t kScaledBlock = 1024;

uint16_t bfloat16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

float scaled(double value, const NetworkInput& out, int channel) {
  return float((value / out.range - out.mean[channel]) / out.std[channel]);
}

template <class Out>
Out converted(float value) {
  if constexpr (sizeof(Out) == 2) {
    return bfloat16_of(value);
  } else {
    return value;
  }
}

// Scaled values of every grey level and channel.
template <class Out>
struct LevelTable {
  Out value[3][256];

  explicit LevelTable(const NetworkInput& out) {
    for (int c = 0; c < 3; ++c) {
      for (int level = 0; level < 256; ++level) value[c][level] = converted<Out>(scaled(level, out, c));
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
        result[3 * i + c] = converted<Out>(scaled(double(value), out, c));
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
    loops.reconstruct(block, {0, count}, r);
    scale_block<T, Out>(level, block, out, table, static_cast<Out*>(out.data) + 3 * begin);
  }
}

template <class Out>
void reconstruct_into(Pixel type, const ImageView& image, const Reconstruction& r, const Strips& strips,
                      const NetworkInput& out) {
  const LevelTable<Out> table(out);
  strips.run(strips.tasks, [&](int64_t strip) {
    const PixelSpan span = span_of_strip(image.pixels, strip, strips.tasks);
    switch (type) {
      case Pixel::u8:
        return reconstruct_strip<uint8_t, Out>(image, span, type, r, out, &table);
      case Pixel::f32:
        return reconstruct_strip<float, Out>(image, span, type, r, out, &table);
      case Pixel::f64:
        return reconstruct_strip<double, Out>(image, span, type, r, out, &table);
    }
  });
}

}  // namespace

void macenko_reconstruct_scaled(Pixel type, const ImageView& image, const double matrix[3][3],
                                const macenko::OdTable& table, double io, const Strips& strips,
                                const NetworkInput& out) {
  const Reconstruction r = make_reconstruction(type, matrix, table, io);
  if (out.bfloat16) {
    reconstruct_into<uint16_t>(type, image, r, strips, out);
  } else {
    reconstruct_into<float>(type, image, r, strips, out);
  }
}

}  // namespace ernet::cpu
