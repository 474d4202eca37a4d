"""How an interval came about, in words."""

from __future__ import annotations

from twotower_eval.records import Estimate, Method

EQUAL = "equal by construction: one computation scores both arms"


def method_text(found: Estimate) -> str:
    """``paired clustered bootstrap, 10,000 resamples, or linearised t interval where wider``."""
    return _text(found.method, found.n) if isinstance(found.method, Method) else found.method


def method_line(found: Estimate) -> str:
    """The same as the beginning of a sentence."""
    text = method_text(found)
    return text[:1].upper() + text[1:]


def _text(method: Method, n: int) -> str:
    if method.function is not None:
        return _function_text(method)
    text = _kind_text(method, n)
    if method.num_scoring is not None:
        text += f", exact bound where the candidate scores in {method.num_scoring} of {n} clusters"
    if method.widened:
        text += ", widened to the exact bound"
    if method.num_tasks is not None:
        text = f"mean over {method.num_tasks} tasks, {text}"
    if method.moved_out:
        text += ", moved out for calls that were not timed"
    if method.devices is not None:
        text += f", times {method.devices[0]} / {method.devices[1]} devices"
    return text


def _function_text(method: Method) -> str:
    text = f"clustered bootstrap through {method.function}, {method.num_resamples:,} resamples"
    text += ", or jackknife where wider" if method.jackknife else ""
    return text if method.num_tasks is None else f"mean over {method.num_tasks} tasks, each by a {text}"


def _kind_text(method: Method, n: int) -> str:
    drawn = f"{method.num_resamples or 0:,} resamples"
    match method.kind:
        case "equal_by_construction":
            return EQUAL
        case "exact_binomial":
            return "exact binomial interval"
        case "exact_bound":
            return f"exact binomial bound, {method.num_differing} of {n} clusters discordant"
        case "exact_mcnemar":
            return "exact McNemar"
        case "sign_flips":
            return f"cluster sign flips, {drawn}"
        case "paired_bootstrap":
            return f"paired clustered bootstrap, {drawn}, or linearised t interval where wider"
        case "clustered_bootstrap" | "function_bootstrap":
            return f"clustered bootstrap, {drawn}, or linearised t interval where wider"
        case "crossed_bootstrap":
            of = f"{method.num_drawn} {method.drawn}" + (f" x {method.num_calls} calls" if method.num_calls else "")
            return f"crossed paired bootstrap of {of}, {drawn}, t interval on the log, corrected for skewness"
        case "round_bootstrap":
            return "bootstrap over rounds, Student tails"
        case "t_of_clusters":
            return "t interval over clusters, corrected for skewness"
        case "t_of_logs":
            return "t interval on the log"
        case "t_of_log_ratios":
            return f"mean of {n} log ratios, t interval"
        case "t_of_times":
            return f"mean of {n}, t interval corrected for skewness, its low end on the log scale"
        case "median":
            return f"median of {n}, order-statistic interval"
        case "range_of_ratios":
            return f"range of {n} ratios"
