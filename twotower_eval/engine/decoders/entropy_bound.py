"""DiffusionGemma's sampler: canvas after canvas of random tokens, of which each step keeps what is certain enough and
makes the rest random anew (entropy-bounded acceptance with renoising).

Nothing is committed before a canvas ends; then its likeliest tokens by the last step are, whatever was kept or drawn.
Temperatures fall from step to step, and entropies are those at the step's temperature. Shape letters: B rows, K canvas,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.commits import commit_step, within_entropy
from twotower_eval.engine.decoders.rows import Clock, check_counts, check_not_negative, on_host
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import Model, self_conditioned
from twotower_eval.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Params:
    """By the names of transformers' generation settings, and with their defaults.

    Step n of ``max_denoising_steps`` N, counted down from N, has temperature ``t_min + (t_max - t_min) n / N``. It
    keeps the tokens of lowest entropy (nats) as long as those before them sum up to ``entropy_bound`` at most. A canvas
    ends early when its likeliest tokens are those of the ``stability_threshold`` steps before and their mean entropy is
    below ``confidence_threshold``; 0 has it never end early. ``sample`` False takes the likeliest token in place of a
    drawn one; ``renoise`` False leaves tokens that are not kept as they were.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    sample: bool = True
    renoise: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "max_denoising_steps")
        check_not_negative(self, "entropy_bound", "t_min", "t_max", "confidence_threshold")
        stability: object = self.stability_threshold
        if isinstance(stability, bool) or not isinstance(stability, int) or stability < 0:
            raise UserError(f"stability_threshold must be a whole number of at least 0, not {stability!r}")
        if not self.t_min <= self.t_max < float("inf") or self.t_max == 0:
            raise UserError(f"t_max must be finite, above 0 and not below t_min {self.t_min}, not {self.t_max}")


_Params = Params  # inside the class its attribute hides the name


@dataclass
class Canvas:
    """One row's canvas in progress. ``likeliest`` and ``confidences`` hold, of each step so far, the likeliest tokens
    (K,) and their probabilities; ``logits_KV`` are those of the last step at its temperature."""

    tokens_K: Tensor
    number: int = 0
    logits_KV: Tensor | None = None
    likeliest: list[Tensor] = field(default_factory=list)
    confidences: list[Tensor] = field(default_factory=list)
    is_finished: bool = False


