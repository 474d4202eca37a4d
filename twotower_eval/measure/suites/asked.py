"""What tasks ask of decoding beside stops and token budget: followed, overridden by an option, or refused.

A task's ``generation_kwargs`` reach lm-eval's models unchanged. Decoders here only sample at a temperature, so any
other setting that would change a text is refused unless an option overrides it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.records import Override, Scalar
from twotower_eval.strict import JsonObject
from twotower_eval.task_options import GenKwargs

# Settings that change nothing at these values; ``None`` changes nothing anywhere. Those of sampling and of beams change
# nothing without sampling and without beams, as in transformers.
NEUTRAL: Mapping[str, tuple[Scalar, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "min_length": (0,),
    "guidance_scale": (1,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "ignore_eos": (False,),
}
SAMPLING: Mapping[str, tuple[Scalar, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "seed": (),
}
BEAMS: Mapping[str, tuple[Scalar, ...]] = {"length_penalty": (), "early_stopping": (), "diversity_penalty": ()}
NO_EFFECT = ("use_cache", "pad_token_id")
OTHER = ("max_length", "max_time", "eos_token_id", "bad_words_ids", "force_words_ids", "suppress_tokens", "logit_bias")
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", *NEUTRAL, *SAMPLING, *BEAMS, *NO_EFFECT, *OTHER)


@dataclass(frozen=True, kw_only=True)
class DecodingRequest:
    """How a task asks for its texts to be made.

    ``temperature`` is 0 for greedy decoding and ``None`` where the task names none. ``unsupported`` holds the settings,
    by the task's own keys, that no decoder here follows.
    """

    temperature: float | None = None
    unsupported: tuple[tuple[str, Scalar], ...] = ()


class DecodingTask(Protocol):
    """What this module needs of a built task. ``asked_samples`` is ``None`` if neither task nor suite names a
    number."""

    @property
    def name(self) -> str: ...
    @property
    def generates(self) -> bool: ...
    @property
    def asked(self) -> DecodingRequest: ...
    @property
    def asked_samples(self) -> int | None: ...
    @property
    def samples(self) -> int: ...
    @property
    def overrides(self) -> tuple[Override, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The decoding settings of all tasks of a plan, and what they override."""

    temperature: float
    overrides: tuple[Override, ...]


def read_decoding_request(settings: JsonObject) -> DecodingRequest:
    """Read one request's generation settings. UserError for values without a meaning.

    As in lm-eval, a temperature above 0 without ``do_sample`` means sampling, and ``do_sample: false`` means greedy
    whatever the temperature.
    """
    sample, temperature = _truth(settings.get("do_sample")), _temperature(settings.get("temperature"))
    sampling = (temperature or 0) > 0 if sample is None else sample
    without_effect = {*NO_EFFECT, *(() if sampling else SAMPLING)}
    if _is_neutral(settings.get("num_beams"), NEUTRAL["num_beams"]):
        without_effect |= BEAMS.keys()
    unsupported = {
        key: value for key, value in settings.items() if key not in without_effect and not _is_done(key, value)
    }
    if sampling and not temperature:
        unsupported = {"do_sample": True, **unsupported}
    held = temperature if sampling else 0.0
    says_nothing = sample is None and temperature is None
    return DecodingRequest(
        temperature=None if says_nothing else held or (None if sampling else 0.0),
        unsupported=tuple((key, _scalar(value)) for key, value in unsupported.items()),
    )


def merged(found: Iterable[DecodingRequest]) -> DecodingRequest:
    """What several requests of one task ask for together; UserError for different temperatures."""
    several = list(found)
    temperatures = sorted({one.temperature or 0.0 for one in several})
    if len(temperatures) > 1:
        listed = ", ".join(f"{temperature:g}" for temperature in temperatures)
        raise UserError(f"its documents ask for unlike temperatures ({listed}), and a task has one")
    held = [one.temperature for one in several if one.temperature is not None]
    unsupported = {pair: None for one in several for pair in one.unsupported}
    return DecodingRequest(temperature=next(iter(held), None), unsupported=tuple(sorted(unsupported, key=str)))


def settle(
    tasks: Sequence[DecodingTask], *, temperature: float | None, samples: int | None, timed: bool = False
) -> Decoding:
    """The one temperature of a plan: its own, else the tasks', else greedy; and what that overrides.

    UserError, with the option to give, if tasks ask for what no decoder here does, for different temperatures, or for
    several samples that would all be equal or that ``timed`` answers (one a round) cannot have.
    """
    asking = [task for task in tasks if task.generates]
    if temperature is None:
        _refuse_unsupported(asking)
        temperature = _common_temperature(asking)
    _refuse_samples(asking, temperature, samples or 1, timed)
    overrides = [one for task in asking for one in _overrides(task, temperature, samples)]
    overrides += [one for task in tasks for one in task.overrides]
    return Decoding(temperature=temperature, overrides=tuple(overrides))


