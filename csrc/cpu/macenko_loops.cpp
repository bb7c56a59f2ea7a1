#include "cpu/macenko_loops.h"

#include "macenko/elementary.h"
#include "macenko/order_statistic.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

using macenko::OdTable;

// Pixels staged at a time: ODs and keys of a block stay in the first-level cache, and products of a block fit in int64.
constexpr int kBlock = 512;
static_assert(kBlock <= macenko::kMaxFixedProducts, "products of one block are summed in int64");
static_assert(kBlock % 8 == 0, "flags are read eight at a time");

template <class T>
struct Block {
  alignas(64) T value[3][kBlock];
};

template <class T>
static void load(const ImageView& image, int64_t begin, int count, Block<T>& block) {
  const T* data = static_cast<const T*>(image.data) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int k = 0; k < 3; ++k) {
      const T* plane = data + k * image.channel_stride;
      for (int i = 0; i < count; ++i) block.value[k][i] = plane[i];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      block.value[0][i] = data[3 * i];
      block.value[1][i] = data[3 * i + 1];
      block.value[2][i] = data[3 * i + 2];
    }
  }
  // Zeros behind the end are valid levels, so loops may run over whole blocks.
  for (int k = 0; k < 3; ++k) {
    for (int i = count; i < kBlock; ++i) block.value[k][i] = 0;
  }
}

// ODs of a block; a value that is no grey level gives whatever it gives, but never a trap.
static void densities(const Block<uint8_t>& block, const Keys& keys, double, double od[3][kBlock]) {
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; ++i) od[k][i] = keys.table->od[block.value[k][i]];
  }
}

template <class T>
static void densities(const Block<T>& block, const Keys& keys, double scale, double od[3][kBlock]) {
  const double inverse = 1 / keys.io;
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; ++i) {
      double level = double(block.value[k][i]) * scale;
      level = level > -0.5 ? level : -0.5;
      od[k][i] = -macenko::log_of_normal((level + 1.0) * inverse);
    }
  }
}

static void tissue_flags(const Block<uint8_t>& block, const Keys& keys, const double (*)[kBlock], uint8_t* flags) {
  const int limit = keys.table->tissue_limit;
  const uint8_t top = uint8_t(limit < 0 ? 0 : limit);
  const uint8_t any = limit < 0 ? 0 : 1;
  for (int i = 0; i < kBlock; ++i) {
    const uint8_t rg = block.value[0][i] > block.value[1][i] ? block.value[0][i] : block.value[1][i];
    const uint8_t largest = rg > block.value[2][i] ? rg : block.value[2][i];
    flags[i] = uint8_t((largest <= top) & any);
  }
}

template <class T>
static void tissue_flags(const Block<T>&, const Keys& keys, const double (*od)[kBlock], uint8_t* flags) {
  for (int i = 0; i < kBlock; ++i) {
    flags[i] = uint8_t((od[0][i] >= keys.beta) & (od[1][i] >= keys.beta) & (od[2][i] >= keys.beta));
  }
}

template <class T>
static int64_t count_invalid(const Block<T>& block, double scale, int count) {
  int64_t invalid = 0;
  for (int i = 0; i < count; ++i) {
    const double r = double(block.value[0][i]) * scale;
    const double g = double(block.value[1][i]) * scale;
    const double b = double(block.value[2][i]) * scale;
    invalid += !(macenko::is_level(r) & macenko::is_level(g) & macenko::is_level(b));
  }
  return invalid;
}

template <class T>
static void fixed_densities(const Block<T>&, const Keys&, const double (*od)[kBlock], const uint8_t* flags,
                            int32_t q[3][kBlock]) {
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kBlock; ++i) {
      // Tissue ODs are in [beta, ln(2 Io)]; others, NaN among them, must not reach the conversion.
      const double kept = flags[i] ? od[k][i] : 0.0;
      q[k][i] = macenko::fixed_of_od(kept) & -int32_t(flags[i]);
    }
  }
}

static void add_products(const int32_t q[3][kBlock], MomentSums& sums) {
  int64_t sum[3] = {0, 0, 0};
  int64_t product[6] = {0, 0, 0, 0, 0, 0};
  for (int i = 0; i < kBlock; ++i) {
    const int64_t r = q[0][i];
    const int64_t g = q[1][i];
    const int64_t b = q[2][i];
    sum[0] += r;
    sum[1] += g;
    sum[2] += b;
    product[0] += r * r;
    product[1] += r * g;
    product[2] += r * b;
    product[3] += g * g;
    product[4] += g * b;
    product[5] += b * b;
  }
  for (int k = 0; k < 3; ++k) sums.sum[k] += sum[k];
  for (int k = 0; k < 6; ++k) sums.product[k] += uint64_t(product[k]);
}

