"""Keep the accuracy: fit a converted model to its original in closed form, from unlabelled data."""

from __future__ import annotations

from ilmconvert.calibration.procedure import Calibration, calibrate
from ilmconvert.calibration.report import CalibrationReport, SiteCalibration

__all__ = ["Calibration", "CalibrationReport", "SiteCalibration", "calibrate"]
