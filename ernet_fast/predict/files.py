"""Predictions for files: images and slides, tables and maps in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ernet_fast._optional import require
from ernet_fast._version import __version__
from ernet_fast.console.atomic_file import atomic_write, remove_abandoned, write_csv, write_json
from ernet_fast.console.progress import Reporter
from ernet_fast.data import ImageReadError, parse_name, read_image
from ernet_fast.predict import heat_map
from ernet_fast.predict.slide import SlidePrediction, predict_slide, training_field
from ernet_fast.predict.trained import Stains, TrainedNetwork
from ernet_fast.scale.inputs import image_files

KINDS = ("auto", "images", "slides")
_SLIDES_ALONE = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".svslide")


@dataclass(frozen=True)
class Predicted:
    """One file: its class probabilities in the order of the network's classes, or None and the reason.

    `tiles` is the number of tiles of a slide that were looked at, whose mean the probabilities are; 1 for an image.
    """

    path: Path
    kind: str
    probabilities: tuple[float, ...] | None
    tiles: int = 1
    reason: str = ""


def predict_files(
    checkpoint: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    kind: str = "auto",
    batch_size: int | None = None,
    device: str = "auto",
    shown: str | None = None,
    reporter: Reporter | None = None,
    **slide_options: Any,
) -> list[Predicted]:
    """Predict every image and slide, and write `predictions.csv`, `predict.json` and `slides/` into `out`.

    Images are prepared as in the network's training, by what the checkpoint holds alone. For a slide `slides/` gets
    the table of its tiles, the heat map and the heat map over the slide. A file that cannot be read stops no other.

    Args:
        checkpoint: a file of `ernet_fast.train.fit`, or the folder of a run, which stands for its `best.pt`.
        inputs: images, slides, folders, patterns and lists of them.
        out: folder to write to, made if missing; files of an earlier call are replaced.
        kind: ``"images"`` or ``"slides"`` reads these alone; ``"auto"`` takes TIFF files for images, and what only
            slides are called (.svs, .ndpi, .mrxs, ...) for slides.
        batch_size: images a step; default: that of the training.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        shown: class whose probability heat maps show; default: of two the second, else the most probable on average.
        reporter: where progress goes; default: stderr.
        slide_options: `field`, `mpp`, `overlap`, `min_tissue` and `stains` of `predict_slide`.

    Returns:
        One entry a file: images, slides, then what is not read.

    Raises:
        FileNotFoundError, ValueError: checkpoint or inputs are missing or damaged, or an argument does not fit.
        FloatingPointError: the network's output is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected a positive number.")
    images, slides, left_out = _find(inputs, kind)
    trained, reporter, folder = TrainedNetwork(checkpoint, device=device), reporter or Reporter(), Path(out)
    if shown is not None and shown not in trained.classes:
        raise ValueError(f"class {shown!r}; the network knows {', '.join(trained.classes)}.")
    if slides and slide_options.get("field") is None:
        training_field(trained)  # before anything is computed
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    done = [*_images(trained, images, batch_size or trained.config.batch_size, reporter)]
    described: dict[str, Any] = {}
    for path in slides:
        try:
            found = predict_slide(trained, path, batch_size=batch_size, reporter=reporter, **slide_options)
        except ImageReadError as error:
            done.append(Predicted(path, "slide", None, 0, str(error)))
            continue
        described[str(path)] = found.settings | {"shown": _write_slide(found, folder / "slides", shown)}
        mean, tiles = found.mean(), int(found.looked_at.sum())
        reason = "" if mean is not None else "no tile has enough tissue"
        done.append(Predicted(path, "slide", None if mean is None else tuple(mean.tolist()), tiles, reason))
    done += [Predicted(path, "other", None, 0, reason) for path, reason in left_out]
    _write_table(folder / "predictions.csv", trained.classes, done)
    write_json(folder / "predict.json", {"version": __version__, **trained.settings(), "slides": described})
    return done


