"""A network as a folder: its arguments in config.json, its tensors in model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ernet_fast._optional import require
from ernet_fast._version import __version__
from ernet_fast.console.atomic_file import atomic_write, write_json
from ernet_fast.er.shortcut import ERShortcut

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OWN = "ernet_fast"
_FORMAT = 1
Network = TypeVar("Network", bound="PretrainedFolder")


class PretrainedFolder(nn.Module):
    """`save_pretrained` and `from_pretrained`, for a network that its constructor's arguments describe.

    Attributes:
        arguments: keyword arguments of the constructor as plain values, without num_classes and global_pool.
        num_classes, pool_type: these two, as they are now.
    """

    arguments: dict[str, Any]
    num_classes: int
    pool_type: str

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config.json and model.safetensors into `folder`, which is made if need be; returns it.

        `from_pretrained` reads them, and for 18, 34, 50, 101 and 152 layers `timm.create_model("local-dir:FOLDER",
        pretrained=True)` too.

        Raises:
            ValueError: the network is not what its constructor makes of its arguments, such as one with another stem or
                attention, or a folded one; the message names the first module. Save these by `torch.save`.
            ImportError: without the package safetensors.
        """
        save = require("safetensors.torch", extra="train", purpose="save_pretrained").save
        arguments = self._all_arguments()
        with torch.device("meta"):
            expected = type(self)(**arguments)
        _check_same(self, expected)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(folder / WEIGHTS) as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        write_json(folder / CONFIG, self._config(arguments))
        return folder

    @classmethod
    def from_pretrained(cls: type[Network], folder: str | os.PathLike[str], **changes: Any) -> Network:
        """The network that `save_pretrained` wrote into the local `folder`, in evaluation mode, on the CPU.

        Args:
            folder: nothing is downloaded.
            **changes: arguments of the constructor in place of those saved, such as fused=False or drop_rate=0.2.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: the files are damaged, of another kind, or do not fit the changes.
            ImportError: without the package safetensors.
        """
        load_file = require("safetensors.torch", extra="train", purpose="from_pretrained").load_file
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {str(folder)!r}: expected the folder of save_pretrained")
        arguments = _read_arguments(folder / CONFIG)
        with torch.device("meta"):
            model = cls(**{**arguments, **changes})
        try:
            model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
        except Exception as error:  # safetensors and torch have each their own
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch names every tensor
            raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}, or is damaged: {reason}") from error
        return model.eval()

    def _all_arguments(self) -> dict[str, Any]:
        if not hasattr(self, "arguments"):
            raise ValueError("the network was pickled by a version that did not keep its arguments: use torch.save")
        return {**self.arguments, "num_classes": self.num_classes, "global_pool": self.pool_type}

    def _config(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """In timm's form, with the arguments beside it."""
        own = {"format": _FORMAT, "version": __version__, "class": type(self).__name__, "arguments": arguments}
        for_timm = {key: value for key, value in arguments.items() if key not in ("family", "layers", "num_classes")}
        channels = for_timm.pop("in_channels")
        return {
            "architecture": getattr(self, "architecture", None) or type(self).__name__,
            "num_classes": self.num_classes,
            "model_args": {**for_timm, "in_chans": channels},
            "pretrained_cfg": {
                "num_classes": self.num_classes,
                "input_size": [channels, 224, 224],
                "first_conv": "conv1",
                "classifier": "fc",
            },
            _OWN: own,
        }


def _read_arguments(path: Path) -> dict[str, Any]:
    try:
        own = json.loads(path.read_text(encoding="utf-8"))[_OWN]
        found, arguments = own["format"], own["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of save_pretrained: {type(error).__name__}: {error}") from error
    if found != _FORMAT or not isinstance(arguments, dict):
        raise ValueError(f"{path} has format {found!r}; this version reads format {_FORMAT}.")
    return arguments


def _check_same(model: nn.Module, expected: nn.Module) -> None:
    """Raise ValueError unless `model` has the layers and tensors of `expected`."""
    found, wanted = _layers(model), _layers(expected)
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{name or 'the network'} is {found.get(name, 'missing')}, and the constructor makes it "
                f"{wanted.get(name, 'nothing')}: arguments cannot describe this network. Save it by torch.save"
            )


def _layers(model: nn.Module) -> dict[str, str]:
    """Every layer in words, less what does not change what a trained network computes."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            layers[name] = f"BatchNorm({module.num_features}, eps={module.eps}, affine={module.affine})"
        elif isinstance(module, ERShortcut):
            layers[name] = f"ERShortcut({module.num_maps}, {module.channels}, {module.norm}, {module.num_groups})"
        elif not list(module.children()):
            layers[name] = repr(module)
    return layers
