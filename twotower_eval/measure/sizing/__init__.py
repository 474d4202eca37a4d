"""The costs of a size of model without its weights: steps of random weights, timed beside their floors."""

from twotower_eval.measure.sizing.run import run

__all__ = ["run"]
