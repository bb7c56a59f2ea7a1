"""What converting a trained ResNet costs, and how fine-tuning goes on from there: curves on the patients held out.

A plain ResNet is trained from scratch on the training patients of a folder in BreakHis's layout, and converted twice:
with shortcuts calibrated on 64 of its training images, and without. Before any fine-tuning the logits of each are
compared with the plain network's on the held-out images. Then both are fine-tuned for a few epochs, and the plain
network is trained on for as many (the control); order and augmentation of the images are the same in all three. Every
epoch is evaluated on the held-out patients; none is chosen by them: what counts is the last.

    OMP_NUM_THREADS=1 python3 bench/finetune_converted.py --data BreaKHis_v1 --record bench/results
    python3 bench/finetune_converted.py                    # on generated tissue, which says nothing about diagnosis
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from record import ROOT, Record, Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

sys.path.insert(0, str(ROOT))

from ernet_fast import convert_resnet, logit_agreement
from ernet_fast.console.progress import Reporter
from ernet_fast.data import BreakHis, PatchTransform
from ernet_fast.data.synthetic import write_breakhis_like
from ernet_fast.reference.rival_networks import PlainResNet
from ernet_fast.train.metrics import area_under_curve

CALIBRATION_IMAGES = 64
PHASES = {
    "plain": "plain ResNet, from scratch",
    "calibrated": "converted with calibrate=, fine-tuned",
    "uncalibrated": "converted without, fine-tuned",
    "control": "plain ResNet, trained on",
}


@dataclass(frozen=True)
class Settings:
    depth: int
    base_channels: int
    size: int
    batch: int
    epochs: int
    tuning_epochs: int
    lr: float
    tuning_lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Images:
    """uint8 [N, 3, size, size], and labels [N]."""

    pixels: Tensor
    labels: Tensor

    def prepared(self, batch: int, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Batches as a network is given them in evaluation."""
        transform = PatchTransform(self.pixels.shape[-1], resize="none")
        places = range(len(self.pixels)) if places is None else places
        for start in range(0, len(places), batch):
            yield channels_last(torch.stack([transform(self.pixels[k]) for k in places[start : start + batch]]))

    def spread(self, count: int) -> list[int]:
        """Places of `count` images at even distances."""
        return sorted({round(k * (len(self.pixels) - 1) / max(1, count - 1)) for k in range(count)})


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def load(root: Path, split: str, size: int) -> tuple[Images, int]:
    """The images of a split, each side squeezed to `size`, and the number of patients."""
    data = BreakHis(root, split)
    shrunk = [interpolate(image[None], size=(size, size), mode="bilinear", antialias=True) for image, _ in data]
    patients = len({sample.patient for sample in data.samples})
    return Images(torch.cat(shrunk), torch.tensor(data.targets)), patients


