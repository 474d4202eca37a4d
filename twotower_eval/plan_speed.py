"""What a plan of timing has beside a plan of scoring: rounds, workloads, and how servers are sent requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

from twotower_eval.errors import UserError
from twotower_eval.plan_baselines import OfTwoArms, each_baseline
from twotower_eval.plan_fields import check_at_least
from twotower_eval.sources import ENDPOINT


class OfSpeed(OfTwoArms):
    """A plan of timing."""

    samples: int | None
    batch_sizes: tuple[int, ...]
    request_rates: tuple[float, ...] | None
    arrivals: Literal["poisson", "constant"] | None
    workload: Literal["fixed", "answer"]
    prompt_tokens: int | None
    new_tokens: int | None


def all_served(plan: OfSpeed) -> bool:
    """Whether every model of a plan is behind a server."""
    singles: Sequence[OfTwoArms] = each_baseline(cast(Any, plan))
    return (plan.model or "").startswith(ENDPOINT) and all(single.serves_baseline for single in singles)


def check_speed(plan: OfSpeed) -> None:
    """UserError for numbers out of bounds, and for settings that contradict each other or have no effect."""
    of_plan: Any = plan
    names = ("batch_sizes", "prompt_tokens", "new_tokens", "num_prompts", "min_rounds", "threads", "launches")
    check_at_least(of_plan, 1, *names)
    check_at_least(of_plan, 0, "min_seconds", "warmup_rounds", "probes")
    _check_rates(plan)
    if plan.samples not in (None, 1):
        raise UserError(f"speed times one sample a round: samples can be 1 only, not {plan.samples}")
    if plan.workload == "answer" and plan.prompt_tokens is not None:
        raise UserError("prompt_tokens has no effect on the answer workload: drop it or take workload fixed")
    if plan.workload == "fixed" and plan.new_tokens is None:
        raise UserError("the fixed workload needs new_tokens: say how many tokens each prompt shall produce")


def _check_rates(plan: OfSpeed) -> None:
    """UserError for request rates that no server is sent, or that say nothing."""
    rates = plan.request_rates
    if rates is None:
        if plan.arrivals is not None:
            raise UserError("arrivals has no effect without request_rates: drop it, or give both")
        return
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"request_rates must be above 0 requests a second, not {', '.join(map(str, rates)) or 'none'}")
    if plan.batch_sizes != (1,):
        raise UserError("request_rates and batch_sizes (concurrency) are two ways to load a server: give one of them")
    if not all_served(plan):
        raise UserError("request_rates are for servers: name an endpoint for every model, or take --batch-sizes")
