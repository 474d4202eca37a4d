"""Checks of what a decoder returns: finished plain values that agree with what the harness knows.

A value that computes when it is read would move work off the clock, so only plain types pass: exactly ``int``, ``str``,
``float``, ``tuple`` or ``list``, no subclasses.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Model, TextCodec, remote
from twotower_eval.errors import UserError
from twotower_eval.plugin_calls import calls_of, module_of
from twotower_eval.records import GENERATION_COUNTS, CommitStep, FinishReason, Generation, Prompt, Served

OTHERS: dict[str, tuple[type, ...]] = {
    "prompt_id": (str,),
    "text": (str, type(None)),
    "finish": (str,),
    "num_forced_commits": (int, type(None)),
    "finish_s": (float, int, type(None)),
    "trace": (tuple, type(None)),
}
FINISHES = typing.get_args(FinishReason)
MAX_STRADDLING = 4  # tokens of the text before a stop string beyond the useful ones
UNREADABLE = "\ufffd"  # what a tokenizer writes for half a character


class ReportError(UserError):
    """A decoder's answers are not finished plain values, or contradict what the harness knows."""


PASS_THROUGH = (ReportError, torch.OutOfMemoryError)  # errors with a message of their own, whoever raises them


@contextmanager
def generating(decoder: object, name: str, option: str, ours: Sequence[BaseException] = ()) -> Iterator[None]:
    """Context of a decoder's ``generate``: PluginError as in ``calls_of``, and UserError if memory runs out.

    ``option`` is the command's option for smaller batches, ``name`` the decoder's name in errors.
    """
    try:
        with calls_of(module_of(decoder), decoder_name(decoder), "generate", pass_through=PASS_THROUGH, ours=ours):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name}: out of memory: take a smaller {option} or shorter prompts") from error


@dataclass(frozen=True, kw_only=True)
class CallRequest:
    """What one call asks a decoder for; ``name`` is the decoder's name in errors.

    ``is_remote``: a server decodes, so that tokens are those of the text, not those that were made.
    """

    name: str
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    stop: Sequence[str]
    tokenizer: TextCodec | None
    vocab_size: int
    is_remote: bool = False


def call_request(
    model: Model, name: str, max_new_tokens: int, eos_token_ids: Sequence[int], stop: Sequence[str]
) -> CallRequest:
    """The request to a decoder; texts are checked with the tokenizer that is not on a clock."""
    return CallRequest(
        name=name,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        stop=stop,
        tokenizer=getattr(model, "raw_tokenizer", model.tokenizer),
        vocab_size=model.vocab_size,
        is_remote=remote(model) is not None,
    )


def check_all_counted(num: int, name: str) -> None:
    """ReportError if the model was run uncounted ``num`` times."""
    if num:
        raise ReportError(
            f"{name}: ran a model {num} times past the harness, which counts prefill, extend, denoise and "
            "context_logits of the model that a decoder is given: call these"
        )


def decoder_name(decoder: object) -> str:
    """A decoder's name in errors."""
    cls = type(decoder)
    return f"decoder {getattr(cls, 'KIND', f'{cls.__module__}:{cls.__qualname__}')}"


def finished(generations: object, name: str) -> tuple[Generation, ...]:
    """The same answers, checked to be plain values that compute nothing when read; else ReportError."""
    if type(generations) is not list and type(generations) is not tuple:
        raise ReportError(f"{name}: its answers are a {_kind(generations)}, not a list of finished Generations")
    plain = []
    for number, generation in enumerate(generations):
        if fault := _not_plain(generation):
            raise ReportError(f"{name}: answer {number + 1} is not finished: {fault}")
        is_list = type(generation.token_ids) is list
        plain.append(dataclasses.replace(generation, token_ids=tuple(generation.token_ids)) if is_list else generation)
    return tuple(plain)


def _not_plain(generation: object) -> str | None:
    """What part of an answer is no plain value; None if all are."""
    if type(generation) is not Generation:
        return f"it is a {_kind(generation)}, not a Generation"
    ids: object = generation.token_ids
    if type(ids) is not tuple and type(ids) is not list:
        return f"token_ids are a {_kind(ids)}, not a tuple"
    for kind in set(map(type, ids)):
        if kind is not int:
            return f"token_ids hold a {kind.__qualname__}, not plain whole numbers"
    for field in GENERATION_COUNTS:
        if type(getattr(generation, field)) is not int:
            return f"{field} is a {_kind(getattr(generation, field))}, not a plain whole number"
    for field, kinds in OTHERS.items():
        value = getattr(generation, field)
        if type(value) not in kinds:
            return f"{field} is a {_kind(value)}, not a plain {kinds[0].__name__}"
    if type(generation.served) not in (Served, type(None)):
        return f"served is a {_kind(generation.served)}, not what a server told"
    odd = [step for step in generation.trace or () if type(step) is not CommitStep]
    return f"its trace holds a {_kind(odd[0])}" if odd else None


def _kind(value: object) -> str:
    return type(value).__qualname__


def check_answers(generations: Sequence[Generation], prompts: Sequence[Prompt], asked: CallRequest) -> None:
    """ReportError, with both values, if an answer contradicts its prompt, the request, or itself."""
    if len(generations) != len(prompts):
        raise ReportError(f"{asked.name}: {len(generations)} generations for {len(prompts)} prompts")
    for generation, prompt in zip(generations, prompts, strict=True):
        check_answer(generation, prompt, asked)


