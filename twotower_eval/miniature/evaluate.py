"""How good the pair is while it trains, in the terms of the claim: retention and tokens per denoiser forward.

Measured on held-out documents that no task uses (tasks take the first ones of each kind), so that watching the curve
cannot tune anything to the evaluation.
"""

from __future__ import annotations

from typing import Any

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.protocol import as_model
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.miniature.batches import Batch, make_batch
from twotower_eval.miniature.corpus import SHORT, Corpus, Document, decode, encode, evaluation_documents
from twotower_eval.miniature.tokenizer import EOS_ID
from twotower_eval.records import Prompt

DOCUMENTS_PER_KIND = 60
MAX_NEW_TOKENS = 1024  # whatever a corpus allows
THRESHOLD = 0.9


def attach_facts(model: TwoTower) -> None:
    """What a loader would attach and decoders ask for; training has no checkpoint to read it from."""
    model.vocab_size = model.config.vocab_size
    model.mask_token_id = model.config.mask_token_id
    model.has_denoiser = True


def accuracy_by_kind(
    model: TwoTower, decoder: str, corpus: Corpus = SHORT, **params: float
) -> tuple[dict[str, float], float | None]:
    """Share of exactly right answers by kind, and useful tokens per denoiser forward (None without any)."""
    attach_facts(model)
    options: dict[str, Any] = {**params}
    generate = make_decoder(as_model(model), decoder, **options).generate
    accuracy: dict[str, float] = {}
    num_tokens = num_forwards = 0
    budget = min(corpus.max_new_tokens, MAX_NEW_TOKENS)
    for kind in corpus.kinds:
        documents = evaluation_documents(kind, corpus)[corpus.first_watched :][:DOCUMENTS_PER_KIND]
        prompts = [Prompt(id=str(i), token_ids=tuple(encode(d.prompt))) for i, d in enumerate(documents)]
        generations = generate(prompts, max_new_tokens=budget, eos_token_ids=(EOS_ID,))
        right = [_is_right(g.token_ids, g.finish, d) for g, d in zip(generations, documents, strict=True)]
        accuracy[kind] = sum(right) / len(right)
        num_tokens += sum(g.num_tokens for g in generations)
        num_forwards += sum(g.num_denoiser_forwards for g in generations)
    return accuracy, num_tokens / num_forwards if num_forwards else None


def _is_right(token_ids: tuple[int, ...], finish: str, document: Document) -> bool:
    return finish == "eos" and decode(token_ids) == document.answer


@torch.no_grad()
def context_point(model: TwoTower, corpus: Corpus = SHORT) -> dict[str, dict[str, float]]:
    """The AR model's accuracy, by kind."""
    accuracy, _ = accuracy_by_kind(model, "autoregressive", corpus)
    return {"ar_accuracy": accuracy}


@torch.no_grad()
def learning_point(model: TwoTower, ar_accuracy: dict[str, float], corpus: Corpus = SHORT) -> dict[str, object]:
    """One point of the learning curve: block 16, 16 steps, one threshold."""
    accuracy, tokens_per_nfe = accuracy_by_kind(model, "block_diffusion", corpus, threshold=THRESHOLD)
    baseline = sum(ar_accuracy.values())
    return {
        "threshold": THRESHOLD,
        "ar_accuracy": ar_accuracy,
        "accuracy": accuracy,
        "retention": round(sum(accuracy.values()) / baseline, 4) if baseline else None,
        "tokens_per_nfe": round(tokens_per_nfe, 3) if tokens_per_nfe else None,
    }


@torch.no_grad()
def with_greedy_answers(model: TwoTower, batch: Batch, multiple: int, max_new_tokens: int) -> Batch:
    """The batch with the context tower's own greedy answers in place of the corpus's: sequence-level distillation
    (arXiv 1606.07947). Prompts whose answer does not end in time are left out; the batch as it is where none does."""
    attach_facts(model)
    columns = batch.num_prompt_columns
    rows = zip(batch.ids_NS[:, :columns].tolist(), batch.valid_NS[:, :columns].tolist(), strict=True)
    prompts = [[i for i, real in zip(ids, valid, strict=True) if real] for ids, valid in rows]
    asked = [Prompt(id=str(i), token_ids=tuple(ids)) for i, ids in enumerate(prompts)]
    generate = make_decoder(as_model(model), "autoregressive").generate
    generations = generate(asked, max_new_tokens=max_new_tokens, eos_token_ids=(EOS_ID,))
    pairs = zip(prompts, generations, strict=True)
    answered = [(prompt, [*g.token_ids, EOS_ID]) for prompt, g in pairs if g.finish == "eos"]
    return make_batch(answered, multiple).to(batch.ids_NS.device) if answered else batch
