"""The tables of the ER benches; every figure, means included, is computed from rows.

A row marked as older (`report_er.py`: it is from another record than the page) has a star in its table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from er_means import MEAN_TARGETS, STAGE_101, Setting, geometric_mean, settings, with_setting
from record import Row, Target

TARGET_101 = 6.0
NONE = "–"
OLDER = "older"  # key of extra_info
CONTESTANTS = ("naive", "compiled", "fused")
NETWORKS = ("plain", "naive", "fused")


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def number(value: Any, digits: int = 2, factor: float = 1.0) -> str:
    """A figure, or a dash where there is none."""
    return NONE if value is None else f"{factor * value:.{digits}f}"


def percent(value: Any) -> str:
    """A share."""
    return NONE if value is None else f"{100 * value:.0f} %"


def mark(value: float | None, target: float) -> str:
    """A figure with what it has to be, or "not measured"."""
    if value is None:
        return "not measured"
    return f"{value:.2f} ({'reaches' if value >= target else 'short of'} {target:g})"


def verdict(target: Target, value: float | None) -> str:
    """A target with what became of it."""
    return f"{target} {'not measured' if value is None else 'reached' if target.met(value) else 'missed'}"


def verdicts(row: Row) -> str:
    """All targets of a row."""
    return "; ".join(verdict(target, value) for target, value in row.targets()) or NONE


def called(text: str, *rows: Row) -> str:
    """A name, with a star if one of the rows is older."""
    return f"{text} *" if any(row.extra_info.get(OLDER) for row in rows) else text


def where(row: Row, setting: Setting) -> str:
    """Stage and setting of a row."""
    return called(f"{row.params['stage']}, {setting}", row)


def means_table(rows: Sequence[Row], test: str) -> str:
    """Geometric means over the stages of ResNet-50 for every setting, against the targets."""
    targets = MEAN_TARGETS[test]
    lines = []
    for setting in settings(rows):
        chosen = with_setting(rows, setting)
        cells = [called(str(setting), *chosen)]
        cells += [mark(geometric_mean(chosen, key), target) for key, target in targets.items()]
        shares = [row.extra_info["share_of_copy"] for row in chosen]
        cells.append(f"{percent(min(shares))} to {percent(max(shares))}")
        if test == "stage_tails":
            third = [row.extra_info["ratio_naive"] for row in chosen if row.params["stage"] == STAGE_101]
            cells.append(mark(third[0] if third else None, TARGET_101))
        lines.append(cells)
    head = ["batch, layout, threads", "times naive eager", "times compiled naive", "share of copy bandwidth"]
    return markdown([*head, "ResNet-101, stage 3: times naive eager"] if test == "stage_tails" else head, lines)


def speed_table(rows: Sequence[Row]) -> str:
    """Times, ratios and the share of copy bandwidth of every row of tails or of calls."""
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info = row.extra_info
            cells = [where(row, setting), *(number(info.get(f"{who}_ms"), 1) for who in CONTESTANTS)]
            cells += [number(info.get(f"ratio_{who}")) for who in ("naive", "compiled")]
            cells += [number(info["copy_time"], 1), percent(info["share_of_copy"])]
            cells += [number(info["must_move"] / row.p50 / 1e6, 0)]
            lines.append(cells)
    head = ["stage, batch, layout, threads", *(f"{who}, ms" for who in CONTESTANTS), "times naive", "times compiled"]
    return markdown([*head, "at copy bandwidth, ms", "share of copy bandwidth", "GB/s"], lines)


def norms_table(rows: Sequence[Row]) -> str:
    """Times, ratios and the share of copy bandwidth of BatchNorm + ReLU."""
    lines = []
    for row in sorted(rows, key=lambda row: (row.params["batch"], row.params["layout"], row.params["threads"])):
        info, params = row.extra_info, row.params
        what = f"{params['name']}, {params['kind']}, {params['batch']}, {params['layout']}, {params['threads']}"
        cells = [
            called(what, row),
            number(info["passes"], 0),
            number(info["modules_ms"], 1),
            number(info["fused_ms"], 1),
        ]
        cells += [number(info["ratio_modules"]), number(info["copy_time"], 1), percent(info["share_of_copy"])]
        lines.append(cells)
    head = ["stage, pass, batch, layout, threads", "passes", "modules, ms", "fused, ms", "times modules"]
    return markdown([*head, "at copy bandwidth, ms", "share of copy bandwidth"], lines)


def bytes_table(rows: Sequence[Row], compiled_moves: dict[str, float]) -> str:
    """What must move and what moved, in maps, and what else the system did; `compiled_moves` in maps, by stage."""
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info = row.extra_info
            one_map = info["must_move"] / info["map_accesses"]
            cells = [where(row, setting), number(one_map, 1, 2.0**-20), str(info["map_accesses"])]
            cells += [number(info.get("moved_fused"), 1, 1 / one_map), number(info.get("moved_naive"), 0, 1 / one_map)]
            cells.append(number(compiled_moves.get(row.params["stage"]), 0))
            cells += [number(info.get(f"faults_{who}"), 0) for who in CONTESTANTS]
            lines.append(cells)
    head = ["stage, batch, layout, threads", "one map, MiB", "maps to move"]
    moved = [f"moved, {who}" for who in ("fused", "naive", "compiled")]
    return markdown([*head, *moved, *(f"faults, {who}" for who in CONTESTANTS)], lines)


def operators_of_tails_table(rows: Sequence[Row]) -> str:
    """Where the fused pass spends its time; the rest is Python, autograd and allocation."""
    columns = {"blocks forward": "er_block", "maps backward": "er_block_backward"}
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info = row.extra_info
            times = [info.get(f"in_{name}_ms", 0.0) for name in columns.values()]
            whole = info.get("in_call_ms")
            if whole is not None:
                parts = [whole, *times, whole - sum(times)]
                lines.append([where(row, setting), *(number(part) for part in parts)])
    return markdown(["stage, batch, layout, threads", "pass, ms", *columns, "rest"], lines)


def kernels_table(rows: Sequence[Row]) -> str:
    """Kernels a block, forward + backward, of each stage."""
    lines = []
    for row in rows:
        info, blocks = row.extra_info, row.extra_info["blocks"]
        cells = [called(row.params["stage"], row), str(blocks)]
        for who in CONTESTANTS:
            cells += [number(info.get(f"{who}_{kind}_kernels"), 1, 1 / blocks) for kind in ("map", "vector")]
        lines.append(cells)
    names = [f"{who}: {kind}" for who in CONTESTANTS for kind in ("maps", "vectors")]
    return markdown(["stage", "blocks", *names], lines)


def operators_table(rows: Sequence[Row]) -> str:
    """Rates of single operators beside that of a copy."""
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info = row.extra_info
            rates = [number(info[f"{kind}gigabytes_per_second"], 0) for kind in ("", "copy_")]
            name = f"{row.params['operator']}, {where(row, setting)}"
            lines.append([name, number(row.p50), *rates, percent(info["share_of_copy"])])
    return markdown(
        ["operator, stage, batch, layout, threads", "ms", "GB/s", "copy, GB/s", "share of copy bandwidth"], lines
    )


def network_of(row: Row) -> str:
    """The network and batch of a row."""
    return called(f"ER-ResNet-{row.params['depth']}, batch {row.params['batch']}", row)


def steps_table(rows: Sequence[Row]) -> str:
    """Training steps or evaluations of whole networks."""
    lines = []
    for row in rows:
        info = row.extra_info
        cells = [network_of(row), *(number(info.get(f"{who}_ms"), 0) for who in NETWORKS)]
        share = info["fused_ms"] / info["plain_ms"]
        lines.append([*cells, number(share), number(info["ratio_naive"]), verdicts(row)])
    head = ["network", *(f"{who}, ms" for who in NETWORKS), "fused / plain", "times naive"]
    return markdown([*head, "targets"], lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Peaks of training of whole networks: of the process, and of tensors alone."""
    lines = []
    for row in rows:
        info = row.extra_info
        cells = [network_of(row)]
        for what in ("peak", "tensors"):
            cells += [number(info.get(f"{what}_{who}"), 0, 2.0**-20) for who in NETWORKS]
            cells.append(number(info.get(f"{what}_share")))
        lines.append([*cells, verdicts(row)])
    names = [f"{what}: {who}" for what in ("process", "tensors") for who in (*NETWORKS, "fused / plain")]
    return markdown(["network, MiB", *names, "targets"], lines)


