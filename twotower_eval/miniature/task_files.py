"""The miniature's evaluation tasks as lm-eval files: one YAML and one JSONL file each, written from the corpus.

They are held-out documents (`corpus.evaluation_documents`): the first ones of each kind for generation, later ones
for the multiple-choice and the perplexity task, so that no prompt serves twice. Writing them again gives the same
bytes; the files in the repository are this function's output.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

from twotower_eval.miniature.corpus import EVAL_SEED, KINDS, SHORT, Document, evaluation_documents
from twotower_eval.miniature.english import ANIMALS, COLOURS, NAMES, PLACES

GENERATION_DOCUMENTS = SHORT.first_watched
CHOICE_DOCUMENTS_PER_KIND, CHOICE_KINDS, OPTIONS = 150, ("recall", "english"), 4
PERPLEXITY_DOCUMENTS_PER_KIND = 20

_HEAD = """\
# Written by twotower_eval.miniature.task_files.write_tasks; change it there.
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
    """A row; every document is drawn on its own, so it is its own cluster in the statistics."""
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
    """What a word of the answer could be mistaken for: values of its table column, near numbers, words of its sort."""
    if document.kind == "recall":
        rows = [row.split() for row in document.prompt.split(";")[0].split(", ")]
        pool = [value for column in zip(*rows, strict=True) if word in column for value in column]
    elif word.isdigit():
        pool = [str(int(word) + change) for change in (-10, -2, -1, 1, 2, 10) if int(word) + change > 0]
    else:
        pool = [other for sort in (NAMES, COLOURS, ANIMALS, PLACES) if word in sort for other in sort]
        pool = [other for other in pool if other in document.prompt] if word in NAMES else pool
    return [other for other in pool if other != word]
