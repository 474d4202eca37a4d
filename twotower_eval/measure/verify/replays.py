"""The families whose reference outputs can be replayed, and the results of a replay.

A family's own file defines a function that gives a :class:`~twotower_eval.measure.verify.replay.Compared` for each
entry of a folder's ``golden.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.protocol import Model
from twotower_eval.measure.verify.checks import CheckResult, not_checked, pass_or_fail
from twotower_eval.measure.verify.replay import Compared, Reference
from twotower_eval.names import Seam, plural, resolve

NAMES = ("golden_logits", "golden_runs", "golden_counts", "golden_likelihoods")
REPLAYS = {
    "a2d_qwen3": "twotower_eval.measure.verify.replay_a2d:a2d",
    "bd3lm": "twotower_eval.measure.verify.replay_bd3lm:bd3lm",
    "d3pm_absorbing_text": "twotower_eval.measure.verify.replay_numbers:d3pm",
    "diffusion_gemma": "twotower_eval.measure.verify.replay_gemma:diffusion_gemma",
    "dream": "twotower_eval.measure.verify.replay_canvas:dream",
    "e2d2": "twotower_eval.measure.verify.replay_e2d2:e2d2",
    "fast_dllm_v1": "twotower_eval.measure.verify.replay_fast_dllm:v1",
    "fast_dllm_v2": "twotower_eval.measure.verify.replay_fast_dllm:v2",
    "llada2_moe": "twotower_eval.measure.verify.replay_llada2:llada2",
    "llada": "twotower_eval.measure.verify.replay_canvas:llada",
    "md4": "twotower_eval.measure.verify.replay_numbers:md4",
    "mdlm": "twotower_eval.measure.verify.replay_dit:mdlm",
    "radd": "twotower_eval.measure.verify.replay_radd:radd",
    "sdar": "twotower_eval.measure.verify.replay_blocks:sdar",
}
NUMBERS = ("d3pm_absorbing_text", "md4")  # families of which there are no checkpoints, only numbers
SEAM = Seam(what="family of reference outputs", form="package.module:replay", shipped=REPLAYS)
Replay = Callable[[Model, Reference], Iterator[Compared]]


def replays(meta: Mapping[str, object]) -> bool:
    """Whether a description is that of a family's reference outputs."""
    return isinstance(meta.get("family"), str)


def needs_model(meta: Mapping[str, object]) -> bool:
    """Whether a checkpoint belongs to the reference outputs."""
    return meta.get("family") not in NUMBERS


def replay_results(model: Model, reference: Reference) -> Iterator[CheckResult]:
    """One result for logits, runs, counts and likelihoods each. UserError for a family without a replay."""
    family = str(reference.meta["family"])
    replay: Any = resolve(SEAM.place(family))
    names_mask = isinstance(mask := reference.meta.get("mask_id"), int)
    if names_mask and needs_model(reference.meta) and model.mask_token_id is None:
        cast(LanguageModel, model).mask_token_id = mask  # some families name it nowhere in a checkpoint
    by_kind: dict[str, list[Compared]] = {"logits": [], "run": [], "count": [], "likelihood": []}
    with torch.inference_mode():
        for entry in replay(model, reference):
            by_kind[entry.kind].append(entry)
    for name, entries in zip(NAMES, by_kind.values(), strict=True):
        yield _result(name, entries)


def _result(name: str, entries: Sequence[Compared]) -> CheckResult:
    compared = [entry for entry in entries if not entry.skipped]
    skipped = [entry for entry in entries if entry.skipped]
    left_out = f"; {len(skipped)} not comparable ({skipped[0].name}: {skipped[0].skipped})" if skipped else ""
    if not compared:
        return not_checked(name, f"the folder holds nothing of this kind{left_out}")
    wrong = [entry for entry in compared if not entry.passed]
    first = f"; not {wrong[0].name}" if wrong else ""
    if name in ("golden_runs", "golden_counts"):
        what = "runs give the same tokens" if name == "golden_runs" else "counts and orders of commits are the same"
        detail = f"{len(compared) - len(wrong)} of {len(compared)} {what}{first}{left_out}"
        return pass_or_fail(name, not wrong, detail, value=len(wrong), limit=0)
    worst = max(
        compared, key=lambda entry: entry.value / (entry.limit or 1) if entry.value == entry.value else float("inf")
    )
    what = plural(len(compared), "forward" if name == "golden_logits" else "value")
    furthest = max(compared, key=lambda entry: entry.largest)
    largest = f"the largest difference {furthest.largest:.3g} in {furthest.name}"
    detail = f"{what}, {largest}, the nearest to its limit in {worst.name}{first}{left_out}"
    return pass_or_fail(name, not wrong, detail, value=worst.value, limit=worst.limit)
