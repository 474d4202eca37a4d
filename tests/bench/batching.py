"""Rows beside each other: the throughput of the shipped miniature as batches grow, and the places that stay empty.

Prompts of all the miniature's tasks, of unequal lengths and ends, are given to one ``generate``. The last arm of each
decoder gives them in batches that end before the next begins: what is lost where freed places stay empty.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench import Findings, Say
from bench.measure import interleave, ratios, spread
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.tokenizer import prompt_ids
from twotower_eval.measure.suites import build_requests, resolve_tasks
from twotower_eval.records import Generation, Prompt
from twotower_eval.resources import data_path

WIDTHS = (1, 2, 4, 8)
SMALL, FULL = (16, 24), (80, 96)  # prompts, tokens at most of each answer
HEADER = ("decoder, rows at a time", "tokens/s", "of one row", "quartiles", "steps full", "extensions full")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A decoder and how many rows it runs at a time; ``refill`` False gives it one batch after the other."""

    kind: str
    width: int
    refill: bool = True
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> str:
        """What decodes, for people."""
        return self.kind.replace("_", " ") + (f" of {self.params['block_size']}" if self.params else "")

    @property
    def name(self) -> str:
        """The row of the table."""
        return f"{self.decoder}, {self.width}{'' if self.refill else ', no refilling'}"


def ways() -> list[Way]:
    """What is timed, in the order of the table."""
    found = []
    for kind, params in (("autoregressive", {}), ("block_diffusion", _block(16))):
        found += [Way(kind=kind, width=width, params=params) for width in WIDTHS]
        found.append(Way(kind=kind, width=WIDTHS[-1], refill=False, params=params))
    # A smaller block keeps a core less busy with one row, so that rows beside it gain more.
    return found + [Way(kind="block_diffusion", width=width, params=_block(8)) for width in (WIDTHS[0], WIDTHS[-1])]


def _block(size: int) -> dict[str, Any]:
    return {"block_size": size, "steps_per_block": size, "threshold": 0.8}


def run(*, rounds: int, full: bool, say: Say) -> Findings:
    """Time all ways interleaved; each must give the tokens of single rows, else ValueError."""
    model = load_model(data_path("miniature", "pair"))
    num_prompts, max_new_tokens = FULL if full else SMALL
    prompts = mixed_prompts(model, num_prompts)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    say(
        f"batching: the shipped miniature, {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens (mean "
        f"{statistics.fmean(lengths):.0f}) that end by themselves within {max_new_tokens} tokens, float32\n"
    )
    arms: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, Any]] = {}
    single: dict[str, list[tuple[int, ...]]] = {}
    for way in ways():
        watched = WatchedModel(model)
        tokens = [g.token_ids for g in decode(watched, way, prompts, max_new_tokens)]
        if tokens != single.setdefault(way.decoder, tokens):
            raise ValueError(f"{way.name}: the tokens are not those of single rows: nothing to time")
        found[way.name] = {"num_tokens": sum(map(len, tokens)), **shares(watched, way)}
        arms[way.name] = _arm(model, way, prompts, max_new_tokens)
    findings = _findings(interleave(arms, rounds), found)
    return replace(findings, summary={"num_prompts": num_prompts, "max_new_tokens": max_new_tokens, **findings.summary})


def mixed_prompts(model: Any, num: int) -> list[Prompt]:
    """Prompts of the miniature's generation tasks, one of each in turn."""
    timed = build_requests(resolve_tasks(["miniature"]), num)
    return [Prompt(id=f"{t.task}/{t.doc_id}", token_ids=tuple(prompt_ids(model, t.text))) for t in timed]


def decode(model: Any, way: Way, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Generation]:
    """The prompts' generations."""
    decoder = make_decoder(model, way.kind, **way.params)
    size = len(prompts) if way.refill else way.width
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_ids": model.eos_token_ids}
    return [g for batch in batches for g in decoder.generate(batch, max_batch_size=way.width, **options)]


def shares(watched: WatchedModel, way: Way) -> dict[str, float | None]:
    """Row-steps that served a row, of all that the places had.

    Steps are what a decoder does again and again: denoiser passes, or the AR decoder's extensions of the context.
    """
    steps = watched.extensions if way.kind == "autoregressive" else watched.denoisings
    return {
        "useful_share_of_steps": steps.share(way.width),
        "useful_share_of_extensions": watched.extensions.share(way.width),
        "useful_share_of_prefills": watched.prefills.share(way.width),
    }


def _arm(model: Any, way: Way, prompts: Sequence[Prompt], max_new_tokens: int) -> Callable[[], object]:
    return lambda: decode(model, way, prompts, max_new_tokens)


def _findings(wall_s: dict[str, list[float]], found: dict[str, dict[str, Any]]) -> Findings:
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for way in ways():
        one_row = next(other for other in ways() if other.decoder == way.decoder)
        speedup = ratios(wall_s[one_row.name], wall_s[way.name])
        counted = found[way.name]
        tokens_per_s = counted["num_tokens"] / statistics.median(wall_s[way.name])
        rows.append(
            (
                way.name,
                f"{tokens_per_s:.0f}",
                f"{speedup['median']:.2f}x",
                f"{speedup['low']:.2f}–{speedup['high']:.2f}",
                _percent(counted["useful_share_of_steps"]),
                _percent(counted["useful_share_of_extensions"]),
            )
        )
        figures[way.name] = {**counted, "wall_s": spread(wall_s[way.name]), "speedup_over_one_row": speedup}
    return Findings(header=HEADER, rows=tuple(rows), summary={"figures": figures})


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
