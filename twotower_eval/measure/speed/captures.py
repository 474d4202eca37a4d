"""Steps from CUDA graphs on the clock: in both arms or in none, and never a capture inside a figure.

A graph is captured when a step of its sizes is first asked for, which takes longer than what is timed. Warm-up rounds
meet the sizes of the measured ones. Where one is new nevertheless (sampled answers end elsewhere in every round, or
there was no warm-up) the timing is noted and taken again. Graphs in use are never given up: as many are kept as there
can be sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from twotower_eval.decoder_settings import block_sizes
from twotower_eval.engine.models.arms import give_graphs
from twotower_eval.engine.models.fixed import MAX_NEW
from twotower_eval.engine.models.graphs import StepGraphs
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.costs import REPEATS
from twotower_eval.measure.speed.lanes import Lane
from twotower_eval.measure.speed.workloads import Calls
from twotower_eval.plan import SizingPlan, SpeedPlan
from twotower_eval.records import SpeedPhase
from twotower_eval.store import RunWriter

Timing = TypeVar("Timing")
MAX_ATTEMPTS = 5  # the same prompts ask for the same sizes, so that the second has all it needs


class Captures:
    """The steps that a run's graphs have made, and timings without any of them; nothing to do without graphs."""

    def __init__(self, graphs: Sequence[StepGraphs], writer: RunWriter) -> None:
        self._graphs, self._writer = graphs, writer

    @property
    def num_made(self) -> int:
        """Steps made so far."""
        return sum(graphs.num_made for graphs in self._graphs)

    def outside(self, phase: SpeedPhase, number: int, what: str, measure: Callable[[], Timing]) -> Timing:
        """What ``measure`` gives when no step is made meanwhile; warm-ups and probes are as they come."""
        for _ in range(MAX_ATTEMPTS):
            before = self.num_made
            timing = measure()
            num_made = self.num_made - before
            if phase != "measure" or not num_made:
                return timing
            self._writer.event("timed_again", what=what, round=number, num_captured=num_made)
        raise UserError(f"{what}: every attempt asks for CUDA graphs of new sizes: drop --cuda-graphs")


def hint(plan: SpeedPlan | SizingPlan) -> str | None:
    """What to say where a GPU is given the kernels of a step one by one: its small steps then last as long as the host
    needs for that, in both arms."""
    if plan.cuda_graphs or not any(device.startswith("cuda") for device in plan.devices):
        return None
    return (
        "without --cuda-graphs small steps last as long as the host needs to launch their kernels, in both arms "
        "(on one H200 24 ms for an AR step instead of 2.4)"
    )


def refuse_uneven(batch_sizes: Iterable[int], block_sizes: Iterable[int]) -> None:
    """UserError where the steps of one token would come from graphs and those of a block would not."""
    rows, width = max(batch_sizes), max(block_sizes, default=1)
    if rows * width > MAX_NEW:
        raise UserError(
            f"batch size {rows} with blocks of {width} makes steps of {rows * width} tokens, and CUDA graphs serve "
            f"{MAX_NEW}: graphs in one arm alone would handicap the other: take smaller ones, or drop --cuda-graphs"
        )


def graphs_for(
    plan: SpeedPlan, calls: Calls, lanes: Mapping[int, Sequence[Lane]], models: tuple[Model, Model]
) -> tuple[StepGraphs, ...]:
    """Both arms' graphs, as many as this plan's prompts and budgets can ask for; none unless the plan wants them."""
    if not plan.cuda_graphs:
        return ()
    longest_prompt = max(
        len(ids) for of_size in lanes.values() for lane in of_size for call in lane.ids.values() for ids in call
    )
    budget = max(call.max_new_tokens for of_size in calls.values() for call in of_size)
    # The last block may go beyond the budget, and parts timed alone go on from there.
    beyond = (max(REPEATS.values()) + 2) * max(block_sizes(plan), default=1)
    longest = longest_prompt + budget + beyond
    return give_graphs(models, max_rows=max(plan.batch_sizes), block_sizes=block_sizes(plan), longest=longest)
