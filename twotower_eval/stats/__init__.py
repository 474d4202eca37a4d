"""Statistics of retention and speedup: pure functions on arrays that return estimates with their intervals.

``paired`` turns scores into sums and bootstrap draws, ``quality`` into retention, ``flips`` into tests of flipped
answers; ``speedup`` handles timed calls, ``nulls`` the A/A gate. ``decide`` judges an estimate, ``power`` plans and
says how much is missing, ``costs`` predicts times from measured parts, ``granularity`` checks published percentages.
numpy and scipy only. No data is a ValueError, never 0.
"""

from twotower_eval.stats.costs import (
    CallCounts,
    CostTable,
    Explanation,
    PhaseCost,
    Prediction,
    break_even,
    explain,
    mean_time,
    median,
    needed_tokens_per_nfe,
    predict,
    predicted_speedup,
)
from twotower_eval.stats.decide import (
    DECISION_LEVEL,
    MIN_CALLS,
    MIN_CLUSTERS,
    MIN_ROUNDS,
    Comparison,
    Decision,
    Relation,
    decide,
    limits,
    too_few,
)
from twotower_eval.stats.figure import Figure
from twotower_eval.stats.flips import Flips, flips, mcnemar, sign_flip_test
from twotower_eval.stats.granularity import possible_counts, smallest_samples
from twotower_eval.stats.intervals import LEVEL, NUM_RESAMPLES, binomial_upper_bound, holm
from twotower_eval.stats.mean import mean_score
from twotower_eval.stats.nulls import NULL_OFFSET, NullLimits, half_width, is_off, off_nulls, widest_null
from twotower_eval.stats.paired import Draws, PairedScores, ScoreTable, draw_task_means
from twotower_eval.stats.power import (
    ASSUMED_ACCURACY,
    ASSUMED_DISCORDANCE,
    Needed,
    PlannedTask,
    PowerPlan,
    planned_stderr,
    power_plan,
    power_text,
    still_needed,
)
from twotower_eval.stats.quality import (
    EQUAL,
    bootstrap_stderr,
    difference,
    equal_by_construction,
    leave_one_out,
    linear_stderr,
    mean_of_ratios,
    num_discordant,
    num_lone_clusters,
    retention,
)
from twotower_eval.stats.speedup import (
    NULL_LEVEL,
    TimedCalls,
    geometric_speedup,
    per_device,
    resamples_launches,
    speedup,
)

__all__ = [
    "ASSUMED_ACCURACY",
    "ASSUMED_DISCORDANCE",
    "DECISION_LEVEL",
    "EQUAL",
    "LEVEL",
    "MIN_CALLS",
    "MIN_CLUSTERS",
    "MIN_ROUNDS",
    "NULL_LEVEL",
    "NULL_OFFSET",
    "NUM_RESAMPLES",
    "CallCounts",
    "Comparison",
    "CostTable",
    "Decision",
    "Draws",
    "Explanation",
    "Figure",
    "Flips",
    "Needed",
    "NullLimits",
    "PairedScores",
    "PhaseCost",
    "PlannedTask",
    "PowerPlan",
    "Prediction",
    "Relation",
    "ScoreTable",
    "TimedCalls",
    "binomial_upper_bound",
    "bootstrap_stderr",
    "break_even",
    "decide",
    "difference",
    "draw_task_means",
    "equal_by_construction",
    "explain",
    "flips",
    "geometric_speedup",
    "half_width",
    "holm",
    "is_off",
    "leave_one_out",
    "limits",
    "linear_stderr",
    "mcnemar",
    "mean_of_ratios",
    "mean_score",
    "mean_time",
    "median",
    "needed_tokens_per_nfe",
    "num_discordant",
    "num_lone_clusters",
    "off_nulls",
    "per_device",
    "planned_stderr",
    "possible_counts",
    "power_plan",
    "power_text",
    "predict",
    "predicted_speedup",
    "resamples_launches",
    "retention",
    "sign_flip_test",
    "smallest_samples",
    "speedup",
    "still_needed",
    "too_few",
    "widest_null",
]