static void clear_tail(uint8_t* flags, int count) {
  for (int i = count; i < kBlock; ++i) flags[i] = 0;
}

template <class T>
static void moments(const ImageView& image, PixelSpan span, const OdTable& table, double io, double beta,
                    MomentSums& sums) {
  Keys keys = {};
  keys.table = &table;
  keys.io = io;
  keys.beta = beta;
  Block<T> block;
  alignas(64) double od[3][kBlock];
  alignas(64) int32_t q[3][kBlock];
  alignas(64) uint8_t flags[kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load(image, begin, count, block);
    sums.invalid += count_invalid(block, image.scale, count);
    densities(block, keys, image.scale, od);
    tissue_flags(block, keys, od, flags);
    clear_tail(flags, count);
    int tissue = 0;
    for (int i = 0; i < kBlock; ++i) tissue += flags[i];
    if (tissue == 0) continue;
    sums.count += tissue;
    fixed_densities(block, keys, od, flags, q);
    add_products(q, sums);
  }
}

// Keys of a block; `live` flags the pixels that count.
template <class T>
static void block_keys(const Block<T>& block, const Keys& keys, double scale, int count, double* a, double* b,
                       uint8_t* live) {
  alignas(64) double od[3][kBlock];
  densities(block, keys, scale, od);
  for (int i = 0; i < kBlock; ++i) {
    a[i] = keys.a[0] * od[0][i] + keys.a[1] * od[1][i] + keys.a[2] * od[2][i];
    b[i] = keys.b[0] * od[0][i] + keys.b[1] * od[1][i] + keys.b[2] * od[2][i];
  }
  if (keys.kind == KeyKind::angle) {
    tissue_flags(block, keys, od, live);
    for (int i = 0; i < kBlock; ++i) {
      const double key = macenko::pseudo_angle(a[i], b[i]);
      a[i] = key;
      b[i] = key;
    }
  } else {
    for (int i = 0; i < kBlock; ++i) live[i] = 1;
  }
  clear_tail(live, count);
}

static void scan_bracket(const double* key, const uint8_t* live, Bracket& bracket) {
  alignas(64) uint8_t inside[kBlock];
  const double low = bracket.low;
  const double high = bracket.high;
  int64_t below = 0;
  for (int i = 0; i < kBlock; ++i) {
    below += (key[i] < low) & live[i];
    inside[i] = uint8_t((key[i] >= low) & (key[i] <= high) & live[i]);
  }
  bracket.below += below;
  for (int i = 0; i < kBlock; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, inside + i, 8);
    if (eight == 0) continue;
    for (int j = i; j < i + 8; ++j) {
      if (!inside[j]) continue;
      if (bracket.inside < bracket.capacity) bracket.collected[bracket.inside] = key[j];
      ++bracket.inside;
    }
  }
}

template <class T>
static void scan(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  Block<T> block;
  alignas(64) double a[kBlock];
  alignas(64) double b[kBlock];
  alignas(64) uint8_t live[kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load(image, begin, count, block);
    block_keys(block, keys, image.scale, count, a, b, live);
    scan_bracket(a, live, first);
    scan_bracket(b, live, second);
  }
}

template <class T>
static int64_t keys_of(const ImageView& image, const Keys& keys, double* out_a, double* out_b) {
  const bool linear = keys.kind == KeyKind::linear;
  Block<T> block;
  alignas(64) double a[kBlock];
  alignas(64) double b[kBlock];
  alignas(64) uint8_t live[kBlock];
  int64_t written = 0;
  for (int64_t begin = 0; begin < image.pixels; begin += kBlock) {
    const int count = int(image.pixels - begin < kBlock ? image.pixels - begin : kBlock);
    load(image, begin, count, block);
    block_keys(block, keys, image.scale, count, a, b, live);
    for (int i = 0; i < count; ++i) {
      out_a[written] = a[i];
      if (linear) out_b[written] = b[i];
      written += live[i];
    }
  }
  return written;
}

template <class T>
static void radix(const ImageView& image, PixelSpan span, const Keys& keys, const RadixPass& pass) {
  Block<T> block;
  alignas(64) double key[2][kBlock];
  alignas(64) uint8_t live[kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load(image, begin, count, block);
    block_keys(block, keys, image.scale, count, key[0], key[1], live);
    for (int i = 0; i < count; ++i) {
      const uint64_t bits = macenko::ordered_bits(key[pass.which][i]);
      if (live[i] && (bits & pass.prefix_mask) == pass.prefix) ++pass.counts[(bits >> pass.shift) & (kRadixBins - 1)];
    }
  }
}

