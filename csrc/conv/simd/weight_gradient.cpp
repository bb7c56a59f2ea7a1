// The gradient of a convolution's weight. A tile of it, some channels of dy times two vectors of channels of x, is
// summed in registers over the pixels of a block: two loads of x and a broadcast of each dy for two products and sums
// of every channel of dy. Compiled once per instruction set.
#include "conv/kernels.h"
#include "simd/vec.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {
namespace {

constexpr int kVectors = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostRows = 12;  // 24 of 32 registers
#else
constexpr int kMostRows = 6;  // 12 of 16 registers
#endif
constexpr int64_t kTile = kVectors * kLanes<float>;

// A copied block of pixels: x with its border of zeros, some channels, and dy.
struct Block {
  const float* x;
  const float* dy;
  int64_t samples, rows, columns;
  int64_t x_sample, x_row, x_pixel;  // floats from one sample, from what one output row and one output pixel read,
                                     // to the next
  int64_t dy_pixel;
  bool fetch_dw;  // before it is needed; with a kernel of one pixel that took longer
};

// dw [kRows][stride] += dy^T x of one place in the kernel.
template <int kRows> void tile(const Block& b, const float* x_sample, const float* dy, float* dw, int64_t stride) {
  Vec<float> sums[kRows][kVectors];
  for (int k = 0; k < kRows; ++k) {
    for (int v = 0; v < kVectors; ++v) sums[k][v] = Vec<float>{};
  }
  if (b.fetch_dw) {
    for (int k = 0; k < kRows; ++k) __builtin_prefetch(dw + k * stride, 1, 3);
  }
  for (int64_t n = 0; n < b.samples; ++n, x_sample += b.x_sample) {
    const float* x_row = x_sample;
    for (int64_t i = 0; i < b.rows; ++i, x_row += b.x_row) {
      const float* x = x_row;
      for (int64_t j = 0; j < b.columns; ++j, x += b.x_pixel, dy += b.dy_pixel) {
        Vec<float> of_x[kVectors];
        for (int v = 0; v < kVectors; ++v) of_x[v] = load<float>(x + v * kLanes<float>);
        for (int k = 0; k < kRows; ++k) {
          const Vec<float> g = broadcast<float>(dy[k]);
          for (int v = 0; v < kVectors; ++v) sums[k][v] += g * of_x[v];
        }
      }
    }
  }
  for (int k = 0; k < kRows; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      float* const out = dw + k * stride + v * kLanes<float>;
      store(out, load<float>(out) + sums[k][v]);
    }
  }
}

using TileFunction = void (*)(const Block&, const float*, const float*, float*, int64_t);
// By the number of rows, which is the most but for the last channels of dy.
constexpr TileFunction kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>, tile<6>,
#if defined(__AVX512F__) || defined(__aarch64__)
                                   tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>
#endif
};
static_assert(sizeof kTiles / sizeof kTiles[0] == kMostRows + 1);

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void copy_floats(float* to, const float* from, int64_t count) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// Rows [first, first + rows) of what the block's output rows read, of channels [begin, begin + channels).
void copy_x(const ConvWeightGradient& args, int64_t sample, int64_t first, int64_t rows, int64_t begin,
            int64_t channels, float* to) {
  const ConvShape& s = args.shape;
  const int64_t width = s.copied_width(), pixel = copied_channels(channels);
  const int64_t step = s.kernel == 1 ? s.stride : 1;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = (first + i) * step - s.padding;
    for (int64_t j = 0; j < width; ++j, to += pixel) {
      const int64_t column = j * step - s.padding;
      if (row >= 0 && row < s.height && column >= 0 && column < s.width) {
        copy_floats(to, args.x + ((sample * s.height + row) * s.width + column) * s.C + begin, channels);
      } else {
        memset(to, 0, static_cast<size_t>(channels) * sizeof(float));
      }
    }
  }
}

void copy_dy(const ConvWeightGradient& args, int64_t sample, int64_t first, int64_t rows, float* to) {
  const ConvShape& s = args.shape;
  const float* from = args.dy + (sample * s.out_height + first) * s.out_width * s.K;
  const int64_t pixel = copied_channels(s.K);
  for (int64_t j = 0; j < rows * s.out_width; ++j) copy_floats(to + j * pixel, from + j * s.K, s.K);
}

// All tiles of a block. Those of one column of tiles of x, at all places of the kernel, follow one another: both
// operands are in the first-level cache then.
void all_tiles(const ConvWeightGradient& args, const Block& b, int64_t begin, int64_t end) {
  const ConvShape& s = args.shape;
  const int64_t places = s.kernel * s.kernel, stride = places * s.C;
  const int64_t x_pixel = b.x_pixel / s.copied_stride(), x_line = s.copied_width() * x_pixel;
  for (int64_t c = begin; c < end; c += kTile) {
    for (int64_t k = 0; k < s.K; k += kMostRows) {
      const TileFunction run = kTiles[least(s.K - k, kMostRows)];
      for (int64_t u = 0; u < s.kernel; ++u) {
        for (int64_t v = 0; v < s.kernel; ++v) {
          run(b, b.x + u * x_line + v * x_pixel + (c - begin), b.dy + k,
              args.dw + k * stride + (u * s.kernel + v) * s.C + c, stride);
        }
      }
    }
  }
}

void weight_gradient(const ConvWeightGradient& args, int64_t begin, int64_t end, float* scratch) {
  const ConvShape& s = args.shape;
  const int64_t channels = end - begin, rows_of_dw = s.K * s.kernel * s.kernel;
  for (int64_t r = 0; r < rows_of_dw; ++r) {
    memset(args.dw + r * s.C + begin, 0, static_cast<size_t>(channels) * sizeof(float));
  }
  const PixelBlock block = pixel_block(s);
  const int64_t x_pixel = copied_channels(channels), x_line = s.copied_width() * x_pixel, step = s.copied_stride();
  float* const dy = scratch + block.samples * s.copied_height(block.rows) * x_line;
  for (int64_t n = 0; n < s.N; n += block.samples) {
    const int64_t samples = least(s.N - n, block.samples);
    for (int64_t i = 0; i < s.out_height; i += block.rows) {
      const int64_t rows = least(s.out_height - i, block.rows), x_rows = s.copied_height(rows);
      const int64_t dy_pixel = copied_channels(s.K);
      for (int64_t m = 0; m < samples; ++m) {
        copy_x(args, n + m, i * step, x_rows, begin, channels, scratch + m * x_rows * x_line);
        copy_dy(args, n + m, i, rows, dy + m * rows * s.out_width * dy_pixel);
      }
      const Block b = {scratch,        dy,       samples,     rows, s.out_width, x_rows * x_line, step * x_line,
                       step * x_pixel, dy_pixel, s.kernel > 1};
      all_tiles(args, b, begin, end);
    }
  }
}

}  // namespace

const ConvLoops conv_loops = {kTile, weight_gradient};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
