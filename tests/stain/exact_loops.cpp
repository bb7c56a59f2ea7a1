// Holds the loops of one instruction set against plain sums, sorting and float64: for a build with sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "macenko/cpu/kernels.h"
#include "macenko/steps/order_statistic.h"

namespace {

using namespace ernet::cpu;
using ernet::macenko::OdTable;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

unsigned next_random() {
  static unsigned state = 7;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

double uniform(double low, double high) { return low + (high - low) * (next_random() & 0xffff) / 65535.0; }

// Planar and interleaved pixels of the same colours: any colour, dark and bright ones, or very few different ones.
struct Image {
  std::vector<unsigned char> planar, interleaved;
  int pixels;

  Image(int count, int kind) : planar(3 * count), interleaved(3 * count), pixels(count) {
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < 3; ++k) {
        const unsigned r = next_random();
        const int level = kind == 0 ? r & 255 : kind == 1 ? 90 + (r & 127) : 60 + 40 * (r % 3);
        planar[k * count + i] = interleaved[3 * i + k] = static_cast<unsigned char>(level);
      }
    }
  }
  ImageView view(bool planar_form) const {
    return planar_form ? ImageView{planar.data(), 1, pixels, pixels, 1.0}
                       : ImageView{interleaved.data(), 3, 1, pixels, 1.0};
  }
};

int failed(const char* what, int pixels, int kind) {
  std::printf("wrong: %s of %d pixels of kind %d\n", what, pixels, kind);
  return 1;
}

int check_moments(const MacenkoLoops& loops, const Image& image, int kind, double io, double beta) {
  const OdTable table = ernet::macenko::make_od_table(io, beta);
  MomentSums expected = {};
  for (int i = 0; i < image.pixels; ++i) {
    const unsigned char* p = image.interleaved.data() + 3 * i;
    if (std::max({p[0], p[1], p[2]}) > table.tissue_limit) continue;
    ++expected.count;
    int j = 0;
    for (int a = 0; a < 3; ++a) {
      const int64_t first = std::max(table.fixed[p[a]], 0);
      expected.sum[a] += first;
      for (int b = a; b < 3; ++b, ++j) expected.product[j] += uint128(first) * std::max(table.fixed[p[b]], 0);
    }
  }
  int wrong = 0;
  for (bool planar : {true, false}) {
    MomentSums sums = {};
    loops.moments(image.view(planar), {0, image.pixels / 3}, table, io, beta, sums);
    loops.moments(image.view(planar), {image.pixels / 3, image.pixels}, table, io, beta, sums);
    bool same = sums.count == expected.count;
    for (int k = 0; k < 3; ++k) same &= sums.sum[k] == expected.sum[k];
    for (int k = 0; k < 6; ++k) same &= sums.product[k] == expected.product[k];
    if (!same) wrong += failed("moments", image.pixels, kind);
  }
  return wrong;
}

bool bracket_holds(const Bracket& b, std::vector<double> keys) {
  std::sort(keys.begin(), keys.end());
  const int64_t below = std::lower_bound(keys.begin(), keys.end(), b.low) - keys.begin();
  if (b.below != below || b.inside != std::upper_bound(keys.begin(), keys.end(), b.high) - keys.begin() - below) {
    return false;
  }
  std::vector<double> found(b.collected, b.collected + b.inside);
  std::sort(found.begin(), found.end());
  return std::equal(found.begin(), found.end(), keys.begin() + below);
}

// Brackets whose ends are keys of the image: the least that an approximate comparison could get wrong shows.
Bracket bracket_of(std::vector<double> keys, double fraction, std::vector<double>& room) {
  Bracket b = {-kInfinity, kInfinity, fraction, 0, 0, room.data(), int64_t(room.size())};
  if (keys.empty()) return b;
  std::sort(keys.begin(), keys.end());
  const int64_t n = int64_t(keys.size());
  const int64_t rank = int64_t(fraction * double(n - 1));
  const int64_t half = n / 200 + int64_t(next_random() % 3);
  if (rank - half >= 0) b.low = keys[rank - half];
  if (rank + half < n) b.high = keys[rank + half];
  return b;
}

