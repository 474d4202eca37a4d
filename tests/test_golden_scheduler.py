"""The commit rule and the sampler's loop against the reference sampler, fed with its denoiser's logits.

55 cases: several mask ids, block sizes (6 and 7 too) and step counts (some above the block size), equal and saturated
confidences, EOS, batches.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from golden_files import SHIPPED
from safetensors.torch import load_file
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.block_diffusion import commit
from twotower_eval.records import Prompt

CASES: dict[str, dict[str, Any]] = json.loads((SHIPPED / "scheduler" / "golden.json").read_text())["cases"]
TENSORS = load_file(SHIPPED / "scheduler" / "golden.safetensors")


@dataclass(frozen=True)
class Rows:
    """A context that knows only which rows of the case it holds."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def select(self, positions: Sequence[int]) -> "Rows":
        return Rows(tuple(self.rows[p] for p in positions), tuple(self.lengths[p] for p in positions))


class Replay:
    """A model whose denoiser answers with the recorded logits of its block and step, and notes what it was given."""

    tokenizer = None
    has_denoiser = True
    joins_contexts = True

    def __init__(self, name: str, first_row: int = 0) -> None:
        self.mask_token_id = CASES[name]["mask_token_id"]
        self.vocab_size = CASES[name]["vocab"]
        self.logits_JBKV, self.first_row = TENSORS[f"{name}.logits"], first_row
        self.starts = [j for j, (_, step) in enumerate(calls(name)) if step == 0]
        self.block, self.step = -1, 0
        self.seen: list[tuple[int, tuple[int, ...], Tensor, list[float]]] = []

    def prefill(self, ids_BS: Tensor, lengths_B: Sequence[int] | None = None) -> Rows:
        rows = tuple(range(self.first_row, self.first_row + ids_BS.shape[0]))
        return Rows(rows, (ids_BS.shape[1],) * len(rows))

    def extend(self, context: Rows, ids_BK: Tensor) -> Rows:
        return Rows(context.rows, tuple(length + ids_BK.shape[1] for length in context.lengths))

    def denoise(self, block_BK: Tensor, context: Rows, t_B: Sequence[float]) -> Tensor:
        if (block_BK == self.mask_token_id).all():
            self.block, self.step = self.block + 1, 0
        else:
            self.step += 1
        call = self.starts[self.block] + self.step
        self.seen.append((call, context.rows, block_BK.clone(), list(t_B)))
        return self.logits_JBKV[call, list(context.rows)].clone()


def calls(name: str) -> list[tuple[int, int]]:
    """Block and step of each of the reference's calls; a block begins where every row is masked."""
    found: list[tuple[int, int]] = []
    for before_BK in TENSORS[f"{name}.xt_before"]:
        begins = bool((before_BK == CASES[name]["mask_token_id"]).all())
        block, step = found[-1] if found else (-1, 0)
        found.append((block + 1, 0) if begins else (block, step + 1))
    return found


def decoder_for(model: Any, name: str, kind: str = "block_diffusion", **more: Any) -> Any:
    case = CASES[name]
    steps, threshold = case["steps_per_block"], case["confidence_threshold"]
    return make_decoder(model, kind, block_size=case["block_size"], steps_per_block=steps, threshold=threshold, **more)


@pytest.mark.parametrize("name", CASES)
def test_commit_rule(name: str) -> None:
    case = CASES[name]
    mask = case["mask_token_id"]
    for j, (_, step) in enumerate(calls(name)):
        before_BK, after_BK = TENSORS[f"{name}.xt_before"][j], TENSORS[f"{name}.xt_after"][j]
        logits_BKV = TENSORS[f"{name}.logits"][j].clone()
        logits_BKV[..., mask] = -torch.inf
        confidence_BK, tokens_BK = logits_BKV.softmax(-1).max(-1)
        steps_left_B = torch.full((case["batch"],), case["steps_per_block"] - step)
        taken_BK, forced_B = commit(confidence_BK, before_BK == mask, steps_left_B, case["confidence_threshold"])
        assert torch.where(taken_BK, tokens_BK, before_BK).tolist() == after_BK.tolist()
        assert forced_B.tolist() == (taken_BK & ~(confidence_BK > case["confidence_threshold"])).sum(1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_sampler(name: str) -> None:
    """The whole loop with the reference's batch-mean t: every call's block and t, tokens, NFE.

    The reference stops all rows after a block in which one has EOS, so the budget is what it made.
    """
    case, model = CASES[name], Replay(name)
    prompts = [Prompt(id=str(row), token_ids=(0,)) for row in range(case["batch"])]
    wanted_BS = TENSORS[f"{name}.tokens"].tolist()
    eos = () if case["eos_token_id"] is None else (case["eos_token_id"],)
    generations = decoder_for(model, name, batch_mean_t=True).generate(
        prompts, max_new_tokens=len(wanted_BS[0]), eos_token_ids=eos
    )
    assert len(model.seen) == case["nfe"]
    assert [call for call, *_ in model.seen] == list(range(case["nfe"]))
    for call, rows, block_BK, t_B in model.seen:
        before_BK = TENSORS[f"{name}.xt_before"][call]
        busy = [row for row in range(case["batch"]) if (before_BK[row] == case["mask_token_id"]).any()]
        assert list(rows) == busy
        assert block_BK.tolist() == before_BK[busy].tolist()
        assert t_B == pytest.approx(TENSORS[f"{name}.t"][call, busy].tolist(), abs=1e-6)
    for g, tokens in zip(generations, wanted_BS, strict=True):
        cut = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
        assert list(g.token_ids) == tokens[:cut]
        assert g.finish == ("length" if cut == len(tokens) else "eos")
        assert g.num_tokens + g.num_discarded_tokens == len(tokens)
    if eos:
        assert any(g.finish == "eos" for g in generations)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["block_diffusion", "reference"])
def test_every_row_alone(name: str, kind: str) -> None:
    """Fed with its own logits a row gives alone what it gave in the batch, in the slow decoder too."""
    case = CASES[name]
    for row, tokens in enumerate(TENSORS[f"{name}.tokens"].tolist()):
        model = Replay(name, first_row=row)
        [g] = decoder_for(model, name, kind).generate([Prompt(id="p", token_ids=(0,))], max_new_tokens=len(tokens))
        assert list(g.token_ids) == tokens
        masked_JBK = TENSORS[f"{name}.xt_before"] == case["mask_token_id"]
        assert g.num_denoiser_forwards == int(masked_JBK[:, row].any(-1).sum())
