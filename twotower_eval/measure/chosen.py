"""Plans with ``auto`` in them: what it becomes for these checkpoints on this machine, with the reasons.

A run's manifest holds the plan that came out, so that a resumed run is never measured in another way unasked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twotower_eval.decoder_settings import USUAL
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan, each_baseline, named_baselines
from twotower_eval.plan_baselines import PREFIX
from twotower_eval.plan_sources import baseline_source, model_source
from twotower_eval.records import AUTO, Arm, Chosen, ChosenReason
from twotower_eval.sources import Source, located
from twotower_eval.usual import OWN_TOWER, has_own_form, needs_baseline, usual_of

if TYPE_CHECKING:
    from twotower_eval.engine.models.protocol import Model

P = TypeVar("P", RunPlan, SpeedPlan, VerifyPlan)
FOREIGN_FAMILY = "transformers"
USUAL_BATCH = 8
MAX_BATCH = 256  # larger ones gain nothing: by then weights are read for more rows than a step needs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """One arm's model, and what the plan says of it; ``folder`` is ``None`` of one that a server runs."""

    arm: Arm
    number: int | None
    folder: Path | None
    family: str
    device: str
    dtype: str


def without_auto(plan: P) -> tuple[P, tuple[Chosen, ...]]:
    """The plan with every ``auto`` replaced but that of the batch size, which needs the models; and what was chosen.

    UserError for a checkpoint that cannot be read.
    """
    candidate = _model("candidate", None, model_source(plan), plan.family, plan.devices[0], plan.dtype)
    models = [candidate, *_baselines(plan)]
    _check_attention(plan, models)
    found: list[Chosen] = []
    models = list(_on_devices(models, found))
    models = list(_in_dtypes(models, found))
    own, others = models[0], models[1:]
    changes: dict[str, Any] = {"dtype": own.dtype}
    changes["devices"] = (own.device, *plan.devices[1:])
    if not isinstance(plan, VerifyPlan):
        changes |= _of_baselines(plan, own, others)
    if isinstance(plan, RunPlan | SpeedPlan):
        _check_baselines(plan, own)
    if getattr(plan, "decoder", None) == AUTO:
        decoder = _decoder(own)
        found += [decoder] if decoder.reason != "usual" else []
        changes["decoder"] = decoder.value
    if isinstance(plan, RunPlan) and (likelihood := _likelihood(plan, own)) is not None:
        found.append(likelihood)
        changes["likelihood"] = likelihood.value
    made = dataclasses.replace(plan, **changes)
    return made, tuple(_joined(_named(made, found), len(models)))


def _check_attention(plan: RunPlan | SpeedPlan | VerifyPlan, models: Sequence[_Model]) -> None:
    """UserError for an attention that is asked of no Hugging Face model."""
    if plan.attention is not None and not any(model.family == FOREIGN_FAMILY for model in models):
        raise UserError(f"attention {plan.attention!r} has no effect: no model here is a Hugging Face model; drop it")
    if isinstance(plan, VerifyPlan):
        return
    for one, model in zip(each_baseline(plan), models[1:], strict=True):
        if one.baseline_attention is not None and model.family != FOREIGN_FAMILY:
            raise UserError(
                f"baseline_attention {one.baseline_attention!r} has no effect: {one.baseline} is no Hugging Face "
                "model; drop it"
            )


def size_without_auto(plan: SizingPlan) -> tuple[SizingPlan, tuple[Chosen, ...]]:
    """The same of a plan without checkpoints, whose dtype is never ``auto``."""
    from twotower_eval.engine.models.choices import choose_device

    if AUTO not in plan.devices:
        return plan, ()
    device = choose_device(["nemotron_h"])
    return dataclasses.replace(plan, devices=(device.value,)), (device,)


def _baselines(plan: RunPlan | SpeedPlan | VerifyPlan) -> Iterator[_Model]:
    """The baselines, if the plan has any; a context tower is of the candidate's own checkpoint."""
    if isinstance(plan, VerifyPlan):
        return
    for at, one in enumerate(each_baseline(plan)):
        number = at if plan.baselines else None
        device, dtype = one.baseline_device or one.devices[0], one.baseline_dtype or one.dtype
        separate = baseline_source(one)
        if separate is None:
            yield _model("baseline", number, model_source(one), one.family, device, dtype)
        else:
            yield _model("baseline", number, separate, one.baseline_family, device, dtype)


def _of_baselines(plan: RunPlan | SpeedPlan, own: _Model, others: list[_Model]) -> dict[str, object]:
    """What a plan says of its baselines: a dtype and a device where these are not the candidate's."""
    unlike = [
        {"dtype": None if other.dtype == own.dtype else other.dtype,
         "device": None if other.device == own.device else other.device}
        for other in others
    ]  # fmt: skip
    if not plan.baselines:
        return {f"{PREFIX}{key}": value for key, value in unlike[0].items()}
    tables = []
    for table, said in zip(plan.baselines, unlike, strict=True):
        kept = {key: value for key, value in table.items() if key not in said}
        found = {**kept, **{key: value for key, value in said.items() if value is not None}}
        tables.append(found)
    return {"baseline_dtype": None, "baseline_device": None, "baselines": tuple(tables)}


