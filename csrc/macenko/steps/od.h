// Optical density OD = -ln((I + 1) / Io) of grey levels 0 to 255, and its fixed-point form.
//
// Moments are summed over fixed-point ODs: integer sums do not depend on their order, so results are bit-identical for
// any number of threads, strips or GPU blocks. With 24 fractional bits a fixed-point OD is off by at most 9e-8.
#pragma once

#include "macenko/steps/host_device.h"

namespace ernet::macenko {

constexpr int kOdFractionBits = 24;
constexpr double kOdScale = double(int64_t(1) << kOdFractionBits);
constexpr double kMaxIo = 1024;
// ODs are below ln(1024) = 6.94, so a fixed-point OD is below 2^26.8 and a product below 2^53.6: this many fit in
// int64.
constexpr int kMaxFixedProducts = 512;

ERNET_HOST_DEVICE double od_of_level(double level, double io) { return -log((level + 1.0) / io); }

// Half a level of overshoot is rounding; NaN and everything else is not a grey level.
ERNET_HOST_DEVICE bool is_level(double level) { return level >= -0.5 && level <= 255.5; }

ERNET_HOST_DEVICE int32_t fixed_of_od(double od) { return int32_t(od * kOdScale + 0.5); }  // for od >= 0

// Fixed-point OD of a grey level in fused float32 arithmetic, so that vectorised loops can run the same operations in
// place of a table and get the same bits. With level + 1 = 2^k (1 + f), |f| < 0.42: OD = ln Io - k ln 2 - f P(f).
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
constexpr int32_t kFixedLn2 = 11629080;    // ln 2 * 2^24
constexpr float kFixedShift = 8388608.0f;  // 2^23: makes f P(f) 2^24 positive before it is truncated
// ln Io in fixed point, plus the shift.
ERNET_HOST_DEVICE int32_t fixed_offset(double io) { return int32_t(log(io) * kOdScale + 0.5) + int32_t(kFixedShift); }

ERNET_HOST_DEVICE int32_t fixed_od_of_level(int level, int32_t offset) {
  const int32_t shifted = bits_as<int32_t>(float(level + 1)) - kSqrtHalfBits;
  const float f = bits_as<float>((shifted & 0x7fffff) + kSqrtHalfBits) - 1.0f;
  // P(f) * 2^24 from the highest power; the fit is within 0.2 units of the fixed point. Written out, as compilers do
  // not vectorise around an inner loop.
  float p = 1466990.625f;
  p = ERNET_FMA(p, f, -2412115.75f);
  p = ERNET_FMA(p, f, 2508042.0f);
  p = ERNET_FMA(p, f, -2778423.75f);
  p = ERNET_FMA(p, f, 3348225.25f);
  p = ERNET_FMA(p, f, -4194665.5f);
  p = ERNET_FMA(p, f, 5592548.0f);
  p = ERNET_FMA(p, f, -8388606.0f);
  p = ERNET_FMA(p, f, 16777216.0f);
  return offset - (shifted >> 23) * kFixedLn2 - int32_t(ERNET_FMA(p, f, kFixedShift));
}

// Everything that depends on the grey level alone.
struct OdTable {
  double od[256];
  int32_t fixed[256];
  int32_t fixed_offset;
  int32_t tissue_limit;  // levels <= this have OD >= beta; -1 if none has
};

ERNET_HOST_DEVICE void set_tissue_limit(OdTable& table, double beta) {
  table.tissue_limit = -1;
  for (int level = 0; level < 256; ++level) {
    if (table.od[level] >= beta) table.tissue_limit = level;
  }
}

ERNET_HOST_DEVICE OdTable make_od_table(double io, double beta) {
  OdTable table;
  table.fixed_offset = fixed_offset(io);
  for (int level = 0; level < 256; ++level) {
    table.od[level] = od_of_level(level, io);
    table.fixed[level] = fixed_od_of_level(level, table.fixed_offset);
  }
  set_tissue_limit(table, beta);
  return table;
}

// Sums over tissue pixels in real units: count, OD_r, OD_g, OD_b, and the products rr, rg, rb, gg, gb, bb.
constexpr int kMomentCount = 10;

}  // namespace ernet::macenko
