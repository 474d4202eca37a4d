"""Decoders behind one protocol: prompts in, generations out. Short names live in ``DECODERS``."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from twotower_eval.engine.decoders.batch import misfit
from twotower_eval.engine.decoders.rows import Clock, OnFinish
from twotower_eval.engine.models.protocol import Model, remote
from twotower_eval.engine.plugin_source import plugin_code
from twotower_eval.errors import UserError
from twotower_eval.names import Seam, nearest, resolve
from twotower_eval.plugin_calls import calls_of, module_of
from twotower_eval.records import DecoderSpec, Generation, Prompt
from twotower_eval.strict import check_number
from twotower_eval.usual import usual_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DECODERS = {
    "autoregressive": "twotower_eval.engine.decoders.autoregressive:Autoregressive",
    "prompt_lookup": "twotower_eval.engine.decoders.speculative:PromptLookup",
    "draft": "twotower_eval.engine.decoders.draft:Draft",
    "static_cache": "twotower_eval.engine.decoders.static_cache:StaticCache",
    "mock_ar": "twotower_eval.engine.decoders.autoregressive:MockAR",
    "block_diffusion": "twotower_eval.engine.decoders.block_diffusion:BlockDiffusion",
    "ancestral": "twotower_eval.engine.decoders.ancestral:Ancestral",
    "low_confidence": "twotower_eval.engine.decoders.low_confidence:LowConfidence",
    "dream": "twotower_eval.engine.decoders.dream:Dream",
    "bd3lm": "twotower_eval.engine.decoders.bd3lm:BD3LM",
    "e2d2": "twotower_eval.engine.decoders.e2d2:E2D2",
    "entropy_bound": "twotower_eval.engine.decoders.entropy_bound:EntropyBound",
    "radd": "twotower_eval.engine.decoders.radd:RADD",
    "sdar": "twotower_eval.engine.decoders.sdar:SDAR",
    "llada2": "twotower_eval.engine.decoders.llada2:LLaDA2",
    "fast_dllm_v1": "twotower_eval.engine.decoders.fast_dllm_v1:FastDLLMv1",
    "fast_dllm_v2": "twotower_eval.engine.decoders.fast_dllm_v2:FastDLLMv2",
    "reference": "twotower_eval.engine.decoders.reference:Reference",
    "endpoint": "twotower_eval.engine.endpoints.decoder:EndpointDecoder",
}
OTHER_WORDS = {"greedy": "autoregressive", "ar": "autoregressive", "diffusion_gemma": "entropy_bound"}
UNASKED = ("prompt_lookup", "draft", "mock_ar")  # they give another decoder's tokens, or none that anyone would want
GIVEN = ("max_new_tokens", "eos_token_ids", "stop")  # the keywords with which every verb calls generate
SEAM = Seam(what="decoder", form="package.module:Class", shipped=DECODERS, other_words=OTHER_WORDS)


class Decoder(Protocol):
    """Decodes any number of prompts, at most ``max_batch_size`` (None: all) in one forward.

    No row depends on its neighbours, so a finished row makes room for the next prompt, and neither order nor batch size
    changes an answer. Prompts are prefilled that many at a time, and rows between two blocks wait for others: up to six
    times as many contexts are held.

    Generations are returned in the order of the prompts. ``on_finish`` receives each as soon as it is done;
    ``finish_s`` counts from the start of the call, including the wait for a place.
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        max_batch_size: int | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Generation]: ...


class DecoderClass(Protocol):
    """A decoder class: how to make one, the version of its loop, and its parameters."""

    __name__: str
    VERSION: int
    Params: Any  # a frozen dataclass
    generate: Callable[..., list[Generation]]

    def __call__(self, model: Model, params: Any, *, clock: Clock | None = None) -> Decoder: ...


def decoder_class(kind: str) -> DecoderClass:
    """The class of a short, registered or ``"module:Class"`` name; UserError with a near-miss hint."""
    if not isinstance(kind, str):
        raise UserError(f"a decoder is chosen by its name or as {SEAM.form}, not by {kind!r}")
    cls = cast(DecoderClass, resolve(SEAM.place(kind)))
    if kind not in DECODERS:
        _check_plug_in(kind, cls)
    return cls


def _check_plug_in(kind: str, cls: DecoderClass) -> None:
    """UserError, naming what is missing, if a plug-in class is no decoder."""
    lacks = [name for name in ("Params", "VERSION") if not hasattr(cls, name)]
    if lacks:
        raise UserError(f"decoder {kind!r} lacks {', '.join(lacks)}: docs/decoder.md has a whole example")
    if not dataclasses.is_dataclass(cls.Params):
        raise UserError(f"decoder {kind!r}: Params must be a dataclass, of its parameters with their defaults")
    if type(cls.VERSION) is not int:
        raise UserError(f"decoder {kind!r}: VERSION must be a whole number, not {cls.VERSION!r}")
    check_number(f"decoder {kind!r}: VERSION", cls.VERSION)


