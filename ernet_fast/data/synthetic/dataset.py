"""Writing a synthetic data set in the layout of BreakHis."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ernet_fast._optional import require
from ernet_fast.data.layout import SUBTYPES, image_path, magnifications_of, parse_name
from ernet_fast.data.splits import make_splits
from ernet_fast.data.synthetic.patch import generate_patch
from ernet_fast.data.synthetic.stain import STAINING, StainProfile, sample_stain

_FIRST_PATIENT = 90001  # slide numbers that BreakHis does not use
_README = """\
Synthetic images in the layout of BreakHis, drawn by ernet_fast.data.synthetic. They show no patient and no tissue.

patients {}, patches per patient and magnification {}, magnifications {}, size {},
seed {}, staining {}, split seed {}
"""


def write_breakhis_like(
    root: str | os.PathLike[str],
    *,
    patients: int = 24,
    patches_per_patient: int = 20,
    magnifications: int | Iterable[int] = (200,),
    size: tuple[int, int] = (224, 224),
    seed: int = 0,
    staining: str = "similar",
    split_seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic data set below `root`; ``BreakHis(root)`` reads it.

    Patients are benign and malignant in turn and go round the eight subtypes; each has one slide with stains of its
    own. A patch depends on `seed`, patient, magnification, number and stain alone, so a larger set contains a smaller
    one of similar staining. The folder appears when it is complete.

    Args:
        root: folder to write to; it may exist, but must not hold ``histology_slides`` yet.
        patients: number of patients; at least 2, and 14 or more for the default split into 5 folds.
        patches_per_patient: images of each patient at each magnification.
        magnifications: one or several of 40, 100, 200, 400.
        size: (height, width) in pixels; BreakHis itself has (460, 700).
        seed: of tissue and stains.
        staining: ``"similar"`` draws all stains around one mean; ``"shifted"`` stains the patients that
            ``BreakHis(root, seed=split_seed)`` puts into its test set as another laboratory would. The classes are
            stained alike in either case.
        split_seed: seed of that split.
        progress: called with (patches written, patches in all) after each.

    Returns:
        `root` as a path.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``root/histology_slides`` exists.
        ImportError: Pillow is missing.
    """
    root = Path(root)
    wanted = magnifications_of(magnifications)
    if not 2 <= patients <= 9999:
        raise ValueError(f"patients={patients}; expected 2 to 9999")
    if not 1 <= patches_per_patient <= 999:
        raise ValueError(f"patches_per_patient={patches_per_patient}; expected 1 to 999")
    if staining not in STAINING:
        raise ValueError(f"staining={staining!r}; expected one of {', '.join(map(repr, STAINING))}")
    if seed < 0:
        raise ValueError(f"seed={seed}; expected 0 or above")
    target = root / "histology_slides"
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists; choose another root, or remove it first")
    pil = require("PIL.Image", extra="train", purpose="writing synthetic images")
    cohort = _draw_cohort(patients, patches_per_patient, wanted, seed, staining, split_seed)
    patches = [(who, m, k) for who in cohort for m in wanted for k in range(1, patches_per_patient + 1)]
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".synthetic-", dir=root))

    def draw(patch: tuple[tuple[int, str, str, StainProfile], int, int]) -> None:
        (index, subtype, slide, stain), magnification, k = patch
        path = image_path(aside, subtype, slide, magnification, f"{k:03d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        origin = [seed, index, magnification, k]
        drawn = generate_patch(subtype, magnification=magnification, size=size, stain=stain, seed=origin)
        pil.fromarray(np.ascontiguousarray(drawn.image.transpose(1, 2, 0))).save(path, compress_level=3)

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(draw, patches), 1):
                if progress is not None:
                    progress(done, len(patches))
        settings = patients, patches_per_patient, wanted, size, seed, staining, split_seed
        (aside / "README.txt").write_text(_README.format(*settings), encoding="utf-8")
        aside.chmod(0o755)  # temporary folders are private
        os.rename(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return root


def _draw_cohort(
    patients: int, patches: int, magnifications: tuple[int, ...], seed: int, staining: str, split_seed: int
) -> list[tuple[int, str, str, StainProfile]]:
    """Number, subtype, slide and stain of each patient."""
    kinds = [[code for code, kind in SUBTYPES.items() if kind.malignant == malignant] for malignant in (0, 1)]
    subtypes = [kinds[index % 2][index // 2 % len(kinds[index % 2])] for index in range(patients)]
    slides = [f"14-{_FIRST_PATIENT + index}" for index in range(patients)]
    shifted: set[str] = set()
    if staining == "shifted":
        images = [
            parse_name(image_path(Path(), subtype, slide, magnification, f"{number:03d}"))
            for subtype, slide in zip(subtypes, slides, strict=True)
            for magnification in magnifications
            for number in range(1, patches + 1)
        ]
        shifted = {sample.slide for sample in make_splits(images, seed=split_seed).select(images, "test")}
    stains = [
        sample_stain(np.random.default_rng([seed, index]), "shifted" if slide in shifted else "similar")
        for index, slide in enumerate(slides)
    ]
    return list(zip(range(patients), subtypes, slides, stains, strict=True))