def _find(inputs: Sequence[str | os.PathLike[str]], kind: str) -> tuple[list[Path], list[Path], list[tuple[Path, str]]]:
    """Images, slides, and what is not read, with the reason."""
    if kind == "images":
        images, left_out = image_files(inputs)
        return images, [], left_out
    if kind == "slides":
        slides, left_out = image_files(inputs, slides=True)
        return [], slides, left_out
    found: dict[bool, list[Path]] = {}
    left_out, empty = [], []
    for as_slides in (False, True):
        try:
            found[as_slides], unread = image_files(inputs, slides=as_slides)
        except ValueError as error:
            found[as_slides], unread = [], []
            empty.append(error)
        left_out += unread if not as_slides else []
    slides = [path for path in found[True] if path.suffix.lower() in _SLIDES_ALONE]
    if not found[False] and not slides:
        raise empty[0]
    return found[False], slides, [(path, reason) for path, reason in left_out if path not in slides]


def _images(trained: TrainedNetwork, paths: Sequence[Path], batch_size: int, reporter: Reporter) -> Iterator[Predicted]:
    sources = _sources(trained, paths, reporter)

    def prepared(path: Path) -> Tensor | str:
        try:
            return trained.prepare(read_image(path), sources.get(path))
        except (ImageReadError, FileNotFoundError, ValueError) as error:
            return str(error)

    if not paths:
        return
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, reporter.task("predict", len(paths)) as task:
        for begin in range(0, len(paths), batch_size):
            part = paths[begin : begin + batch_size]
            found = [*pool.map(prepared, part)]
            usable = [image for image in found if isinstance(image, Tensor)]
            answers = iter(trained.probabilities(usable).tolist() if usable else ())
            for path, image in zip(part, found, strict=True):
                if isinstance(image, Tensor):
                    yield Predicted(path, "image", tuple(next(answers)))
                else:
                    yield Predicted(path, "image", None, 0, image)
            task.advance(len(part))


def _sources(trained: TrainedNetwork, paths: Sequence[Path], reporter: Reporter) -> dict[Path, Stains | None]:
    """Of a training by slide: the stains of the slide of each image whose name, as in BreakHis, says which it is."""
    if not trained.by_slide:
        return {}
    slides: dict[str, list[Path]] = {}
    for path in paths:
        with suppress(ValueError):
            slides.setdefault(parse_name(path).slide, []).append(path)
    unknown = len(paths) - sum(map(len, slides.values()))
    if unknown:
        reporter.warning(
            f"the network was trained on images normalised by slide, and the names of {unknown} images do not say "
            "which slide they are of: they are normalised by their own stains."
        )
    stains = trained.slide_stains(slides)
    return {path: stains[slide] for slide, images in slides.items() for path in images}


def _write_slide(found: SlidePrediction, folder: Path, shown: str | None) -> str:
    """Table and pictures of a slide; the class that the pictures show."""
    pil = require("PIL.Image", extra="train", purpose="writing pictures")
    folder.mkdir(parents=True, exist_ok=True)
    index, name = heat_map.shown_class(found, shown), found.slide.name
    write_csv(folder / f"{name}.tiles.csv", found.rows())
    with atomic_write(folder / f"{name}.heatmap.png") as file:
        pil.fromarray(heat_map.heat_map(found, index)).save(file, format="PNG")
    with atomic_write(folder / f"{name}.overlay.png") as file:
        heat_map.save_overlay(found, index, file)
    return found.classes[index]


def _write_table(path: Path, classes: Sequence[str], done: Sequence[Predicted]) -> None:
    rows: list[list[Any]] = [["path", "kind", "tiles", "predicted", *(f"p_{name}" for name in classes), "reason"]]
    for entry in done:
        values = entry.probabilities
        guess = "" if values is None else classes[max(range(len(classes)), key=values.__getitem__)]
        shown = [""] * len(classes) if values is None else [f"{v:.6f}" for v in values]
        rows.append([str(entry.path), entry.kind, entry.tiles, guess, *shown, entry.reason])
    write_csv(path, rows)
