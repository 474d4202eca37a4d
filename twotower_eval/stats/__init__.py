"""Statistics of retention and speedup: pure functions on arrays that return estimates with their intervals.

``paired`` turns scores into sums and bootstrap draws, ``quality`` into retention, ``flips`` into tests of flipped
answers; ``speedup`` handles timed calls. numpy and scipy only. No data is a ValueError, never 0.
"""

from twotower_eval.stats.flips import Flips, flips, mcnemar, sign_flip_test
from twotower_eval.stats.intervals import LEVEL, NUM_RESAMPLES, binomial_upper_bound, holm
from twotower_eval.stats.paired import Draws, PairedScores, ScoreTable, draw_task_means
from twotower_eval.stats.quality import (
    bootstrap_stderr,
    difference,
    leave_one_out,
    linear_stderr,
    mean_of_ratios,
    mean_score,
    num_discordant,
    num_lone_clusters,
    retention,
)
from twotower_eval.stats.speedup import NULL_LEVEL, TimedCalls, geometric_speedup, resamples_launches, speedup

__all__ = [
    "LEVEL",
    "NULL_LEVEL",
    "NUM_RESAMPLES",
    "Draws",
    "Flips",
    "PairedScores",
    "ScoreTable",
    "TimedCalls",
    "binomial_upper_bound",
    "bootstrap_stderr",
    "difference",
    "draw_task_means",
    "flips",
    "geometric_speedup",
    "holm",
    "leave_one_out",
    "linear_stderr",
    "mcnemar",
    "mean_of_ratios",
    "mean_score",
    "num_discordant",
    "num_lone_clusters",
    "resamples_launches",
    "retention",
    "sign_flip_test",
    "speedup",
]
