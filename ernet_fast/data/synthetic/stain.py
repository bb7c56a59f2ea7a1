"""Stain vectors and intensities, and the Beer-Lambert law that turns concentrations into an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STAINING = ("similar", "shifted")


@dataclass(frozen=True)
class StainProfile:
    """How one laboratory, on one day, stained and photographed a slide."""

    haematoxylin: tuple[float, float, float]  # optical density in R, G, B; made a unit vector
    eosin: tuple[float, float, float]  # the same
    strength: tuple[float, float] = (1.0, 1.0)  # factors on the concentrations of haematoxylin and eosin
    background: float = 240.0  # grey level of unstained glass, 0 ... 255

    def __post_init__(self) -> None:
        for name in ("haematoxylin", "eosin"):
            vector = np.asarray(getattr(self, name), dtype=np.float64)
            if vector.shape != (3,) or not np.all(np.isfinite(vector)) or np.any(vector < 0) or not np.any(vector > 0):
                raise ValueError(f"{name}={getattr(self, name)!r}; expected three optical densities >= 0, not all zero")
            object.__setattr__(self, name, tuple((vector / np.linalg.norm(vector)).tolist()))
        if len(self.strength) != 2 or not all(0 < value < np.inf for value in self.strength):
            raise ValueError(f"strength={self.strength!r}; expected two factors above 0")
        if not 0 < self.background <= 255:
            raise ValueError(f"background={self.background!r}; expected a grey level above 0 and up to 255")

    @property
    def stain_matrix(self) -> NDArray[np.float64]:
        """[3, 2]: optical density in R, G, B of a unit of haematoxylin (column 0) and of eosin (column 1)."""
        return np.array([self.haematoxylin, self.eosin]).T


# Mean direction and strength of each regime. "similar" lies between the published vectors of Ruifrok & Johnston
# (2001) and Macenko et al. (2009); "shifted" is what another laboratory's slides look like: fainter, bluer haematoxylin
# and stronger, redder eosin. Exposure is the same, as stain normalisation takes a known background for granted.
_REGIMES = {
    "similar": StainProfile((0.60, 0.72, 0.35), (0.20, 0.87, 0.45), (1.0, 1.0), 240.0),
    "shifted": StainProfile((0.65, 0.68, 0.34), (0.25, 0.83, 0.50), (0.60, 1.50), 240.0),
}
_DIRECTION_SPREAD = 0.025  # of each component of a stain vector between patients
_STRENGTH_SPREAD = 0.10  # of the logarithm
_BACKGROUND_SPREAD = 2.0  # grey levels


def sample_stain(rng: np.random.Generator, regime: str = "similar") -> StainProfile:
    """Draw one patient's staining around the mean of `regime` (``"similar"`` or ``"shifted"``)."""
    if regime not in _REGIMES:
        raise ValueError(f"regime={regime!r}; expected one of {', '.join(map(repr, _REGIMES))}")
    mean = _REGIMES[regime]
    vectors = np.maximum(mean.stain_matrix.T + _DIRECTION_SPREAD * rng.standard_normal((2, 3)), 0.01)
    strength = np.array(mean.strength) * np.exp(_STRENGTH_SPREAD * rng.standard_normal(2))
    background = float(np.clip(mean.background + _BACKGROUND_SPREAD * rng.standard_normal(), 200.0, 250.0))
    h, e = map(tuple, vectors.tolist())
    return StainProfile(h, e, tuple(strength.tolist()), background)


def beer_lambert(concentrations: NDArray[np.float32], stain: StainProfile) -> NDArray[np.float32]:
    """Transmitted intensity ``I = I0 exp(-S C)`` in grey levels [3, H, W]: C are the concentrations [2, H, W] times
    ``stain.strength``, S is ``stain.stain_matrix`` and I0 ``stain.background``.
    """
    matrix = (stain.stain_matrix * np.asarray(stain.strength)).astype(np.float32)
    density = matrix @ concentrations.reshape(2, -1)
    return (np.float32(stain.background) * np.exp(-density)).reshape(3, *concentrations.shape[1:])
