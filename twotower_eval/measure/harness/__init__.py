"""Evaluation: cells made from a plan, answered through the lm-eval adapter, journalled and scored."""

from twotower_eval.measure.harness.jobs import Prepared, prepare
from twotower_eval.measure.harness.prompts import timed_tasks
from twotower_eval.measure.harness.run import answer, run, score_journal, write_lm_files

__all__ = ["Prepared", "answer", "prepare", "run", "score_journal", "timed_tasks", "write_lm_files"]
