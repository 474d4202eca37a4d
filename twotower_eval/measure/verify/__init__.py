"""The ``verify`` verb: is this checkpoint, on this machine, with these kernels, what it should be? Before measuring."""

from twotower_eval.measure.verify.run import verify

__all__ = ["verify"]
