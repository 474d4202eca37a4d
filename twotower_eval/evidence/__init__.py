"""Evidence from run folders: quality and speed at every operating point, paired and with intervals.

Claims judge it and reports show it; neither computes it again. Needs neither torch nor lm-eval.
"""

from twotower_eval.evidence.points import Measured, PointKey, QualityPoint, TaskQuality
from twotower_eval.evidence.runs import Runs
from twotower_eval.evidence.timing import SpeedPoint

__all__ = ["Measured", "PointKey", "QualityPoint", "Runs", "SpeedPoint", "TaskQuality"]
