"""Embeddings of images by a trained network, computed once."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Sample, read_image
from ernet_fast.predict import TrainedNetwork
from ernet_fast.predict.trained import Stains

SlideStains = dict[str, Stains | None]


class Embeddings(NamedTuple):
    """Embeddings float32 [n, D] and class probabilities float32 [n, K] of n images, by the network alone."""

    values: Tensor
    probabilities: Tensor


def prepared_batches(
    trained: TrainedNetwork, samples: Sequence[Sample], batch_size: int, stains: SlideStains
) -> Iterator[Tensor]:
    """Images [N, 3, S, S] as the network takes them, in order. Errors name the file that cannot be read.

    `stains` of the slides, if the training normalised by slide.
    """

    def prepared(sample: Sample) -> Tensor:
        return trained.prepare(read_image(sample.path), stains.get(sample.slide))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for begin in range(0, len(samples), batch_size):
            part = samples[begin : begin + batch_size]
            yield torch.stack([*pool.map(prepared, part)])


def stains_of(trained: TrainedNetwork, samples: Sequence[Sample]) -> SlideStains:
    """The stains of each slide of `samples`, of a training by slide; empty for others."""
    slides: dict[str, list[Path]] = {}
    for sample in samples if trained.by_slide else ():
        slides.setdefault(sample.slide, []).append(sample.path)
    return trained.slide_stains(slides)


@torch.no_grad()
def embed_all(
    trained: TrainedNetwork, samples: Sequence[Sample], cache: Path, checkpoint: str, reporter: Reporter
) -> Embeddings:
    """Embeddings of all samples, from `cache` where it holds them, else computed and written there.

    `checkpoint` is the SHA-256 of the network's file, by which, with the images' paths, sizes and times, a cache is
    known to be that of these images.
    """
    key = [checkpoint, *(_stamp(sample.path) for sample in samples)]
    kept = _read(cache, key)
    if kept is not None:
        reporter.line(f"embeddings of {len(samples)} images found in {cache}")
        return kept
    values, probabilities = [], []
    with reporter.task("embed", len(samples)) as task:
        for images in prepared_batches(trained, samples, trained.config.batch_size, stains_of(trained, samples)):
            found, logits = trained.embed(images)
            values.append(found.float().cpu())
            probabilities.append(logits.double().softmax(dim=1).float().cpu())
            task.advance(len(images))
    done = Embeddings(torch.cat(values), torch.cat(probabilities))
    if not all(part.isfinite().all() for part in done):
        raise FloatingPointError("the network's output is not finite for some images.")
    with atomic_write(cache) as file:
        torch.save({"key": key, **done._asdict()}, file)
    return done


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


def _read(cache: Path, key: list[str]) -> Embeddings | None:
    """What a cache holds; None if there is none, it is damaged, or of other images."""
    try:
        state = torch.load(cache, map_location="cpu", weights_only=True)
        return Embeddings(state["values"], state["probabilities"]) if state["key"] == key else None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError):
        return None