def check_answer(generation: Generation, prompt: Prompt, asked: CallRequest) -> None:
    """See :func:`check_answers`; for one prompt."""
    for fault in _faults(generation, prompt, asked):
        raise ReportError(f"{asked.name}: prompt {prompt.id!r}: {fault}")


def check_returned(
    given: object, prompts: Sequence[Prompt], heard: Sequence[Generation], name: str
) -> list[Generation]:
    """The returned answers that ``on_finish`` has not received.

    ReportError if the returned ones are not one per prompt, in order, or differ from those that ``on_finish`` received.
    """
    made = finished(given, name)
    if len(made) != len(prompts):
        raise ReportError(f"{name}: {len(made)} generations for {len(prompts)} prompts")
    before = {generation.prompt_id: generation for generation in heard}
    for generation, prompt in zip(made, prompts, strict=True):
        if generation.prompt_id != prompt.id:
            raise ReportError(f"{name}: in the place of prompt {prompt.id!r} is the answer to {generation.prompt_id!r}")
        known = before.get(prompt.id, generation)
        if (known.token_ids, known.text) != (generation.token_ids, generation.text):
            raise ReportError(f"{name}: prompt {prompt.id!r}: on_finish received another answer than generate returned")
    return [generation for generation in made if generation.prompt_id not in before]


def _faults(generation: Generation, prompt: Prompt, asked: CallRequest) -> Iterator[str]:
    ids, num_tokens = generation.token_ids, len(generation.token_ids)
    if generation.prompt_id != prompt.id:
        yield f"the answer in its place is that of prompt {generation.prompt_id!r}"
    if generation.num_tokens != num_tokens:
        yield f"num_tokens is {generation.num_tokens}, and there are {num_tokens} token_ids"
    if generation.num_prompt_tokens != len(prompt.token_ids):
        yield f"num_prompt_tokens is {generation.num_prompt_tokens}, and the prompt has {len(prompt.token_ids)}"
    if num_tokens > asked.max_new_tokens and not asked.is_remote:
        yield f"{num_tokens} tokens, and the budget is {asked.max_new_tokens}"
    if ids and not 0 <= min(ids) <= max(ids) < asked.vocab_size:
        yield f"token ids from {min(ids)} to {max(ids)}, and the model knows 0 to {asked.vocab_size - 1}"
    for field in (*GENERATION_COUNTS, "num_forced_commits"):
        if (getattr(generation, field) or 0) < 0:
            yield f"{field} is {getattr(generation, field)}, and no count is below 0"
    if asked.is_remote:
        return
    yield from _faults_of_end(generation, asked)
    if asked.tokenizer is not None and generation.text is not None and not _is_text_of(generation, asked):
        yield f"its text is not that of its {num_tokens} token_ids"


def _faults_of_end(generation: Generation, asked: CallRequest) -> Iterator[str]:
    finish, num_tokens = generation.finish, len(generation.token_ids)
    if finish not in FINISHES:
        yield f"finish is {finish!r}, not one of {', '.join(FINISHES)}"
    if finish == "eos" and not asked.eos_token_ids:
        yield "finish is 'eos', and no token was to end it"
    if finish == "stop" and not asked.stop:
        yield "finish is 'stop', and no stop string was given"
    if finish == "length" and num_tokens < asked.max_new_tokens:
        yield f"finish is 'length' after {num_tokens} tokens, and the budget is {asked.max_new_tokens}"
    counted = sorted({*asked.eos_token_ids} & {*generation.token_ids})
    if counted:
        yield f"token_ids hold the end of the text ({counted[0]}), which is not counted"


def _is_text_of(generation: Generation, asked: CallRequest) -> bool:
    """Whether a text comes from its tokens, ignoring blanks, which tokenizers treat differently.

    Before a stop string it may include part of the token that contains the stop's beginning, and with special tokens,
    which texts leave out, what these read as.
    """
    tokenizer, text = asked.tokenizer, _without_blanks(generation.text or "")
    assert tokenizer is not None
    readings = {read(generation.token_ids) for read in (tokenizer.decode, tokenizer.decode_with_special)}
    for read in map(_without_blanks, readings):
        if text == read:
            return True
        known = read.rstrip(UNREADABLE)
        if generation.finish == "stop" and text.startswith(known):
            rest = text[len(known) :].strip(UNREADABLE)
            if not rest or len(tokenizer.encode(rest)) <= MAX_STRADDLING or _is_of_stop(rest, asked.stop):
                return True
    return False


def _is_of_stop(rest: str, stop: Sequence[str]) -> bool:
    return any(rest in _without_blanks(text) for text in stop)


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def check_forwards(generations: Sequence[Generation], watched: WatchedModel, name: str) -> None:
    """ReportError if a call's reported forwards differ from the harness's count, row by row of every model call."""
    counted = {
        "context": sum(watched.prefills.rows) + sum(watched.extensions.rows),
        "denoiser": sum(watched.denoisings.rows),
    }
    reported = {
        "context": sum(generation.num_context_forwards for generation in generations),
        "denoiser": sum(generation.num_denoiser_forwards for generation in generations),
    }
    for kind, num in counted.items():
        if reported[kind] != num:
            raise ReportError(
                f"{name}: reports {reported[kind]} {kind} forwards over its {len(generations)} prompts, and the "
                f"harness counted {num}. The counts must add up to the rows of all model calls, those of finished "
                "rows and of a prefix that is read once included. Either call the model through "
                "twotower_eval.engine.models.counting.CountingModel(model, len(prompts)) and report its counts row by "
                "row, or add up the rows of each call yourself (a row that serves several prompts counts for one)"
            )
