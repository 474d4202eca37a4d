"""The ``verify`` verb: checks a checkpoint on this machine, with these kernels, before anything is measured."""

from twotower_eval.measure.verify.run import verify

__all__ = ["verify"]