def given_overrides(task: str, own: JsonObject, given: GenKwargs) -> Iterator[Override]:
    """What the plan's ``gen_kwargs`` change of a task's own settings."""
    for key, value in given.items():
        if own.get(key) is not None and own[key] != value:
            common = {"task": task, "setting": key, "option": "gen_kwargs"}
            yield Override(asked=_scalar(own[key]), done=_scalar(value), **common)  # type: ignore[arg-type]


def settings_text(asked: Iterable[tuple[str, Scalar]]) -> str:
    """Settings as a YAML file writes them, with a hint for an unknown one."""
    return ", ".join(_setting_text(key, value) for key, value in asked)


def _setting_text(key: str, value: Scalar) -> str:
    if key == "do_sample":
        return "do_sample: true without a temperature above 0"
    hint = "" if key in KNOWN else f", which is no known setting{did_you_mean(key, KNOWN)}"
    return f"{key}: {value}{hint}"


def _refuse_unsupported(tasks: Sequence[DecodingTask]) -> None:
    for task in tasks:
        if task.asked.unsupported:
            instead = f"--temperature {task.asked.temperature or 0:g}"
            raise UserError(
                f"task {task.name!r} asks for {settings_text(task.asked.unsupported)}: no decoder here does that; "
                f"give {instead} to decode at that temperature without it, which the run then says"
            )


def _common_temperature(tasks: Sequence[DecodingTask]) -> float:
    by_temperature = {float(task.asked.temperature or 0): task.name for task in reversed(tasks)}
    if len(by_temperature) > 1:
        (low, one), *_, (high, other) = sorted(by_temperature.items())
        raise UserError(
            f"task {one!r} asks for temperature {low:g} and {other!r} for {high:g}, and a run has one temperature: "
            "run them apart, or give --temperature for all of them"
        )
    return next(iter(by_temperature), 0.0)


def _refuse_samples(tasks: Sequence[DecodingTask], temperature: float, given: int, timed: bool) -> None:
    instead = "give --samples 1, or a --temperature above 0"
    if temperature == 0 and given > 1:
        raise UserError(f"{given} samples at temperature 0 are {given} times the same: {instead}")
    for task in tasks:
        asks = f"task {task.name!r} asks for {task.samples} samples of each problem"
        if task.samples > 1 and timed:
            raise UserError(f"{asks}, and speed times one a round: give --samples 1, or leave it out")
        if task.samples > 1 and temperature == 0:
            raise UserError(f"{asks}, which greedy decoding makes {task.samples} times the same: {instead}")


def _overrides(task: DecodingTask, temperature: float, samples: int | None) -> Iterator[Override]:
    asked = task.asked
    for key, value in asked.unsupported:
        yield Override(task=task.name, setting=key, asked=value, done=None, option="temperature")
    if asked.temperature not in (None, temperature):
        common = {"task": task.name, "setting": "temperature", "option": "temperature"}
        yield Override(asked=asked.temperature, done=temperature, **common)  # type: ignore[arg-type]
    if samples is not None and task.asked_samples not in (None, samples):
        yield Override(task=task.name, setting="samples", asked=task.asked_samples, done=samples, option="samples")


def _truth(value: object) -> bool | None:
    if value is None or value in (True, False):
        return None if value is None else bool(value)
    raise UserError(f"do_sample must be true or false, not {value!r}")


def _temperature(value: object) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or number < 0:
        raise UserError(f"temperature must be a number of at least 0, not {value!r}")
    return number


def _is_done(key: str, value: object) -> bool:
    """Whether a setting is followed here, or changes nothing at its value."""
    if key in ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        return True
    return key in ("do_sample", "temperature") or _is_neutral(value, NEUTRAL.get(key, SAMPLING.get(key, ())))


def _is_neutral(value: object, neutral: Sequence[Scalar]) -> bool:
    return value is None or value in neutral or _number(value) in neutral


def _number(value: object) -> float | None:
    """A number, or a text that is one: YAML takes ``1e-3`` for a text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _scalar(value: object) -> Scalar:
    if isinstance(value, (str, bool)) or (
        isinstance(value, (int, float)) and _number(value) is not None and abs(value) < 2**63
    ):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)
