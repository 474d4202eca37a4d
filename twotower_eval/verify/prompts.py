"""Prompts to verify a model on: the shipped tasks' texts, or, without a tokenizer, random ids."""

from __future__ import annotations

import json
from typing import Any

import torch

from twotower_eval.models.prompts import naming, prompt_ids
from twotower_eval.plan import data_path
from twotower_eval.records import Prompt

TASKS = ("miniature_arithmetic", "miniature_recall", "miniature_sort", "miniature_program")
PER_TASK = 2
RANDOM_LENGTHS = (3, 9, 17, 33)  # around a block's ends, unequal so that batches are padded


def make_prompts(model: Any, seed: int) -> list[Prompt]:
    """A few prompts of unequal lengths. Text where the model can read it: random ids say little of a trained model."""
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        usable = [token for token in range(model.vocab_size) if token != model.mask_token_id]
        drawn = [torch.randint(len(usable), (n,), generator=generator).tolist() for n in RANDOM_LENGTHS]
        rows = [tuple(usable[index] for index in indices) for indices in drawn]
        return [Prompt(id=f"random/{n}", token_ids=row) for n, row in zip(RANDOM_LENGTHS, rows, strict=True)]
    prompts = []
    for task in TASKS:
        lines = data_path("tasks", "miniature", f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        for doc_id, line in enumerate(lines[:PER_TASK]):
            text = json.loads(line)["prompt"]
            with naming(f"task {task!r}, document {doc_id}"):
                ids = tuple(prompt_ids(model, text))
            prompts.append(Prompt(id=f"{task}/{doc_id}", token_ids=ids, text=text))
    return prompts
