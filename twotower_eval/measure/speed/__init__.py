"""Timing: cells of both arms in interleaved rounds, on prompts that are the same for all."""

from twotower_eval.measure.speed.launches import run

__all__ = ["run"]
