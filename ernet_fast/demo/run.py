"""The steps of the demo, one after the other."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ernet_fast.console.atomic_file import write_text
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Sample, read_image
from ernet_fast.data.synthetic import write_breakhis_like
from ernet_fast.demo.nuclei_tour import FIGURES, show_nuclei
from ernet_fast.demo.pace import FEWEST_EPOCHS, affordable_epochs
from ernet_fast.demo.page import DemoFindings, write_page
from ernet_fast.demo.stain_tour import show_normalization
from ernet_fast.demo.timing import Timing, time_macenko, time_shortcuts, time_training_step
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.data_sets import open_split
from ernet_fast.train.evaluation import evaluate
from ernet_fast.train.images import evenly_chosen
from ernet_fast.train.loop import fit
from ernet_fast.train.stain_choice import most_typical

_RUN_FILES = (
    "last.pt",
    "last-1.pt",
    "best.pt",
    "history.json",
    "history.csv",
    "config.json",
    "split.csv",
    "skipped.csv",
)
_TOTAL_SECONDS = 80.0  # leaves some of the 90 seconds for starting Python, and for machines that slow down meanwhile
_LATER_SECONDS = 27.0  # for evaluation, timing and report
_MISTAKES = 6
_SYNTHETIC: dict[str, Any] = {
    "patients": 24, "patches_per_patient": 8, "magnifications": [100, 200], "size": [224, 224], "staining": "shifted"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo; the defaults take less than 90 seconds on two cores.

    Attributes:
        data: folder in the BreakHis layout, or None to draw synthetic images.
        out: folder for everything the demo writes.
        epochs: passes over the training images; None is 8, or fewer (2 at least) where the machine is too slow for the
            90 seconds.
        image_size: pixels of the network's input.
        max_images: most images trained on; validation takes a quarter of that, the test half.
        seed: of the synthetic images, the split, weights and order.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """

    data: str | None = None
    out: str = "runs/demo"
    epochs: int | None = None
    image_size: int = 96
    max_images: int = 480
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("image_size", 16), ("max_images", 16), ("seed", 0)):
            value = getattr(self, name)
            if (name, value) != ("epochs", None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}; expected an integer of at least {least}.")


@dataclass(frozen=True)
class DemoResult:
    """All figures as plain values, the lines about speed, the report and the time everything took."""

    figures: dict[str, Any]
    timing_lines: list[str]
    report: Path
    seconds: float


