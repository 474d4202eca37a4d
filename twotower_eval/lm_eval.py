"""Our models and decoders in lm-eval itself, under the name ``twotower``: importing this module registers them.

>>> import twotower_eval.lm_eval  # doctest: +SKIP
>>> lm_eval.simple_evaluate("twotower", "pretrained=miniature,threshold=0.9", tasks=["arc_easy"])  # doctest: +SKIP

``twotower-eval lm-eval …`` is lm-eval's own command with this done before.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import lm_eval.models  # noqa: F401  # fills the registry, which lm-eval does itself only while it is empty
from lm_eval.api.registry import model_registry
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import simple_parse_args_string

from twotower_eval.decoder_settings import SHORT_NAMES, cross_decoders
from twotower_eval.engine.decoders import decoder_class, from_spec
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.chat import Messages, attach_format, format_of, load_format
from twotower_eval.engine.models.protocol import Model, lacks
from twotower_eval.errors import UserError
from twotower_eval.measure.chosen import USUAL_BATCH
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.harness.jobs import DENOISER_KINDS, make_scorer_of
from twotower_eval.measure.harness.lm_files import SOURCE
from twotower_eval.measure.suites.lm_types import Instance
from twotower_eval.names import did_you_mean
from twotower_eval.plan import RunPlan
from twotower_eval.plan_chat import chat_options
from twotower_eval.records import AUTO, ChatOptions, DecoderSpec, LikelihoodKind
from twotower_eval.sources import Source, located, read_source
from twotower_eval.usual import usual_of

LOADING = ("pretrained", "revision", "dtype", "device", "devices", "tower", "family", "trust_remote_code", "attention")
RUNNING = ("decoder", "likelihood", "batch_size", "max_batch_size", "seed")
ASKING = ("enable_thinking", "think_end_token", "chat_template_args")
# The device of lm-eval's command without --device, whatever the machine has.
UNASKED_DEVICE = next(field.default for field in dataclasses.fields(EvaluatorConfig) if field.name == "device")


class TwoTowerLM(HarnessLM):
    """A checkpoint with a decoder, made from lm-eval's ``--model_args``.

    ``pretrained`` is what ``--model`` of ``twotower-eval run`` takes; every parameter of the decoder is an argument of
    its own: ``pretrained=org/name,decoder=block_diffusion,block_size=16,threshold=0.9``. Without ``decoder`` a pair
    decodes by block diffusion and any other model autoregressively. Scores are those of ``twotower-eval run``.
    ``--apply_chat_template`` asks through the checkpoint's own template, with ``enable_thinking``, ``think_end_token``
    and ``chat_template_args`` as lm-eval's ``hf`` takes them. UserError for an unknown argument and for whatever keeps
    the model from being loaded.
    """

    def __init__(self, **arguments: object) -> None:
        given = dict(arguments)
        if not given.get("pretrained"):
            raise UserError("--model twotower needs pretrained=CHECKPOINT among its --model_args")
        loading = {name: given.pop(name) for name in LOADING if given.get(name) is not None}
        running = {name: given.pop(name) for name in RUNNING if given.get(name) is not None}
        self._asking = _chat_options({name: given.pop(name) for name in ASKING if name in given})
        self._source = _source(loading)
        named = None if running.get("decoder") is None else str(running["decoder"])
        kind = None if named is None else SHORT_NAMES.get(named, named)
        if kind is not None:
            _refuse_unknown(kind, given)  # before weights are loaded
        model = _loaded(loading)
        kind = kind or (usual_of(model.checkpoint.family).decoder if model.has_denoiser else "autoregressive")
        _refuse_unknown(kind, given)
        temperature = cast(Any, given.pop("temperature", None))
        plan = RunPlan(decoder=kind, set=cast(Any, given) or None, temperature=temperature)
        [spec] = cross_decoders(plan)
        likelihood = cast(LikelihoodKind, running.get("likelihood", plan.likelihood))
        scored_by = _kind(model, dataclasses.replace(plan, likelihood=likelihood).likelihood)
        super().__init__(
            model,
            decoder=from_spec(model, spec),
            scorer=make_scorer_of(model, scored_by, spec),
            kind=scored_by,
            batch_size=_batch_size(running.get("batch_size")),
            seed=_seed(running.get("seed", 0)),
        )
        self.spec: DecoderSpec = spec
        attach_format(model, load_format(self._source, self._asking))  # its template is read where it is asked for

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """The messages as the checkpoint's own template writes them, which is read the first time."""
        if format_of(self.model).template is None:
            self.chat_template(True)
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's template, or of the one of several that has this name; messages are then
        written by it. UserError if there is none."""
        if chat_template:
            if self._source.kind == "endpoint":
                raise UserError("a server applies its own chat template: take lm_eval --model local-chat-completions")
            found = located(self._source, extent="settings", needs_config=False)
            attach_format(self.model, load_format(found, dataclasses.replace(self._asking, template=chat_template)))
        return super().chat_template(chat_template)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See HarnessLM; refused with ``enable_thinking``, as by lm-eval's ``hf``: options are scored unthought."""
        if self._asking.enable_thinking:
            raise UserError("enable_thinking has no effect on tasks that score options: leave them out, or drop it")
        return super().loglikelihood(requests)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, object] | None = None
    ) -> TwoTowerLM:
        """From ``pretrained=org/name,threshold=0.9``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, object], additional_config: Mapping[str, object] | None = None
    ) -> TwoTowerLM:
        """From a dictionary; what lm-eval adds (batch size, device) gives way to it.

        lm-eval's command adds a GPU that nobody asked for; as for its own ``hf`` it is the first device there is.
        """
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if added.get("device") == UNASKED_DEVICE:
            del added["device"]
        return cls(**{**added, **arg_dict})

    def get_model_info(self) -> dict[str, object]:
        """What lm-eval writes beside the results."""
        checkpoint = self.model.checkpoint
        return {
            "model_dtype": checkpoint.dtype,
            "model_revision": checkpoint.revision,
            "model_sha": checkpoint.identity,
            "decoder": self.spec.label,
        }


def _chat_options(given: Mapping[str, object]) -> ChatOptions:
    """What is told to a chat template, and where answers begin. UserError for thinking without an end."""
    plan = RunPlan(apply_chat_template=True, **cast(Any, given))
    return dataclasses.replace(chat_options(plan), template=None)


def _source(given: Mapping[str, object]) -> Source:
    revision, code = given.get("revision"), bool(given.get("trust_remote_code"))
    return read_source(str(given["pretrained"]), cast("str | None", revision), trust_remote_code=code)


def _loaded(given: Mapping[str, object]) -> Model:
    named = {name: value for name, value in given.items() if name not in ("pretrained", "devices")}
    options = {"dtype": AUTO, "device": AUTO, **named}
    if "devices" in given:  # in lm-eval's argument strings a comma ends an argument
        options["devices"] = tuple(str(given["devices"]).split("+"))
    return load_model(str(given["pretrained"]), **cast(Any, options))


def _kind(model: Model, asked: LikelihoodKind) -> LikelihoodKind:
    """The kind of log-likelihoods, as a candidate has them in ``twotower-eval run``."""
    if lacks(model, "causal") and asked not in DENOISER_KINDS:
        return usual_of(model.checkpoint.family).kinds[0]
    return asked if model.has_denoiser or asked in DENOISER_KINDS else "exact"


def _refuse_unknown(kind: str, given: Mapping[str, object]) -> None:
    own = [field.name for field in dataclasses.fields(decoder_class(kind).Params)]
    known = [*LOADING, *RUNNING, *ASKING, *own]
    for name in given:
        if name not in known:
            raise UserError(
                f"--model twotower with decoder {kind!r} has no argument {name!r}{did_you_mean(name, known)}"
            )


def _batch_size(given: object) -> int:
    """A whole number; lm-eval's ``auto`` is our usual one, as no score depends on it."""
    text = str(given if given is not None else USUAL_BATCH)
    if text.partition(":")[0] == "auto":
        return USUAL_BATCH
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, or auto, not {text!r}")
    return int(text)


def _seed(given: object) -> int:
    text = str(given)
    if not text.isdecimal():
        raise UserError(f"seed must be a whole number of at least 0, not {text!r}")
    return int(text)


def main(arguments: Sequence[str]) -> None:
    """lm-eval's own command with these arguments, and with our models in its registry."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]  # the only place that it reads them from
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if SOURCE not in model_registry:
    model_registry.register(SOURCE, target=TwoTowerLM)