// A tail's bracket without an outer end that has too little room: the keys needed are kept, the others counted.
bool end_is_kept(const MacenkoLoops& loops, const ImageView& image, const Keys& keys, std::vector<double> all,
                 double fraction) {
  const int64_t n = int64_t(all.size()), needed = n / 100 + 1;
  if (n == 0) return true;
  std::vector<double> room(2 * needed + 8), other(2 * needed + 8);
  Bracket b = {-kInfinity, kInfinity, fraction, 0, 0, room.data(), int64_t(room.size()), needed};
  Bracket unused = b;
  unused.collected = other.data();
  loops.scan(image, {0, image.pixels}, keys, b, unused);
  if (b.inside < needed || b.inside > b.capacity) return false;
  if (fraction > 0.5 && b.below + b.dropped + b.inside != n) return false;
  const auto before = [&](double x, double y) { return fraction > 0.5 ? x > y : x < y; };
  std::sort(all.begin(), all.end(), before);
  std::sort(b.collected, b.collected + b.inside, before);
  return std::equal(all.begin(), all.begin() + needed, b.collected);
}

// The same image, planar and interleaved.
struct Views {
  ImageView planar, interleaved;
};

int check_scan(const MacenkoLoops& loops, const Views& image, int kind, KeyKind key_kind, double io, double beta,
               double gain) {
  const int pixels = int(image.planar.pixels);
  const OdTable table = ernet::macenko::make_od_table(io, beta);
  Keys keys = {key_kind, {}, {}, beta, io, &table};
  for (double& w : keys.a) w = gain * uniform(-1, 1);
  for (double& w : keys.b) w = gain * uniform(key_kind == KeyKind::angle ? 0.2 : -1, 1);
  std::vector<double> a(pixels), b(pixels), room[2] = {a, a};
  const int64_t live = loops.keys(image.planar, keys, a.data(), b.data());
  a.resize(live);
  b.resize(live);
  const std::vector<double>* of[2] = {&a, key_kind == KeyKind::angle ? &a : &b};
  if (!end_is_kept(loops, image.planar, keys, a, 0.99)) return failed("upper end", pixels, kind);
  if (!end_is_kept(loops, image.interleaved, keys, a, 0.01)) return failed("lower end", pixels, kind);
  const double fractions[3][2] = {{0.01, 0.99}, {0.99, 0.99}, {0.3, 0.99}};
  int wrong = 0;
  for (const auto& fraction : fractions) {
    Bracket guess[2];
    for (int i = 0; i < 2; ++i) guess[i] = bracket_of(*of[i], fraction[i], room[i]);
    for (bool planar : {true, false}) {
      Bracket found[2] = {guess[0], guess[1]};
      loops.scan(planar ? image.planar : image.interleaved, {0, pixels}, keys, found[0], found[1]);
      for (int i = 0; i < 2; ++i) {
        if (!bracket_holds(found[i], *of[i])) wrong += failed("scan", pixels, kind);
      }
    }
  }
  return wrong;
}

// Floating-point pixels near those of an image, a third of them as near to the edge of tissue as the type allows.
template <class T> int check_float_scans(Pixel type, const Image& image, int kind, double io, double beta) {
  const int n = image.pixels;
  std::vector<T> planar(3 * n), interleaved(3 * n);
  const double edge = io * std::exp(-beta) - 1;
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < 3; ++k) {
      double level = image.interleaved[3 * i + k] + uniform(-0.5, 0.5);
      if (i % 3 == 0 && k == 0) level = edge * (1 + (int(next_random() % 5) - 2) * 3e-8);
      const T value = T(std::min(std::max(level, -0.5), 255.5) / 51);
      planar[k * n + i] = interleaved[3 * i + k] = value;
    }
  }
  const Views views = {{planar.data(), 1, n, n, 51.0}, {interleaved.data(), 3, 1, n, 51.0}};
  const MacenkoLoops& loops = macenko_loops(type);
  return check_scan(loops, views, kind, KeyKind::angle, io, beta, 1) +
         check_scan(loops, views, kind, KeyKind::linear, io, beta, uniform(1, 20));
}

