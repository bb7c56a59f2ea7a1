"""Images of a data set in a few large files, memory-mapped: no decoding, and no file to open for each image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernet_fast.console.atomic_file import PendingFile, write_json

INDEX = "pack.json"
FORMAT = 1
_SHARD_BYTES = 1 << 30


class PackedImages:
    """Reads what `write_pack` wrote. Picklable: every process maps the files for itself.

    Attributes:
        settings: plain values that say how the images were made.

    Raises:
        FileNotFoundError: no ``pack.json`` in `folder`, or a shard is missing.
        ValueError: the index is damaged or of another format, or a shard has another size than it says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"no {INDEX} in {str(folder)!r}; make it with `ernet-fast pack`")
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"it has format {found['format']!r}; this version reads {FORMAT}")
            self.settings: dict[str, Any] = found["settings"]
            self.shards: list[tuple[str, int, str]] = [(s["file"], s["bytes"], s["sha256"]) for s in found["shards"]]
            self._places = {name: tuple(place) for name, *place in found["images"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is damaged or no index of packed images: {error}") from None
        for file, size, _ in self.shards:
            if (actual := (self.folder / file).stat().st_size) != size:
                raise ValueError(f"{self.folder / file} has {actual} bytes; its index says {size}. Pack anew.")
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, name: str) -> Tensor:
        """The image of a sample's name: uint8 [3, H, W], a copy. Raises KeyError for one that is not there."""
        shard, offset, height, width = self._places[name]
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / self.shards[shard][0], np.uint8, "r")
        pixels = self._maps[shard][offset : offset + 3 * height * width]
        return torch.from_numpy(np.array(pixels)).view(3, height, width)

    def damaged(self) -> list[str]:
        """The shards whose bytes are not those that were written; reads them all."""
        return [file for file, _, digest in self.shards if _digest(self.folder / file) != digest]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 24):
            digest.update(data)
    return digest.hexdigest()


def write_pack(
    folder: str | os.PathLike[str],
    images: Iterable[tuple[str, Tensor]],
    settings: dict[str, Any],
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> PackedImages:
    """Write named images, uint8 [3, H, W] of any sizes, into shards of about `shard_bytes`, and their index last.

    A folder without its index holds no pack: one whose writing was interrupted is written anew.

    Raises:
        FileExistsError: `folder` holds a pack.
        ValueError: an image that is not uint8 [3, H, W], or a name that occurs twice.
        OSError: no room on the disk, or no right to write.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise FileExistsError(f"{str(folder)!r} holds packed images already; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, tuple[int, int, int, int]] = {}
    shards: list[dict[str, Any]] = []
    pending: PendingFile | None = None
    digest, written = hashlib.sha256(), 0
    try:
        for name, image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or name in places:
                raise ValueError(f"image {name!r} is {image.dtype} {list(image.shape)}, or occurs twice")
            if pending is None:
                pending = PendingFile(folder / f"shard-{len(shards):05d}.u8")
                digest, written = hashlib.sha256(), 0
            data = image.contiguous().numpy().tobytes()
            pending.file.write(data)
            digest.update(data)
            places[name] = (len(shards), written, image.shape[1], image.shape[2])
            written += len(data)
            if written >= shard_bytes:
                shards.append(_close(pending, written, digest.hexdigest()))
                pending = None
        if pending is not None:
            shards.append(_close(pending, written, digest.hexdigest()))
            pending = None
    finally:
        if pending is not None:
            pending.discard()
    index = {"format": FORMAT, "settings": settings, "shards": shards}
    write_json(folder / INDEX, index | {"images": [[name, *place] for name, place in places.items()]})
    return PackedImages(folder)


def _close(pending: PendingFile, size: int, digest: str) -> dict[str, Any]:
    pending.commit()
    return {"file": pending.path.name, "bytes": size, "sha256": digest}
