// The Python module ernet_fast._C. Importing it registers the operators torch.ops.ernet.*; it has build_info() besides.
#include <pybind11/pybind11.h>

#ifdef ERNET_WITH_CUDA
#include "macenko/cuda/requested_plan.h"
#endif
#include "er/cache_shares.h"
#include "er/streaming.h"
#include "memory/output_cache.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace {

py::object split(const char* text) { return *text == '\0' ? py::list() : py::str(text).attr("split")(";"); }

py::dict build_info() {
  using namespace py::literals;
  return py::dict("version"_a = ERNET_VERSION, "compiler"_a = __VERSION__, "isa_variants"_a = split(ERNET_ISA_VARIANTS),
                  "isa"_a = ernet::isa_name(ernet::finest_isa()), "cuda_archs"_a = split(ERNET_CUDA_ARCHS),
                  "torch_headers"_a = ERNET_TORCH_HEADERS, "torch_abi_target"_a = "2.11",
                  "sanitizers"_a = ERNET_SANITIZE);
}

py::dict caches() {
  using namespace py::literals;
  const ernet::CacheSizes& sizes = ernet::cache_sizes();
  const ernet::cpu::CacheShares& shares = ernet::cpu::cache_shares();
  return py::dict("first"_a = sizes.first, "second"_a = sizes.second, "last"_a = sizes.last, "source"_a = sizes.source,
                  "channel_tile"_a = shares.channel_tile, "gradient"_a = shares.gradient);
}

py::dict streaming() {
  using namespace py::literals;
  const ernet::cpu::Streaming& found = ernet::cpu::streaming();
  return py::dict("fetch_ahead"_a = found.fetch_ahead, "stores"_a = found.stores, "source"_a = found.source,
                  "seconds"_a = found.seconds);
}

py::dict map_buffers() {
  using namespace py::literals;
  const ernet::cpu::MapBufferCounts counts = ernet::cpu::map_buffer_counts();
  return py::dict("kept_bytes"_a = ernet::cpu::kept_map_bytes(), "limit_bytes"_a = ernet::cpu::map_buffer_limit(),
                  "reused"_a = counts.reused, "fresh"_a = counts.fresh);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of ernet_fast";
  ernet::selected_isa();           // an impossible ERNET_ISA fails here, at import, with a clear error
  ernet::cache_sizes();            // so does an ERNET_CACHES that names no sizes,
  ernet::cpu::check_streaming();   // an ERNET_STREAMING of another form,
  ernet::cpu::map_buffer_limit();  // and an ERNET_KEEP_MB that is no number
#ifdef ERNET_WITH_CUDA
  ernet::cuda::read_requested_plan();
  m.def("set_macenko_plan", &ernet::cuda::request_plan, py::arg("plan"),
        "For comparisons: the plan of later Macenko calls on CUDA devices, as ERNET_MACENKO_PLAN names them.");
#endif
  m.def("build_info", &build_info,
        "What this binary is: version, compiler, instruction sets compiled in and the one in use, CUDA architectures, "
        "the torch whose headers it was built with, and the oldest torch that it supports.");
  m.def(
      "caches", &caches,
      "Bytes of this machine's data caches (of the last level one CPU's share), who says so, and what the ER operators "
      "make of them: bytes of a channel tile and of a gradient that stays in cache.");
  m.def(
      "streaming", &streaming,
      "Bytes that maps are prefetched ahead and from which on outputs bypass the caches, who says so, and the seconds "
      "that the probe took, which runs once in a process.");
  m.def(
      "map_buffers", &map_buffers,
      "Memory of freed outputs that is kept for later ones: bytes kept, how many may be, buffers used again and new.");
  m.def("set_map_buffer_limit", &ernet::cpu::set_map_buffer_limit, py::arg("bytes"),
        "How many bytes may be kept; what exceeds them goes back to the system at once, 0 keeps none.");
  m.def("poison_map_buffers", &ernet::cpu::poison_map_buffers, py::arg("wanted"),
        "For tests: fill these buffers with NaN before use.");
}
