"""The README's tables: a few rows of the newest records, chosen so that they fit a page."""

from __future__ import annotations

from collections.abc import Sequence

from record import LEAST_REPEATS, Row
from report import NOT_MEASURED, Loaded, Records, markdown, targets_gpu_lines

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
    """The block epilogues of the stages at batch 8, channels-last, one thread, and the worst of layouts and threads."""
    found: dict[str, list[Row]] = {}
    for row in records.rows("cpu", "bench_er_stage"):
        if row.params.get("batch") == 8 and row.params.get("stage") in STAGES and "ratio_naive" in row.extra_info:
            found.setdefault(row.params["stage"], []).append(row)
    lines = []
    for stage, title in STAGES.items():
        typical = [r for r in found.get(stage, ()) if (r.params["layout"], r.params["threads"]) == ("channels-last", 1)]
        if not typical:
            continue
        (row,), worst = typical, min(found[stage], key=lambda row: row.extra_info["ratio_naive"])
        info, params = row.extra_info, worst.params
        where = f"{params['layout']}, {params['threads']} thread{'s' * (params['threads'] > 1)}"
        lines.append([
            title, f"**{milliseconds(row.p50)}**{row.few}", milliseconds(info["naive_ms"]),
            f"{info['ratio_naive']:.3g}x", f"{worst.extra_info['ratio_naive']:.3g}x ({where}){worst.few}",
            f"{100 * info['share_of_copy']:.0f} %",
        ])  # fmt: skip
    head = [
        "a stage's shortcuts, forward + backward, batch 8, channels-last, one thread",
        "fused",
        "naive",
        "",
        "worst of both layouts, 1 and 2 threads",
        "of copy bandwidth",
    ]
    return markdown(head, lines) if lines else f"Stages: {MISSING}."


def missed(records: Records) -> str:
    """The targets of the CPU that rows miss, with the worst of them."""
    found: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row, _ in records.newest("cpu").values():
        for target, value in row.targets():
            if value is not None and not target.met(value):
                found.setdefault((row.group, str(target)), []).append((value, row))
    lines = []
    for (group, text), rows in sorted(found.items()):
        value, row = (max if "<=" in text else min)(rows, key=lambda entry: entry[0])
        lines.append([group, f"`{text}`", str(len(rows)), f"{value:.3g}: {row.extra_info.get('title') or row.name}"])
    return markdown(["target of", "missed", "rows", "the worst"], lines) if lines else "Every target is met."


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
        lines.append([name, f"**{milliseconds(row.p50)}**{row.few}", *times, ratio, peak])
    head = [
        "training step, 224 x 224, channels-last, all cores",
        "fused",
        "plain ResNet",
        "naive ER",
        "times naive",
        "memory of plain",
    ]
    return markdown(head, lines) if lines else f"Training steps: {MISSING}."


def gpu(records: Records) -> str:
    """One target of each group of GPU benches."""
    lines: dict[str, Sequence[str]] = {}
    for module, case, line in targets_gpu_lines(records):
        lines.setdefault(case.group or module, line)
    device = next((one.machine["name"] for one in records.of("gpu")), None)
    said = f"Measured on {device}." if device else f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."
    return f"{said}\n\n{markdown(['what', 'target', 'measured', 'verdict'], list(lines.values()))}"


def source(records: Records) -> str:
    """Where the CPU's figures are from."""
    found = records.of("cpu")
    if not found:
        return f"CPU: {MISSING}."
    machine = found[0].machine
    names = ", ".join(f"[{one.path.name}](bench/results/{one.path.name})" for one in found[:3])
    return (
        f"Medians of {LEAST_REPEATS} repeats or more, where a row does not say otherwise, "
        f"within one run on {machine['cores']} cores ({machine['cpu']}; "
        f"torch {machine['packages']['torch']}, float32), {machine['time'][:10]}: {names}."
    )


def tables(records: Records) -> dict[str, str]:
    """The README's tables."""
    return {
        "readme-macenko": macenko(records),
        "readme-stages": stages(records),
        "readme-steps": steps(records),
        "readme-missed": missed(records),
        "readme-gpu": gpu(records),
        "readme-source": source(records),
    }
