"""The ``verify`` verb: checks a checkpoint on this machine, with these kernels, before anything is measured."""

from twotower_eval.measure.verify.run import verify, without_model

__all__ = ["verify", "without_model"]
