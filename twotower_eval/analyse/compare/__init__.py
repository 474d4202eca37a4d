"""Evidence from run folders: quality and speed at every operating point, paired and with intervals.

Claims judge it and reports show it; neither computes it again. Needs neither torch nor lm-eval.
"""

from twotower_eval.analyse.compare.clean import CleanQuality, CleanSpeed, Flagged, Flags
from twotower_eval.analyse.compare.costs import Costs
from twotower_eval.analyse.compare.documents import Sample
from twotower_eval.analyse.compare.figures import ArmsDifferError, Measured
from twotower_eval.analyse.compare.points import PointKey, QualityPoint, TaskQuality
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.tradeoff import Panel, TradeOff

__all__ = [
    "ArmsDifferError",
    "CleanQuality",
    "CleanSpeed",
    "Costs",
    "Flagged",
    "Flags",
    "Measured",
    "Panel",
    "PointKey",
    "QualityPoint",
    "Runs",
    "Sample",
    "SpeedPoint",
    "TaskQuality",
    "TradeOff",
]
