"""A trained network on images and slides without labels. Needs the extra `train`, for slides also `slides`."""

from __future__ import annotations

from ernet_fast.predict.files import Predicted, predict_files
from ernet_fast.predict.slide import SlidePrediction, predict_slide
from ernet_fast.predict.trained import TrainedNetwork

__all__ = ["Predicted", "SlidePrediction", "TrainedNetwork", "predict_files", "predict_slide"]
