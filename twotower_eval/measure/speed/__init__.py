"""Timing: cells of both arms in interleaved rounds, on the same prompts for all."""

from twotower_eval.measure.speed.launches import run

__all__ = ["run"]
