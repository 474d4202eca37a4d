"""Does a parallel decoder keep its quality, and is it faster? Evaluation and timing of two-tower language models.

Names are resolved on first use, so that importing this package costs nothing and loads no torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from twotower_eval.moved import MovedFinder, Room
from twotower_eval.version import __version__

if TYPE_CHECKING:
    from twotower_eval.api import Run, audit, compare, evaluate, judge, load_run, report, size, time, verify
    from twotower_eval.api.comparison import Comparison
    from twotower_eval.api.shown import Page
    from twotower_eval.engine.decoders import make_decoder
    from twotower_eval.engine.models import load_model
    from twotower_eval.engine.scorers import make_scorer
    from twotower_eval.engine.scorers.pieces import ScoreRequest
    from twotower_eval.errors import NoEstimate, UserError
    from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
    from twotower_eval.records import DecoderSpec, Estimate, Generation, Likelihood, Prompt, Verdict

__all__ = [
    "Comparison",
    "DecoderSpec",
    "Estimate",
    "Generation",
    "Likelihood",
    "NoEstimate",
    "Page",
    "Prompt",
    "Run",
    "RunPlan",
    "ScoreRequest",
    "SizingPlan",
    "SpeedPlan",
    "UserError",
    "Verdict",
    "VerifyPlan",
    "__version__",
    "audit",
    "compare",
    "evaluate",
    "judge",
    "load_model",
    "load_run",
    "make_decoder",
    "make_scorer",
    "report",
    "size",
    "time",
    "verify",
]

_HOMES = {
    "Comparison": "twotower_eval.api.comparison",
    "DecoderSpec": "twotower_eval.records",
    "Estimate": "twotower_eval.records",
    "Generation": "twotower_eval.records",
    "Likelihood": "twotower_eval.records",
    "NoEstimate": "twotower_eval.errors",
    "Page": "twotower_eval.api.shown",
    "Prompt": "twotower_eval.records",
    "Run": "twotower_eval.api",
    "RunPlan": "twotower_eval.plan",
    "ScoreRequest": "twotower_eval.engine.scorers.pieces",
    "SizingPlan": "twotower_eval.plan",
    "SpeedPlan": "twotower_eval.plan",
    "UserError": "twotower_eval.errors",
    "Verdict": "twotower_eval.records",
    "VerifyPlan": "twotower_eval.plan",
    "audit": "twotower_eval.api",
    "compare": "twotower_eval.api",
    "evaluate": "twotower_eval.api",
    "judge": "twotower_eval.api",
    "load_model": "twotower_eval.engine.models",
    "load_run": "twotower_eval.api",
    "make_decoder": "twotower_eval.engine.decoders",
    "make_scorer": "twotower_eval.engine.scorers",
    "report": "twotower_eval.api",
    "size": "twotower_eval.api",
    "time": "twotower_eval.api",
    "verify": "twotower_eval.api",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing an old path, ``twotower_eval.report``, puts that room into its package; never over a function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, Room)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
    sys.meta_path.append(MovedFinder())
