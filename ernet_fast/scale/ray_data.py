"""`normalize_dataset`: stain normalisation of a Ray Data set, by actors on the machines of a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ernet_fast._optional import require
from ernet_fast.data import ImageReadError
from ernet_fast.scale.files import Stains, known_stains
from ernet_fast.scale.method import Method, Values
from ernet_fast.scale.target import PUBLISHED, make_method
from ernet_fast.scale.treat import USUAL_LIMITS, Limits, open_picture
from ernet_fast.stain import MacenkoStatus
from ernet_fast.stain.options import Options

ADDED = ("stain_status", "stain_reason", "tissue_share", "stains")
"""Columns of the result beside those of the input."""

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def normalize_dataset(
    data: Any,
    *,
    target: Stains = PUBLISHED,
    method: str = "macenko",
    options: Options | None = None,
    source: Stains | None = None,
    column: str = "image",
    batch_size: int = 32,
    actors: int | tuple[int, int | None] = (1, None),
    num_cpus: float = 1,
    num_gpus: float = 0,
    retries: int = -1,
    limits: Limits = USUAL_LIMITS,
) -> Any:
    """Normalise the images of a Ray data set; extra "ray".

    The target is read, and fitted if it is an image, here and once. Each actor takes a copy, and one batch after the
    other. A batch whose actor dies, with its machine or alone, is done again by another: every row of the input is one
    row of the result. What is done to an image depends on nothing but itself and the settings, so the pixels are those
    of `normalize_files`.

    Args:
        data: a `ray.data.Dataset` with a `column` of images, uint8 arrays [H, W, 3] of any sizes, or the bytes of image
            files; or paths of files and folders as `ray.data.read_binary_files` takes them (S3 and the like included),
            which give the columns `path` and `column`.
        target: as in `normalize_files`.
        method: "macenko" or "reinhard".
        options: as in `normalize_files`.
        source: stains that all images are taken to have; default: each its own.
        column: that holds the images.
        batch_size: rows of a batch.
        actors: how many, or the least and the most (None: as many as the cluster has room for). What reads the data set
            needs a CPU besides: on a cluster whose CPUs are all taken by actors nothing is ever read.
        num_cpus: of an actor, which computes with as many threads.
        num_gpus: of an actor; with more than 0 batches are normalised on its GPU.
        retries: how often a batch is done again, and an actor started again, after an actor died; -1 for always.
        limits: of encoded images.

    Returns:
        A lazy `ray.data.Dataset`: the columns of `data`, with normalised images uint8 [H, W, 3] in `column`, and
        `stain_status` ("ok", "degenerate" or "error"), `stain_reason`, `tissue_share`, and `stains` in the order of the
        method's columns (`ernet_fast.scale.method`), NaN where there are none. An image that could not be read, or
        has no stains under `on_degenerate="raise"`, has the status "error" and no pixels, [0, 0, 3]. To write files,
        filter by the status and use Ray's own `write_*`, or `map` with a function that writes.

    Raises:
        ImportError: Ray is missing.
        FileNotFoundError, ValueError: as `normalize_files`.
        TypeError: no data set and no paths. Rows without images of the kinds above raise when they are read.
    """
    ray_data = require("ray.data", extra="ray", purpose="normalising data sets of Ray")
    chosen = make_method(target, method, options)
    known = None if source is None else known_stains(source, method, chosen.options)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected a positive number.")
    if not isinstance(data, ray_data.Dataset):
        data = _read(ray_data, data, column)
    given = {} if retries == -1 else {"max_restarts": retries, "max_task_retries": retries}  # Ray Data's own default
    return data.map_batches(
        _Actor, fn_constructor_args=(chosen, known, column, limits, max(1, int(num_cpus)), num_gpus > 0),
        batch_size=batch_size, batch_format="numpy", compute=_pool(ray_data, actors), num_cpus=num_cpus,
        num_gpus=num_gpus or None, **given,
    )  # fmt: skip


def _pool(ray_data: Any, actors: int | tuple[int, int | None]) -> Any:
    least, most = (actors, actors) if isinstance(actors, int) else actors
    return ray_data.ActorPoolStrategy(min_size=least, max_size=most)


def _read(ray_data: Any, paths: Paths, column: str) -> Any:
    """The files as rows of `path` and bytes."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if not isinstance(given, Sequence):
        raise TypeError(f"data is a {type(paths).__name__}; expected a ray.data.Dataset, or paths.")
    found = ray_data.read_binary_files([os.fspath(path) for path in given], include_paths=True)
    return found.rename_columns({"bytes": column})


class _Actor:
    """Normalises batches of rows."""

    def __init__(
        self, method: Method, source: Values | None, column: str, limits: Limits, threads: int, on_gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self.method, self.source, self.column, self.limits = method, source, column, limits
        self.device = torch.device("cuda" if on_gpu else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with its images normalised, and what is to be said about each."""
        if self.column not in batch or any(name in batch for name in ADDED):
            raise ValueError(
                f"the data set has the columns {', '.join(batch)}; expected {self.column!r} among them (column), and "
                f"none of {', '.join(ADDED)}, which are added."
            )
        rows = [self._pixels(value) for value in batch[self.column]]
        images = [torch.from_numpy(row).to(self.device) for row in rows if isinstance(row, np.ndarray)]
        done = iter(self._normalized(images))
        results = [self._failed(row) if isinstance(row, str) else self._judged(row, *next(done)) for row in rows]
        pixels, statuses, reasons, shares, stains = zip(*results, strict=True)
        said = (np.array(statuses), np.array(reasons), np.array(shares), np.array(stains))
        return {**batch, self.column: list(pixels), **dict(zip(ADDED, said, strict=True))}

    def _pixels(self, value: Any) -> np.ndarray | str:
        """An image, or why there is none."""
        if isinstance(value, bytes):
            try:
                return open_picture(value, self.limits).pixels
            except ImageReadError as error:
                return str(error)
        if not (isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3 and value.dtype == np.uint8):
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"column {self.column!r} holds {found}; expected uint8 [H, W, 3], or bytes of image files.")
        return np.array(value)  # Ray's own memory is read-only

    def _normalized(self, images: list[torch.Tensor]) -> list[tuple[np.ndarray, list[float], MacenkoStatus]]:
        if not images:
            return []
        results, values, statuses = self.method.normalize(images, self.source)
        pixels = [np.ascontiguousarray(result.cpu().numpy()) for result in results]
        return list(zip(pixels, values.tolist(), map(MacenkoStatus, statuses.tolist()), strict=True))

    def _judged(
        self, image: np.ndarray, result: np.ndarray, values: list[float], status: MacenkoStatus
    ) -> tuple[np.ndarray, str, str, float, list[float]]:
        share = self.method.tissue.share(image)
        if status == MacenkoStatus.OK:
            return result, "ok", "", share, values
        nothing = [float("nan")] * len(values)
        if self.method.options.on_degenerate == "raise":
            return np.zeros((0, 0, 3), np.uint8), "error", status.reason, share, nothing
        return result, "degenerate", status.reason, share, nothing

    def _failed(self, reason: str) -> tuple[np.ndarray, str, str, float, list[float]]:
        nan = float("nan")
        return np.zeros((0, 0, 3), np.uint8), "error", reason, nan, [nan] * len(self.method.columns)
