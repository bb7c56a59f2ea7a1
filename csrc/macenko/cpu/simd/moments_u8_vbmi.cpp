// Moments of 8-bit images from tables in registers: the same exact integer sums as moments_u8.cpp.
#include "macenko/cpu/simd/u8_vbmi.h"

#ifdef ERNET_VBMI
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

using macenko::OdTable;

// A fixed-point OD q of macenko/steps/od.h is kCentre + 2^kLowBits high + low, with two signed 16-bit parts whose
// products VNNI sums in pairs. The sums of products of parts make the sum of products of ODs, exactly.
constexpr int kLowBits = 13;
constexpr int32_t kCentre = 1 << 26;
constexpr int kMaxHigh = 1 << 13;
constexpr int kMaxLow = 1 << 12;
static_assert(macenko::kOdFractionBits == 24, "ODs are below 2^27, within 2^26 of the centre");

// One addition to a lane is two products. So many vectors of 64 pixels, four additions each for the mixed products,
// stay within int32.
constexpr int kVectorsPerFlush = 7;
static_assert(int64_t(kVectorsPerFlush) * 2 * 2 * kMaxHigh * kMaxHigh <= INT32_MAX, "products of high parts");
static_assert(int64_t(kVectorsPerFlush) * 4 * 2 * kMaxHigh * kMaxLow <= INT32_MAX, "mixed products");

struct PartTables {
  WordTable high, low;
};

static void make_parts(const OdTable& table, PartTables& parts) {
  for (int level = 0; level < 256; ++level) {
    const int32_t fixed = table.fixed[level] > 0 ? table.fixed[level] : 0;
    const int32_t centred = fixed - kCentre;
    const int32_t high = (centred + kMaxLow) >> kLowBits;
    parts.high.set(level, high);
    parts.low.set(level, centred - high * (1 << kLowBits));
  }
}

// Sums of parts, of products of high parts, of mixed ones (of a part with itself: once, to be doubled) and of low ones.
struct PartSums {
  __m512i high[3], low[3];
  __m512i hh[6], hl[6], ll[6];
};

constexpr int kSums = 24;
static_assert(sizeof(PartSums) == kSums * sizeof(__m512i), "only sums");

// The same, summed over vectors to int64 lanes.
struct WideSums {
  __m512i lane[kSums];
  int64_t count;
};

static inline void clear(PartSums& s) {
  for (int k = 0; k < 3; ++k) s.high[k] = s.low[k] = _mm512_setzero_si512();
  for (int k = 0; k < 6; ++k) s.hh[k] = s.hl[k] = s.ll[k] = _mm512_setzero_si512();
}

static inline void flush(const PartSums& s, WideSums& wide) {
  __m512i part[kSums];
  __builtin_memcpy(part, &s, sizeof(part));
  for (int j = 0; j < kSums; ++j) {
    const __m512i even = _mm512_srai_epi64(_mm512_slli_epi64(part[j], 32), 32);
    const __m512i odd = _mm512_srai_epi64(part[j], 32);
    wide.lane[j] = _mm512_add_epi64(wide.lane[j], _mm512_add_epi64(even, odd));
  }
}

static inline void add_words(const __m512i h[3], const __m512i l[3], PartSums& s) {
  const __m512i one = _mm512_set1_epi16(1);
  for (int k = 0; k < 3; ++k) {
    s.high[k] = _mm512_dpwssd_epi32(s.high[k], h[k], one);
    s.low[k] = _mm512_dpwssd_epi32(s.low[k], l[k], one);
  }
  int j = 0;
  for (int a = 0; a < 3; ++a) {
    for (int b = a; b < 3; ++b, ++j) {
      s.hh[j] = _mm512_dpwssd_epi32(s.hh[j], h[a], h[b]);
      s.ll[j] = _mm512_dpwssd_epi32(s.ll[j], l[a], l[b]);
      s.hl[j] = _mm512_dpwssd_epi32(s.hl[j], h[a], l[b]);
      if (a != b) s.hl[j] = _mm512_dpwssd_epi32(s.hl[j], l[a], h[b]);
    }
  }
}

