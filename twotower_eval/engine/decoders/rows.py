"""Rows of a batch: padding prompts, one random stream per row, choosing tokens, detecting ends, and counting useful
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import Model, TextCodec
from twotower_eval.errors import UserError
from twotower_eval.records import CommitStep, FinishReason, Generation, Prompt

Clock = Callable[[], float]  # seconds; waits for all devices
OnFinish = Callable[[Generation], None]  # called with every row as it finishes

STOP_WINDOW_SPARE = 8  # extra tokens decoded, beyond a stop string's bytes, when looking for it at the end


@dataclass(frozen=True)
class Rules:
    """Stop events of one call, the same for all rows and all decoders."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stop: tuple[str, ...]
    tokenizer: TextCodec | None

    @property
    def stop_window(self) -> int:
        """Number of last tokens that surely contain a stop string that has just been completed."""
        return max(len(text.encode()) for text in self.stop) + STOP_WINDOW_SPARE


def make_rules(model: Model, *, max_new_tokens: int, eos_token_ids: Sequence[int], stop: Sequence[str]) -> Rules:
    """Check and bundle the stop events. Stop strings need the model's tokenizer."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}")
    if isinstance(stop, str):
        raise UserError("stop must be a sequence of strings, not one string")
    if stop and model.tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this checkpoint has none; use eos_token_ids")
    if any(not text for text in stop):
        raise UserError("an empty stop string would stop everything; leave it out")
    return Rules(max_new_tokens, frozenset(eos_token_ids), tuple(stop), model.tokenizer)


def check_batch_size(max_batch_size: int | None) -> int | None:
    """The batch size, or UserError if it is none."""
    if max_batch_size is None:
        return None
    if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise UserError(f"max_batch_size must be a whole number of at least 1, not {max_batch_size!r}")
    return max_batch_size


def check_prompts(model: Model, prompts: Sequence[Prompt], *, may_be_empty: bool = False) -> None:
    """UserError unless all prompts have at least one token (or none, if they may), all within the vocabulary."""
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise UserError(f"a decoder takes Prompts, not {prompt!r:.40}: tt.Prompt.from_text(text, model) makes one")
        if not (prompt.token_ids or may_be_empty):
            raise UserError(f"prompt {prompt.id!r} is empty; give it at least one token")
        if not 0 <= min(prompt.token_ids, default=0) <= max(prompt.token_ids, default=0) < model.vocab_size:
            raise UserError(f"prompt {prompt.id!r} has a token id outside the vocabulary of {model.vocab_size}")


def is_finished(token_ids: Sequence[int], num_new: int, rules: Rules) -> bool:
    """Whether a row may stop, if only its last ``num_new`` tokens have not been checked before.

    A stop string is looked for at the end of the text first, then :func:`cut` decides: some tokenizers write the first
    token of a text differently, so an end alone may show what the whole text does not hold.
    """
    if len(token_ids) >= rules.max_new_tokens:
        return True
    if any(token in rules.eos_token_ids for token in token_ids[-num_new:]):
        return True
    if not rules.stop:
        return False
    assert rules.tokenizer is not None
    return _holds_stop(token_ids[-(num_new + rules.stop_window) :], rules) and cut(token_ids, rules)[2] == "stop"


def cut(token_ids: Sequence[int], rules: Rules) -> tuple[tuple[int, ...], str | None, FinishReason]:
    """Useful tokens, their text up to the stop, and why the row ended.

    A token that contains the start of a stop string is not useful, but its text before the stop is kept.
    """
    kept = list(token_ids[: rules.max_new_tokens])
    finish: FinishReason = "length"
    for position, token in enumerate(kept):
        if token in rules.eos_token_ids:
            kept, finish = kept[:position], "eos"
            break
    if rules.tokenizer is None:
        return tuple(kept), None, finish
    num_read = _num_until_stop(kept, rules)
    if num_read is None:
        return tuple(kept), rules.tokenizer.decode(kept), finish
    read = kept[:num_read]
    return tuple(read[: _num_useful(read, rules)]), _before_stops(rules.tokenizer.decode(read), rules), "stop"


def _holds_stop(token_ids: Sequence[int], rules: Rules) -> bool:
    texts = [read(token_ids) for read in _readings(token_ids, rules)]
    return any(stop in text for text in texts for stop in rules.stop)


def _readings(token_ids: Sequence[int], rules: Rules) -> list[Callable[[Sequence[int]], str]]:
    """The texts of tokens: without special tokens, as scored, and with them, as stop strings may contain some."""
    tokenizer = rules.tokenizer
    assert tokenizer is not None
    has_special = not tokenizer.special_token_ids.isdisjoint(token_ids)
    return [tokenizer.decode, tokenizer.decode_with_special] if has_special else [tokenizer.decode]


def _num_until_stop(token_ids: Sequence[int], rules: Rules) -> int | None:
    """The smallest number of first tokens that contain a stop string, by bisection; None if all do not."""
    if not rules.stop or not _holds_stop(token_ids, rules):
        return None
    without, holding = 0, len(token_ids)
    while holding - without > 1:
        middle = (without + holding) // 2
        without, holding = (without, middle) if _holds_stop(token_ids[:middle], rules) else (middle, holding)
    return holding


def _num_useful(token_ids: Sequence[int], rules: Rules) -> int:
    """Number of tokens wholly before the stop strings, in each reading that contains one."""
    num_useful = len(token_ids)
    for read in _readings(token_ids, rules):
        whole = read(token_ids)
        before = _before_stops(whole, rules)
        while before != whole and num_useful and len(read(token_ids[:num_useful])) > len(before):
            num_useful -= 1
    return num_useful


def _before_stops(text: str, rules: Rules) -> str:
    for stop in rules.stop:
        text = text.split(stop, 1)[0]
    return text


def generation(
    prompt: Prompt,
    produced: Sequence[int],
    rules: Rules,
    *,
    num_context_forwards: int,
    num_denoiser_forwards: int,
    num_draft_forwards: int | None = None,
    num_forced_commits: int | None = None,
    finish_s: float | None = None,
    trace: tuple[CommitStep, ...] | None = None,
) -> Generation:
    """The record of one row; tokens produced after the cut are counted as discarded."""
    token_ids, text, finish = cut(produced, rules)
    return Generation(
        prompt_id=prompt.id,
        token_ids=token_ids,
        text=text,
        finish=finish,
        num_prompt_tokens=len(prompt.token_ids),
        num_tokens=len(token_ids),
        num_discarded_tokens=len(produced) - len(token_ids),
        num_context_forwards=num_context_forwards,
        num_denoiser_forwards=num_denoiser_forwards,
        num_draft_forwards=num_draft_forwards,
        num_forced_commits=num_forced_commits,
        finish_s=finish_s,
        trace=trace,
    )


def padded_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Ids (B, S) padded on the right with 0, and lengths."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64), lengths


def check_temperature(temperature: float) -> None:
    """UserError unless it is a finite number of at least 0."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")


