// Optical density OD = -ln((I + 1) / Io) of grey levels 0 to 255, and its fixed-point form.
//
// Moments are summed over fixed-point ODs: integer sums do not depend on their order, so results are bit-identical for any
// number of threads, strips or GPU blocks. 24 fractional bits round an OD by at most 3e-8, the spacing of float32 at 0.5.
#pragma once

#include "macenko/host_device.h"

namespace ernet {
namespace macenko {

constexpr int kOdFractionBits = 24;
constexpr double kOdScale = double(int64_t(1) << kOdFractionBits);
constexpr double kMaxIo = 1024;
// ODs are below ln(1024) = 6.94, so a fixed-point OD is below 2^26.8 and a product below 2^53.6: this many fit in int64.
constexpr int kMaxFixedProducts = 512;

ERNET_HOST_DEVICE double od_of_level(double level, double io) { return -log((level + 1.0) / io); }

// Half a level of overshoot is rounding; NaN and everything else is not a grey level.
ERNET_HOST_DEVICE bool is_level(double level) { return level >= -0.5 && level <= 255.5; }

ERNET_HOST_DEVICE int32_t fixed_of_od(double od) { return int32_t(od * kOdScale + 0.5); }  // for od >= 0

// Everything that depends on the grey level alone.
struct OdTable {
  double od[256];
  int32_t fixed[256];     // 0 for levels that are no tissue
  int32_t tissue_limit;   // levels <= this have OD >= beta; -1 if none has
};

// Entry `level` of the table; tissue_limit is the caller's to set.
ERNET_HOST_DEVICE void set_od_entry(OdTable& table, int level, double io, double beta) {
  const double od = od_of_level(level, io);
  table.od[level] = od;
  table.fixed[level] = od >= beta ? fixed_of_od(od) : 0;
}

ERNET_HOST_DEVICE OdTable make_od_table(double io, double beta) {
  OdTable table;
  table.tissue_limit = -1;
  for (int level = 0; level < 256; ++level) {
    set_od_entry(table, level, io, beta);
    if (table.od[level] >= beta) table.tissue_limit = level;
  }
  return table;
}

// Sums over tissue pixels in real units: count, OD_r, OD_g, OD_b, and the products rr, rg, rb, gg, gb, bb.
constexpr int kMomentCount = 10;

}  // namespace macenko
}  // namespace ernet
