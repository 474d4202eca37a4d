"""Training batches: documents of like length, prompts ending at one column, so that blocks start with the answers.

N documents, S columns, P prompt columns, K block size. Prompts are padded on the left, answers with EOS on the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch import Tensor

from twotower_eval.miniature.corpus import SHORT, Corpus, Document, training_documents
from twotower_eval.miniature.tokenizer import EOS_ID, PAD_ID, encode

SEPARATOR_SHARE = 0.1  # documents that follow an EOS, as in a running text
PROMPT_WEIGHT = 0.1  # of a prompt token's loss in AR training: most prompts are random by design
FILLER_WEIGHT = 0.1  # of an EOS behind the first one, in the denoiser's loss


@dataclass(frozen=True)
class Batch:
    """Token ids (N, S), which of them are real, prompt columns P, and each answer's length with its EOS."""

    ids_NS: Tensor
    valid_NS: Tensor
    num_prompt_columns: int
    answer_lengths_N: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(
            self.ids_NS.to(device), self.valid_NS.to(device), self.num_prompt_columns, self.answer_lengths_N.to(device)
        )

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding and filler not counted."""
        return int(self.valid_NS[:, : self.num_prompt_columns].sum() + self.answer_lengths_N.sum())


def make_batch(documents: list[tuple[list[int], list[int]]], multiple: int) -> Batch:
    """Lay out (prompt ids, answer ids with EOS) so that all answers start at one column, a multiple of ``multiple``."""
    prompt_columns = _rounded_up(max(len(prompt) for prompt, _ in documents), multiple)
    answer_columns = _rounded_up(max(len(answer) for _, answer in documents), multiple)
    rows, valid = [], []
    for prompt, answer in documents:
        padding = prompt_columns - len(prompt)
        rows.append([PAD_ID] * padding + prompt + answer + [EOS_ID] * (answer_columns - len(answer)))
        valid.append([False] * padding + [True] * (len(prompt) + answer_columns))
    lengths_N = torch.tensor([len(answer) for _, answer in documents])
    return Batch(torch.tensor(rows), torch.tensor(valid), prompt_columns, lengths_N)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def training_batches(
    seed: int, *, columns_per_batch: int, multiple: int, pool_size: int, corpus: Corpus = SHORT
) -> Iterator[Batch]:
    """An endless stream. Each pool of documents is sorted by shape, cut into batches, and the batches are shuffled."""
    rng = Random(f"batches {seed}")
    stream = training_documents(seed, corpus=corpus)
    while True:
        pool = [_encoded(document, rng) for document in islice(stream, pool_size)]
        pool.sort(key=lambda d: (_rounded_up(len(d[1]), multiple), _rounded_up(len(d[0]), multiple), rng.random()))
        batches, rest = [], pool
        while rest:
            taken = _take(rest, columns_per_batch, multiple)
            batches.append(make_batch(rest[:taken], multiple))
            rest = rest[taken:]
        rng.shuffle(batches)
        yield from batches


def _encoded(document: Document, rng: Random) -> tuple[list[int], list[int]]:
    separator = [EOS_ID] if rng.random() < SEPARATOR_SHARE else []
    return separator + encode(document.prompt), [*encode(document.answer), EOS_ID]


def _take(documents: list[tuple[list[int], list[int]]], columns: int, multiple: int) -> int:
    """How many of the sorted documents fit into one batch of at most ``columns`` padded tokens."""
    widest_prompt = widest_answer = 0
    for count, (prompt, answer) in enumerate(documents):
        widest_prompt = max(widest_prompt, _rounded_up(len(prompt), multiple))
        widest_answer = max(widest_answer, _rounded_up(len(answer), multiple))
        if count and (count + 1) * (widest_prompt + widest_answer) > columns:
            return count
    return len(documents)
