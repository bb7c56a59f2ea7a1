"""Which CPU this is: name, numbers, caches and instruction sets.

Standard library only, and no import from the package: bench/ loads this file when it times another revision.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# What csrc/simd/isa.cpp asks of a CPU, in the words of /proc/cpuinfo; each adds to the one before.
_FLAGS = {
    "avx2": {"avx2", "fma", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
    "avx512vbmi": {"avx512vbmi", "avx512_vbmi2", "avx512_vnni"},
}
_SHOWN = {"portable": "portable code", "avx2": "AVX2", "avx512": "AVX-512", "avx512vbmi": "AVX-512 VBMI"}
# (vendor, family): (first model, last model, microarchitecture), of the makers' public lists
_MICROARCHITECTURES: dict[tuple[str, int], tuple[tuple[int, int, str], ...]] = {
    ("AuthenticAMD", 23): ((0x00, 0x2F, "Zen"), (0x30, 0xAF, "Zen 2")),
    ("AuthenticAMD", 25): (
        (0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3"), (0x60, 0x7F, "Zen 4"),
        (0xA0, 0xAF, "Zen 4"),
    ),
    ("AuthenticAMD", 26): ((0x00, 0x7F, "Zen 5"),),
    ("GenuineIntel", 6): (
        (0x3F, 0x3F, "Haswell"), (0x4F, 0x4F, "Broadwell"), (0x55, 0x55, "Skylake or Cascade Lake"),
        (0x6A, 0x6C, "Ice Lake"), (0x8F, 0x8F, "Sapphire Rapids"), (0xAD, 0xAE, "Granite Rapids"),
        (0xCF, 0xCF, "Emerald Rapids"),
    ),
}  # fmt: skip


def processor(cpuinfo: Path = _CPUINFO, caches: Path = _CACHES) -> dict[str, Any]:
    """What the system says of its first core.

    Returns:
        `name`; `vendor`, `family`, `model`, `stepping`, None where the system does not say; `caches`, bytes of one
        cache by "L1d", "L2", "L3"; `instruction_sets`, those of this library's that the CPU has.
    """
    said = _first_core(cpuinfo)
    numbers = {key: said.get(words, "") for key, words in (
        ("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))}  # fmt: skip
    return {
        "name": said.get("model name") or platform.processor() or platform.machine(),
        "vendor": said.get("vendor_id"),
        **{key: int(text) if text.isdigit() else None for key, text in numbers.items()},
        "caches": _cache_sizes(caches),
        "instruction_sets": instruction_sets(set(said.get("flags", "").split())),
    }


def instruction_sets(flags: set[str]) -> list[str]:
    """Names of ERNET_ISA that a CPU with these flags of /proc/cpuinfo can run, the slowest first."""
    found = ["portable"]
    for name, needed in _FLAGS.items():
        if not needed <= flags:
            break
        found.append(name)
    return found


def microarchitecture(found: Mapping[str, Any]) -> str | None:
    """The makers' name for this family and model, None where it is not in the list."""
    key, model = (found.get("vendor"), found.get("family")), found.get("model")
    ranges = _MICROARCHITECTURES.get(key, ()) if None not in key else ()  # type: ignore[arg-type]
    return next((name for first, last, name in ranges if model is not None and first <= model <= last), None)


def processor_text(found: Mapping[str, Any], isa: str | None = None) -> str:
    """In words: "AMD EPYC, family 25 model 1 (Zen 3), AVX2".

    Args:
        found: what `processor` returned, or a part of it.
        isa: the instruction set in use; None for the best that the CPU has.
    """
    parts = [str(found["name"])]
    if found.get("family") is not None:
        core = microarchitecture(found)
        parts.append(f"family {found['family']} model {found['model']}" + (f" ({core})" if core else ""))
    isa = isa or next(reversed(found.get("instruction_sets") or [""]))
    return ", ".join([*parts, *([_SHOWN.get(isa, isa)] if isa else [])])


def caches_text(found: Mapping[str, Any]) -> str:
    """In words: "caches L1d 32 KiB, L2 512 KiB, L3 32 MiB"; empty where the system does not say."""
    sizes = [f"{name} {_size(size)}" for name, size in (found.get("caches") or {}).items()]
    return f"caches {', '.join(sizes)}" if sizes else ""


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def _first_core(cpuinfo: Path) -> dict[str, str]:
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cache_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each data cache of one core, by "L1d", "L2", "L3"."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        number, unit = size.rstrip("KMG"), size[-1:]
        if kind != "Instruction" and number.isdigit():
            name = f"L{level}" + ("d" if level == "1" else "")
            found[name] = int(number) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(unit, 1)
    return found
