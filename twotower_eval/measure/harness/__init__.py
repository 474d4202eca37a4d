"""Evaluation: cells made from a plan, answered through the lm-eval adapter, journalled, scored."""

from twotower_eval.measure.harness.run import run, score_journal, timed_tasks

__all__ = ["run", "score_journal", "timed_tasks"]