class EntropyBound(BatchDecoder[Params]):
    """The sampler. Rows go through their canvases on their own; a canvas that ends early costs no further steps."""

    KIND = "entropy_bound"
    NEEDS_MASK = False
    SAMPLES = True
    Params = Params
    VERSION = 1

    def __init__(self, model: Model, params: _Params, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        needed = (
            f"decoder {self.KIND!r} is for models that denoise random tokens and are told their earlier logits, as "
            f"DiffusionGemma is, and {model.checkpoint.name} ({model.checkpoint.family}) is none"
        )
        self._size = self_conditioned(model, needed).block_size

    def _decode(self, call: Call) -> None:
        for row, prompt in zip(call.rows, call.prompts, strict=True):
            row.steps = [] if self.params.trace or prompt.trace else None
        canvases = [self._opened(call, row, number=0) for row in range(len(call.prompts))]
        context = call.admit()
        while context is not None:
            own = [canvases[row] for row in context.rows]
            tokens_BK = torch.stack([canvas.tokens_K for canvas in own])
            logits_BKV = call.counted.denoise_after(tokens_BK, context, [canvas.logits_KV for canvas in own])
            temperatures = [self.temperature(len(canvas.likeliest)) for canvas in own]
            logits_BKV = logits_BKV / torch.tensor(temperatures, device=logits_BKV.device)[:, None, None]
            self._step(call, own, context.rows, logits_BKV)
            context = call.admit(self._advance(call, canvases, context))

    def temperature(self, step: int) -> float:
        """That of a step, counted from 0."""
        num, low = self.params.max_denoising_steps, self.params.t_min
        return low + (self.params.t_max - low) * (num - step) / num

    def _opened(self, call: Call, row: int, *, number: int) -> Canvas:
        return Canvas(self._random(call, row), number)

    def _random(self, call: Call, row: int) -> Tensor:
        """Random tokens (K,)."""
        num = self.model.vocab_size
        return (call.noise.uniform(row, self._size).double() * num).long().clamp(max=num - 1)

    def _step(self, call: Call, canvases: Sequence[Canvas], rows: Sequence[int], logits_BKV: Tensor) -> None:
        """Keep, renoise, and see who has ended."""
        probability_BKV = logits_BKV.softmax(-1)
        entropy_BK = torch.special.entr(probability_BKV).sum(-1).cpu()
        likeliest_BK, confidence_BK = on_host(logits_BKV.argmax(-1), probability_BKV.amax(-1))
        drawn_BK = call.noise.drawn(rows, probability_BKV).cpu() if self.params.sample else likeliest_BK
        kept_BK = within_entropy(entropy_BK, self.params.entropy_bound)
        for position, (canvas, row) in enumerate(zip(canvases, rows, strict=True)):
            other_K = self._random(call, row) if self.params.renoise else canvas.tokens_K
            canvas.tokens_K = torch.where(kept_BK[position], drawn_BK[position], other_K)
            canvas.logits_KV = logits_BKV[position]
            canvas.likeliest.append(likeliest_BK[position])
            canvas.confidences.append(confidence_BK[position])
            sure = float(entropy_BK[position].mean()) < self.params.confidence_threshold
            settled = sure and is_stable(canvas.likeliest, self.params.stability_threshold)
            canvas.is_finished = settled or len(canvas.likeliest) == self.params.max_denoising_steps

    def _advance(self, call: Call, canvases: list[Canvas], context: CountedContext) -> CountedContext | None:
        """Hand over finished canvases; read those of rows that go on into the context, all in one call."""
        rows = list(context.rows)
        closed = [position for position, row in enumerate(rows) if canvases[row].is_finished]
        still_open = [position for position in range(len(rows)) if position not in closed]
        for position in closed:
            _record(call, rows[position], canvases[rows[position]])
        made = [canvases[rows[position]].likeliest[-1].tolist() for position in closed]
        going = [closed[i] for i in call.absorb([rows[position] for position in closed], made)]
        if not going:
            return context.select(still_open) if still_open else None
        view = context.select(going)
        extended = call.counted.extend(view, torch.stack([canvases[row].likeliest[-1] for row in view.rows]))
        for row in view.rows:
            canvases[row] = self._opened(call, row, number=canvases[row].number + 1)
        return context.select(still_open).join(extended) if still_open else extended


def is_stable(likeliest: Sequence[Tensor], num_before: int) -> bool:
    """Whether the last step's tokens are those of so many steps before it.

    >>> one, two = torch.tensor([1]), torch.tensor([2])
    >>> is_stable([two, one, one], 1), is_stable([two, one, one], 2), is_stable([one], 1), is_stable([one], 0)
    (True, False, False, True)
    """
    before = likeliest[-1 - num_before : -1]
    return len(likeliest) > num_before and all(torch.equal(likeliest[-1], one) for one in before)


def _record(call: Call, index: int, canvas: Canvas) -> None:
    """The trace of a finished canvas: a position is committed by the step from which on its token stays."""
    steps = call.rows[index].steps
    if steps is None:
        return
    final_K, since_K = canvas.likeliest[-1], torch.zeros_like(canvas.tokens_K)
    for step, tokens_K in enumerate(canvas.likeliest[:-1]):
        since_K = torch.where(tokens_K == final_K, since_K, step + 1)
    for step, confidence_K in enumerate(canvas.confidences):
        steps.append(commit_step(canvas.number, step, since_K == step, final_K, confidence_K))
