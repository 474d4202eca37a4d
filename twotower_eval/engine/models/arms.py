"""The two models of a comparison, loaded so that shared parts are in memory once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from twotower_eval.engine import models
from twotower_eval.engine.models.graphs import StepGraphs, num_sizes, stepped, use_graphs
from twotower_eval.engine.models.protocol import Model, has_denoiser
from twotower_eval.errors import UserError
from twotower_eval.records import Ways
from twotower_eval.sources import GivenModel, Source, read_source

if TYPE_CHECKING:
    from twotower_eval.engine.models.transformers_model import TransformersModel


Loaded = dict[tuple[object, ...], Model]  # by what a model was loaded with


def load_arms(
    model: GivenModel,
    baseline: GivenModel | None,
    *,
    dtype: str,
    devices: Sequence[str],
    baseline_dtype: str | None = None,
    baseline_device: str | None = None,
    cuda_graphs: bool = False,
    family: str | None = None,
    baseline_family: str | None = None,
    loaded: Loaded | None = None,
    tokenizer: str | None = None,
    request_timeout: float | None = None,
    chat: bool = False,
) -> tuple[Model, Model]:
    """Load baseline and candidate: one object if they are the same, shared tensors if one is part of the other.

    Without ``baseline`` it is the candidate's own context tower. ``baseline_dtype`` and ``baseline_device`` are by
    default the candidate's dtype and first device; a baseline that has others shares nothing with it. The families are
    as in ``models.load_model``; None: the folder's own. ``cuda_graphs``: UserError, before anything loads, if one arm
    cannot run its steps as graphs. What is in ``loaded`` is not loaded again, and what is loaded is put there: one
    candidate has several baselines, which may share a checkpoint. Of an endpoint ``tokenizer`` counts the
    tokens, by default the other arm's, and with ``chat`` it is sent messages; see ``models.load_model``.
    """
    if cuda_graphs:
        _refuse_without_graphs({model: family, **({} if baseline is None else {baseline: baseline_family})})
    held = {} if loaded is None else loaded
    given = model if baseline is None else baseline
    if _is_served(model) or _is_served(given):
        own = _Given(
            given,
            baseline_dtype or dtype,
            (baseline_device or devices[0],),
            family if baseline is None else baseline_family,
        )
        there = {"tokenizer": tokenizer, "request_timeout": request_timeout, "chat": chat}
        return _load_served(held, own, _Given(model, dtype, devices, family), there)
    candidate = _load_once(held, model, dtype, devices, family)
    own_dtype, own_devices = baseline_dtype or dtype, (baseline_device or devices[0],)
    alike = (own_dtype, own_devices[0]) == (dtype, devices[0])
    if baseline is None:
        if alike:
            return context_tower(candidate), candidate
        tower: Literal["context"] | None = "context" if candidate.has_denoiser else None
        return _load_once(held, model, own_dtype, own_devices, family, tower), candidate
    same = _is_same(read_source(baseline), read_source(model)) and _read_alike(model, family, baseline_family)
    if alike and same:
        return candidate, candidate
    return _load_once(held, baseline, own_dtype, own_devices, baseline_family), candidate


def _load_once(
    loaded: Loaded,
    model: GivenModel,
    dtype: str,
    devices: Sequence[str],
    family: str | None,
    tower: Literal["context"] | None = None,
) -> Model:
    family = models.family_of(model) if family is None else family
    source = read_source(model)
    key = (source.place, source.attention, dtype, tuple(devices), family, tower)
    if key not in loaded:
        loaded[key] = models.load_model(model, dtype=dtype, devices=devices, family=family, tower=tower)
    return loaded[key]


def _is_same(one: Source, other: Source) -> bool:
    return (one.place, one.trust_remote_code, one.attention) == (other.place, other.trust_remote_code, other.attention)


@dataclasses.dataclass(frozen=True)
class _Given:
    """An arm as it is asked for."""

    model: GivenModel
    dtype: str
    devices: Sequence[str]
    family: str | None


def _load_served(held: Loaded, baseline: _Given, candidate: _Given, there: Mapping[str, Any]) -> tuple[Model, Model]:
    """Both arms where one is or both are behind servers; a local one is loaded first, as its tokenizer may count the
    tokens of the other. ``there`` are options of load_model for servers."""
    arms = (baseline, candidate)
    found: dict[int, Model] = {}
    for at in sorted(range(len(arms)), key=lambda at: _is_served(arms[at].model)):
        one = arms[at]
        if not _is_served(one.model):
            found[at] = _load_once(held, one.model, one.dtype, one.devices, one.family)
            continue
        key = (read_source(one.model).place, one.family)
        if key not in held:
            held[key] = models.load_model(one.model, family=one.family, other=found.get(1 - at), **there)
        found[at] = held[key]
    return found[0], found[1]


def _is_served(given: GivenModel) -> bool:
    return read_source(given).kind == "endpoint"


def _read_alike(model: GivenModel, *families: str | None) -> bool:
    return len({models.family_of(model) if family is None else family for family in families}) == 1


def prove_arms(arms: Sequence[Model], longest: Callable[[Model], int]) -> tuple[Ways, ...]:
    """Check every Hugging Face model up to the contexts that it will see, each once; how each is run, for a manifest.

    ``longest`` gives the tokens of an arm's longest context. UserError if a model cannot be right.
    """
    models_of = {id(arm): arm for arm in arms if getattr(arm, "ways", None) is not None}
    if not models_of:
        return ()
    from twotower_eval.engine.models.proof import prove_up_to

    return tuple(prove_up_to(cast("TransformersModel", model), longest(model)) for model in models_of.values())


def _refuse_without_graphs(families: Mapping[GivenModel, str | None]) -> None:
    """UserError if one arm cannot use graphs: graphs in one arm alone would handicap the other."""
    for model, named in families.items():
        family = named or models.family_of(model)
        if family != "nemotron_h":
            name = read_source(model).name
            raise UserError(
                f"checkpoint {name} is of family {family}, whose steps cannot come from CUDA graphs, and in the "
                "other arm alone they would handicap this one: drop --cuda-graphs"
            )


def enable_cuda_graphs(
    arms: Sequence[Model], *, max_rows: int, block_sizes: Sequence[int], longest: int
) -> tuple[StepGraphs, ...]:
    """Run both arms' small steps as CUDA graphs; the graphs, each once.

    None is ever evicted while batches have up to ``max_rows`` rows and contexts up to ``longest`` tokens. A pair's
    context tower as the other arm shares the pair's graphs.
    """
    widths = {1, *block_sizes}
    max_graphs = num_sizes(max_rows, widths, longest)
    found: dict[int, StepGraphs] = {}
    # The pair first: its context tower uses the same graphs.
    for model in sorted(arms, key=lambda model: not model.has_denoiser):
        own = stepped(model)
        graphs = own.graphs
        if graphs is None or id(graphs) not in found:
            graphs = use_graphs(own, max_graphs=max_graphs, widths=widths)
        found[id(graphs)] = graphs
    return tuple(found.values())


def context_tower(pair: Model) -> Model:
    """The pair's context tower as a model of its own, on the same tensors; a causal model is its own."""
    if not has_denoiser(pair):
        return pair
    tower = pair.context_tower
    whole, devices = pair.checkpoint, pair.checkpoint.devices[:1]
    tower.checkpoint = dataclasses.replace(
        whole, digest=pair.context_digest, tower="context", devices=devices, weights=()
    )
    for name in ("tokenizer", "vocab_size", "max_length", "eos_token_ids", "context_digest", "folder_settings"):
        setattr(tower, name, getattr(pair, name))
    for name, value in (("mask_token_id", None), ("has_denoiser", False)):
        setattr(tower, name, value)
    return tower