// Adds the first `count` gathered pixels.
static void add_gathered(const Gathered& tissue, int count, const PartTables& parts, WideSums& wide) {
  alignas(64) int16_t word[6][kBlock];
  for (int i = 0; i < count; i += kWide) {
    const Levels p = tissue.at(i);
    const __mmask64 there = first_bytes(count - i);
    for (int c = 0; c < 3; ++c) {
      const Quarters q = quarters_of(p.c[c]);
      const Words high = look_up(parts.high, p.c[c], q);
      const Words low = look_up(parts.low, p.c[c], q);
      for (int part = 0; part < 2; ++part) {
        _mm512_store_si512(word[c] + i + 32 * part, high.part[part]);
        _mm512_store_si512(word[3 + c] + i + 32 * part, low.part[part]);
      }
    }
    if (~there) {
      // What lies behind the last pixel counts nothing. Words are in the order of `Words`.
      const __m512i all = _mm512_maskz_set1_epi8(there, -1);
      const __m512i keep[2] = {_mm512_unpacklo_epi8(all, all), _mm512_unpackhi_epi8(all, all)};
      for (auto& plane : word) {
        for (int part = 0; part < 2; ++part) {
          int16_t* w = plane + i + 32 * part;
          _mm512_store_si512(w, _mm512_and_si512(_mm512_load_si512(w), keep[part]));
        }
      }
    }
  }
  const int padded_count = (count + kWide - 1) / kWide * kWide;
  for (int begin = 0; begin < padded_count; begin += kVectorsPerFlush * kWide) {
    const int left = padded_count - begin;
    const int end = begin + (left < kVectorsPerFlush * kWide ? left : kVectorsPerFlush * kWide);
    PartSums sums;
    clear(sums);
    for (int i = begin; i < end; i += 32) {
      __m512i h[3], l[3];
      for (int c = 0; c < 3; ++c) {
        h[c] = _mm512_load_si512(word[c] + i);
        l[c] = _mm512_load_si512(word[3 + c] + i);
      }
      add_words(h, l, sums);
    }
    flush(sums, wide);
  }
  wide.count += count;
}

// Back from parts: sum of q = n kCentre + S, sum of q q' = n kCentre^2 + kCentre (S + S') + sum of products of the
// rest.
static void add_sums(const WideSums& wide, MomentSums& sums) {
  __extension__ typedef __int128 int128;
  int64_t total[kSums];
  for (int j = 0; j < kSums; ++j) total[j] = _mm512_reduce_add_epi64(wide.lane[j]);
  const int64_t *high = total, *low = total + 3, *hh = total + 6, *hl = total + 12, *ll = total + 18;
  const int64_t scale = 1 << kLowBits;
  const int64_t n = wide.count;
  int64_t rest[3];
  for (int k = 0; k < 3; ++k) {
    rest[k] = high[k] * scale + low[k];
    sums.sum[k] += n * kCentre + rest[k];
  }
  int j = 0;
  for (int a = 0; a < 3; ++a) {
    for (int b = a; b < 3; ++b, ++j) {
      const int128 mixed = int128(hl[j]) * (a == b ? 2 : 1);
      const int128 product = int128(hh[j]) * scale * scale + mixed * scale + ll[j];
      sums.product[j] += uint128(int128(n) * kCentre * kCentre + int128(rest[a] + rest[b]) * kCentre + product);
    }
  }
  sums.count += n;
}

void moments_vbmi(const ImageView& image, PixelSpan span, const OdTable& table, double, double, MomentSums& sums) {
  PartTables parts;
  make_parts(table, parts);
  Gathered tissue;
  WideSums wide = {};
  for (int64_t begin = span.begin; begin < span.end; begin += kWide) {
    const Levels p = load_levels(image, begin, span.end - begin);
    tissue.add(p, tissue_mask(p, table.tissue_limit) & first_bytes(span.end - begin));
    if (tissue.full()) {
      const int whole = tissue.count / kWide * kWide;
      add_gathered(tissue, whole, parts, wide);
      tissue.drop(whole);
    }
  }
  add_gathered(tissue, tissue.count, parts, wide);
  add_sums(wide, sums);
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
