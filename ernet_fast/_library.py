"""The compiled library, `libernet.so`: loaded and called through ctypes, so that one binary serves every Python."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("libernet.so")


FUNCTIONS = ("environment_error", "build_info", "caches", "streaming")
"""Those that return text."""


class Library:
    """The functions of the library besides its operators, which loading it registers as `torch.ops.ernet.*`.

    Raises:
        OSError: the file does not load.
        AttributeError: it is of another version, and lacks a function.
        ValueError: an environment variable has a value that the library does not understand.
    """

    def __init__(self, path: Path = PATH) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name in FUNCTIONS:
            getattr(self._functions, f"ernet_{name}").restype = ctypes.c_char_p
        error = self._functions.ernet_environment_error()
        if error is not None:
            raise ValueError(f"environment variable {error.decode()}")

    def build_info(self) -> dict[str, Any]:
        """What it was built with and for, and the instruction set in use."""
        return json.loads(self._functions.ernet_build_info())

    def caches(self) -> dict[str, Any]:
        """Bytes of this machine's data caches, who says so, and what the ER operators make of them."""
        return json.loads(self._functions.ernet_caches())

    def streaming(self) -> dict[str, Any]:
        """How maps are streamed: bytes prefetched ahead and from which stores bypass the caches; it may probe."""
        return json.loads(self._functions.ernet_streaming())

    def map_buffers(self) -> dict[str, int]:
        """Memory of freed outputs: bytes kept, how many may be, buffers used again and newly asked for."""
        counts = (ctypes.c_uint64 * 4)()
        self._functions.ernet_map_buffers(counts)
        return dict(zip(("kept_bytes", "limit_bytes", "reused", "fresh"), counts, strict=True))

    def set_map_buffer_limit(self, limit_bytes: int) -> None:
        """Keep at most so many bytes; what exceeds them goes back to the system at once."""
        self._functions.ernet_set_map_buffer_limit(ctypes.c_uint64(limit_bytes))

    def poison_map_buffers(self, wanted: bool) -> None:
        """For tests: fill this memory with NaN before it is used."""
        self._functions.ernet_poison_map_buffers(int(wanted))

    def has_cuda(self) -> bool:
        """Whether CUDA kernels are compiled in."""
        return hasattr(self._functions, "ernet_set_macenko_plan")

    def set_macenko_plan(self, plan: str) -> None:
        """For comparisons: the plan of later Macenko calls on CUDA devices; does nothing without CUDA kernels.

        Raises:
            ValueError: a plan that `ERNET_MACENKO_PLAN` does not name.
        """
        if not self.has_cuda():
            return
        function = self._functions.ernet_set_macenko_plan
        function.restype = ctypes.c_char_p
        error = function(plan.encode())
        if error is not None:
            raise ValueError(error.decode())