def stage_memory_table(rows: Sequence[Row]) -> str:
    """What a stage keeps for backward, and its peak."""
    lines = []
    for row in rows:
        info = row.extra_info
        cells = [called(row.params["stage"], row)]
        cells += [number(info[f"kept_{who}"], 1, 2.0**-20) for who in NETWORKS]
        cells += [number(info["extra_fused"], 0), number(info["extra_vectors"], 0), number(info["extra_per_image"], 0)]
        cells += [number(info["extra_maps_naive"], 1), number(info["peak_share"])]
        lines.append(cells)
    head = ["stage", *(f"{who}, MiB" for who in NETWORKS), "fused beyond plain, bytes", "in vectors of C"]
    return markdown([*head, "of these an image", "naive beyond plain, maps", "peak, fused / plain"], lines)


def calls_table(rows: Sequence[Row]) -> str:
    """Calls on tiny maps."""
    lines = [
        [called(row.params["name"], row), number(row.p50, 1), number(row.extra_info["add_us"], 1), verdicts(row)]
        for row in rows
    ]
    return markdown(["call", "µs", "torch.add beside it, µs", "targets"], lines)


def targets_table(rows: Iterable[Row]) -> str:
    """Targets by what they are asked of: how many rows reach them, the least and the most that was found."""
    found: dict[tuple[str, str], list[float]] = {}
    targets: dict[tuple[str, str], Target] = {}
    for row in rows:
        for target, value in row.targets():
            key = (row.group, str(target))
            targets[key] = target
            found.setdefault(key, []).extend([] if value is None else [value])
    lines = []
    for (group, text), values in found.items():
        reached = sum(targets[group, text].met(value) for value in values)
        spread = f"{min(values):.3g} to {max(values):.3g}" if values else NONE
        lines.append([group, f"`{text}`", f"{reached} of {len(values)}", spread])
    return markdown(["what", "target", "rows that reach it", "found"], lines)
