// Brackets in the tails of the keys: whether a pixel may lie there is the sign of a linear form of its ODs, which an
// approximation with a known error can tell; the few that may get exact keys. Included by the loops, once per
// instruction set, and therefore static throughout.
#pragma once

#include "macenko/cpu/kernels.h"

namespace ernet::cpu::ERNET_ISA_NAMESPACE {

// w . OD >= limit.
struct Form {
  double w[3];
  double limit;
};

// The form that says whether the key `which` of a pixel is in the tail that holds the bracket, or in the bracket. For
// angles between 0 and pi it is the cross product with the direction of the bracket's inner end.
static inline Form tail_form(const Keys& keys, int which, const Bracket& bracket) {
  const bool upper = bracket.fraction > 0.5;
  const double sign = upper ? 1 : -1;
  const double end = upper ? bracket.low : bracket.high;
  Form form = {{0, 0, 0}, 0};
  if (keys.kind == KeyKind::angle) {
    if (sign * end > 2) return {{0, 0, 0}, 1e300};  // there are no such angles
    if (!(end > 0 && end < 2)) return {{0, 0, 0}, -1e300};
    const double x = 1 - end;
    const double y = 1 - __builtin_fabs(x);
    for (int k = 0; k < 3; ++k) form.w[k] = sign * (keys.b[k] * x - keys.a[k] * y);
  } else {
    for (int k = 0; k < 3; ++k) form.w[k] = sign * (which == 0 ? keys.a[k] : keys.b[k]);
    form.limit = sign * end;
  }
  return form;
}

// True if the bracket is so far out that exact keys of the whole tail cost little.
static inline bool in_tail(const Bracket& bracket) { return bracket.fraction < 0.05 || bracket.fraction > 0.95; }

// True if OD . b is positive for all tissue, whose ODs lie between `least` and `most`.
static inline bool angles_are_above_axis(const Keys& keys, double least, double most) {
  double height = 0;
  for (double b : keys.b) height += b * (b > 0 ? least : most);
  return height > 1e-9;
}

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
