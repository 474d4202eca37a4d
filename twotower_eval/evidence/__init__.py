"""Evidence from run folders: quality and speed at every operating point, paired and with intervals.

Claims judge it and reports show it; neither computes it again. Needs neither torch nor lm-eval.
"""

from twotower_eval.evidence.clean import CleanQuality, CleanSpeed, Flagged
from twotower_eval.evidence.costs import Costs
from twotower_eval.evidence.degenerate import Flags
from twotower_eval.evidence.measured import ArmsDifferError
from twotower_eval.evidence.pareto import Panel, TradeOff
from twotower_eval.evidence.points import Measured, PointKey, QualityPoint, TaskQuality
from twotower_eval.evidence.runs import Runs
from twotower_eval.evidence.samples import Sample
from twotower_eval.evidence.timing import SpeedPoint

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
