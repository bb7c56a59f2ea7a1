// Holds the loops on feature maps of one instruction set against plain sums. Maps and coefficients are small integers,
// so that every sum is exact in whatever order and precision it is taken: results must be equal, on every processor.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "er/kernels.h"
#include "half_reference.h"
#include "simd/vec.h"

namespace {

using namespace ernet::cpu;
namespace isa = ernet::cpu::ERNET_ISA_NAMESPACE;

unsigned next_random() {
  static unsigned state = 7;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

int small(int most) { return int(next_random() % unsigned(2 * most + 1)) - most; }

template <typename T> T stored(double value) { return T(value); }
template <> isa::bf16 stored(double value) {
  const float single = float(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return {uint16_t(bits >> 16)};
}
template <> isa::f16 stored(double value) { return {half_reference::float_to_half(float(value))}; }

double value_of(float x) { return double(x); }
double value_of(double x) { return x; }
double value_of(isa::f16 x) { return double(half_reference::half_to_float(x.bits)); }
double value_of(isa::bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float single;
  std::memcpy(&single, &bits, 4);
  return double(single);
}

template <typename T> constexpr Storage storage = Storage::f32;
template <> constexpr Storage storage<double> = Storage::f64;
template <> constexpr Storage storage<isa::bf16> = Storage::bf16;
template <> constexpr Storage storage<isa::f16> = Storage::f16;

template <typename T> std::vector<T> integers(int64_t count, int most) {
  std::vector<T> all(static_cast<size_t>(count));
  for (T& x : all) x = stored<T>(small(most));
  return all;
}

// Where an element of a map is, and its bit of a ReLU bitmask.
struct Place {
  int64_t group, n, c, p;  // group: of coefficients and sums
  int64_t element, byte;
  int bit;
};

template <typename Work> void for_each_element(const MapShape& s, const Work& work) {
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t c = 0; c < s.C; ++c) {
      for (int64_t p = 0; p < s.P; ++p) {
        const int64_t row = s.channels_last ? n * s.P + p : n * s.C + c, j = s.channels_last ? c : p;
        const int64_t width = s.channels_last ? s.C : s.P;
        work(Place{s.per_sample ? n : 0, n, c, p, row * width + j, row * bit_row_bytes(s) + j / 8, int(j % 8)});
      }
    }
  }
}

// Some maps, every other one with a bitmask if any is to have one.
template <typename T> struct Maps {
  std::vector<std::vector<T>> maps;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<const void*> data;
  std::vector<const uint8_t*> bits;

  Maps(const MapShape& s, int64_t count, bool gated) {
    for (int64_t l = 0; l < count; ++l) {
      maps.push_back(integers<T>(s.N * s.C * s.P, 4));
      masks.emplace_back(static_cast<size_t>(bit_bytes(s)));
      for (uint8_t& byte : masks.back()) byte = uint8_t(next_random());
    }
    for (int64_t l = 0; l < count; ++l) {
      data.push_back(maps[size_t(l)].data());
      bits.push_back(gated && l % 2 == 0 ? masks[size_t(l)].data() : nullptr);
    }
  }
  double at(int64_t l, const Place& at) const {
    const uint8_t* const mask = bits[size_t(l)];
    return mask != nullptr && (mask[at.byte] >> at.bit & 1) == 0 ? 0.0 : value_of(maps[size_t(l)][size_t(at.element)]);
  }
};

// A loop over its work items, in two parts.
template <typename Arguments>
void run(const MapLoops<Arguments>& loops, Storage type, const Arguments& args, int64_t items) {
  loops.items[int(type)](args, items / 2, items);
  loops.items[int(type)](args, 0, items / 2);
}

int failed(const char* what, const MapShape& s, Storage type) {
  std::printf("wrong: %s of [%d, %d, %d], channels_last %d, storage %d\n", what, int(s.N), int(s.C), int(s.P),
              s.channels_last, int(type));
  return 1;
}

template <typename T> int check_sum(const MapShape& s, int64_t num_maps, bool gated, bool relu) {
  using A = typename isa::Accumulate<T>::type;
  const Maps<T> x(s, num_maps, gated);
  const int64_t width = s.groups() * s.C;
  const std::vector<A> a = integers<A>(num_maps * width, 2), b = integers<A>(width, 3);
  std::vector<T> y(size_t(s.N * s.C * s.P));
  const WeightedSum args = {s,        num_maps, x.data.data(), gated ? x.bits.data() : nullptr, a.data(), b.data(),
                            y.data(), relu,     gated};
  run(er_loops().weighted_sum, storage<T>, args, sum_items(s));
  bool same = true;
  for_each_element(s, [&](const Place& at) {
    double expected = double(b[size_t(at.group * s.C + at.c)]);
    for (int64_t l = 0; l < num_maps; ++l) {
      expected += double(a[size_t(l * width + at.group * s.C + at.c)]) * x.at(l, at);
    }
    same &= value_of(y[size_t(at.element)]) == (relu && expected < 0 ? 0 : expected);
  });
  return same ? 0 : failed("weighted_sum", s, storage<T>);
}

// Inner products of x with later g, and with g = dy where y > 0; or (without x) of g with maps.
template <typename T> int check_dots(const MapShape& s, int64_t num_later, bool with_x, bool bits_wanted) {
  const Maps<T> later(s, num_later, with_x), own(s, 3, false);  // x, dy, y
  std::vector<T> g(size_t(s.N * s.C * s.P));
  std::vector<uint8_t> bits(size_t(bit_bytes(s)));
  MapDots args = {s,
                  with_x ? own.data[0] : nullptr,
                  own.data[1],
                  own.data[2],
                  bits_wanted ? bits.data() : nullptr,
                  bits_wanted ? nullptr : g.data(),
                  num_later,
                  later.data.data(),
                  later.bits.data(),
                  nullptr,
                  false};
  const int64_t rows = args.rows(), width = s.groups() * s.C;
  std::vector<double> partial(size_t(s.groups() * slabs_per_group(s) * rows * s.C)), found(size_t(rows * width));
  args.partial = partial.data();
  run(er_loops().map_dots, storage<T>, args, reduce_items(s));
  merge<double>(args, {0, s.C}, found.data(), nullptr);
  std::vector<double> expected(found.size());
  bool same = true;
  for_each_element(s, [&](const Place& at) {
    const size_t i = size_t(at.element);
    const bool alive = !(value_of(own.maps[2][i]) <= 0);
    const double gradient = alive ? value_of(own.maps[1][i]) : 0, x = with_x ? value_of(own.maps[0][i]) : gradient;
    const int64_t sum = at.group * s.C + at.c;
    for (int64_t l = 0; l < num_later; ++l) expected[size_t(l * width + sum)] += later.at(l, at) * x;
    if (with_x) expected[size_t((rows - 2) * width + sum)] += gradient * x;
    expected[size_t((rows - 1) * width + sum)] += gradient;
    same &= bits_wanted ? (bits[size_t(at.byte)] >> at.bit & 1) == alive : value_of(g[i]) == gradient;
  });
  return same && found == expected ? 0 : failed("map_dots", s, storage<T>);
}

template <typename T> int check_sum_dots(const MapShape& s, int64_t num_g) {
  using A = typename isa::Accumulate<T>::type;
  const Maps<T> g(s, num_g, true), own(s, 2, false);  // z, before
  const int64_t width = s.groups() * s.C;
  const std::vector<A> a = integers<A>((num_g + 1) * width, 2), b = integers<A>(width, 3);
  std::vector<T> y(size_t(s.N * s.C * s.P));
  std::vector<double> partial(size_t(s.groups() * slabs_per_group(s) * num_g * s.C)), found(size_t(num_g * width));
  const SumDots args = {s,        num_g,    g.data.data(), g.bits.data(),  own.data[0], a.data(),
                        b.data(), y.data(), own.data[1],   partial.data(), false};
  run(er_loops().sum_dots, storage<T>, args, reduce_items(s));
  merge<double>(args, {0, s.C}, found.data(), nullptr);
  std::vector<double> expected(found.size());
  bool same = true;
  for_each_element(s, [&](const Place& at) {
    const int64_t sum = at.group * s.C + at.c;
    const size_t i = size_t(at.element);
    double value = double(b[size_t(sum)]) + double(a[size_t(num_g * width + sum)]) * value_of(own.maps[0][i]);
    for (int64_t l = 0; l < num_g; ++l) {
      value += double(a[size_t(l * width + sum)]) * g.at(l, at);
      expected[size_t(l * width + sum)] += g.at(l, at) * value_of(own.maps[1][i]);
    }
    same &= value_of(y[i]) == value;
  });
  return same && found == expected ? 0 : failed("sum_dots", s, storage<T>);
}

// The only ones that are rounded: sums of a tile, and one division.
template <typename T> int check_moments(const MapShape& s) {
  const Maps<T> x(s, 1, false);
  const size_t width = size_t(s.groups() * s.C);
  std::vector<double> partial(size_t(slabs_per_group(s)) * 2 * width), mean(width), var(width);
  std::vector<double> sum(width), squares(width);
  const ChannelMoments args = {s, x.data[0], partial.data()};
  run(er_loops().channel_moments, storage<T>, args, reduce_items(s));
  merge<double>(args, {0, s.C}, mean.data(), var.data());
  for_each_element(s, [&](const Place& at) {
    sum[size_t(at.group * s.C + at.c)] += x.at(0, at);
    squares[size_t(at.group * s.C + at.c)] += x.at(0, at) * x.at(0, at);
  });
  const double count = double(s.per_sample ? s.P : s.N * s.P);
  const double error = std::fmin(count, kPlaneChunk) * 0x1p-24;  // of sums in float32, relative
  bool same = true;
  for (size_t i = 0; i < width; ++i) {
    const double expected = sum[i] / count;
    same &= std::abs(mean[i] - expected) <= 4 * error;
    same &= std::abs(var[i] - (squares[i] / count - expected * expected)) <= 16 * error;
  }
  return same ? 0 : failed("channel_moments", s, storage<T>);
}

template <typename T> int check_type() {
  int wrong = 0;
  constexpr int64_t shapes[][3] = {{2, 3, 49}, {1, 70, 196}, {3, 5, 1}, {2, 33, 63}, {1, 2, 8197}, {1, 2051, 3}};
  for (const int64_t (&shape)[3] : shapes) {
    for (int form = 0; form < 4; ++form) {
      const MapShape s = {shape[0], shape[1], shape[2], form % 2 == 1, form / 2 == 1};
      for (int64_t maps : {1, 3, 6, 8}) {
        wrong += check_sum<T>(s, maps, maps % 2 == 1, maps > 1);
        if (s.channels_last) wrong += check_sum_dots<T>(s, maps);
      }
      for (int64_t later : {0, 2, 6}) {
        wrong += check_dots<T>(s, later, true, later != 2) + check_dots<T>(s, later, false, false);
      }
      wrong += check_moments<T>(s);
    }
  }
  return wrong;
}

// Conversions from and to float16 against integer arithmetic, of every half and of floats near every half.
int check_half() {
  constexpr int lanes = isa::kLanes<float>;
  int wrong = 0;
  for (uint32_t first = 0; first < 65536; first += lanes) {
    isa::f16 halves[lanes], back[lanes];
    float found[lanes], moved[lanes];
    for (int i = 0; i < lanes; ++i) halves[i].bits = uint16_t(first + uint32_t(i));
    isa::store(found, isa::load<float>(halves));
    for (int i = 0; i < lanes; ++i) {
      const float expected = half_reference::half_to_float(halves[i].bits);
      const bool nan = expected != expected;
      wrong += nan ? found[i] == found[i] : std::memcmp(found + i, &expected, 4) != 0;
      // Just below, at and just above the middle between this half and the next.
      uint32_t bits;
      std::memcpy(&bits, &expected, 4);
      bits += (nan ? 0u : 0xfffu + next_random() % 3);
      std::memcpy(moved + i, &bits, 4);
    }
    isa::store(back, isa::load<float>(moved));
    for (int i = 0; i < lanes; ++i) {
      const uint16_t expected = half_reference::float_to_half(moved[i]);
      const bool nan = (expected & 0x7fff) > 0x7c00;
      wrong += nan ? (back[i].bits & 0x7fff) <= 0x7c00 : back[i].bits != expected;
    }
  }
  if (wrong > 0) std::printf("wrong: %d conversions of float16\n", wrong);
  return wrong;
}

}  // namespace

int main() {
  const int wrong =
      check_half() + check_type<float>() + check_type<double>() + check_type<isa::bf16>() + check_type<isa::f16>();
  std::printf("wrong %d\n", wrong);
  return wrong == 0 ? 0 : 1;
}
