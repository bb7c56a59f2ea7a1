// The Python module ernet_fast._C. Importing it registers the operators torch.ops.ernet.*; it has build_info() besides.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

py::list split(const char* text) {
  py::list parts;
  std::string part;
  for (const char* p = text;; ++p) {
    if (*p == ';' || *p == '\0') {
      if (!part.empty()) parts.append(part);
      part.clear();
      if (*p == '\0') break;
    } else {
      part += *p;
    }
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ERNET_VERSION;
  info["compiler"] = __VERSION__;
  info["isa_variants"] = split(ERNET_ISA_VARIANTS);
  info["isa"] = ernet::isa_name(ernet::selected_isa());
  info["cuda_archs"] = split(ERNET_CUDA_ARCHS);
  info["torch_headers"] = ERNET_TORCH_HEADERS;
  info["torch_abi_target"] = "2.11";
  info["sanitizers"] = ERNET_SANITIZE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of ernet_fast";
  ernet::selected_isa();  // an impossible ERNET_ISA fails here, at import, with a clear error
  m.def("build_info", &build_info,
        "What this binary is: version, compiler, instruction sets compiled in and the one in use, CUDA architectures, "
        "the torch whose headers it was built with, and the oldest torch it serves.");
}
