"""From a trained network to a prediction for every slide or patient, with what it was based on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernet_fast._version import __version__
from ernet_fast.attend.bags import Bag, make_bags
from ernet_fast.attend.embeddings import Embeddings, embed_all, prepared_batches, stains_of
from ernet_fast.attend.fit import Bags, pooled, train_attention
from ernet_fast.attend.page import write_page
from ernet_fast.attend.result import PARTS, AttendResult, BagResult
from ernet_fast.attend.settings import AttendSettings
from ernet_fast.console.atomic_file import atomic_write, remove_abandoned, write_csv, write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Sample, Splits
from ernet_fast.models.attention_pool import MagnificationAttention
from ernet_fast.predict import TrainedNetwork
from ernet_fast.train.data_sets import open_split


def attend(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: AttendSettings | None = None,
    data: str | os.PathLike[str] | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> AttendResult:
    """Train attention over the fields of slides or patients on a network's embeddings, and predict every bag.

    The split is the network's: bags of its training images train, those of its validation images choose the epoch,
    test bags are looked at once. Writes `attention.pt`, `embeddings.pt`, `bags.csv`, `attention.csv`, `metrics.json`
    and `report.html` into `out`.

    Args:
        checkpoint: a file of `ernet_fast.train.fit`, or the folder of a run, which stands for its `best.pt`.
        out: folder to write to, made if missing.
        settings: of bags, attention and training.
        data: folder with the images; default: that of the training.
        device: of the network, ``"auto"``, ``"cpu"`` or ``"cuda"``.
        reporter: where progress goes; default: stderr.

    Raises:
        FileNotFoundError, ValueError: checkpoint or data are missing, damaged or do not fit.
        FloatingPointError: the loss or the network's output is not finite.
    """
    settings, reporter, folder = settings or AttendSettings(), reporter or Reporter(), Path(out)
    trained = TrainedNetwork(checkpoint, device=device)
    parts = _open_parts(trained, data)
    samples = tuple(sample for part in parts.values() for sample in part)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    described = trained.settings()
    kept = embed_all(trained, samples, folder / "embeddings.pt", described["sha256"], reporter)
    bags = _bags_of(parts, settings.by)
    magnification = torch.tensor([sample.magnification for sample in samples])
    torch.manual_seed(settings.seed)
    attention = MagnificationAttention(
        kept.values.shape[1], len(trained.classes), magnifications=sorted(set(magnification.tolist())),
        pool=settings.pool, features=settings.features, heads=settings.heads, dropout=settings.dropout,
    )  # fmt: skip
    by_part = Bags(bags["train"], bags["val"], magnification)
    look = _kept(kept)
    with reporter.task("attention", settings.epochs) as task:
        history = train_attention(
            attention, by_part, look, settings, epochs=settings.epochs, advance=lambda: task.advance(1)
        )
    if settings.tune_epochs:
        look = _tuned(trained, samples)
        with reporter.task("end to end", settings.tune_epochs) as task:
            history += train_attention(
                attention.to(next(trained.network.parameters()).device), by_part, look, settings,
                epochs=settings.tune_epochs, network=trained.network, advance=lambda: task.advance(1),
            )  # fmt: skip
    results = _results(attention, bags, look, kept, samples, magnification)
    result = AttendResult(folder, trained.classes, settings, samples, tuple(results), history, described)
    _write(result, attention, trained if settings.tune_epochs else None)
    return result


def _open_parts(trained: TrainedNetwork, data: str | os.PathLike[str] | None) -> dict[str, list[Sample]]:
    """The images that trained, chose and test, by the checkpoint's own split."""
    config = trained.config.from_dict(trained.config.to_dict() | ({} if data is None else {"data": os.fspath(data)}))
    splits = None if trained.state["split"] is None else Splits.from_dict(trained.state["split"])
    parts: dict[str, list[Sample]] = {"train": open_split(config, config.fit_on, splits).samples}
    parts["val"] = open_split(config, "val", splits).samples if config.fit_on == "train" else []
    parts["test"] = open_split(config, "test", splits).samples
    return parts


def _bags_of(parts: dict[str, list[Sample]], by: str) -> dict[str, list[Bag]]:
    """Bags of each part; their fields are places in all images."""
    bags, begin = {}, 0
    for name, part in parts.items():
        own = make_bags(part, by)
        bags[name] = [bag._replace(fields=tuple(begin + place for place in bag.fields)) for bag in own]
        begin += len(part)
    return bags


def _kept(kept: Embeddings) -> Any:
    return lambda places: kept.values[list(places)]


def _tuned(trained: TrainedNetwork, samples: Sequence[Sample]) -> Any:
    """Embeddings by the network as it is now; gradients flow where they are on."""
    stains = stains_of(trained, samples)

    def look(places: Sequence[int]) -> Tensor:
        chosen = [samples[place] for place in places]
        batches = prepared_batches(trained, chosen, trained.config.batch_size, stains)
        return torch.cat([trained.embed(images)[0].float() for images in batches])

    return look


def _results(
    attention: MagnificationAttention, bags: dict[str, list[Bag]], look: Any, kept: Embeddings,
    samples: Sequence[Sample], magnification: Tensor,
) -> list[BagResult]:  # fmt: skip
    results = []
    for part in PARTS:
        for bag in bags[part]:
            logits, weights = pooled(attention, bag, look, magnification)
            mean = kept.probabilities[list(bag.fields)].double().mean(dim=0)
            own = logits[0].double().softmax(dim=0)
            patient = samples[bag.fields[0]].patient
            lists = (tuple(values.tolist()) for values in (own, mean, weights))
            results.append(BagResult(part, bag, patient, *lists))
    return results


def _write(result: AttendResult, attention: MagnificationAttention, tuned: TrainedNetwork | None) -> None:
    folder, classes = result.folder, result.classes
    header = [f"{kind}{name}" for kind in ("p_", "mean_p_") for name in classes]
    rows: list[list[Any]] = [["part", "bag", "patient", "images", "true", "predicted", *header]]
    fields: list[list[Any]] = [["part", "bag", "image", "magnification", "weight", "times_even"]]
    for entry in result.bags:
        guess = classes[max(range(len(classes)), key=entry.probabilities.__getitem__)]
        shown = [f"{p:.6f}" for p in (*entry.probabilities, *entry.mean_probabilities)]
        count = len(entry.bag.fields)
        rows.append([entry.part, entry.bag.name, entry.patient, count, classes[entry.bag.label], guess, *shown])
        for place, weight in zip(entry.bag.fields, entry.weights, strict=True):
            sample = result.samples[place]
            numbers = f"{weight:.6f}", f"{weight * count:.3f}"
            fields.append([entry.part, entry.bag.name, sample.path.name, sample.magnification, *numbers])
    write_csv(folder / "bags.csv", rows)
    write_csv(folder / "attention.csv", fields)
    settings = result.settings.to_dict()
    state: dict[str, Any] = {
        "version": __version__, "settings": settings, "checkpoint": result.checkpoint, "classes": list(classes),
        "magnifications": list(attention.magnifications), "attention": attention.state_dict(),
        "network": None if tuned is None else tuned.network.state_dict(),
    }  # fmt: skip
    with atomic_write(folder / "attention.pt") as file:
        torch.save(state, file)
    figures = {
        "version": __version__, "settings": settings, "checkpoint": result.checkpoint,
        "metrics": {part: result.metrics(part) for part in PARTS},
        "attention_by_magnification": {part: result.attention_by_magnification(part) for part in PARTS},
        "history": result.history,
    }  # fmt: skip
    write_json(folder / "metrics.json", figures)
    write_page(folder / "report.html", result)