template <class T>
static void store(const ImageView& image, int64_t begin, int count, void* out, const T value[3][kBlock]) {
  T* data = static_cast<T*>(out) + begin * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int c = 0; c < 3; ++c) {
      T* plane = data + c * image.channel_stride;
      for (int i = 0; i < count; ++i) plane[i] = value[c][i];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      data[3 * i] = value[0][i];
      data[3 * i + 1] = value[1][i];
      data[3 * i + 2] = value[2][i];
    }
  }
}

static void levels_by_exp(const double od[3][kBlock], const Reconstruction& r, double out[3][kBlock]) {
  for (int c = 0; c < 3; ++c) {
    const double* m = r.matrix[c];
    for (int i = 0; i < kBlock; ++i) {
      const double exponent = -(m[0] * od[0][i] + m[1] * od[1][i] + m[2] * od[2][i]);
      const double value = r.io * macenko::exp_clamped(exponent);
      out[c][i] = value < 255.0 ? value : 255.0;
    }
  }
}

static void finish(const Block<uint8_t>&, double, const double level[3][kBlock], uint8_t out[3][kBlock]) {
  for (int c = 0; c < 3; ++c) {
    for (int i = 0; i < kBlock; ++i) out[c][i] = uint8_t(int32_t(level[c][i]));
  }
}

// Back to the caller's range. A pixel without a finite optical density comes out as NaN.
template <class T>
static void finish(const Block<T>& block, double scale, const double level[3][kBlock], T out[3][kBlock]) {
  const double inverse = 1 / scale;
  const double infinity = __builtin_inf();
  for (int i = 0; i < kBlock; ++i) {
    bool defined = true;
    for (int k = 0; k < 3; ++k) {
      const double value = double(block.value[k][i]) * scale;
      defined &= (value > -1.0) & (value < infinity);
    }
    for (int c = 0; c < 3; ++c) out[c][i] = defined ? T(level[c][i] * inverse) : T(__builtin_nan(""));
  }
}

// ODs for the reconstruction: unlike those of the fit, levels between -1 and -0.5 count as they are.
template <class T>
static void reconstruction_densities(const Block<T>& block, const Keys& keys, double scale, double od[3][kBlock]) {
  if constexpr (sizeof(T) == 1) {
    densities(block, keys, scale, od);
  } else {
    const double inverse = 1 / keys.io;
    for (int k = 0; k < 3; ++k) {
      for (int i = 0; i < kBlock; ++i) {
        const double light = (double(block.value[k][i]) * scale + 1.0) * inverse;
        od[k][i] = -macenko::log_of_normal(light > 1e-300 ? light : 1e-300);
      }
    }
  }
}

// The loops over 8-bit images of this instruction set.
struct ByteLoops {
  decltype(&moments_of_bytes) moments;
  decltype(&scan_bytes) scan;
  decltype(&reconstruct_bytes) reconstruct;
};
#if defined(ERNET_VBMI)
constexpr ByteLoops bytes = {moments_vbmi, scan_vbmi, reconstruct_vbmi};
#elif defined(ERNET_AVX512)
constexpr ByteLoops bytes = {moments_of_bytes, scan_bytes, reconstruct_avx512};
#else
constexpr ByteLoops bytes = {moments_of_bytes, scan_bytes, reconstruct_bytes};
#endif

template <class T>
static void reconstruct(const ImageView& image, PixelSpan span, const Reconstruction& r) {
  if constexpr (sizeof(T) == 1) {
    if (r.single) return bytes.reconstruct(image, span, r);
  }
  Keys keys = {};
  keys.table = r.table;
  keys.io = r.io;
  Block<T> block;
  alignas(64) double od[3][kBlock];
  alignas(64) double level[3][kBlock];
  alignas(64) T out[3][kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load(image, begin, count, block);
    reconstruction_densities(block, keys, image.scale, od);
    levels_by_exp(od, r, level);
    finish(block, image.scale, level, out);
    store<T>(image, begin, count, r.out, out);
  }
}

extern const MacenkoLoops macenko_table[kNumPixelTypes];
const MacenkoLoops macenko_table[kNumPixelTypes] = {
    {bytes.moments, bytes.scan, keys_of<uint8_t>, radix<uint8_t>, reconstruct<uint8_t>, select_order},
    {moments<float>, scan<float>, keys_of<float>, radix<float>, reconstruct<float>, select_order},
    {moments<double>, scan<double>, keys_of<double>, radix<double>, reconstruct<double>, select_order},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
