// Natural logarithm and exponential in double precision without calls or branches, so that compilers vectorise loops of
// them.
#pragma once

#include "macenko/steps/host_device.h"

namespace ernet::macenko {

// ln(x) for normal x > 0, to about 1 ulp: x = 2^k m with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m + 1)).
ERNET_HOST_DEVICE double log_of_normal(double x) {
  const int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  const int64_t shifted = bits_as<int64_t>(x) - sqrt_half;
  // The exponent as a double by way of 2^52 + exponent: AVX2 has no conversion from int64.
  const double exponent = bits_as<double>(((shifted >> 52) + 2048) | 0x4330000000000000) - 4503599627372544.0;
  const double f = bits_as<double>((shifted & 0x000fffffffffffff) + sqrt_half) - 1.0;
  const double s = f / (f + 2.0);
  const double z = s * s;
  // atanh(s) / s - 1 = z/3 + z^2/5 + ...; |s| <= 0.1716, so ten terms leave 2^-56.
  double p = 1.0 / 21;
  p = p * z + 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  const double tail = 2.0 * s * (z * p) + exponent * 1.90821492927058770002e-10;  // low part of ln 2
  return exponent * 6.93147180369123816490e-01 + (2.0 * s + tail);                // high part: 32 bits
}

// exp(x) to about 1 ulp for |x| <= 700, and the value at the nearer bound beyond.
ERNET_HOST_DEVICE double exp_clamped(double x) {
  x = x > -700.0 ? x : -700.0;
  x = x < 700.0 ? x : 700.0;
  const double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double k = x * 1.44269504088896340736 + shift;
  const double n = k - shift;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // Taylor to r^13 / 13!; |r| <= 0.3466, so the rest is below 2^-57.
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * bits_as<double>((bits_as<uint64_t>(k) << 52) + 0x3ff0000000000000u);
}

// cos(x) and sin(x) to about 1 ulp for |x| <= 4, the same bits on every processor.
ERNET_HOST_DEVICE void cos_sin(double x, double& cosine, double& sine) {
  const double quarters = rint(x * 0.636619772367581343076);  // of a turn
  const double r = (x - quarters * 1.57079632673412561417) - quarters * 6.07710050650619224932e-11;
  const double z = r * r;
  // Taylor; |r| <= 0.7854, so the rest is below 2^-60.
  // Reciprocals of -19!, 17!, ..., -3! and of 20!, -18!, ..., 4!.
  const double odd[] = {-121645100408832000.0,
                        355687428096000.0,
                        -1307674368000.0,
                        6227020800.0,
                        -39916800.0,
                        362880.0,
                        -5040.0,
                        120.0,
                        -6.0};
  const double even[] = {2432902008176640000.0,
                         -6402373705728000.0,
                         20922789888000.0,
                         -87178291200.0,
                         479001600.0,
                         -3628800.0,
                         40320.0,
                         -720.0,
                         24.0};
  double s = 0, c = 0;
  for (int i = 0; i < 9; ++i) {
    s = s * z + 1.0 / odd[i];
    c = c * z + 1.0 / even[i];
  }
  s = r + r * (z * s);
  c = (1.0 - 0.5 * z) + z * (z * c);
  const int quarter = int(quarters) & 3;
  const double a = (quarter & 1) != 0 ? s : c;
  const double b = (quarter & 1) != 0 ? c : s;
  cosine = quarter == 1 || quarter == 2 ? -a : a;
  sine = quarter >= 2 ? -b : b;
}

}  // namespace ernet::macenko
