"""Does a parallel decoder keep its quality, and is it faster? Evaluation and timing of two-tower language models.

Names are resolved on first use, so that importing this package costs nothing and loads no torch.
"""

import sys
from typing import TYPE_CHECKING, Any

from twotower_eval.moved import MovedFinder

__version__ = "0.1.0"

if TYPE_CHECKING:
    from twotower_eval.engine.decoders import make_decoder
    from twotower_eval.engine.models import load_model
    from twotower_eval.engine.scorers import make_scorer
    from twotower_eval.engine.scorers.pieces import ScoreRequest
    from twotower_eval.records import DecoderSpec, Generation, Likelihood, Prompt

__all__ = [
    "DecoderSpec",
    "Generation",
    "Likelihood",
    "Prompt",
    "ScoreRequest",
    "__version__",
    "load_model",
    "make_decoder",
    "make_scorer",
]

_HOMES = {
    "DecoderSpec": "twotower_eval.records",
    "Generation": "twotower_eval.records",
    "Likelihood": "twotower_eval.records",
    "Prompt": "twotower_eval.records",
    "ScoreRequest": "twotower_eval.engine.scorers.pieces",
    "load_model": "twotower_eval.engine.models",
    "make_decoder": "twotower_eval.engine.decoders",
    "make_scorer": "twotower_eval.engine.scorers",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
    sys.meta_path.append(MovedFinder())
