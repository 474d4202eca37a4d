"""What a size of model costs without its weights: steps of random weights, timed beside their floors."""

from twotower_eval.measure.sizing.run import run

__all__ = ["run"]
