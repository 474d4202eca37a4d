"""The ``size`` verb: what the parts of decoding cost at a size of model whose weights are not at hand.

Costs only: nothing that such a model says means anything. Interleaved rounds as for real checkpoints, the AR step
twice in each for the A/A null; a launch that goes on begins a new round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from twotower_eval import store
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.config import NemotronHConfig, parse_config
from twotower_eval.engine.models.graphs import use_graphs
from twotower_eval.errors import UserError
from twotower_eval.measure.sizing.card import (
    CostCard,
    cut,
    describe,
    graphs_needed,
    make_card,
    measured_layers,
    refuse_if_too_large,
)
from twotower_eval.measure.sizing.commits import Profile, even_profile, recorded_profiles
from twotower_eval.measure.sizing.items import Rig, make_items, make_rigs
from twotower_eval.measure.sizing.pairs import ForcedRouting, build_random_pair, steer, with_layers
from twotower_eval.measure.sizing.session import Session
from twotower_eval.measure.speed.captures import Captures, hint, refuse_uneven
from twotower_eval.measure.speed.clock import CallClock, Devices, torch_threads
from twotower_eval.measure.speed.peak import DevicePeak, device_peak
from twotower_eval.names import config_name
from twotower_eval.plan import SizingPlan, data_path
from twotower_eval.progress import Progress, SilentProgress, duration_text
from twotower_eval.records import RunManifest, Verb, to_json
from twotower_eval.store.environment import new_manifest

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
    """Measure a config's costs and return the run's folder.

    ``resume`` goes on with a run on the same machine by whole rounds. ``now`` gives seconds. UserError for whatever
    the user can mend, before anything is built where it can be known by then.
    """
    progress = progress or SilentProgress()
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
        if said := hint(plan):
            progress.note(said)
        began_s = time.monotonic()
        progress.note("making the weights: nothing else is printed until they are there")
        rigs, routing = _build(plan, config, parts, dtype)
        progress.note(f"weights made in {duration_text(time.monotonic() - began_s)}")
        manifest = _manifest(plan, rigs, resume)
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
    """The config that the plan names; UserError with the file's name if it is none."""
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
    """The file that is meant: by its path, by a folder that holds a ``config.json``, or by the name of a shipped one.

    UserError with the shipped names where there is none.
    """
    for file in (Path(name), Path(name) / "config.json"):
        if file.is_file():
            return file
    shipped = {config_name(path.name): path for path in sorted(data_path("tasks", "configs").glob("*.json"))}
    if name not in shipped:
        raise UserError(
            f"{name!r} is neither a config.json, nor a folder with one, nor a shipped config; shipped are "
            f"{', '.join(shipped)}"
        )
    return shipped[name]


def make_profiles(plan: SizingPlan) -> tuple[Profile, ...]:
    """Commit profiles for every block size, equal ones once; UserError where a rate fits no block size."""
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
            found.setdefault((size, profile.num_steps), profile)  # time follows the number of calls
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
    """The largest part with weights of its own, the others on the same ones; forced routing attached to all."""
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
    # Runs from before this verb go on under the one that began them.
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
    """What the report needs beside the costs: floors, sizes, and which profile a number of steps stands for."""
    writer.event("cost_card", card=to_json(card), num_items=num_items)
    for profile in profiles:
        writer.event(
            "profile",
            name=profile.name,
            block_size=profile.block_size,
            num_blocks=len(profile.blocks),
            num_steps=profile.num_steps,
        )
