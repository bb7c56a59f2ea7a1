"""Writing of packed images: a data set decoded once, and perhaps normalised and resized."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ernet_fast import _version
from ernet_fast.console.progress import Reporter
from ernet_fast.data import Sample, read_image
from ernet_fast.data.augment import resized
from ernet_fast.data.packed import PackedImages, write_pack
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.data_sets import open_split, report_skipped
from ernet_fast.train.images import normalised
from ernet_fast.train.stain_choice import StainNormalization, normalise_to, plain_state


class _Prepared(Dataset[Any]):
    """Name and pixels of each sample, normalised and resized as asked for."""

    def __init__(
        self, samples: Sequence[Sample], stain: StainNormalization | None, size: int | None, resize: str
    ) -> None:
        self.samples, self.stain, self.size, self.resize = samples, stain, size, resize

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        sample = self.samples[index]
        image = normalised(read_image(sample.path), sample, self.stain)
        return sample.name, image if self.size is None else resized(image, (self.size, self.size), self.resize)


def pack_images(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str = "auto",
    image_size: int | None = None,
    resize: str = "shorter",
    stain: str = "macenko",
    stain_target: str | os.PathLike[str] | None = None,
    stain_fit: str = "image",
    on_error: str = "raise",
    num_workers: int = 0,
    reporter: Reporter | None = None,
) -> PackedImages:
    """Pack all images of a data set, for `TrainConfig.packed`; training on them gives what training on the files gives.

    Args:
        data: as in `TrainConfig`.
        out: folder for the shards and their index.
        layout: as in `TrainConfig`.
        image_size: resize as a run of this `image_size` does; None keeps the size, for runs of any.
        resize: as in `TrainConfig`.
        stain: the method if there is a `stain_target`, ``"macenko"`` or ``"reinhard"``.
        stain_target: normalise to the stains of this image, as a run with this `stain_target` does; None does not. A
            run's default target, the most typical training image, is that of its fold and cannot be packed.
        stain_fit: as in `TrainConfig`.
        on_error: as in `TrainConfig`.
        num_workers: processes that read.
        reporter: where progress goes; default: stderr.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: as `open_split`, `normalise_to` and `write_pack` do.
    """
    reporter = reporter or Reporter()
    config = TrainConfig(
        data=os.fspath(data), out=os.fspath(out), layout=layout, resize=resize, on_error=on_error,
        stain="none" if stain_target is None else stain, stain_fit=stain_fit,
    )  # fmt: skip
    opened = open_split(config, "all", any_images=True)
    normalizer = None if stain_target is None else normalise_to(stain, stain_target)
    if normalizer is not None and stain_fit == "slide":
        normalizer = normalizer.by_slide()
        reporter.line(f"fitting the stains of {len({sample.slide for sample in opened.samples})} slides")
        normalizer.prepare(opened.samples)
    settings = {
        "version": _version.__version__, "data": config.data, "image_size": image_size, "resize": resize,
        "stain": plain_state(normalizer),
    }  # fmt: skip
    loader = DataLoader(
        _Prepared(opened.samples, normalizer, image_size, resize), batch_size=None, num_workers=num_workers
    )
    with reporter.task("pack", len(opened.samples)) as task:

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, image in loader:
                yield name, image
                task.advance()

        packed = write_pack(out, counted(), settings)
    report_skipped(tuple(opened.skipped), packed.folder, reporter)
    return packed
