// What the library has besides the operators torch.ops.ernet.*, which loading it registers: C functions that
// ernet_fast/_library.py calls. It uses no symbol of Python, so that one binary serves every version.
#include <exception>
#include <sstream>
#include <string>

#ifdef ERNET_WITH_CUDA
#include "macenko/cuda/requested_plan.h"
#endif
#include "er/cache_shares.h"
#include "er/streaming.h"
#include "memory/output_cache.h"
#include "simd/isa.h"

#define ERNET_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// What `work` throws as text, which lives until the next call of this thread; null if it throws nothing.
template <typename Work> const char* error_of(const Work& work) {
  static thread_local std::string message;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

std::string quoted(const std::string& text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    json += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return json + '"';
}

// The parts of a list "a;b".
std::string list(const char* parts) {
  std::istringstream stream(parts);
  std::string json;
  for (std::string part; std::getline(stream, part, ';');) json += (json.empty() ? "" : ", ") + quoted(part);
  return '[' + json + ']';
}

}  // namespace

// What is wrong with an environment variable that the operators read: an ERNET_ISA that this CPU has not, an
// ERNET_CACHES that names no sizes, an ERNET_STREAMING of another form, an ERNET_KEEP_MB that is no number; null if
// nothing is.
ERNET_EXPORT const char* ernet_environment_error() {
  return error_of([] {
    ernet::selected_isa();
    ernet::cache_sizes();
    ernet::cpu::check_streaming();
    ernet::cpu::map_buffer_limit();
#ifdef ERNET_WITH_CUDA
    ernet::cuda::read_requested_plan();
#endif
  });
}

// What this binary is, as JSON: version, compiler, instruction sets compiled in and the one in use, CUDA architectures,
// the torch whose headers it was built with, and the oldest torch that it supports.
ERNET_EXPORT const char* ernet_build_info() {
  static const std::string json =
      "{\"version\": " + quoted(ERNET_VERSION) + ", \"compiler\": " + quoted(__VERSION__) +
      ", \"isa_variants\": " + list(ERNET_ISA_VARIANTS) + ", \"isa\": " + quoted(ernet::isa_name(ernet::finest_isa())) +
      ", \"cuda_archs\": " + list(ERNET_CUDA_ARCHS) + ", \"torch_headers\": " + quoted(ERNET_TORCH_HEADERS) +
      ", \"torch_abi_target\": \"2.11\", \"sanitizers\": " + quoted(ERNET_SANITIZE) + "}";
  return json.c_str();
}

// Bytes of this machine's data caches (of the last level one CPU's share), who says so, and what the ER operators make
// of them: bytes of a channel tile and of a gradient that stays in cache.
ERNET_EXPORT const char* ernet_caches() {
  static thread_local std::string json;
  const ernet::CacheSizes& sizes = ernet::cache_sizes();
  const ernet::cpu::CacheShares& shares = ernet::cpu::cache_shares();
  std::ostringstream out;
  out << "{\"first\": " << sizes.first << ", \"second\": " << sizes.second << ", \"last\": " << sizes.last
      << ", \"source\": " << quoted(sizes.source) << ", \"channel_tile\": " << shares.channel_tile
      << ", \"gradient\": " << shares.gradient << '}';
  json = out.str();
  return json.c_str();
}

// Bytes that maps are prefetched ahead and from which on outputs bypass the caches, who says so, and the seconds that
// the probe took, which runs once in a process.
ERNET_EXPORT const char* ernet_streaming() {
  static thread_local std::string json;
  const ernet::cpu::Streaming& found = ernet::cpu::streaming();
  std::ostringstream out;
  out << "{\"fetch_ahead\": " << found.fetch_ahead << ", \"stores\": " << found.stores
      << ", \"source\": " << quoted(found.source) << ", \"seconds\": " << found.seconds << '}';
  json = out.str();
  return json.c_str();
}

// Memory of freed outputs that is kept for later ones: bytes kept, how many may be, buffers used again and new.
ERNET_EXPORT void ernet_map_buffers(uint64_t counts[4]) {
  const ernet::cpu::MapBufferCounts buffers = ernet::cpu::map_buffer_counts();
  counts[0] = ernet::cpu::kept_map_bytes();
  counts[1] = ernet::cpu::map_buffer_limit();
  counts[2] = buffers.reused;
  counts[3] = buffers.fresh;
}

// How many bytes may be kept; what exceeds them goes back to the system at once, 0 keeps none.
ERNET_EXPORT void ernet_set_map_buffer_limit(uint64_t bytes) { ernet::cpu::set_map_buffer_limit(bytes); }

// For tests: fill these buffers with NaN before use.
ERNET_EXPORT void ernet_poison_map_buffers(int wanted) { ernet::cpu::poison_map_buffers(wanted != 0); }

#ifdef ERNET_WITH_CUDA
// For comparisons: the plan of later Macenko calls on CUDA devices, as ERNET_MACENKO_PLAN names them. Returns what is
// wrong with it, or null.
ERNET_EXPORT const char* ernet_set_macenko_plan(const char* plan) {
  return error_of([plan] { ernet::cuda::request_plan(plan); });
}
#endif
