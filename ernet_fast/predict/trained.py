"""The network of a checkpoint, with everything that led images to it in training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.data import ImageReadError, PatchTransform, read_image
from ernet_fast.stain import MacenkoFit, MacenkoStatus, ReinhardFit
from ernet_fast.train.checkpoint import field_of, load_checkpoint, load_network
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.device import build_fabric, evaluation_pass
from ernet_fast.train.network import build_network, uses_channels_last
from ernet_fast.train.run_folder import find_checkpoint
from ernet_fast.train.stain_choice import StainNormalization

Stains = MacenkoFit | ReinhardFit


class TrainedNetwork:
    """A checkpoint's network in evaluation mode, and the preparation of images that it was trained with.

    Args:
        checkpoint: a file of `ernet_fast.train.fit`, or the folder of a run, which stands for its `best.pt`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Attributes:
        path: of the checkpoint.
        epoch: of the checkpoint.
        config: the training's settings.
        classes: names of the classes.
        state: everything that the checkpoint holds.
        network: the module, on its device.
        by_slide: whether the training normalised an image by the stains of its whole slide.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing or damaged.
        ImportError: the extra ``train`` is not installed.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], *, device: str = "auto") -> None:
        self.path = find_checkpoint(checkpoint)
        self.state = load_checkpoint(self.path)
        with field_of(self.path, "config"):
            self.config = TrainConfig.from_dict(self.state["config"] | {"weights": None})
        self.epoch: int = self.state["epoch"]
        self.classes: tuple[str, ...] = tuple(self.state["classes"])
        with field_of(self.path, "stain"):
            self._stain = StainNormalization.from_state(self.state["stain"])
        self._transform = PatchTransform(self.config.image_size, resize=self.config.resize)
        self.by_slide = self._stain is not None and getattr(self.config, "stain_fit", "image") == "slide"
        self._fabric = build_fabric(device, self.config.precision)
        network = build_network(self.config, len(self.classes))
        load_network(network, self.state, self.path)
        self._channels_last = uses_channels_last(self.config, self._fabric.device)
        if self._channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = self._fabric.strategy.precision.convert_module(network).to(self._fabric.device)
        self.network: nn.Module = network.eval()
        self._forward = evaluation_pass(self._fabric, network, self._channels_last)

    def prepare(self, image: Tensor, source: Stains | None = None) -> Tensor:
        """Uint8 [3, H, W] to float32 [3, S, S]: the training's stain normalisation, size and scale.

        `source` are the stains of the image's slide where they are known; its own are fitted otherwise.
        """
        if self._stain is not None:
            image = self._stain(image) if source is None else self._stain.of_source(image, source)
        return self._transform(image)

    def common_stains(self, images: Iterable[Tensor]) -> Stains | None:
        """Stains (after Reinhard's method, colour statistics) of all `images`, uint8 [3, H, W], together, as those of
        one slide; None without normalisation. Those of the target if the images have none to fit.
        """
        return None if self._stain is None else self._stain.fit_together(images)

    def slide_stains(self, slides: Mapping[str, Sequence[Path]]) -> dict[str, Stains | None]:
        """Stains of each slide: those that the checkpoint holds, else `common_stains` of its image files.

        Files that cannot be read are left out.
        """
        known = (self.state["stain"] or {}).get("slides", {})
        found: dict[str, Stains | None] = {}
        for slide, paths in slides.items():
            if slide in known:
                fit = MacenkoFit(*known[slide])
                usable = int(fit.status[0]) == MacenkoStatus.OK or self._stain is None
                found[slide] = fit if usable else self._stain.normalizer.target  # type: ignore[union-attr]
            else:
                found[slide] = self.common_stains(_readable(paths))
        return found

    def logits(self, prepared: Tensor) -> Tensor:
        """Output [N, K] of prepared images [N, 3, S, S], on the network's device; gradients flow where they are on."""
        return self._forward(prepared)

    def embed(self, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """What the classifier gets of prepared images, [N, D], and makes of it, the logits [N, K]."""
        taken: list[Tensor] = []
        classifier = _classifier(self.network)
        hook = classifier.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
        try:
            logits = self.logits(prepared)
        finally:
            hook.remove()
        return taken[0].flatten(1), logits

    @torch.no_grad()
    def probabilities(self, prepared: Sequence[Tensor]) -> Tensor:
        """Class probabilities float64 [N, K] of prepared images, on the CPU.

        Raises FloatingPointError if the network's output is not finite.
        """
        found = self.logits(torch.stack(list(prepared))).double().softmax(dim=1).cpu()
        if not found.isfinite().all():
            raise FloatingPointError("the network's output is not finite.")
        return found

    def settings(self) -> dict[str, Any]:
        """What decides predictions, as plain values: the checkpoint and its preparation of images."""
        stain = self.state["stain"]
        return {
            "checkpoint": str(self.path),
            "sha256": hashlib.sha256(Path(self.path).read_bytes()).hexdigest(),
            "epoch": self.epoch,
            "model": self.config.model,
            "classes": list(self.classes),
            "image_size": self.config.image_size,
            "resize": self.config.resize,
            "stain_target": None if stain is None else str(stain["source"]),
            "stains_by_slide": self.by_slide,
        }


def _readable(paths: Sequence[Path]) -> Iterator[Tensor]:
    for path in sorted(paths):
        with suppress(ImageReadError, FileNotFoundError):
            yield read_image(path)


def _classifier(network: nn.Module) -> nn.Module:
    """The linear layer that ends a network: the one it names, or the last one."""
    named = getattr(network, "get_classifier", lambda: None)()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if isinstance(named, nn.Linear):
        return named
    if not linear:
        raise ValueError(f"{type(network).__name__} has no linear classifier, so no embeddings of images.")
    return linear[-1]
