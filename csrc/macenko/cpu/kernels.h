// The loops over pixels behind the Macenko operators, free of torch, a table of functions per instruction set. Results
// of ranges of an image add up to the same bits, however it is cut.
#pragma once

#include <stdint.h>

#include "macenko/steps/reconstruct.h"
#include "simd/isa.h"

#ifdef ERNET_ISA
#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#define ERNET_AVX512 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined vectors inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define ERNET_VBMI 1
#endif
#ifdef __SSE2__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

namespace ernet::cpu {

enum class Pixel : int { u8 = 0, f32 = 1, f64 = 2 };
constexpr int kNumPixelTypes = 3;

// One RGB image. Strides are in elements: (1, H W) in the planar layout, (3, 1) channels-last.
struct ImageView {
  const void* data;
  int64_t pixel_stride;
  int64_t channel_stride;
  int64_t pixels;
  double scale;  // grey level of the value 1
  // Room for what a pass over an 8-bit image leaves to later ones, [3][pixels]; null: nothing is kept.
  int16_t* words = nullptr;
  // The grey levels of a floating-point image that has whole ones alone, with the pixel stride of the image; null: not
  // known to be so.
  const uint8_t* levels = nullptr;
  int64_t level_channel_stride = 0;
};

struct PixelSpan {
  int64_t begin;
  int64_t end;
};

__extension__ typedef unsigned __int128 uint128;

// Exact sums over the tissue pixels of a range: fixed-point ODs of macenko/steps/od.h, products with twice the
// fractional bits.
struct MomentSums {
  int64_t count;
  int64_t invalid;  // pixels with a value that is no grey level
  int64_t sum[3];
  uint128 product[6];
};

// What is ordered: `angle` gives tissue pixels the pseudo-angle of (a . OD, b . OD) as both keys; `linear` gives all
// pixels the keys a . OD and b . OD.
enum class KeyKind : int { angle = 0, linear = 1 };
struct Keys {
  KeyKind kind;
  double a[3];
  double b[3];
  double beta;
  double io;
  const macenko::OdTable* table;
};

// Counts keys below `low`, and collects those in [low, high].
struct Bracket {
  double low;
  double high;
  double fraction;  // of all keys that are expected below the bracket
  int64_t below;
  int64_t inside;     // how many there are, also beyond `capacity`
  double* collected;  // the first `capacity` of them
  int64_t capacity;
  // Of a tail: how many keys from its end on are looked for; 0: none is to make room for others.
  int64_t needed = 0;
  int64_t dropped = 0;  // keys below those kept that did
};

// True if the bracket is so far out that exact keys of the whole tail cost little.
static inline bool in_tail(const Bracket& bracket) { return bracket.fraction < 0.05 || bracket.fraction > 0.95; }

// Of a tail's keys, where more than the needed ones are there, keeps those, and moves the bracket beyond the last.
void make_room(Bracket& bracket);

constexpr int kRadixBits = 11;
constexpr int kRadixBins = 1 << kRadixBits;

// Counts, among the keys whose ordered bits above `shift + kRadixBits` equal those of `prefix`, the digits at `shift`.
struct RadixPass {
  int which;  // key a or b
  int shift;
  uint64_t prefix;
  uint64_t prefix_mask;
  int64_t* counts;  // [kRadixBins], added to
};

// Reconstructions that one pass over an image writes at most: all stains, haematoxylin alone, eosin alone.
constexpr int kMostResults = 3;

// I' = Io exp(shift - matrix . OD).
struct Reconstruction {
  double matrix[3][3];
  double shift[3];
  double io;
  bool single;   // float32 holds the exponents, and factors of them: 8-bit images may be computed in it
  bool factors;  // float64 holds factors of the exponents, from which whole levels may be reconstructed
  const macenko::OdTable* table;
  void* out;
};

// What becomes of the levels of a network's input, and where all the pixels of the image go, interleaved.
struct ScaledLevels {
  int value_bytes;    // 4, or 2 for 16-bit types
  const void* value;  // [3][256], of every channel and level
  void* out;
};

// A key of some rank, and the one of the next rank (infinity if there is none).
struct Neighbours {
  double lower;
  double upper;
};

struct MacenkoLoops {
  // Whether `count` consecutive values are whole levels within rounding, which are written; null for bytes.
  bool (*whole_levels)(const void* values, int64_t count, double scale, uint8_t* levels);
  // Both read or write the image's `words`, if they are of any use to them.
  bool uses_words;
  void (*moments)(const ImageView&, PixelSpan, const macenko::OdTable&, double io, double beta, MomentSums&);
  void (*scan)(const ImageView&, PixelSpan, const Keys&, Bracket&, Bracket&);
  // Keys of all pixels of an image; returns how many were written (angle: tissue only) to a and, if linear, b.
  int64_t (*keys)(const ImageView&, const Keys&, double* a, double* b);
  void (*radix)(const ImageView&, PixelSpan, const Keys&, const RadixPass&);
  // Every result of reconstructions that share Io and the table. Pixels are read once.
  void (*reconstruct)(const ImageView&, PixelSpan, const Reconstruction*, int results);
  // A single one of an 8-bit image and `single`, scaled; null where nothing is faster than one step after the other.
  void (*reconstruct_scaled)(const ImageView&, PixelSpan, const Reconstruction&, const ScaledLevels&);
  // Among `count` finite or infinite keys, which are overwritten, as is scratch[0 .. count - 1].
  Neighbours (*select)(double* keys, double* scratch, int64_t count, int64_t rank);
};

// Each in the file of its name in simd/; the suffix vbmi: for instruction sets that have it, faster again.
#ifdef ERNET_ISA
namespace ERNET_ISA_NAMESPACE {
Neighbours select_order(double* keys, double* scratch, int64_t count, int64_t rank);
void scan_f32(const ImageView&, PixelSpan, const Keys&, Bracket&, Bracket&);
void scan_f64(const ImageView&, PixelSpan, const Keys&, Bracket&, Bracket&);
void moments_of_bytes(const ImageView&, PixelSpan, const macenko::OdTable&, double io, double beta, MomentSums&);
void scan_bytes(const ImageView&, PixelSpan, const Keys&, Bracket&, Bracket&);
void reconstruct_bytes(const ImageView&, PixelSpan, const Reconstruction*, int results);
void reconstruct_levels_u8(const ImageView&, PixelSpan, const Reconstruction*, int results);
void reconstruct_levels_f32(const ImageView&, PixelSpan, const Reconstruction*, int results);
void reconstruct_levels_f64(const ImageView&, PixelSpan, const Reconstruction*, int results);
bool whole_levels_f32(const void* values, int64_t count, double scale, uint8_t* levels);
bool whole_levels_f64(const void* values, int64_t count, double scale, uint8_t* levels);
void moments_vbmi(const ImageView&, PixelSpan, const macenko::OdTable&, double io, double beta, MomentSums&);
void scan_vbmi(const ImageView&, PixelSpan, const Keys&, Bracket&, Bracket&);
void reconstruct_vbmi(const ImageView&, PixelSpan, const Reconstruction*, int results);
void reconstruct_scaled_vbmi(const ImageView&, PixelSpan, const Reconstruction&, const ScaledLevels&);
}  // namespace ERNET_ISA_NAMESPACE
#endif

// Loops of the selected instruction set.
const MacenkoLoops& macenko_loops(Pixel type);

}  // namespace ernet::cpu
