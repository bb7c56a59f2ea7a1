"""How well colour alone tells benign from malignant: what a network must beat before it has learnt any structure.

A logistic regression on six numbers an image, the means and standard deviations of red, green and blue, with and
without Macenko normalisation, trained and tested on the patients of a study (`split.csv` of `ernet-fast ablate`).
docs/results.md has its figures.

    python3 bench/colour_baseline.py --data BreaKHis_v1 --split-file study/split.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ernet_fast.console.tables import markdown_table
from ernet_fast.data import Sample, read_image
from ernet_fast.train import TrainConfig
from ernet_fast.train.data_sets import open_split
from ernet_fast.train.stain_choice import most_typical

FEATURES = {"mean colour": slice(0, 3), "mean and deviation": slice(0, 6)}


def colours(samples: Sequence[Sample], prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Means and standard deviations of red, green and blue of each image, float64 [N, 6]."""
    rows = []
    for sample in samples:
        pixels = prepare(read_image(sample.path)).flatten(1).double()
        rows.append(torch.cat([pixels.mean(1), pixels.std(1)]))
    return torch.stack(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="BreakHis, a folder with one folder a class, or a CSV list")
    parser.add_argument("--split-file", required=True, help="the split: split.csv of a run or study")
    given = parser.parse_args(arguments)
    config = TrainConfig(data=given.data, split_file=given.split_file, out=".")  # nothing is written
    train, test = open_split(config, "trainval").samples, open_split(config, "test").samples
    labels = [[sample.label for sample in samples] for samples in (train, test)]
    target, normalization = most_typical(train)
    print(f"{len(train)} images to train on, {len(test)} to test on; Macenko's target: {target.name}\n")
    rows = []
    ways: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda image: image, "macenko": normalization}
    for name, prepare in ways.items():
        seen, unseen = colours(train, prepare), colours(test, prepare)
        aucs = []
        for chosen in FEATURES.values():
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            scores = model.fit(seen[:, chosen].numpy(), labels[0]).predict_proba(unseen[:, chosen].numpy())[:, 1]
            aucs.append(f"{roc_auc_score(labels[1], scores):.3f}")
        rows.append([name, *aucs])
    print(markdown_table(["stain", *(f"AUC, {name}" for name in FEATURES)], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
