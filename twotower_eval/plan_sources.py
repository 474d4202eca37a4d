"""The models of a plan: what they are read from, and the commits behind those of the hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar

from twotower_eval.errors import UserError
from twotower_eval.plan import (
    CONTEXT_TOWER,
    Plan,
    RunPlan,
    SizingPlan,
    SpeedPlan,
    VerifyPlan,
    baseline_name,
    each_baseline,
    named_baselines,
)
from twotower_eval.plan_baselines import MODEL, NAME
from twotower_eval.sources import ENDPOINT, SHIPPED_PAIR, Source, is_repo, located, read_source


def model_source(plan: Plan | VerifyPlan) -> Source:
    """The model that a plan is about: the shipped miniature pair unless it names another."""
    given = SHIPPED_PAIR if plan.model is None else plan.model
    return read_source(given, plan.revision, trust_remote_code=bool(plan.trust_remote_code), attention=plan.attention)


def baseline_source(plan: Plan) -> Source | None:
    """The baseline's model; None where it is the candidate's own context tower."""
    if plan.baseline == CONTEXT_TOWER:
        return None
    return read_source(
        plan.baseline,
        plan.baseline_revision,
        trust_remote_code=bool(plan.baseline_trust_remote_code),
        attention=plan.baseline_attention or plan.attention,
    )


def arm_sources(plan: Plan) -> tuple[tuple[Source | None, str | None], ...]:
    """The model of the candidate and of every baseline, with the family that the plan chooses for it."""
    baselines = ((baseline_source(single), single.baseline_family) for single in each_baseline(plan))
    return (model_source(plan), plan.family), *baselines


def _refuse_unused(plan: Plan) -> None:
    """UserError for what has no effect on endpoints, or without one."""
    names = [plan.model or "", *(baseline_name(single) for single in each_baseline(plan))]
    served = [name.startswith(ENDPOINT) for name in names]
    for name in ("tokenizer", "request_timeout") if not any(served) else ():
        if getattr(plan, name) is not None:
            raise UserError(f"{name} is for endpoints, and no model here is one ({ENDPOINT}http://HOST:PORT/v1#NAME)")
    if all(served) and isinstance(plan.apply_chat_template, str):
        raise UserError(
            f"a server applies its own chat template, and {plan.apply_chat_template!r} names none of it: give "
            "apply_chat_template without a name"
        )
    for name in ("dtype", "devices") if all(served) else ():
        if getattr(plan, name) != next(field.default for field in dataclasses.fields(plan) if field.name == name):
            raise UserError(f"{name} has no effect on models behind a server: drop it")


D = TypeVar("D", RunPlan, SpeedPlan, VerifyPlan)


def chat_sources(plan: Plan) -> tuple[Source, ...]:
    """The model whose tokenizer the candidate reads with, then that of every baseline."""
    own = model_source(plan)
    return (own, *(baseline_source(single) or own for single in each_baseline(plan)))


class Check(Protocol):
    """Refuses a model by its small files (see ``engine.models.check_settings``), which nothing here can read."""

    def __call__(self, source: Source, family: str | None, *, device: str, reads_text: bool) -> None:
        """UserError for a model that could not be used."""


def check_checkpoints(plan: D, *, check: Check | None = None, silent: bool = False) -> D:
    """The plan with the commit of every model of the hub, whose files are then here.

    UserError for checkpoints that are not there and settings that have no effect on them, before anything heavy is
    imported; then, of ``check``, for whatever their small files show, before any weights are downloaded. ``silent``:
    downloads show no progress.
    """
    if not isinstance(plan, VerifyPlan):
        _refuse_unused(plan)
    elif (plan.model or "").startswith(ENDPOINT):
        raise UserError(f"verify looks at logits, and {plan.model} is behind a server, which gives texts")
    arms = ((model_source(plan), plan.family),) if isinstance(plan, VerifyPlan) else arm_sources(plan)
    found = [
        source and located(source, extent="settings", needs_config=family is None, silent=silent)
        for source, family in arms
    ]
    for one, (_, family), device in zip(found, arms, _arm_devices(plan), strict=True):
        if one is not None and check is not None:
            check(one, family, device=device, reads_text=not isinstance(plan, VerifyPlan))
    for one in filter(None, found):
        located(one, needs_config=False, silent=silent)
    return _pinned(plan, found)


def _arm_devices(plan: Plan | VerifyPlan) -> tuple[str, ...]:
    """The first device of the candidate and of every baseline, which may be ``auto``."""
    own = plan.devices[0]
    if isinstance(plan, VerifyPlan):
        return (own,)
    return own, *(single.baseline_device or own for single in each_baseline(plan))


def check_config(plan: SizingPlan, *, silent: bool = False) -> SizingPlan:
    """The plan with the commit of a config of the hub, which is then here."""
    if not is_repo(plan.config):
        return plan
    source = located(read_source(plan.config), extent="config", silent=silent)
    return dataclasses.replace(plan, config=f"{source.repo}@{source.commit}")


def _pinned(plan: D, sources: Sequence[Source | None]) -> D:
    """A plan that says which commits its models of the hub are, candidate first.

    Two commits of one name have it in their names, too.
    """
    hub = [one for one in sources if one is not None and one.kind == "hub"]
    alike = len({one.name for one in hub}) < len({(one.repo, one.commit) for one in hub})

    def pins(source: Source | None) -> tuple[str, str] | None:
        if source is None or source.repo is None or source.commit is None or source.kind != "hub":
            return None
        shown = source.commit if alike else source.revision
        return f"{source.repo}@{shown}" if shown else source.repo, source.commit

    candidate, *baselines = map(pins, sources)
    if candidate is not None:
        plan = dataclasses.replace(plan, model=candidate[0], revision=candidate[1])
    if isinstance(plan, VerifyPlan) or not any(baselines):
        return plan
    if plan.baselines is None:
        ((name, commit),) = filter(None, baselines)
        return dataclasses.replace(plan, baseline=name, baseline_revision=commit)
    tables = [
        {**table, **({} if pin is None else {MODEL: pin[0], "revision": pin[1], NAME: name})}
        for table, pin, (name, _) in zip(plan.baselines, baselines, named_baselines(plan), strict=True)
    ]
    return dataclasses.replace(plan, baselines=tuple(tables))
