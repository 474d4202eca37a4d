"""The ``size`` verb: times the parts of decoding at a size of model whose weights are not at hand."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from twotower_eval import store
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.config import NemotronHConfig, parse_config
from twotower_eval.engine.models.graphs import use_graphs
from twotower_eval.errors import UserError
from twotower_eval.measure.chosen import size_without_auto
from twotower_eval.measure.sizing.card import (
    CostCard,
    cut,
    describe,
    graphs_needed,
    make_card,
    measured_layers,
    refuse_if_too_large,
)
from twotower_eval.measure.sizing.items import (
    Item,
    Profile,
    Rig,
    even_profile,
    make_items,
    make_rigs,
    recorded_profiles,
)
from twotower_eval.measure.sizing.pairs import ForcedRouting, build_random_pair, steer, with_layers
from twotower_eval.measure.speed import costs
from twotower_eval.measure.speed.clock import CallClock, Devices, torch_threads
from twotower_eval.measure.speed.conditions import Captures, DevicePeak, device_peak, hint, refuse_uneven
from twotower_eval.measure.speed.schedule import RoundLoop, whole_rounds
from twotower_eval.names import config_name, plural
from twotower_eval.plan import SizingPlan
from twotower_eval.progress import Advance, Progress, SilentProgress, duration_text
from twotower_eval.records import (
    CONFIG_FILES,
    CostSample,
    RunManifest,
    SpeedPhase,
    Verb,
    derive_seed,
    launch_id_of,
    to_json,
)
from twotower_eval.resources import data_path
from twotower_eval.rules import chosen_line
from twotower_eval.sources import is_repo, located, read_source
from twotower_eval.store.environment import new_manifest
from twotower_eval.store.journal import now_text


@dataclass
class _Touched:
    """Distinct experts per layer and step of every item, counted off the clock when it first comes up."""

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
        self._launch_id = launch_id_of(writer.run.manifest.run_id, len({sample.launch_id for sample in earlier}) + 1)
        num_items = sum(map(len, groups))
        super().__init__(
            plan,
            progress,
            whole_s=whole_rounds(earlier, num_items),
            next_round=1 + max((s.round for s in earlier if s.phase == "measure"), default=-1),
            steps_per_round=num_items,
        )

    def run(self) -> None:
        """Warm up, report the estimated duration, and measure until both minimums are reached."""
        done = plural(self._num_done, "complete round")
        self._progress.note(f"{plural(self._steps_per_round, 'timed item')} per round; {done} so far")
        self._rounds()
        self._progress.note(f"{plural(self._num_done, 'round')}, {duration_text(self._timed_s)} on the clock")
        self._writer.event("measured", num_rounds=self._num_done, timed_s=self._timed_s)

    def _round(self, phase: SpeedPhase, number: int, advance: Advance) -> float:
        """Time every item once, items to compare close in time; the seconds on the clock."""
        order = random.Random(derive_seed(self._plan.seed, phase, number))
        timed_s = 0.0
        gc.collect()
        for group in order.sample(self._groups, len(self._groups)):
            for item in order.sample(group, len(group)):
                timed_s += self._time(item, phase, number)
                advance()
        return timed_s

    def _begun(self, item: Item) -> tuple[str, float]:
        """When the repetitions started, and their seconds."""
        repeat = item.make_ready()
        return now_text(), sum(costs.time_repeats(repeat, self._clock, item.num_repeats))

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


NOTES = (
    "RANDOM WEIGHTS: every figure is a cost of the model's size; its outputs mean nothing and are not kept.",
    "Experts were forced: shared (one set for all tokens of a row's block), half (half of a set in common), "
    "independent (each token its own). The AR step and the prefill were timed with independent ones.",
    "All rows of a batch have contexts of the same length and follow the same commits.",
)


def run(
    plan: SizingPlan,
    *,
    root: Path,
    resume: Path | None = None,
    progress: Progress | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Path:
    """Measure a config's costs; the run's folder.

    ``resume`` continues a run on the same machine by whole rounds. ``now`` gives seconds. UserError for whatever the
    user can mend, before anything is built where possible.
    """
    progress = progress or SilentProgress()
    plan, chosen = size_without_auto(plan)
    if chosen:
        progress.note(chosen_line(chosen))
    config = read_config(plan)
    parts = measured_layers(config.pattern, plan.layers)
    profiles = make_profiles(plan)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    if plan.cuda_graphs:
        refuse_uneven(plan.batch_sizes, plan.block_sizes)
    with torch_threads(plan.threads):
        patterns = ["".join(config.pattern[index] for index in part) for part in parts]
        card = make_card(plan, config, patterns, [_peak(device, dtype) for device in plan.devices], dtype)
        for line in describe(card):
            progress.note(line)
        refuse_if_too_large(card, plan, config, dtype)
        if text := hint(plan):
            progress.note(text)
        began_s = time.monotonic()
        progress.note("making the weights; this takes a while")
        rigs, routing = _build(plan, config, parts, dtype)
        progress.note(f"weights made in {duration_text(time.monotonic() - began_s)}")
        manifest = dataclasses.replace(_manifest(plan, rigs, resume), chosen=chosen)
        writer = store.create(root, manifest) if resume is None else store.resume(resume, manifest)
        with writer:
            for warning in writer.warnings:
                progress.note(f"warning: {warning}")
            items = make_items(plan, rigs, profiles)
            _journal_card(writer, card, profiles, num_items=sum(map(len, items)))
            clock = CallClock(Devices(plan.devices), now)
            captures = Captures([rig.pair.graphs for rig in rigs if rig.pair.graphs is not None], writer)
            Session(plan, writer, items, routing, clock, captures, progress).run()
            writer.finish()
    return writer.path


def read_config(plan: SizingPlan) -> NemotronHConfig:
    """Read the plan's config; UserError, naming the file, if it is invalid."""
    file = config_file(plan.config)
    data = read_json(file)
    try:
        config = parse_config(data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    longest = config.max_position_embeddings
    if longest is not None and plan.prompt_tokens > longest:
        raise UserError(f"prompt_tokens {plan.prompt_tokens}: {file} reads {longest} tokens at most")
    return config


def config_file(name: str) -> Path:
    """The config file of a name: its path, a folder with a ``config.json``, the name of a shipped one, or of the hub.

    UserError, listing the shipped names, if there is none.
    """
    for file in (Path(name), Path(name) / "config.json"):
        if file.is_file():
            return file
    shipped = {config_name(path.name): path for path in sorted(data_path("tasks", "configs").glob("*.json"))}
    if name in shipped:
        return shipped[name]
    if is_repo(name):
        return located(read_source(name), extent="config").files / CONFIG_FILES[0]
    raise UserError(
        f"{name!r} is neither a config.json, nor a folder with one, nor a shipped config; shipped are "
        f"{', '.join(shipped)}"
    )


def make_profiles(plan: SizingPlan) -> tuple[Profile, ...]:
    """Commit profiles for every block size, equal ones once; UserError for a rate that fits no block size."""
    unfit = [rate for rate in plan.tokens_per_nfe if rate > max(plan.block_sizes)]
    if unfit:
        raise UserError(f"{unfit[0]:g} tokens per NFE do not fit into blocks of {max(plan.block_sizes)}")
    recorded = None if plan.profile is None else store.load(Path(plan.profile))
    found: dict[tuple[int, int], Profile] = {}
    for size in plan.block_sizes:
        profiles = [even_profile(rate, size, plan.repeats) for rate in plan.tokens_per_nfe if rate <= size]
        if recorded is not None:
            profiles += recorded_profiles(recorded, size, plan.repeats, plan.seed)
        for profile in profiles:
            found.setdefault((size, profile.num_steps), profile)  # time depends on the number of calls
    return tuple(found.values())


def _peak(device: str, dtype: torch.dtype) -> DevicePeak:
    try:
        return device_peak(device, dtype)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here: {reason}") from error


def _build(
    plan: SizingPlan, config: NemotronHConfig, parts: Sequence[Sequence[int]], dtype: torch.dtype
) -> tuple[list[Rig], ForcedRouting]:
    """Build the largest set of layers, the others on the same weights, and force the routing of all."""
    try:
        pair = build_random_pair(
            cut(config, config.pattern[: len(parts[0])]),
            name=config_name(plan.config),
            dtype=dtype,
            devices=plan.devices,
            seed=plan.seed,
            share_towers=plan.share_towers,
        )
        routing = steer(pair, plan.seed)
        pairs = [pair, *(with_layers(pair, part) for part in parts[1:])]
        if plan.cuda_graphs:
            for each in pairs:
                use_graphs(each, routing.variant, graphs_needed(plan))
        return make_rigs(plan, pairs), routing
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{plan.config}: out of memory while building: take fewer --layers, --share-towers or smaller batches"
        ) from error


def _manifest(plan: SizingPlan, rigs: Sequence[Rig], resume: Path | None) -> RunManifest:
    # Runs from before this verb are continued under the verb that started them.
    verb: Verb = "size" if resume is None else store.load(resume).manifest.verb
    return new_manifest(
        verb,
        run_id=store.new_run_id(verb) if resume is None else resume.name,
        plan=plan,
        cells=[cell for rig in rigs for cell in rig.cells],
        devices=plan.devices,
        seeds={"run": plan.seed},
        notes=NOTES,
    )


def _journal_card(writer: store.RunWriter, card: CostCard, profiles: Sequence[Profile], *, num_items: int) -> None:
    """Journal what the report needs beside the costs: floors, sizes, and the profile of each number of steps."""
    writer.event("cost_card", card=to_json(card), num_items=num_items)
    for profile in profiles:
        writer.event(
            "profile",
            name=profile.name,
            block_size=profile.block_size,
            num_blocks=len(profile.blocks),
            num_steps=profile.num_steps,
        )
