"""``ernet-fast predict``: a checkpoint on images and slides without labels."""

from __future__ import annotations

import argparse
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_table
from ernet_fast.predict import Predicted, predict_files
from ernet_fast.predict.files import KINDS
from ernet_fast.predict.slide import STAINS
from ernet_fast.train.checkpoint import load_checkpoint
from ernet_fast.train.run_folder import find_checkpoint

SOME_FAILED = 3
_LISTED = 20


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "predict",
        parents=parents,
        help="run a checkpoint on images and slides",
        description="Run the network of a checkpoint on images, folders or whole slides without labels. Images get the "
        "stain normalisation and the size of the training, by what the checkpoint holds alone. Writes predictions.csv "
        "(probabilities), predict.json (the settings), and for each slide the table of its tiles, a heat map and the "
        "heat map over the slide.",
        epilog=f"Exit code {SOME_FAILED}: done, but some files failed; they are listed. No result is a diagnosis.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="RUN", help="folder of a run (its best.pt), or a file best.pt or last.pt")
    add("input", metavar="INPUT", nargs="+", help="images, slides, folders, patterns ('slides/*.svs'), or @LIST")
    add("--out", metavar="FOLDER", required=True, help="folder to write to, made if missing")
    kinds = "read images or slides alone; auto: TIFF files are images, .svs, .ndpi, .mrxs and the like slides"
    add("--as", choices=KINDS, default="auto", dest="kind", help=f"{kinds} (default: auto)")
    add("--batch-size", type=int, metavar="N", help="images a step; default: that of the training")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--json", action="store_true", help="print all probabilities as JSON")
    slide = parser.add_argument_group("slides").add_argument
    field = "height and width of a tile; default: a training image's, if the training had one magnification"
    slide("--field", type=float, metavar="UM", help=field)
    slide("--mpp", type=float, metavar="UM", help="micrometres a pixel of level 0; default: what the slide says")
    slide("--overlap", type=float, metavar="SHARE", default=0.0, help="overlap of neighbouring tiles (default: 0)")
    tissue = "least share of tissue of a tile that is looked at (default: %(default)g)"
    slide("--min-tissue", type=float, metavar="SHARE", default=0.1, help=tissue)
    stains = "fit stains on each tile or on the whole slide; default: as in training"
    slide("--stains", choices=STAINS, help=stains)
    shown = "class that heat maps show; default: of two the second, else the most probable on average"
    slide("--class", dest="shown", metavar="NAME", help=shown)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Predict; returns 0, or 3 if a file failed."""
    names = ("kind", "batch_size", "device", "shown", "field", "mpp", "overlap", "min_tissue", "stains")
    done = predict_files(
        arguments.checkpoint, arguments.input, arguments.out, reporter=Reporter(quiet=arguments.quiet),
        **{name: getattr(arguments, name) for name in names},
    )  # fmt: skip
    classes = load_checkpoint(find_checkpoint(arguments.checkpoint))["classes"]
    failed = [entry for entry in done if entry.probabilities is None]
    if arguments.json:
        print_json([_as_json(entry, classes) for entry in done])
    else:
        _print(done, failed, classes, arguments.out)
    return SOME_FAILED if failed else 0


def _as_json(entry: Predicted, classes: list[str]) -> dict[str, Any]:
    values = entry.probabilities
    return {
        "path": str(entry.path), "kind": entry.kind, "tiles": entry.tiles, "reason": entry.reason or None,
        "probabilities": None if values is None else dict(zip(classes, values, strict=True)),
    }  # fmt: skip


def _print(done: list[Predicted], failed: list[Predicted], classes: list[str], out: str) -> None:
    found = [(entry, entry.probabilities) for entry in done if entry.probabilities is not None]
    rows = []
    for entry, values in found[:_LISTED]:
        best = max(range(len(classes)), key=values.__getitem__)
        rows.append([entry.path.name, classes[best], f"{values[best]:.3f}", str(entry.tiles)])
    if rows:
        print(format_table(["file", "predicted", "probability", "tiles"], rows, right_from=2))
    if len(found) > _LISTED:
        print(f"and {len(found) - _LISTED} more")
    for entry in failed:
        print(f"failed {entry.path}: {entry.reason}")
    print(f"\n{len(found)} files; written to {out}")
