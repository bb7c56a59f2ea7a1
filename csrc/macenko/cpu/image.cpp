#include "macenko/cpu/image.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "macenko/cpu/levels.h"
#include "memory/scratch.h"

namespace ernet::cpu {

#define ERNET_DECLARE_TABLE(isa)                           \
  namespace isa {                                          \
  extern const MacenkoLoops macenko_table[kNumPixelTypes]; \
  }
ERNET_DECLARE_TABLE(isa_portable)
#ifdef ERNET_HAS_AVX2
ERNET_DECLARE_TABLE(isa_avx2)
#endif
#ifdef ERNET_HAS_AVX512
ERNET_DECLARE_TABLE(isa_avx512)
#endif
#ifdef ERNET_HAS_AVX512VBMI
ERNET_DECLARE_TABLE(isa_avx512vbmi)
#endif
#undef ERNET_DECLARE_TABLE

const MacenkoLoops& macenko_loops(Pixel type) {
  switch (finest_isa()) {
#ifdef ERNET_HAS_AVX512VBMI
    case Isa::avx512vbmi: return isa_avx512vbmi::macenko_table[int(type)];
#endif
#ifdef ERNET_HAS_AVX512
    case Isa::avx512: return isa_avx512::macenko_table[int(type)];
#endif
#ifdef ERNET_HAS_AVX2
    case Isa::avx2: return isa_avx2::macenko_table[int(type)];
#endif
    default: return isa_portable::macenko_table[int(type)];
  }
}

Strips one_strip() {
  return {1, [](int64_t tasks, const std::function<void(int64_t)>& body) {
            for (int64_t task = 0; task < tasks; ++task) body(task);
          }};
}

namespace {

// Largest exponent of one input channel, and of the shift: with all four 2^z stays within float32, and e^z within
// float64.
constexpr double kSingleExponent = 25.0, kDoubleExponent = 170.0;

// True if every exponent M_ck OD_k of whole levels, and the shift, is below `largest`; false for NaN.
bool fits(const double matrix[3][3], const double shift[3], const macenko::OdTable& table, double largest) {
  // OD falls with the level, so the ends bound the rest.
  const double od = std::fmax(std::fabs(table.od[0]), std::fabs(table.od[255]));
  bool fits = true;
  for (int c = 0; c < 3; ++c) {
    fits &= std::fabs(shift[c]) < largest;
    for (int k = 0; k < 3; ++k) fits &= std::fabs(matrix[c][k]) * od < largest;
  }
  return fits;
}

// Every so many pixels of an image, planar, to look for percentiles in. More of them narrow the search but cost time
// themselves.
class ImageSample {
 public:
  ImageSample(Pixel type, const ImageView& image) : view_{nullptr, 1, 0, 0, image.scale} {
    if (image.pixels <= kCollectAll) return;
    const int64_t wanted = std::clamp(image.pixels / kPixelsPerSample, kSmallSample, kLargeSample);
    const int64_t stride =
        (image.pixels / wanted) | 1;  // odd, so that it does not walk down the columns of an even width
    if (type == Pixel::u8) take<uint8_t>(image, stride);
    if (type == Pixel::f32) take<float>(image, stride);
    if (type == Pixel::f64) take<double>(image, stride);
  }

  const ImageView& view() const { return view_; }

 private:
  static constexpr int64_t kPixelsPerSample = 32;
  static constexpr int64_t kSmallSample = 512;
  static constexpr int64_t kLargeSample = 8192;

  template <class T> void take(const ImageView& image, int64_t stride) {
    const int64_t count = (image.pixels + stride - 1) / stride;
    bytes_.reset(new unsigned char[size_t(3 * count) * sizeof(T)]);
    const T* from = static_cast<const T*>(image.data);
    T* to = reinterpret_cast<T*>(bytes_.get());
    for (int64_t i = 0; i < count; ++i) {
      const T* pixel = from + i * stride * image.pixel_stride;
      for (int k = 0; k < 3; ++k) to[k * count + i] = pixel[k * image.channel_stride];
    }
    view_.data = to;
    view_.channel_stride = view_.pixels = count;
  }

  std::unique_ptr<unsigned char[]> bytes_;
  ImageView view_;
};

// Images whose words moments leave to the scans: six bytes a pixel, 6 MiB at most.
constexpr int64_t kMostKeptPixels = int64_t(1) << 20;

}  // namespace

int64_t macenko_moments(Pixel type, const ImageView& image, const MacenkoParameters& p, const macenko::OdTable& table,
                        const Strips& strips, double moments[macenko::kMomentCount]) {
  const MacenkoLoops& loops = macenko_loops(type);
  std::vector<MomentSums> partial(size_t(strips.tasks), MomentSums{});
  strips.run(strips.tasks, [&](int64_t strip) {
    loops.moments(image, span_of_strip(image.pixels, strip, strips.tasks), table, p.io, p.beta, partial[strip]);
  });
  MomentSums sums = {};
  for (const MomentSums& part : partial) {
    sums.count += part.count;
    sums.invalid += part.invalid;
    for (int k = 0; k < 3; ++k) sums.sum[k] += part.sum[k];
    for (int k = 0; k < 6; ++k) sums.product[k] += part.product[k];
  }
  moments_of_sums(sums.count, sums.sum, sums.product, moments);
  return sums.invalid;
}

MacenkoImageFit macenko_fit(Pixel type, const ImageView& given, const MacenkoParameters& p,
                            const macenko::OdTable& table, const Strips& strips) {
  if (given.levels != nullptr) return macenko_fit(Pixel::u8, byte_image(given), p, table, strips);
  ImageView image = given;
  Scratch words;
  if (macenko_loops(type).uses_words && image.pixels <= kMostKeptPixels) {
    image.words = static_cast<int16_t*>(words.take(size_t(3 * image.pixels) * sizeof(int16_t)));
  }
  double moments[macenko::kMomentCount];
  if (macenko_moments(type, image, p, table, strips, moments) > 0) return no_fit(macenko::kNonFinite);
  std::optional<ImageSample> sample;
  return fit_of_moments(moments, p, table, [&](const Keys& keys, const double percent[2], double result[2]) {
    if (!sample) sample.emplace(type, image);
    const bool angles = keys.kind == KeyKind::angle;
    macenko_percentiles(macenko_loops(type), image, sample->view(), keys, angles ? int64_t(moments[0]) : image.pixels,
                        percent, p.nearest, angles, strips, result);
  });
}

Reconstruction make_reconstruction(const double matrix[3][3], const double shift[3], const macenko::OdTable& table,
                                   double io) {
  Reconstruction r = {};
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < 3; ++k) r.matrix[c][k] = matrix[c][k];
    r.shift[c] = shift[c];
  }
  r.io = io;
  r.table = &table;
  r.single = fits(matrix, shift, table, kSingleExponent);
  r.factors = fits(matrix, shift, table, kDoubleExponent);
  return r;
}

void macenko_reconstruct(Pixel type, const ImageView& image, const Reconstruction* r, int results,
                         const Strips& strips) {
  strips.run(strips.tasks, [&](int64_t strip) {
    macenko_loops(type).reconstruct(image, span_of_strip(image.pixels, strip, strips.tasks), r, results);
  });
}

}  // namespace ernet::cpu
