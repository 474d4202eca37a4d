"""How good the pair is while it trains, in the terms of the claim: retention and tokens per denoiser forward.

Measured on held-out documents that no task uses (the tasks take the first 300 of each kind), so that watching the
curve cannot tune anything to the evaluation.
"""

from __future__ import annotations

from typing import Any

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.protocol import as_model
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.miniature.corpus import KINDS, Document, decode, encode, evaluation_documents
from twotower_eval.miniature.task_files import MAX_NEW_TOKENS
from twotower_eval.miniature.tokenizer import EOS_ID
from twotower_eval.records import Prompt

FIRST_DOCUMENT = 300  # the tasks use those before it
DOCUMENTS_PER_KIND = 60
THRESHOLD = 0.9


def attach_facts(model: TwoTower) -> None:
    """What a loader would attach and decoders ask for; training has no checkpoint to read it from."""
    model.vocab_size = model.config.vocab_size
    model.mask_token_id = model.config.mask_token_id
    model.has_denoiser = True


def accuracy_by_kind(model: TwoTower, decoder: str, **params: Any) -> tuple[dict[str, float], float | None]:
    """Share of exactly right answers by kind, and useful tokens per denoiser forward (None without any)."""
    attach_facts(model)
    generate = make_decoder(as_model(model), decoder, **params).generate
    accuracy: dict[str, float] = {}
    num_tokens = num_forwards = 0
    for kind in KINDS:
        documents = evaluation_documents(kind)[FIRST_DOCUMENT : FIRST_DOCUMENT + DOCUMENTS_PER_KIND]
        prompts = [Prompt(id=str(i), token_ids=tuple(encode(d.prompt))) for i, d in enumerate(documents)]
        generations = generate(prompts, max_new_tokens=MAX_NEW_TOKENS, eos_token_ids=(EOS_ID,))
        right = [_is_right(g.token_ids, g.finish, d) for g, d in zip(generations, documents, strict=True)]
        accuracy[kind] = sum(right) / len(right)
        num_tokens += sum(g.num_tokens for g in generations)
        num_forwards += sum(g.num_denoiser_forwards for g in generations)
    return accuracy, num_tokens / num_forwards if num_forwards else None


def _is_right(token_ids: tuple[int, ...], finish: str, document: Document) -> bool:
    return finish == "eos" and decode(token_ids) == document.answer


@torch.no_grad()
def context_point(model: TwoTower) -> dict[str, Any]:
    """The AR model's accuracy, by kind."""
    accuracy, _ = accuracy_by_kind(model, "autoregressive")
    return {"ar_accuracy": accuracy}


@torch.no_grad()
def learning_point(model: TwoTower, ar_accuracy: dict[str, float]) -> dict[str, Any]:
    """One point of the learning curve: block 16, 16 steps, one threshold."""
    accuracy, tokens_per_nfe = accuracy_by_kind(model, "block_diffusion", threshold=THRESHOLD)
    baseline = sum(ar_accuracy.values())
    return {
        "threshold": THRESHOLD,
        "ar_accuracy": ar_accuracy,
        "accuracy": accuracy,
        "retention": round(sum(accuracy.values()) / baseline, 4) if baseline else None,
        "tokens_per_nfe": round(tokens_per_nfe, 3) if tokens_per_nfe else None,
    }
