"""Drafts verified in one pass beside one token at a time: prompt lookup, and a draft model, here the model itself.

A draft model of the same size costs as much as it saves: its row shows the tokens of a pass, and what the machinery
costs, not a speed that anyone gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import Findings, Say
from bench.batching import FULL, SMALL, mixed_prompts
from bench.measure import interleave, ratios
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.records import Generation
from twotower_eval.resources import SHIPPED

HEADER = ("decoder, batch 1", "tokens per pass", "ratio to autoregressive", "quartiles")
WAYS: dict[str, dict[str, Any]] = {"autoregressive": {}, "prompt_lookup": {}, "draft": {"draft": SHIPPED}}


def run(*, rounds: int, full: bool, say: Say) -> Findings:
    """Time the decoders interleaved; each must give the autoregressive tokens, else ValueError."""
    model = load_model(SHIPPED, tower="context")
    num_prompts, max_new_tokens = FULL if full else SMALL
    prompts = mixed_prompts(model, num_prompts)
    say(f"drafts: the shipped miniature's context tower, {len(prompts)} prompts one by one, float32\n")

    def arm(kind: str) -> Callable[[], list[Generation]]:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_ids": model.eos_token_ids}
        decoder = make_decoder(model, kind, **WAYS[kind])
        return lambda: decoder.generate(prompts, max_batch_size=1, **options)

    arms = {kind: arm(kind) for kind in WAYS}
    made = {kind: call() for kind, call in arms.items()}
    tokens = {kind: [one.token_ids for one in answers] for kind, answers in made.items()}
    if any(found != tokens["autoregressive"] for found in tokens.values()):
        raise ValueError("drafts changed the greedy tokens: nothing to time")
    wall_s = interleave(arms, rounds)
    rows, figures = [], {}
    for kind, answers in made.items():
        ratio = ratios(wall_s["autoregressive"], wall_s[kind])
        per_pass = sum(one.num_tokens for one in answers) / sum(one.num_context_forwards for one in answers)
        rows.append((kind, f"{per_pass:.2f}", f"{ratio['median']:.2f}x", f"{ratio['low']:.2f}–{ratio['high']:.2f}"))
        figures[kind] = {"tokens_per_pass": per_pass, "ratio": ratio}
    return Findings(header=HEADER, rows=tuple(rows), summary={"num_prompts": num_prompts, "figures": figures})