def check_counts(params: object, *names: str) -> None:
    """UserError unless each of these parameters is None or a whole number of at least 1."""
    for name in names:
        value = getattr(params, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_not_negative(params: object, *names: str) -> None:
    """UserError unless each of these parameters is None or a number of at least 0."""
    for name in names:
        value = getattr(params, name)
        if value is not None and not value >= 0:
            raise UserError(f"{name} must be a number of at least 0, not {value!r}")


def check_top_p(top_p: float | None) -> None:
    """UserError unless it is None or a share above 0 and not above 1."""
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must lie above 0 and not above 1, not {top_p!r}")


def on_host(tokens: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and confidence on the host, with a single wait: the only one of a denoiser step."""
    if tokens.device.type == "cpu":
        return tokens, confidence
    return unpacked(packed(tokens, confidence).cpu(), confidence.dtype)


def packed(tokens: Tensor, confidence: Tensor) -> Tensor:
    """Token ids and confidences in one float64 tensor (2, ...), which holds both exactly."""
    return torch.stack([tokens.double(), confidence.double()])


def unpacked(both: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What was :func:`packed`: int64 ids, and confidences of ``dtype``."""
    return both[0].to(torch.int64), both[1].to(dtype)


class Noise(Protocol):
    """Where a call's random numbers come from: each row has a stream of its own."""

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard Gumbel noise (len(rows), *shape)."""

    def uniform(self, row: int, num: int) -> Tensor:
        """So many numbers of [0, 1), float32."""

    def drawn(self, rows: Sequence[int], probability_BKV: Tensor) -> Tensor:
        """One token (len(rows), K) of each distribution, with one number of the row's stream each."""


class RowNoise:
    """Gumbel noise from one generator per row, seeded by its prompt, so that a row never depends on its neighbours.

    Drawn on the host in float32, so that devices agree.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard Gumbel noise (len(rows), *shape), each row from its own stream."""
        uniform = torch.stack([torch.rand(shape, generator=self.generators[row]) for row in rows])
        return -torch.log(-torch.log(uniform.clamp(min=1e-20, max=1 - 1e-7))).to(device)

    def uniform(self, row: int, num: int) -> Tensor:
        """So many numbers of [0, 1) from a row's stream, float32."""
        return torch.rand(num, generator=self.generators[row])

    def drawn(self, rows: Sequence[int], probability_BKV: Tensor) -> Tensor:
        """One token (len(rows), K) of each distribution: the first whose cumulated probability is above the number."""
        uniform_BK = torch.stack([self.uniform(row, probability_BKV.shape[1]) for row in rows])
        return quantile(probability_BKV, uniform_BK.to(probability_BKV.device))


def quantile(probability: Tensor, uniform: Tensor) -> Tensor:
    """The first tokens (...) whose cumulated probabilities (..., V) are above numbers of [0, 1); never one of none.

    >>> quantile(torch.tensor([[0.5, 0.0, 0.5, 0.0]]), torch.tensor([0.5]))
    tensor([2])
    """
    total = probability.double().cumsum(-1)
    wanted = uniform.double()[..., None] * total[..., -1:]
    return torch.searchsorted(total, wanted, right=True)[..., 0]


def choose(logits: Tensor, temperature: float, noise: Noise, rows: Sequence[int]) -> Tensor:
    """Token ids (B, ...) from logits (B, ..., V): argmax, or a Gumbel-max sample of logits / temperature."""
    if temperature > 0:
        logits = logits / temperature + noise.gumbel(rows, tuple(logits.shape[1:]), logits.device)
    return logits.argmax(-1)