def _model(arm: Arm, number: int | None, source: Source, family: str | None, device: str, dtype: str) -> _Model:
    from twotower_eval.engine.models import family_of

    if source.kind == "endpoint":
        return _Model(arm=arm, number=number, folder=None, family="", device=device, dtype=dtype)
    found = located(source, needs_config=family is None)
    return _Model(
        arm=arm, number=number, folder=found.files, family=family or family_of(found), device=device, dtype=dtype
    )


def _on_devices(models: list[_Model], found: list[Chosen]) -> Iterator[_Model]:
    from twotower_eval.engine.models import check_device_name
    from twotower_eval.engine.models.choices import choose_device

    families = [model.family for model in models]
    for model in models:
        device = model.device
        if device == AUTO and model.folder is None:
            device = "cpu"  # nothing is computed here
        elif device == AUTO:
            chosen = choose_device(families)  # one for both arms, so that their times can be compared
            found.append(dataclasses.replace(chosen, arm=model.arm, name=_number_text(model)))
            device = chosen.value
        elif model.folder is not None:
            check_device_name(device)
        yield dataclasses.replace(model, device=device)


def _in_dtypes(models: list[_Model], found: list[Chosen]) -> Iterator[_Model]:
    from twotower_eval.engine.models.choices import choose_dtype

    for model in models:
        dtype = model.dtype
        if dtype == AUTO and model.folder is not None:
            chosen = choose_dtype(model.folder, model.device)
            found.append(dataclasses.replace(chosen, arm=model.arm, name=_number_text(model)))
            dtype = chosen.value
        yield dataclasses.replace(model, dtype=dtype)


def _decoder(model: _Model) -> Chosen:
    from twotower_eval.engine.models.choices import may_denoise

    if model.folder is None or may_denoise(model.folder, model.family) is False:
        return Chosen(setting="decoder", value="autoregressive", reason="no denoiser")
    usual = usual_of(model.family).decoder
    reason: ChosenReason = "usual" if usual == USUAL else "of the family"
    return Chosen(setting="decoder", value=usual, reason=reason)


def _likelihood(plan: RunPlan, model: _Model) -> Chosen | None:
    """The kind of log-likelihoods in place of a context tower's, where the family has none."""
    kinds = usual_of(model.family).kinds
    if plan.likelihood != OWN_TOWER or has_own_form(model.family) or not kinds:
        return None
    return Chosen(setting="likelihood", value=kinds[0], reason="no causal tower")


def _check_baselines(plan: RunPlan | SpeedPlan, model: _Model) -> None:
    """UserError, before anything is loaded, where a candidate is to be its own baseline and cannot be."""
    if not has_own_form(model.family) and any(baseline_source(one) is None for one in each_baseline(plan)):
        raise UserError(needs_baseline(model_source(plan).name, model.family))


def _number_text(model: _Model) -> str | None:
    return None if model.number is None else str(model.number)


def _named(plan: RunPlan | SpeedPlan | VerifyPlan, found: list[Chosen]) -> list[Chosen]:
    """The entries of several baselines with their names, which may follow from what ``auto`` became."""
    names = [None] if isinstance(plan, VerifyPlan) else [name for name, _ in named_baselines(plan)]
    return [one if one.name is None else dataclasses.replace(one, name=names[int(one.name)]) for one in found]


def _joined(found: list[Chosen], num_arms: int) -> Iterator[Chosen]:
    """One entry for all arms where the same was chosen for the same reason."""
    without = [dataclasses.replace(one, arm=None, name=None) for one in found]
    for one, plain in zip(found, without, strict=True):
        same = [other for other, bare in zip(found, without, strict=True) if bare == plain]
        if len(same) < num_arms or one is same[0]:
            yield plain if len(same) == num_arms else one


def choose_batch_size(arms: Sequence[Model], longest: Callable[[Model], int], *, num_requests: int) -> Chosen:
    """What the batch size ``auto`` stands for: on a GPU the largest power of two whose longest contexts fit into
    memory in both arms, elsewhere 8.

    ``longest`` gives the tokens of an arm's longest context; no more rows than ``num_requests`` are tried.
    """
    from twotower_eval.engine.models.choices import fits

    on_gpu = [arm for arm in arms if arm.checkpoint.devices[0].startswith("cuda")]
    if not on_gpu:
        return Chosen(setting="batch_size", value=str(USUAL_BATCH), reason="usual")
    size = min(MAX_BATCH, 1 << max(0, num_requests - 1).bit_length())
    for arm in on_gpu:
        while size > 1 and not fits(arm, size, longest(arm)):
            size //= 2
    return Chosen(setting="batch_size", value=str(size), reason="fits")