def optimizer_of(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors and ER weights, which scale like those of normalisation layers, do not decay."""
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in undecayed].append(parameter)
    decays = [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(decays, lr=lr)


def evaluate(model: nn.Module, images: Images, batch: int) -> dict[str, float]:
    """Loss, accuracy and area under the ROC curve."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(x) for x in images.prepared(batch)]).double()
    right = int((logits.argmax(1) == images.labels).sum())
    return {
        "loss": float(cross_entropy(logits, images.labels)),
        "right": right,
        "accuracy": right / len(images.labels),
        "auc": area_under_curve(logits.softmax(1)[:, 1], images.labels == 1),
    }


def train(
    model: nn.Module, images: Images, held_out: Images, epochs: int, lr: float, settings: Settings, reporter: Reporter
) -> list[dict[str, float]]:
    """Train with a cosine schedule; the evaluation before and after every epoch, with the seconds of its training."""
    history: list[dict[str, float]] = [{"epoch": 0, **evaluate(model, held_out, settings.batch)}]
    optimizer = optimizer_of(model, lr, settings.weight_decay)
    transform = PatchTransform(settings.size, train=True, resize="none")
    steps, done = epochs * max(1, len(images.labels) // settings.batch), 0
    for epoch in range(1, epochs + 1):
        torch.manual_seed(1000 * settings.seed + epoch)
        order, start, losses = torch.randperm(len(images.labels)), time.perf_counter(), []
        model.train()
        for chosen in order.split(settings.batch):
            if len(chosen) < settings.batch:
                continue
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done / steps))
            x = channels_last(torch.stack([transform(images.pixels[k]) for k in chosen.tolist()]))
            loss = cross_entropy(model(x), images.labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            done += 1
        seconds = time.perf_counter() - start
        found = {"epoch": epoch, "train_loss": sum(losses) / len(losses), "seconds": seconds}
        history.append({**found, **evaluate(model, held_out, settings.batch)})
        shown = history[-1]
        reporter.line(
            f"  epoch {epoch}/{epochs}: accuracy {shown['accuracy']:.3f}, AUC {shown['auc']:.3f}, {seconds:.0f} s"
        )
    return history


def study(
    images: Images, held_out: Images, settings: Settings, reporter: Reporter
) -> Iterator[tuple[str, list[dict[str, float]], dict[str, Any]]]:
    """Name, history and further figures of every phase, as each is done."""
    torch.manual_seed(settings.seed)
    plain = PlainResNet(settings.depth, 2, base_channels=settings.base_channels).to(memory_format=torch.channels_last)
    reporter.line(f"{PHASES['plain']}: {len(images.labels)} images, {len(held_out.labels)} held out")
    yield "plain", train(plain, images, held_out, settings.epochs, settings.lr, settings, reporter), {}
    batches = list(images.prepared(settings.batch, images.spread(CALIBRATION_IMAGES)))
    networks = {
        "calibrated": convert_resnet(plain, calibrate=batches),
        "uncalibrated": convert_resnet(plain),
        "control": copy.deepcopy(plain),
    }
    for name, network in networks.items():
        agreement = logit_agreement(plain, network, held_out.prepared(settings.batch))
        reporter.line(f"{PHASES[name]}: before, {agreement}")
        history = train(network, images, held_out, settings.tuning_epochs, settings.tuning_lr, settings, reporter)
        yield name, history, agreement._asdict()


def row_of(data: str, name: str, history: list[dict[str, float]], further: dict[str, Any]) -> Row:
    """The row of a phase: accuracy at its end, in per cent, and all there is to draw."""
    accuracy = 100 * history[-1]["accuracy"]
    info = {"title": f"{PHASES[name]}, {data}", "phase": name, "history": history, "start": history[0], **further}
    return Row(
        "finetune_converted", f"{name}[{data}]", "fine-tuning after conversion", {"data": data}, accuracy, accuracy,
        accuracy, "%", extra_info=info,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--data", type=Path, help="folder in BreakHis's layout; generated images without")
    made.add_argument("--record", type=Path, metavar="FOLDER", help="write rows to the record of this machine there")
    made.add_argument("--depth", type=int, default=34, help="of the ResNet (default 34)")
    made.add_argument("--base-channels", type=int, default=32, help="of its stem (default 32, half of the usual)")
    for name, value in (("size", 96), ("batch", 32), ("epochs", 15), ("tuning-epochs", 5), ("seed", 0)):
        made.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    for name, value in (("lr", 1e-3), ("tuning-lr", 2e-4), ("weight-decay", 0.05)):
        made.add_argument(f"--{name}", type=float, default=value, help=f"default {value}")
    made.add_argument("--patients", type=int, default=24, help="of generated images (default 24)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    # read before training: files may change while it runs
    record = Record.of(describe("cpu"), options.record) if options.record else None
    reporter = Reporter(bars=False)
    with tempfile.TemporaryDirectory() as folder:
        root, data = options.data, options.data and options.data.resolve().name
        if root is None:
            sides = (settings.size, settings.size)
            root, data = write_breakhis_like(folder, patients=options.patients, size=sides), "generated"
        (images, train_patients), (held_out, patients) = (
            load(root, split, settings.size) for split in ("trainval", "test")
        )
    known = {
        "settings": asdict(settings), "threads": torch.get_num_threads(), "train_images": len(images.labels),
        "train_patients": train_patients, "images": len(held_out.labels), "patients": patients,
        "positive": int(held_out.labels.sum()),
    }  # fmt: skip
    for name, history, further in study(images, held_out, settings, reporter):
        row = row_of(data, name, history, {**further, **known})
        print(f"{PHASES[name]}: accuracy {history[0]['accuracy']:.3f} -> {history[-1]['accuracy']:.3f}", flush=True)
        if record is not None:
            record.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
