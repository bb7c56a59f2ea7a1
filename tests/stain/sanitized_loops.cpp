// Fits and reconstructs images of many sizes in buffers that end, or begin, at pages without access, and checks the
// loops (exact_loops.cpp): for a build with sanitizers. These do not see the masked loads and stores of AVX-512; the
// pages do.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "macenko/cpu/image.h"
#include "macenko/cpu/levels.h"

int check_exactness(bool few);

namespace {

using ernet::cpu::ImageView;
using ernet::cpu::NetworkType;
using ernet::cpu::Pixel;
using ernet::cpu::Reconstruction;
using ernet::cpu::Strips;
using ernet::cpu::WholeLevels;

// Bytes between two pages that cannot be read or written, flush with the second or, one time in four, with the first.
class Fenced {
 public:
  explicit Fenced(size_t bytes) {
    static unsigned made = 0;
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
    length_ = inside + 2 * page;
    void* mapped = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    begin_ = static_cast<unsigned char*>(mapped);
    if (mprotect(begin_ + page, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = begin_ + page + (made++ % 4 ? inside - bytes : 0);
  }
  ~Fenced() { munmap(begin_, length_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  unsigned char* get() const { return data_; }

 private:
  unsigned char *begin_, *data_;
  size_t length_;
};

// Noise, tissue without background, or background with a little tissue and, as float64, one NaN.
double level(int kind, unsigned random, int i, Pixel type) {
  if (kind == 0) return random >> 24;
  if (kind == 1) return 30 + (random >> 25);
  if (type == Pixel::f64 && i == 5) return std::nan("");
  return i % 7 ? 255 : 90 + (random >> 30);
}

template <class T> void fill(void* data, int count, int kind, Pixel type) {
  static unsigned random = 1;
  for (int i = 0; i < count; ++i) {
    random = random * 1664525u + 1013904223u;
    static_cast<T*>(data)[i] = static_cast<T>(level(kind, random, i, type));
  }
}

// Whether one pass writes the results that single passes write; the last of them always fits in float32.
bool three_agree(Pixel type, const ImageView& image, const Reconstruction& first, const ernet::macenko::OdTable& table,
                 const Strips& strips) {
  const double gentle[3][3] = {{1, 0, 0}, {.1, .9, 0}, {0, .2, .8}}, none[3] = {0, 0, 0};
  const size_t bytes = 3 * size_t(image.pixels) * (type == Pixel::u8 ? 1 : type == Pixel::f32 ? 4 : 8);
  const Fenced alone(bytes), a(bytes), b(bytes), c(bytes);
  Reconstruction together[3] = {first, first, ernet::cpu::make_reconstruction(gentle, none, table, first.io)};
  together[1].shift[2] = -1;
  unsigned char* out[3] = {a.get(), b.get(), c.get()};
  for (int j = 0; j < 3; ++j) together[j].out = out[j];
  ernet::cpu::macenko_reconstruct(type, image, together, 3, strips);
  bool same = true;
  for (int j = 0; j < 3; ++j) {
    together[j].out = alone.get();
    ernet::cpu::macenko_reconstruct(type, image, together + j, 1, strips);
    same &= std::memcmp(alone.get(), out[j], bytes) == 0;
  }
  return same;
}

// Whether two fits have the same bits.
bool same_fit(const ernet::cpu::MacenkoImageFit& a, const ernet::cpu::MacenkoImageFit& b) {
  return a.status == b.status &&
         (a.status != ernet::macenko::kOk ||
          (std::memcmp(&a.stain, &b.stain, sizeof a.stain) == 0 &&
           std::memcmp(a.max_concentration, b.max_concentration, sizeof a.max_concentration) == 0));
}

// With `whole` what is known of whole levels is made use of.
int run(int pixels, bool channels_last, Pixel type, int kind, bool whole) {
  const int bytes = type == Pixel::u8 ? 1 : type == Pixel::f32 ? 4 : 8;
  const Fenced in(3 * pixels * bytes), out(3 * pixels * bytes);
  if (type == Pixel::u8) fill<unsigned char>(in.get(), 3 * pixels, kind, type);
  if (type == Pixel::f32) fill<float>(in.get(), 3 * pixels, kind, type);
  if (type == Pixel::f64) fill<double>(in.get(), 3 * pixels, kind, type);
  ImageView image = {in.get(), channels_last ? 3 : 1, channels_last ? 1 : pixels, pixels, 1.0};
  std::optional<WholeLevels> levels;
  if (whole) levels.emplace(type, image, ernet::cpu::one_strip());
  const auto table = ernet::macenko::make_od_table(240, 0.15);
  const ernet::cpu::MacenkoParameters parameters = {240, 1, 0.15, false};
  const Strips three = {3, [](int64_t tasks, const std::function<void(int64_t)>& task) {
                          for (int64_t i = 0; i < tasks; ++i) task(i);
                        }};
  const double gain = kind == 1 ? 40 : 1;  // beyond float32 for one kind
  const double matrix[3][3] = {{.5 * gain, .2, .1}, {.1, .9 * gain, .1}, {0, .2, .8}};
  const double shift[3] = {0.1, -2, 0};
  auto r = ernet::cpu::make_reconstruction(matrix, shift, table, 240);
  r.out = out.get();
  int fitted = 0;
  bool same = true;
  for (const Strips& strips : {ernet::cpu::one_strip(), three}) {
    fitted += ernet::cpu::macenko_fit(type, image, parameters, table, strips).status == ernet::macenko::kOk;
    ernet::cpu::macenko_reconstruct(type, image, &r, 1, strips);
    same &= three_agree(type, image, r, table, strips);
    for (NetworkType network_type : {NetworkType::f32, NetworkType::bf16, NetworkType::f16}) {
      const Fenced scaled(3 * pixels * (network_type == NetworkType::f32 ? 4 : 2));
      const ernet::cpu::NetworkInput network = {scaled.get(), network_type, 255, {.5, .4, .3}, {.2, .2, .1}};
      ernet::cpu::macenko_scaled(type, image, &r, strips, network);
      ernet::cpu::macenko_scaled(type, image, nullptr, strips, network);
    }
  }
  if (!same) std::printf("three results of one pass differ from each alone: %d pixels of kind %d\n", pixels, kind);
  return same ? fitted : -1000000;
}

// Whether an image's colours have its fit, in a table that holds them and nothing behind it.
bool colours_agree(int pixels, int kind) {
  const Fenced in(3 * pixels);
  fill<unsigned char>(in.get(), 3 * pixels, kind, Pixel::u8);
  const ImageView image = {in.get(), 3, 1, pixels, 1.0};
  std::vector<int64_t> counts(ernet::cpu::kColours);
  ernet::cpu::macenko_count_colours(image, counts.data());
  const auto table = ernet::macenko::make_od_table(240, 0.15);
  const ernet::cpu::MacenkoParameters parameters = {240, 1, 0.15, false};
  const auto expected = ernet::cpu::macenko_fit(Pixel::u8, image, parameters, table, ernet::cpu::one_strip());
  const auto found = ernet::cpu::macenko_fit_colours(counts.data(), parameters, table);
  return same_fit(found, expected);
}

// Whether floating-point images of bytes have the levels and the fit of these, and one value beyond rounding or that is
// no level is seen wherever it stands.
template <class T> bool bytes_are_found(Pixel type, int pixels, bool channels_last, double range) {
  const Fenced bytes(3 * pixels), values(3 * pixels * sizeof(T));
  fill<unsigned char>(bytes.get(), 3 * pixels, 0, Pixel::u8);
  T* const value = reinterpret_cast<T*>(values.get());
  const T inverse = T(range / 255);
  for (int i = 0; i < 3 * pixels; ++i) {  // divided, multiplied, or of another precision
    const double level = bytes.get()[i];
    value[i] = i % 3 == 0 ? T(level * range / 255) : i % 3 == 1 ? T(level) * inverse : T(float(level * range / 255));
  }
  const int64_t pixel_stride = channels_last ? 3 : 1, channel_stride = channels_last ? 1 : pixels;
  const ImageView image = {value, pixel_stride, channel_stride, pixels, 255 / range};
  const auto table = ernet::macenko::make_od_table(240, 0.15);
  const ernet::cpu::MacenkoParameters parameters = {240, 1, 0.15, false};
  const Strips strips = ernet::cpu::one_strip();
  ImageView found = image;
  const WholeLevels levels(type, found, strips);
  if (found.levels == nullptr || std::memcmp(found.levels, bytes.get(), 3 * pixels) != 0) return false;
  const ImageView expected = {bytes.get(), pixel_stride, channel_stride, pixels, 1.0};
  if (!same_fit(ernet::cpu::macenko_fit(type, found, parameters, table, strips),
                ernet::cpu::macenko_fit(Pixel::u8, expected, parameters, table, strips))) {
    return false;
  }
  const double wrong[] = {1e-30, 0.3, 254.999, 255.01, 256, -1, -1e-30, HUGE_VAL, -HUGE_VAL, std::nan("")};
  for (int i : {0, pixels, 3 * pixels - 1}) {
    const T before = value[i];
    for (double level : wrong) {
      value[i] = T(level * range / 255);
      ImageView other = image;
      const WholeLevels none(type, other, strips);
      if (other.levels != nullptr) return false;
    }
    value[i] = before;
  }
  return true;
}

}  // namespace

// With an argument, whatever it is, a few sizes alone: for emulators.
int main(int arguments, char**) {
  const bool few = arguments > 1;
  for (int pixels : few ? std::vector<int>{700} : std::vector<int>{1, 511, 1025, 20011}) {
    for (int kind = 0; kind < (few ? 1 : 3); ++kind) {
      if (!colours_agree(pixels, kind)) {
        std::printf("colours differ: %d pixels of kind %d\n", pixels, kind);
        return 1;
      }
    }
  }
  for (int pixels : {1, 513, 4097}) {
    for (double range : {1.0, 255.0, 0.7}) {
      for (bool channels_last : {false, true}) {
        if (!bytes_are_found<float>(Pixel::f32, pixels, channels_last, range) ||
            !bytes_are_found<double>(Pixel::f64, pixels, channels_last, range)) {
          std::printf("whole levels are not known: %d pixels, range %g\n", pixels, range);
          return 1;
        }
      }
    }
  }
  const std::vector<int> sizes = {1, 2, 3, 5, 15, 16, 17, 31, 47, 48, 511, 512, 513, 1000, 2047, 2049, 5003, 20011};
  int fitted = 0;
  for (int pixels : few ? std::vector<int>{3, 17, 513, 2049, 5003} : sizes) {
    for (bool channels_last : {false, true}) {
      for (Pixel type : {Pixel::u8, Pixel::f32, Pixel::f64}) {
        for (int kind = 0; kind < 3; ++kind) {
          fitted += run(pixels, channels_last, type, kind, false);
          if (type != Pixel::u8 && kind == 0) fitted += run(pixels, channels_last, type, kind, true);
        }
      }
    }
  }
  const int wrong = check_exactness(few);
  std::printf("fitted %d, wrong %d\n", fitted, wrong);
  return fitted > (few ? 50 : 100) && wrong == 0 ? 0 : 1;
}