def _check_calls(kind: str, cls: DecoderClass) -> None:
    """UserError, showing the call, if a class cannot be made or called as decoders are."""
    if not hasattr(cls, "generate"):
        raise UserError(f"decoder {kind!r} lacks generate: docs/decoder.md has a whole example")
    try:
        inspect.signature(cls).bind(None, None, clock=None)
    except TypeError as error:
        raise UserError(f"decoder {kind!r} is made as {cls.__name__}(model, params, clock=clock): {error}") from error
    try:
        inspect.signature(cls.generate).bind(None, (), **dict.fromkeys(GIVEN))
    except TypeError as error:
        given = ", ".join(f"{name}=…" for name in GIVEN)
        raise UserError(f"decoder {kind!r} is called as generate(prompts, {given}): {error}") from error


def decoder_spec(kind: str, /, **params: object) -> DecoderSpec:
    """A full specification: parameters checked, defaults filled in, the class's version, a plug-in's code."""
    cls = decoder_class(kind)
    checked = _checked(cls, kind, params)
    filled = dataclasses.asdict(checked)
    for name, value in filled.items():
        check_number(f"decoder {kind!r}: its parameter {name}", value)  # it may be a default that nothing has read
    code = plugin_code(SEAM.place(kind))
    draft: str | None = cls.draft_digest(checked) if kind in DECODERS and hasattr(cls, "draft_digest") else None
    return DecoderSpec(
        kind=kind,
        params=filled,
        version=cls.VERSION,
        code=code,
        draft=draft,
        approximate=getattr(checked, "approximate", None) or None,
        sampled=getattr(cls, "SAMPLES", None) or getattr(checked, "sampled", None) or None,
    )


def make_decoder(model: Model, kind: str, *, clock: Clock | None = None, **params: object) -> Decoder:
    """Make a decoder for ``model``. With a ``clock`` each generation's ``finish_s`` is filled in.

    Parameters called ``model``, ``kind`` or ``clock`` need :func:`from_spec`.

    UserError for an unknown kind or parameter, a bad value, a model that lacks what the decoder needs, or anything that
    a plug-in class raises.
    """
    return _made(model, kind, params, clock)


def from_spec(model: Model, spec: DecoderSpec, *, clock: Clock | None = None) -> Decoder:
    """The decoder of a specification; UserError if it names another version."""
    version = decoder_class(spec.kind).VERSION
    if spec.version != version:
        raise UserError(f"decoder {spec.kind}: version {spec.version} was asked for, this is version {version}")
    return _made(model, spec.kind, spec.params, clock)


def _made(model: Model, kind: str, params: Mapping[str, object], clock: Clock | None) -> Decoder:
    cls = decoder_class(kind)
    if kind not in DECODERS:
        _check_calls(kind, cls)
    if remote(model) is not None and kind != "endpoint":
        raise UserError(
            f"decoder {kind!r} reads a model's logits, and {model.checkpoint.name} is behind a server, which gives "
            "texts: take decoder 'endpoint'"
        )
    checked = _checked(cls, kind, params)
    needs = getattr(cls, "needs", None)
    if needs is not None and (reason := misfit(kind, needs(), model)):
        raise UserError(f"{reason}: give --decoder {' or '.join(fitting(model))}")
    with calls_of(module_of(cls), f"decoder {kind}", "__init__"):
        return cls(model, checked, clock=clock)


def fitting(model: Model) -> list[str]:
    """Decoders that can use a model with their own defaults, the usual one of its family first; those that serve as
    references or need another model are left out."""
    found = []
    for kind in DECODERS:
        cls = decoder_class(kind)
        if kind in UNASKED or not hasattr(cls, "needs"):
            continue
        with contextlib.suppress(UserError):
            cls(model, cls.Params())
            found.append(kind)
    usual = usual_of(model.checkpoint.family).decoder
    return sorted(found, key=lambda kind: kind != usual)


def _checked(cls: DecoderClass, kind: str, params: Mapping[str, object]) -> DataclassInstance:
    known = [f.name for f in dataclasses.fields(cls.Params)]
    for name in params:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(known) or 'none'}"
            raise UserError(f"decoder {kind} has no parameter {name!r}; {hint}")
    with calls_of(module_of(cls), f"decoder {kind}", "Params"):
        checked: DataclassInstance = cls.Params(**params)
    return checked
