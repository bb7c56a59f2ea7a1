"""The pictures of docs/gallery.md, from real tissue: `python bench/gallery.py` (needs the images of ERNET_TEST_DATA).
`python bench/gallery.py runs/demo/report.html` makes that of a report instead (needs chromium).

BreakHis: Spanhol, Oliveira, Petitjean, Heutte, IEEE TBME 63(7), 2016, CC BY 4.0; cropped, normalised, saved as JPEG.
CMU-1-Small-Region.svs: CC0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ernet_fast.stain import MacenkoNormalizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ERNET_TEST_DATA", ROOT.parent / "shared" / "data"))
PICTURES = ROOT / "docs" / "images"
SIDE, GAP, LINE = 300, 10, 30  # pixels: of a crop, between crops, of a line of text
TARGET = "SOB_M_DC-14-11031-200-903"
TISSUE = [
    "SOB_B_TA-14-13200-200-903", "SOB_M_PC-14-15687B-200-903", "SOB_M_DC-14-10926-200-903",
    "SOB_M_PC-14-12465-200-903",
]  # fmt: skip
GREY = "SOB_B_F-14-14134E-200-903"  # whose glass is darker than Io


def patch(name: str) -> np.ndarray:
    """The middle of a BreakHis image [H, W, 3], enlarged to SIDE x SIDE."""
    (path,) = (DATA / "BreaKHis_tiny").rglob(f"{name}.*")
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def sheet(rows: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> Image.Image:
    """Rows of named pictures, each row under its heading."""
    widest = max(len(row) for _, row in rows)
    height = len(rows) * (SIDE + 2 * LINE + GAP)
    page = Image.new("RGB", (widest * (SIDE + GAP) + GAP, height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    for r, (heading, row) in enumerate(rows):
        y = r * (SIDE + 2 * LINE + GAP) + GAP
        draw.text((GAP, y), heading, "black", font)
        for c, (name, picture) in enumerate(row):
            x = GAP + c * (SIDE + GAP)
            page.paste(Image.fromarray(picture), (x, y + LINE))
            draw.text((x, y + LINE + SIDE + 2), name, "#444444", font)
    return page


def normalized(image: np.ndarray, target: np.ndarray, io: float = 240) -> np.ndarray:
    """The image with the target's stains."""
    normalizer = MacenkoNormalizer(Io=io)
    normalizer.fit(target)
    return np.asarray(normalizer(image))


def before_after() -> Image.Image:
    """Four patients, as they were scanned and with the stains of one target."""
    target, images = patch(TARGET), {name.split("-")[2]: patch(name) for name in TISSUE}
    after = {name: normalized(image, target) for name, image in images.items()}
    return sheet(
        [
            ("as scanned", [*images.items()]),
            ("with the stains of the target, at the right", [*after.items(), ("target: 11031", target)]),
        ]
    )


def choices() -> Image.Image:
    """One patch with several Io, and with several targets; a patch that comes out badly."""
    image, target, grey = patch(TISSUE[0]), patch(TARGET), patch(GREY)
    eosin, pale = patch("SOB_M_LC-14-16196-200-903"), patch("SOB_B_TA-14-19854C-200-903")
    ios = [(f"Io = {io}", normalized(image, target, io)) for io in (255, 240, 220, 200)]
    targets = [
        ("target: nearly all eosin", eosin), ("with it", normalized(image, eosin)), ("target: pale, few nuclei", pale),
        ("with it", normalized(image, pale)),
    ]  # fmt: skip
    dark = [(f"Io = {io}", normalized(grey, target, io)) for io in (240, 220, 200)]
    return sheet(
        [
            ("Io, with a good target", [("as scanned", image), *ios]),
            ("targets that are none, with Io = 240", [("as scanned", image), *targets]),
            ("glass that is darker than Io", [("as scanned", grey), *dark]),
        ]
    )


def report_page(page: str) -> Image.Image:
    """A report of `ernet-fast demo` or `train` as a browser shows it, in columns side by side; wants chromium."""
    width, most, columns = 1000, 9000, 3
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        options = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{most}")
        address = Path(page).resolve().as_uri()
        subprocess.run(["chromium", *options, f"--screenshot={shot}", address], check=True, capture_output=True)
        pixels = np.asarray(Image.open(shot).convert("RGB"))
    written = np.flatnonzero((pixels != pixels[-1, -1]).any(axis=(1, 2)))[-1] + 1  # what follows is empty
    height = -(-int(written) // columns)
    canvas = Image.new("RGB", (columns * width, height), tuple(pixels[-1, -1]))
    for column in range(columns):
        canvas.paste(
            Image.fromarray(pixels[column * height : min(written, (column + 1) * height)]), (column * width, 0)
        )
    return canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    pages = [("report", report_page(page)) for page in sys.argv[1:]]
    for name, picture in pages or (("tissue", before_after()), ("choices", choices())):
        picture.save(PICTURES / f"{name}.jpg", quality=88, optimize=True)
        print(PICTURES / f"{name}.jpg", picture.size)
