"""Tables of the ER benches; every figure, means included, is computed from rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from er_means import STAGE_101, STAGES_50, mean_rows, setting_of
from record import Row
from records import Records
from tables import P50, SHARE, TARGETS, Column, Table, figure, number, param, percent, starred, table, time_of

CONTESTANTS = ("naive", "compiled", "fused")
NETWORKS = ("plain", "naive", "fused")
MIB = 2.0**-20
STAGES = {
    "resnet50-1": "ER-ResNet-50, stage 1: 256 x 56 x 56, 3 maps",
    "resnet50-2": "stage 2: 512 x 28 x 28, 4 maps",
    "resnet50-3": "stage 3: 1024 x 14 x 14, 6 maps",
    "resnet50-4": "stage 4: 2048 x 7 x 7, 3 maps",
    "resnet101-3": "ER-ResNet-101, stage 3: 1024 x 14 x 14, 23 maps",
}


def by_setting(row: Row) -> tuple[Any, ...]:
    """By batch, layout and threads, then in the order of the stages."""
    return *setting_of(row), [*STAGES_50, STAGE_101].index(row.params["stage"])


def setting_text(row: Row) -> str:
    return ", ".join(map(str, setting_of(row)))


def typical(row: Row) -> bool:
    """The batch and layout that pages show where they show one."""
    return setting_of(row)[:2] == (8, "channels-last")


def milliseconds(*whose: str) -> list[Column]:
    return [figure(f"{who}, ms", f"{who}_ms") for who in whose]


def in_maps(who: str) -> Column:
    """What a contestant moves, in maps."""

    def cell(row: Row) -> str:
        info = row.extra_info
        moved = info.get(f"moved_{who}")
        return number(moved and moved * info["map_accesses"] / info["must_move"])

    return Column(f"moved, {who}", cell)


def rest(row: Row) -> str:
    """What of a pass is not within operators."""
    info = row.extra_info
    return number(
        info["in_call_ms"] - sum(info.get(f"in_{name}_ms", 0.0) for name in ("er_block", "er_block_backward"))
    )


WHERE = Column("stage, batch, layout, threads", lambda row: starred(f"{row.params['stage']}, {setting_text(row)}", row))
STAGE = param("stage", "stage")
NETWORK = Column("network", lambda row: starred(network_of(row), row))
AT_COPY = figure("at copy bandwidth, ms", "copy_time")
SPEED = (
    WHERE, *milliseconds(*CONTESTANTS), figure("times naive", "ratio_naive"),
    figure("times compiled", "ratio_compiled"), AT_COPY, SHARE,
    Column("GB/s", lambda row: number(row.extra_info["must_move"] / row.p50 / 1e6)),
)  # fmt: skip
BYTES = (
    WHERE, figure("one map, MiB", "must_move", factor=MIB, per="map_accesses"), figure("maps to move", "map_accesses"),
    in_maps("fused"), in_maps("naive"), *(figure(f"faults, {who}", f"faults_{who}") for who in CONTESTANTS),
)  # fmt: skip
PARTS = (
    WHERE, figure("pass, ms", "in_call_ms"), figure("blocks forward", "in_er_block_ms"),
    figure("maps backward", "in_er_block_backward_ms"), Column("rest", rest),
)  # fmt: skip
KERNELS = (
    STAGE, figure("blocks", "blocks"),
    *(figure(f"{who}: {kind}s", f"{who}_{kind}_kernels", per="blocks")
      for who in CONTESTANTS for kind in ("map", "vector")),
    figure("maps moved, compiled", "moved_compiled", per="map_bytes"),
)  # fmt: skip
OPERATORS = (
    Column("operator, stage, batch, layout, threads", lambda row: f"{row.params['operator']}, {WHERE.cell(row)}"),
    P50, figure("GB/s", "gigabytes_per_second"), figure("copy, GB/s", "copy_gigabytes_per_second"), SHARE,
)  # fmt: skip
NORMS = (
    Column("stage, pass, batch, layout, threads",
           lambda row: starred(f"{row.params['name']}, {row.params['kind']}, {setting_text(row)}", row)),
    figure("passes", "passes"), *milliseconds("modules", "fused"), figure("times modules", "ratio_modules"),
    AT_COPY, SHARE,
)  # fmt: skip
FUSED = Column("fused", lambda row: f"**{time_of(row.p50)}**{row.few}")
STEPS = (
    NETWORK, figure("plain", "plain_ms", time_of), figure("naive", "naive_ms", time_of), FUSED,
    Column("fused / plain", lambda row: number(row.extra_info["fused_ms"] / row.extra_info["plain_ms"])),
    figure("times naive", "ratio_naive"), figure("lean", "lean_ms", time_of), figure("lean / plain", "lean_share"),
    TARGETS,
)  # fmt: skip
EVALUATION = (*STEPS[:-3], TARGETS)
MEMORY = (
    NETWORK,
    *(column for name, key in (("process", "peak"), ("tensors", "tensors")) for column in (
        *(figure(f"{name}: {who}, MiB", f"{key}_{who}", factor=MIB) for who in NETWORKS),
        figure(f"{name}: fused / plain", f"{key}_share"))),
    *(figure(f"activations: {who}, MiB", f"activations_{who}", factor=MIB) for who in (*NETWORKS, "lean")),
    figure("lean / plain", "lean_activations_share"), TARGETS,
)  # fmt: skip
STAGE_MEMORY = (
    STAGE, *(figure(f"{who}, MiB", f"kept_{who}", factor=MIB) for who in NETWORKS),
    figure("fused beyond plain, bytes", "extra_fused"), figure("in vectors of C", "extra_vectors"),
    figure("of these an image", "extra_per_image"), figure("naive beyond plain, maps", "extra_maps_naive"),
    figure("peak, fused / plain", "peak_share"), figure("lean, MiB", "kept_lean", factor=MIB),
    figure("kept, lean / plain", "lean_kept_share"), figure("peak, lean / plain", "lean_peak_share"),
)  # fmt: skip
CALLS = (param("call", "name"), P50._replace(head="µs"), figure("torch.add beside it, µs", "add_us"), TARGETS)
MEANS = (
    Column("batch, layout, threads", lambda row: starred(setting_text(row), row)),
    figure("times naive eager", "ratio_naive"), figure("times compiled naive", "ratio_compiled"),
    figure("share of copy bandwidth, least", "least_share", percent), figure("most", "most_share", percent),
    figure("ResNet-101, stage 3: times naive eager", "ratio_naive_101"), TARGETS,
)  # fmt: skip


def network_of(row: Row) -> str:
    return f"ER-ResNet-{row.params['depth']}, batch {row.params['batch']}"


def means(bench: str, test: str) -> Callable[[Records], str]:
    """Geometric means over the stages of ResNet-50 for every setting, against the targets."""
    return lambda records: table(mean_rows(records.rows("cpu", bench), bench, test), MEANS)


def readme_stages(records: Records) -> str:
    """The block epilogues of the stages at batch 8, channels-last, one thread, and the worst of layouts and threads."""
    rows = [row for row in records.rows("cpu", "bench_er_stage", "stage_epilogues") if row.params["batch"] == 8]

    def worst(row: Row) -> str:
        same = [other for other in rows if other.params["stage"] == row.params["stage"]]
        least = min(same, key=lambda other: other.extra_info["ratio_naive"])
        threads = least.params["threads"]
        where = f"{least.params['layout']}, {threads} thread{'s' * (threads > 1)}"
        return f"{least.extra_info['ratio_naive']:.3g}x ({where}){least.few}"

    columns = (
        Column("a stage's shortcuts, forward + backward, batch 8, channels-last, one thread",
               lambda row: STAGES[row.params["stage"]]),
        FUSED, figure("naive", "naive_ms", time_of), figure("", "ratio_naive", lambda ratio: f"{ratio:.3g}x"),
        Column("worst of both layouts, 1 and 2 threads", worst), SHARE._replace(head="of copy bandwidth"),
    )  # fmt: skip
    chosen = [row for row in rows if typical(row) and row.params["threads"] == 1]
    return table(sorted(chosen, key=by_setting), columns)


EPILOGUES = ("bench_er_stage", "stage_epilogues")
SUMS = ("bench_er_functional", "shortcut_sum")
TABLES: dict[str, Callable[[Records], str]] = {
    "er-means": means(*EPILOGUES),
    "er-speed": Table(*EPILOGUES, SPEED, order=by_setting),
    "er-bytes": Table(*EPILOGUES, BYTES, order=by_setting),
    "er-parts": Table(*EPILOGUES, PARTS, lambda row: typical(row) and "in_call_ms" in row.extra_info, by_setting),
    "er-all-parts": Table(*EPILOGUES, PARTS, lambda row: "in_call_ms" in row.extra_info, by_setting),
    "er-kernels": Table("bench_er_stage", "kernels", KERNELS),
    "er-operators": Table("bench_er_operators", "operator", OPERATORS, order=by_setting),
    "er-sum-means": means(*SUMS),
    "er-sum-speed": Table(*SUMS, SPEED, order=by_setting),
    "er-norms": Table("bench_er_norms", "norms", NORMS, order=setting_of),
    "er-stage-memory": Table("bench_er_memory", "stage_memory", STAGE_MEMORY),
    "er-steps": Table("bench_er_training", "training_step", STEPS),
    "er-memory": Table("bench_er_training", "training_memory", MEMORY),
    "er-evaluation": Table("bench_er_training", "evaluation", EVALUATION),
    "er-calls": Table("bench_er_overhead", "call", CALLS),
    "readme-stages": readme_stages,
}
