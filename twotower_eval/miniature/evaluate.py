"""Measures the pair while it trains, in the terms of the claim, and writes the lm-eval files of the corpus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.protocol import as_model
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.miniature.blocks import Batch, make_batch
from twotower_eval.miniature.corpus import (
    ANIMALS,
    COLOURS,
    EVAL_SEED,
    KINDS,
    NAMES,
    PLACES,
    SHORT,
    Corpus,
    Document,
    decode,
    encode,
    evaluation_documents,
)
from twotower_eval.miniature.export import EOS_ID
from twotower_eval.records import Prompt

GENERATION_DOCUMENTS = SHORT.first_watched
CHOICE_DOCUMENTS_PER_KIND, CHOICE_KINDS, OPTIONS = 150, ("recall", "english"), 4
PERPLEXITY_DOCUMENTS_PER_KIND = 20

_HEAD = """\
# Written by twotower_eval.miniature.evaluate.write_tasks; change it there.
# `data_files` is the bare name of the file beside this one. lm-eval would look for it in the working directory, so a
# loader has to put this file's folder in front (`twotower-eval` does).
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
num_fewshot: 0
"""
_GENERATION = """\
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
target_delimiter: ""
generation_kwargs:
  until: []  # nothing but the model's EOS ends an answer
  do_sample: false
  max_gen_toks: {max_new_tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: ['^\\s+', '\\s+$']
"""
_CHOICE = """\
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_PERPLEXITY = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
_TAIL = """\
metadata:
  version: 1.0
"""


def write_tasks(folder: Path) -> list[Path]:
    """Write every task's YAML and JSONL file into the folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = _GENERATION.format(max_new_tokens=SHORT.max_new_tokens)
    paths: list[Path] = []
    for kind in KINDS:
        paths += _write_task(folder, f"miniature_{kind}", generation, list(_generation_rows(kind)))
    paths += _write_task(folder, "miniature_choice", _CHOICE, list(_choice_rows()))
    paths += _write_task(folder, "miniature_perplexity", _PERPLEXITY, list(_perplexity_rows()))
    return paths


def _write_task(folder: Path, task: str, body: str, rows: Sequence[Mapping[str, object]]) -> list[Path]:
    settings, data = folder / f"{task}.yaml", folder / f"{task}.jsonl"
    settings.write_text(_HEAD.format(task=task) + body + _TAIL, encoding="utf-8", newline="\n")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data.write_text(lines, encoding="utf-8", newline="\n")
    return [settings, data]


def _named(doc_id: str, **fields: object) -> dict[str, object]:
    """A row; every document is drawn independently, so it is its own cluster in the statistics."""
    return {"doc_id": doc_id, "cluster": doc_id, **fields}


def _generation_rows(kind: str) -> Iterator[dict[str, object]]:
    for index, document in enumerate(evaluation_documents(kind)[:GENERATION_DOCUMENTS]):
        yield _named(f"{kind}-{index:03d}", prompt=document.prompt, answer=document.answer)


def _choice_rows() -> Iterator[dict[str, object]]:
    rng = Random(f"{EVAL_SEED} choice")
    for kind in CHOICE_KINDS:
        held_out = evaluation_documents(kind)[GENERATION_DOCUMENTS:][:CHOICE_DOCUMENTS_PER_KIND]
        for index, document in enumerate(held_out):
            options = [document.answer, *distractors(document, rng)]
            rng.shuffle(options)
            gold = options.index(document.answer)
            yield _named(f"choice-{kind}-{index:03d}", prompt=document.prompt, choices=options, gold=gold)


def _perplexity_rows() -> Iterator[dict[str, object]]:
    for kind in KINDS:
        held_out = evaluation_documents(kind)[GENERATION_DOCUMENTS + CHOICE_DOCUMENTS_PER_KIND :]
        for index, document in enumerate(held_out[:PERPLEXITY_DOCUMENTS_PER_KIND]):
            yield _named(f"perplexity-{kind}-{index:03d}", text=document.prompt + document.answer)


def distractors(document: Document, rng: Random) -> list[str]:
    """Three different wrong answers that each differ from the right one in a single word or number."""
    words = [match for match in re.finditer(r"\w+", document.answer) if _substitutes(document, match[0])]
    wrong: list[str] = []
    while len(wrong) < OPTIONS - 1:
        word = rng.choice(words)
        other = rng.choice(_substitutes(document, word[0]))
        option = document.answer[: word.start()] + other + document.answer[word.end() :]
        if option not in wrong:
            wrong.append(option)
    return wrong


def _substitutes(document: Document, word: str) -> list[str]:
    """Words that an answer's word could be mistaken for: values of its table column, near numbers, words of its
    kind."""
    if document.kind == "recall":
        rows = [row.split() for row in document.prompt.split(";")[0].split(", ")]
        pool = [value for column in zip(*rows, strict=True) if word in column for value in column]
    elif word.isdigit():
        pool = [str(int(word) + change) for change in (-10, -2, -1, 1, 2, 10) if int(word) + change > 0]
    else:
        pool = [other for sort in (NAMES, COLOURS, ANIMALS, PLACES) if word in sort for other in sort]
        pool = [other for other in pool if other in document.prompt] if word in NAMES else pool
    return [other for other in pool if other != word]


DOCUMENTS_PER_KIND = 60
MAX_NEW_TOKENS = 1024  # as far as a corpus allows
THRESHOLD = 0.9


def attach_facts(model: TwoTower) -> None:
    """Attach what a loader would and decoders need; in training there is no checkpoint to read it from."""
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
    """The batch with the context tower's greedy answers in place of the corpus's: sequence-level distillation (arXiv
    1606.07947). Prompts whose answer does not end in time are left out; the batch is unchanged if none does."""
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
