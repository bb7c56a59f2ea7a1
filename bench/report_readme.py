"""The README's tables: a few rows of the newest records, chosen so that they fit a page."""

from __future__ import annotations

from collections.abc import Sequence

from record import Row
from report import NOT_MEASURED, Loaded, Records, bars_gpu_lines, markdown

MISSING = "not recorded"
PEERS = ("torchstain torch", "torchstain numpy", "stainx", "torch-staintools", "tiatoolbox")
SIZES = ("64x64", "224x224", "700x460", "1024x1024")
OPERATIONS = {"normalize": "normalise", "fit": "fit"}
STAGES = {
    "resnet50-1": "ER-ResNet-50, stage 1: 256 x 56 x 56, 3 maps",
    "resnet50-2": "stage 2: 512 x 28 x 28, 4 maps",
    "resnet50-3": "stage 3: 1024 x 14 x 14, 6 maps",
    "resnet50-4": "stage 4: 2048 x 7 x 7, 3 maps",
    "resnet101-3": "ER-ResNet-101, stage 3: 1024 x 14 x 14, 23 maps",
}


def milliseconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def macenko(records: Records) -> str:
    """Images by size, this library and the peers that a record has; every ratio is within one record."""
    rows = {
        (row.params["operation"], row.params["size"], row.params["who"]): (row, one)
        for row, one in records.newest("cpu").values()
        if row.bench == "bench_macenko" and row.status == "measured" and "who" in row.params
    }
    lines = []
    for operation, verb in OPERATIONS.items():
        own = {size: rows.get((operation, size, "ernet_fast")) for size in SIZES}
        if not any(own.values()):
            continue
        cells = [MISSING if found is None else milliseconds(found[0].p50) for found in own.values()]
        lines.append([f"{verb}, ernet_fast", *(f"**{cell}**" for cell in cells)])
        for peer in PEERS:
            theirs = {size: rows.get((operation, size, peer)) for size in SIZES}
            if any(theirs.values()):
                lines.append([peer, *(against(found) for found in theirs.values())])
    head = ["one 8-bit image, one thread", *(size.replace("x", " x ") for size in SIZES)]
    return markdown(head, lines) if lines else f"Macenko: {MISSING}."


def against(found: tuple[Row, Loaded] | None) -> str:
    """A peer's time, and how many times that of the library in the same record it is."""
    if found is None:
        return MISSING
    theirs, one = found
    same = {**theirs.params, "who": "ernet_fast"}
    own = [row for row in one.rows if row.bench == theirs.bench and row.params == same and row.status == "measured"]
    ratio = f" ({theirs.p50 / own[0].p50:.3g}x)" if own else ""
    return f"{milliseconds(theirs.p50)}{ratio}"


def stages(records: Records) -> str:
    """The tails of the stages at batch 8, channels-last, one thread."""
    wanted = {"batch": 8, "layout": "channels-last", "threads": 1}
    found = {
        row.params["stage"]: row
        for row in records.rows("cpu", "bench_er_stage")
        if {*wanted.items()} <= {*row.params.items()} and "stage" in row.params and "naive_ms" in row.extra_info
    }
    lines = []
    for stage, title in STAGES.items():
        row = found.get(stage)
        if row is not None:
            info = row.extra_info
            share = f"{100 * info['share_of_floor']:.0f} %" if "share_of_floor" in info else "-"
            ratio = f"{info['ratio_naive']:.3g}x"
            lines.append([title, f"**{milliseconds(row.p50)}**", milliseconds(info["naive_ms"]), ratio, share])
    head = [
        "a stage's shortcuts, forward + backward, batch 8, channels-last, one thread",
        "fused",
        "naive",
        "",
        "of the floor",
    ]
    return markdown(head, lines) if lines else f"Stages: {MISSING}."


def steps(records: Records) -> str:
    """Whole training steps, as far as they are recorded."""
    lines = []
    shares = {
        (row.params["depth"], row.params["batch"]): row.extra_info.get("peak_share")
        for row in records.rows("cpu", "bench_er_training", "memory of training")
    }
    for row in records.rows("cpu", "bench_er_training", "training step"):
        info = row.extra_info
        share = shares.get((row.params["depth"], row.params["batch"]))
        name = f"ER-ResNet-{row.params['depth']}, batch {row.params['batch']}"
        times = [milliseconds(info[key]) if key in info else "-" for key in ("plain_ms", "naive_ms")]
        peak = "-" if share is None else f"{share:.3g}x"
        ratio = f"{info['ratio_naive']:.3g}x"
        lines.append([name, f"**{milliseconds(row.p50)}**", *times, ratio, peak])
    head = [
        "training step, 224 x 224, all cores",
        "fused",
        "plain ResNet",
        "naive ER",
        "times naive",
        "memory of plain",
    ]
    return markdown(head, lines) if lines else f"Training steps: {MISSING}."


def gpu(records: Records) -> str:
    """One bar of each group of GPU benches."""
    lines: dict[str, Sequence[str]] = {}
    for module, case, line in bars_gpu_lines(records):
        lines.setdefault(case.group or module, line)
    device = next((one.machine["name"] for one in records.of("gpu")), None)
    said = f"Measured on {device}." if device else f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."
    return f"{said}\n\n{markdown(['what', 'bar', 'measured', 'verdict'], list(lines.values()))}"


def source(records: Records) -> str:
    """Where the CPU's figures are from."""
    found = records.of("cpu")
    if not found:
        return f"CPU: {MISSING}."
    machine = found[0].machine
    names = ", ".join(f"[{one.path.name}](bench/results/{one.path.name})" for one in found[:3])
    return (
        f"Medians within one run on {machine['cores']} cores ({machine['cpu']}; torch {machine['packages']['torch']}, "
        f"float32), {machine['time'][:10]}: {names}."
    )


def tables(records: Records) -> dict[str, str]:
    """The README's tables."""
    return {
        "readme-macenko": macenko(records),
        "readme-stages": stages(records),
        "readme-steps": steps(records),
        "readme-gpu": gpu(records),
        "readme-source": source(records),
    }
