// Brackets of percentiles in the tails of 8-bit images. Whether a key lies beyond the inner end of a bracket is the
// sign of a linear form of the ODs, told by words of 16 bits with a known error; the few pixels that may lie there
// get exact keys.
#include "macenko/cpu/simd/u8_vbmi.h"
#include "macenko/steps/order_statistic.h"

#ifdef ERNET_VBMI
namespace ernet::cpu::ERNET_ISA_NAMESPACE {

static void make_words(const Keys& keys, WordTable& table) {
  const int32_t origin = word_origin(keys.io);
  for (int level = 0; level < 256; ++level) table.set(level, word_of(keys.table->fixed[level], origin));
}

// A form in every lane.
struct FormLanes {
  __m512i w[3];
  __m512i constant;
};

static FormLanes in_lanes(const WordForm& form) {
  FormLanes lanes;
  for (int k = 0; k < 3; ++k) lanes.w[k] = _mm512_set1_epi16(form.w[k]);
  lanes.constant = _mm512_set1_epi16(form.constant);
  return lanes;
}

// Bit i says that pixel i may reach the limit of the form.
static inline __mmask64 may_reach(const Words words[3], const FormLanes& form) {
  __m512i sum[2];
  for (int part = 0; part < 2; ++part) {
    sum[part] = form.constant;
    for (int k = 0; k < 3; ++k) {
      sum[part] = _mm512_add_epi16(sum[part], _mm512_mulhrs_epi16(words[k].part[part], form.w[k]));
    }
  }
  return ~_mm512_movepi8_mask(_mm512_packs_epi16(sum[0], sum[1]));
}

// What a scan found: `reached` counts the keys that are not below the bracket.
struct Tail {
  Bracket* bracket;
  int64_t reached;
};

static inline void collect(const double* key, int count, Tail& tail) {
  Bracket& bracket = *tail.bracket;
  const __m512d low = _mm512_set1_pd(bracket.low);
  const __m512d high = _mm512_set1_pd(bracket.high);
  for (int i = 0; i < count; i += 8) {
    const __m512d k = _mm512_load_pd(key + i);
    const __mmask8 live = count - i >= 8 ? 0xff : __mmask8((1u << (count - i)) - 1);
    const __mmask8 reached = _mm512_mask_cmp_pd_mask(live, k, low, _CMP_GE_OQ);
    const __mmask8 inside = _mm512_mask_cmp_pd_mask(reached, k, high, _CMP_LE_OQ);
    tail.reached += __builtin_popcount(reached);
    bracket.below += __builtin_popcount(live & ~reached);
    if (inside == 0) continue;
    if (bracket.capacity - bracket.inside < 8 && bracket.needed > 0) make_room(bracket);
    const int64_t room = bracket.capacity - bracket.inside;
    if (room > 0) {
      const __mmask8 fits = room >= 8 ? 0xff : __mmask8((1u << room) - 1);
      _mm512_mask_storeu_pd(bracket.collected + bracket.inside, fits, _mm512_maskz_compress_pd(inside, k));
    }
    bracket.inside += __builtin_popcount(inside);
  }
}

// Exact keys of the gathered pixels, as those of the loops in float64.
static void collect_exactly(const Gathered& pixels, const Keys& keys, Tail& first, Tail& second) {
  alignas(64) double a[kBlock];
  alignas(64) double b[kBlock];
  const double* od = keys.table->od;
  const int n = pixels.count;
  for (int i = 0; i < n; ++i) {
    const double red = od[pixels.level[0][i]];
    const double green = od[pixels.level[1][i]];
    const double blue = od[pixels.level[2][i]];
    a[i] = keys.a[0] * red + keys.a[1] * green + keys.a[2] * blue;
    b[i] = keys.b[0] * red + keys.b[1] * green + keys.b[2] * blue;
  }
  if (keys.kind == KeyKind::angle) {
    for (int i = 0; i < n; ++i) a[i] = macenko::pseudo_angle(a[i], b[i]);
    collect(a, n, first);
    collect(a, n, second);
  } else {
    collect(a, n, first);
    collect(b, n, second);
  }
}

void scan_vbmi(const ImageView& image, PixelSpan span, const Keys& keys, Bracket& first, Bracket& second) {
  const bool angles = keys.kind == KeyKind::angle;
  const int limit = keys.table->tissue_limit;
  if (!in_tail(first) || !in_tail(second)) return scan_bytes(image, span, keys, first, second);
  WordTable table;
  make_words(keys, table);
  const FormLanes forms[2] = {in_lanes(word_form(tail_form(keys, 0, first), keys.io)),
                              in_lanes(word_form(tail_form(keys, 1, second), keys.io))};
  const FormLanes axis = in_lanes(word_form(axis_form(keys), keys.io));
  Tail tails[2] = {{&first, 0}, {&second, 0}};
  Gathered tissue, chosen;
  int64_t total = 0;
  const auto scan_levels = [&](const Levels& p, __mmask64 live) {
    Words words[3];
    for (int c = 0; c < 3; ++c) words[c] = look_up(table, p.c[c], quarters_of(p.c[c]));
    __mmask64 reaches = may_reach(words, forms[0]) | may_reach(words, forms[1]);
    if (angles) reaches |= may_reach(words, axis);
    chosen.add(p, live & reaches);
    if (chosen.full()) {
      collect_exactly(chosen, keys, tails[0], tails[1]);
      chosen.count = 0;
    }
  };
  const auto scan_tissue = [&](int count) {
    for (int i = 0; i < count; i += kWide) scan_levels(tissue.at(i), first_bytes(count - i));
    total += count;
  };
  for (int64_t begin = span.begin; begin < span.end; begin += kWide) {
    const Levels p = load_levels(image, begin, span.end - begin);
    const __mmask64 there = first_bytes(span.end - begin);
    if (!angles) {
      scan_levels(p, there);
      continue;
    }
    tissue.add(p, tissue_mask(p, limit) & there);
    if (tissue.full()) {
      const int whole = tissue.count / kWide * kWide;
      scan_tissue(whole);
      tissue.drop(whole);
    }
  }
  if (angles) {
    scan_tissue(tissue.count);
  } else {
    total = span.end - span.begin;
  }
  collect_exactly(chosen, keys, tails[0], tails[1]);
  // Below a bracket of the upper tail are all pixels that do not reach it, chosen or not.
  for (int i = 0; i < 2; ++i) {
    Bracket& bracket = *tails[i].bracket;
    if (bracket.fraction > 0.5) bracket.below = total - tails[i].reached;
  }
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
#endif
