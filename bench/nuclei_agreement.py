"""Nuclei found in synthetic patches against those that were drawn: the table of docs/segment.md.

python3 bench/nuclei_agreement.py [--seeds N]
"""

from __future__ import annotations

import argparse

import numpy as np

from ernet_fast.data.layout import SUBTYPES
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.segment import compare_nuclei, nuclei

FIELDS = ((40, 460), (100, 230), (100, 460), (200, 230), (200, 460), (400, 230), (400, 460))
FIRST_SEED = 1000  # those below served to choose the settings and serve in tests


def detections(magnification: int, height: int, seeds: int) -> tuple[float, list[tuple[float, ...]]]:
    """Micrometres a pixel, and F1, precision, recall and count error of every patch."""
    found, mpp = [], 0.0
    for subtype in SUBTYPES:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            patch = generate_patch(subtype, magnification=magnification, size=(height, 230), seed=seed)
            mpp, true = patch.mpp, patch.nuclei
            centres = nuclei(patch.image, mpp=mpp).regions.position
            d = compare_nuclei(centres, true.position, true.axes.mean(axis=1), patch.nuclear_cover.shape)
            found.append((d.f1, d.precision, d.recall, d.count_error))
    return mpp, found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="patches of each of the eight types (default: 2)")
    seeds = parser.parse_args().seeds
    print("| magnification | um a pixel | patches | F1: mean (worst) | precision | recall | count error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for magnification, height in FIELDS:
        mpp, rows = detections(magnification, height, seeds)
        table = np.array(rows)
        f1, precision, recall, error = table.mean(axis=0)
        print(
            f"| {magnification}X | {mpp:.2f} | {len(rows)} | {f1:.2f} ({table[:, 0].min():.2f}) | {precision:.2f} "
            f"| {recall:.2f} | {100 * error:+.0f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
