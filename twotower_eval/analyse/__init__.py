"""Reading runs: statistics, comparisons, claims and reports. It needs neither torch nor lm-eval."""
