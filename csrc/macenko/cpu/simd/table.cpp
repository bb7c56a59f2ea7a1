#include "macenko/cpu/simd/blocks.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

template <class T> static int64_t count_invalid(const Block<T>& block, double scale, int count) {
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
    clear_end(flags, count);
    int tissue = 0;
    for (int i = 0; i < kBlock; ++i) tissue += flags[i];
    if (tissue == 0) continue;
    sums.count += tissue;
    fixed_densities(block, keys, od, flags, q);
    add_fixed(q, sums);
  }
}

template <class T> static int64_t keys_of(const ImageView& image, const Keys& keys, double* out_a, double* out_b) {
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

template <class T> static void radix(const ImageView& image, PixelSpan span, const Keys& keys, const RadixPass& pass) {
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

static void levels_by_exp(const double od[3][kBlock], const Reconstruction& r, double out[3][kBlock]) {
  for (int c = 0; c < 3; ++c) {
    const double* m = r.matrix[c];
    for (int i = 0; i < kBlock; ++i) {
      const double exponent = r.shift[c] - (m[0] * od[0][i] + m[1] * od[1][i] + m[2] * od[2][i]);
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
        const double intensity = (double(block.value[k][i]) * scale + 1.0) * inverse;
        od[k][i] = -macenko::log_of_normal(intensity > 1e-300 ? intensity : 1e-300);
      }
    }
  }
}

// The loops over 8-bit images of this instruction set.
struct ByteLoops {
  bool uses_words;
  decltype(&moments_of_bytes) moments;
  decltype(&scan_bytes) scan;
  decltype(&reconstruct_bytes) reconstruct;
  decltype(MacenkoLoops::reconstruct_scaled) reconstruct_scaled;
};
#if defined(ERNET_VBMI)
constexpr ByteLoops bytes = {false, moments_vbmi, scan_vbmi, reconstruct_vbmi, reconstruct_scaled_vbmi};
#else
constexpr ByteLoops bytes = {true, moments_of_bytes, scan_bytes, reconstruct_bytes, nullptr};
#endif

// How a result of an image of whole levels may be computed.
enum class Way { exponents, factors, single };

template <class T> static Way way_of(const Reconstruction& r) {
  if (sizeof(T) == 1 && r.single) return Way::single;
  return r.factors ? Way::factors : Way::exponents;
}

template <class T>
static void reconstruct(const ImageView& image, PixelSpan span, const Reconstruction* r, int results) {
  if (sizeof(T) == 1 || image.levels != nullptr) {
    const Way way = way_of<T>(r[0]);
    for (int j = 1; j < results; ++j) {
      if (way_of<T>(r[j]) == way) continue;
      for (int i = 0; i < results; ++i) reconstruct<T>(image, span, r + i, 1);  // each in its own way
      return;
    }
    constexpr auto by_factors = sizeof(T) == 1   ? reconstruct_levels_u8
                                : sizeof(T) == 4 ? reconstruct_levels_f32
                                                 : reconstruct_levels_f64;
    if (way == Way::single) return bytes.reconstruct(image, span, r, results);
    if (way == Way::factors) return by_factors(image, span, r, results);
  }
  Keys keys = {};
  keys.table = r->table;
  keys.io = r->io;
  Block<T> block;
  alignas(64) double od[3][kBlock];
  alignas(64) double level[3][kBlock];
  alignas(64) T out[3][kBlock];
  for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
    const int count = int(span.end - begin < kBlock ? span.end - begin : kBlock);
    load(image, begin, count, block);
    reconstruction_densities(block, keys, image.scale, od);
    for (int j = 0; j < results; ++j) {
      levels_by_exp(od, r[j], level);
      finish(block, image.scale, level, out);
      store(image, begin, count, r[j].out, out);
    }
  }
}

extern const MacenkoLoops macenko_table[kNumPixelTypes];
const MacenkoLoops macenko_table[kNumPixelTypes] = {
    {nullptr, bytes.uses_words, bytes.moments, bytes.scan, keys_of<uint8_t>, radix<uint8_t>, reconstruct<uint8_t>,
     bytes.reconstruct_scaled, select_order},
    {whole_levels_f32, false, moments<float>, scan_f32, keys_of<float>, radix<float>, reconstruct<float>, nullptr,
     select_order},
    {whole_levels_f64, false, moments<double>, scan_f64, keys_of<double>, radix<double>, reconstruct<double>, nullptr,
     select_order},
};

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