def run_demo(config: DemoConfig, reporter: Reporter | None = None) -> DemoResult:
    """Normalise, train, evaluate, time and report.

    Raises:
        ValueError, FileNotFoundError: the data is missing or cannot be used.
        ImportError: the extra ``train`` is not installed.
    """
    reporter = reporter or Reporter()
    start = time.perf_counter()
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    reporter.line("1/6  images")
    data = config.data if config.data is not None else str(_synthetic_images(folder / "images", config.seed, reporter))
    settings = _training(config, data, folder / "run")
    train, test = open_split(settings, "train").samples, open_split(settings, "test").samples
    reporter.line(f"     {_count(train)} to train on, {_count(test)} to test on")

    reporter.line("2/6  stain normalisation")
    target, normalizer = most_typical(evenly_chosen(train, settings.max_train_images))
    tour = show_normalization([*train, *test], target, normalizer, folder / "before_after.png")
    reporter.line(f"     spread of mean colours {tour.spread_before:.1f} -> {tour.spread_after:.1f} grey levels")

    nuclei = show_nuclei(test)
    reporter.line("3/6  training")
    for name in _RUN_FILES:  # of an earlier demo, and nothing else
        (folder / "run" / name).unlink(missing_ok=True)
    settings = replace(settings, stain_target=str(target), epochs=_epochs(config, settings, len(train), start))
    reporter.line(f"     {settings.epochs} epochs")
    trained = fit(settings, reporter=reporter, on_epoch=lambda record: _out_of_time(config, record, start))

    reporter.line("4/6  evaluation on test patients")
    evaluation = evaluate(
        trained.best_checkpoint, max_images=max(1, config.max_images // 2), device=config.device, mistakes=_MISTAKES,
        reporter=reporter,
    )  # fmt: skip
    evaluation.write(folder / "evaluation")

    reporter.line("5/6  speed")
    timings = _timings(config, evenly_chosen(train, 1)[0])

    reporter.line("6/6  report")
    findings = DemoFindings(
        synthetic=config.data is None, data=data, settings=settings, counts={"train": len(train), "test": len(test)},
        target=target.name, tour=tour, nuclei=nuclei, trained=trained, evaluation=evaluation, timings=timings,
        seconds=time.perf_counter() - start,
    )  # fmt: skip
    report = write_page(folder / "report.html", findings)
    seconds = time.perf_counter() - start
    figures = _figures(findings, report, seconds)
    write_text(folder / "demo.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return DemoResult(figures, [timing.line for timing in timings], report, seconds)


def _epochs(config: DemoConfig, settings: TrainConfig, images: int, start: float) -> int:
    if config.epochs is not None:
        return config.epochs
    left = _TOTAL_SECONDS - _LATER_SECONDS - (time.perf_counter() - start)
    return affordable_epochs(settings, min(images, config.max_images), max(left, 0.0))


def _out_of_time(config: DemoConfig, record: dict[str, Any], start: float) -> bool:
    """Whether one more epoch like this one would take too long; never if the number of epochs was asked for."""
    spent = time.perf_counter() - start + record["train_seconds"]
    return config.epochs is None and record["epoch"] >= FEWEST_EPOCHS and spent > _TOTAL_SECONDS - _LATER_SECONDS


def _count(samples: list[Sample]) -> str:
    return f"{len(samples)} images of {len({sample.patient for sample in samples})} patients"


def _training(config: DemoConfig, data: str, out: Path) -> TrainConfig:
    return TrainConfig(
        data=data, out=str(out), model="er_resnet18", image_size=config.image_size, batch_size=24, lr=5e-4,
        schedule="one-cycle", class_weights="balanced", select_by="loss", cache=True,
        max_train_images=config.max_images, max_val_images=max(1, config.max_images // 4), seed=config.seed,
        device=config.device,
    )  # fmt: skip


def _synthetic_images(root: Path, seed: int, reporter: Reporter) -> Path:
    """The synthetic set, drawn unless this folder has the same one already."""
    wanted = json.dumps({**_SYNTHETIC, "seed": seed}, sort_keys=True)
    stamp = root / "settings.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        reporter.line(f"     found in {root}")
        return root
    if (root / "histology_slides").exists():
        raise FileExistsError(f"{str(root)!r} holds other images; choose another --out, or remove that folder.")
    settings: dict[str, Any] = {**_SYNTHETIC, "size": tuple(_SYNTHETIC["size"])}
    count = settings["patients"] * settings["patches_per_patient"] * len(settings["magnifications"])
    with reporter.task("draw synthetic images", count) as task:
        write_breakhis_like(root, seed=seed, split_seed=seed, progress=lambda done, total: task.advance(1), **settings)
    write_text(stamp, wanted)
    return root


def _timings(config: DemoConfig, sample: Sample) -> list[Timing]:
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    return [time_shortcuts(device), time_training_step(device), time_macenko(read_image(sample.path))]


def _figures(findings: DemoFindings, report: Path, seconds: float) -> dict[str, Any]:
    tour = findings.tour
    return {
        "report": str(report),
        "seconds": round(seconds, 1),
        "synthetic": findings.synthetic,
        "stain": {
            "target": findings.target, "spread_before": tour.spread_before, "spread_after": tour.spread_after,
            "images": tour.measured,
        },
        "nuclei": {
            name: {"images": images, "nuclei": count, **dict(zip(FIGURES, means, strict=True))}
            for name, (images, count, means) in findings.nuclei.rows.items()
        },
        "history": findings.trained.history,
        "evaluation": findings.evaluation.figures(),
        "timings": [{"task": t.task, "median_seconds": t.seconds, "repeats": t.repeats} for t in findings.timings],
    }  # fmt: skip
