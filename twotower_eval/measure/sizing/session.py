"""One launch of a sizing run: every item once a round, in an order of its own, warm-up rounds first."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from twotower_eval import store
from twotower_eval.errors import UserError
from twotower_eval.measure.sizing.items import Item
from twotower_eval.measure.sizing.pairs import ForcedRouting
from twotower_eval.measure.speed import phases
from twotower_eval.measure.speed.captures import Captures
from twotower_eval.measure.speed.clock import CallClock
from twotower_eval.measure.speed.loop import RoundLoop, whole_rounds
from twotower_eval.plan import SizingPlan
from twotower_eval.progress import Advance, Progress, duration_text
from twotower_eval.records import CostSample, SpeedPhase, derive_seed
from twotower_eval.store.journal import now_text


@dataclass
class _Touched:
    """Distinct experts per layer and step of every item, counted off the clock the first time it comes up."""

    routing: ForcedRouting
    counts: dict[Item, float | None]

    def of(self, item: Item) -> float | None:
        if item not in self.counts:
            self.routing.count_touched()
            repeat = item.make_ready()
            with torch.inference_mode():
                repeat()
            self.counts[item] = self.routing.mean_touched()
        return self.counts[item]


class Session(RoundLoop):
    """One launch: its warm-up and its rounds."""

    def __init__(
        self,
        plan: SizingPlan,
        writer: store.RunWriter,
        groups: Sequence[Sequence[Item]],
        routing: ForcedRouting,
        clock: CallClock,
        captures: Captures,
        progress: Progress,
    ) -> None:
        self._plan, self._writer, self._groups, self._clock = plan, writer, groups, clock
        self._routing, self._captures = routing, captures
        self._touched = _Touched(routing, {})
        earlier = writer.run.costs
        self._launch_id = f"{writer.run.manifest.run_id}/{len({sample.launch_id for sample in earlier}) + 1}"
        num_items = sum(map(len, groups))
        super().__init__(
            plan,
            progress,
            whole_s=whole_rounds(earlier, num_items),
            next_round=1 + max((s.round for s in earlier if s.phase == "measure"), default=-1),
            steps_per_round=num_items,
        )

    def run(self) -> None:
        """Warm up, say how long it will take, and measure until there is enough."""
        self._progress.note(f"{self._steps_per_round} timed items a round, {self._num_done} whole rounds are there")
        self._rounds()
        self._progress.note(f"{self._num_done} rounds, {duration_text(self._timed_s)} on the clock")
        self._writer.event("measured", num_rounds=self._num_done, timed_s=self._timed_s)

    def _round(self, phase: SpeedPhase, number: int, advance: Advance) -> float:
        """Every item once; what is compared with each other lies close in time. Seconds on the clock."""
        order = random.Random(derive_seed(self._plan.seed, phase, number))
        timed_s = 0.0
        gc.collect()
        for group in order.sample(self._groups, len(self._groups)):
            for item in order.sample(group, len(group)):
                timed_s += self._time(item, phase, number)
                advance()
        return timed_s

    def _begun(self, item: Item) -> tuple[str, float]:
        """When the repetitions began, and their seconds."""
        repeat = item.make_ready()
        return now_text(), sum(phases.time_repeats(repeat, self._clock, item.num_repeats))

    def _time(self, item: Item, phase: SpeedPhase, number: int) -> float:
        self._routing.kind = item.routing
        try:
            touched = self._touched.of(item)
            what = f"{item.part}, batch size {item.batch_size}, {item.pattern}"
            started_at, wall_s = self._captures.outside(phase, number, what, partial(self._begun, item))
        except torch.OutOfMemoryError as error:
            raise UserError(f"{item.part}, batch {item.batch_size}: out of memory: take smaller batches") from error
        sample = CostSample(
            cell=item.cell_id,
            launch_id=self._launch_id,
            round=number,
            phase=phase,
            part=item.part,
            replica=item.replica,
            batch_size=item.batch_size,
            context_tokens=self._plan.prompt_tokens,
            block_size=item.block_size,
            num_repeats=item.num_repeats,
            wall_s=wall_s,
            started_at=started_at,
            routing=item.routing,
            num_experts_touched=touched,
            pattern=item.pattern,
            num_steps=item.num_steps,
        )
        self._writer.append(sample)
        return wall_s
