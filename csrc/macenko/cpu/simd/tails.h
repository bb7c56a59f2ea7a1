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
// angles between 0 and pi (axis_form) it is the cross product with the direction of the bracket's inner end.
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

// The form that says whether a pixel's angle is not between 0 and pi, where `tail_form` says nothing of it.
static inline Form axis_form(const Keys& keys) { return {{-keys.b[0], -keys.b[1], -keys.b[2]}, 0}; }

}  // namespace ernet::cpu::ERNET_ISA_NAMESPACE