int check_select(const MacenkoLoops& loops, int count, int kind) {
  std::vector<double> keys(count);
  for (double& key : keys) key = kind == 0 ? uniform(-1, 1) : kind == 1 ? next_random() % 3 : 1.0;
  std::vector<double> sorted = keys;
  std::sort(sorted.begin(), sorted.end());
  int wrong = 0;
  for (int64_t rank : {int64_t(0), int64_t(count / 100), int64_t(count / 2), int64_t(count - 1)}) {
    std::vector<double> work = keys, scratch(count);
    const Neighbours found = loops.select(work.data(), scratch.data(), count, rank);
    const double upper = rank + 1 < count ? sorted[rank + 1] : kInfinity;
    if (found.lower != sorted[rank] || found.upper != upper) wrong += failed("selection", count, kind);
  }
  return wrong;
}

// Truncated levels may differ from those of float64 only where the value is within a millionth of an integer.
int check_reconstruction(const MacenkoLoops& loops, const Image& image, int kind, double io, bool single) {
  const OdTable table = ernet::macenko::make_od_table(io, 0.15);
  Reconstruction r = {{{.9, .3, -.2}, {.1, 1.1, .1}, {-.1, .2, .8}}, {0.1, -0.3, 0}, io, single, true, &table, nullptr};
  std::vector<unsigned char> out[2];
  for (bool planar : {true, false}) {
    out[planar].resize(3 * image.pixels);
    r.out = out[planar].data();
    loops.reconstruct(image.view(planar), {0, image.pixels / 2}, &r, 1);
    loops.reconstruct(image.view(planar), {image.pixels / 2, image.pixels}, &r, 1);
  }
  for (int i = 0; i < image.pixels; ++i) {
    const unsigned char* p = image.interleaved.data() + 3 * i;
    for (int c = 0; c < 3; ++c) {
      double exponent = -r.shift[c];
      for (int k = 0; k < 3; ++k) exponent += r.matrix[c][k] * table.od[p[k]];
      const double value = std::min(io * std::exp(-exponent), 255.0);
      const int level = out[1][c * image.pixels + i];
      // Exponents are below 14 in magnitude and rounded six times.
      const double error = value * 6 * 14 * 0x1p-24;
      if (level != out[0][3 * i + c] || level < std::floor(value - error) || level > std::floor(value + error)) {
        return failed("reconstruction", image.pixels, kind);
      }
    }
  }
  return 0;
}

}  // namespace

// The number of results that are wrong, of many images or of a few.
int check_exactness(bool few) {
  const MacenkoLoops& loops = macenko_loops(Pixel::u8);
  int wrong = 0;
  const std::vector<int> sizes = {1, 7, 63, 64, 65, 100, 447, 449, 511, 512, 513, 2049, 6007};
  for (int pixels : few ? std::vector<int>{7, 65, 449, 2049} : sizes) {
    for (int kind = 0; kind < 3; ++kind) {
      const Image image(pixels, kind);
      for (double io : {240.0, 255.0, 1024.0}) {
        for (double beta : {0.0, 0.15}) {
          wrong += check_moments(loops, image, kind, io, beta);
          const Views views = {image.view(true), image.view(false)};
          wrong += check_scan(loops, views, kind, KeyKind::angle, io, beta, 1);
          wrong += check_scan(loops, views, kind, KeyKind::linear, io, beta, uniform(1, 20));
          wrong += check_float_scans<float>(Pixel::f32, image, kind, io, beta);
          wrong += check_float_scans<double>(Pixel::f64, image, kind, io, beta);
        }
        for (bool single : {true, false}) wrong += check_reconstruction(loops, image, kind, io, single);
      }
      wrong += check_select(loops, pixels, kind);
    }
  }
  return wrong;
}
