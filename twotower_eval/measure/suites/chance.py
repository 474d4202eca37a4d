"""What guessing scores: a document's expected score if one of its options is picked blindly, each as likely as another.

For options that a model ranks by likelihood the task's own scoring says it: it is asked once for each option what it
would give if that one came first, by far. So several right options, normalised accuracies and a task's own functions
are all counted as the task counts them. Answers in text have options only where the document lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TypeVar

import numpy as np

from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.lm_types import Doc, Instance, Task

T = TypeVar("T")
FIRST_NATS, FAR_NATS, WITHOUT_CONTEXT_NATS = -1e-6, -1e6, -1.0  # by far, whatever length they are divided by
COLUMNS = ("choices", "options")
TEXT_METRICS = ("exact_match", "acc", "accuracy", "em")  # right or wrong; a measure of likeness pays some wrong options
LETTER = re.compile(r"\(?([A-Za-z])[).:]?\.?")
LISTED = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s")
FIRST_LISTED = re.compile(r"(?:^|[?!.:;]\s*|\n\s*)A[).:]\s|\(A[).:]\s")  # not the A of "Plan A: …"
UNDER_OPTIONS = re.compile(r"(?im)^[^\S\n]*options:[^\S\n]*\n((?:[^\S\n]*[-*\u2022][^\S\n]+\S.*(?:\n|\Z))+)")


def chance_by_metric(source: Task, doc: Doc, instances: Sequence[Instance]) -> dict[str, float]:
    """Metric -> expected score under uniform guessing; a metric without options, or of likelihoods, is not there.

    ``source`` is the lm-eval task that scores ``doc`` by the answers to ``instances``.
    """
    better = [metric for metric, higher in source.higher_is_better().items() if higher is not False]
    try:
        with lm_tasks.quiet():
            return _chances(source, doc, instances, better)
    except _UnfitError:
        return {}  # a scoring of its own kind, which real answers may well suit


class _UnfitError(Exception):
    """The task's own code cannot take what it is given here."""


def _of_task(function: Callable[..., T], *given: object) -> T:
    """What the task's own code, or lm-eval's around it, makes of what it is given."""
    unfit: tuple[type[Exception], ...] = (*lm_tasks.misfits(), ArithmeticError, SyntaxError, ValueError)
    try:
        return function(*given)
    except unfit as error:
        raise _UnfitError from error


def _chances(source: Task, doc: Doc, instances: Sequence[Instance], better: Sequence[str]) -> dict[str, float]:
    if instances[0].request_type == "generate_until":
        share = _share_listed(source, doc)
        return {} if share is None else {metric: share for metric in better if metric in TEXT_METRICS}
    num_options = len(instances)
    if instances[0].request_type != "loglikelihood" or (num_options < 2 and source.OUTPUT_TYPE != "multiple_choice"):
        return {}
    # With this metric lm-eval asks for every option a second time, without the question.
    num_options //= 2 if "acc_mutual_info" in better else 1
    found = [_if_first(source, doc, option, num_options, len(instances)) for option in range(num_options)]
    return {metric: sum(one[metric] for one in found) / len(found) for metric in better if _is_share(metric, found)}


def _if_first(source: Task, doc: Doc, option: int, num_options: int, num: int) -> dict[str, float]:
    """The document's scores if one option comes first, by far, and is what greedy decoding gives.

    The others follow in their order, round and round: over all options each takes each place once.
    """
    places = [(at - option) % num_options for at in range(num_options)]
    asked = [(FIRST_NATS + place * FAR_NATS, place == 0) for place in places]
    asked += [(WITHOUT_CONTEXT_NATS, False)] * (num - num_options)
    scores = _of_task(lambda: dict(source.process_results(doc, asked)))
    return {metric: float(value) for metric, value in scores.items() if isinstance(value, (Real, np.bool_))}


def _is_share(metric: str, found: Sequence[Mapping[str, float]]) -> bool:
    """Whether a metric is a number between 0 and 1 whichever option comes first; log-likelihoods are not."""
    return all(0 <= one.get(metric, -1) <= 1 for one in found)


def _share_listed(source: Task, doc: Doc) -> float | None:
    """Share of right ones among the options that a document lists; ``None`` where a right answer is none of them."""
    target = _of_task(source.doc_to_target, doc)
    right = target if isinstance(target, list) else [target]
    asked = str(_of_task(source.doc_to_text, doc))
    for options in (*_columns(source, doc), _dashed(asked)):
        texts = [str(option).strip() for option in options]
        places = {_place_among(texts, one) for one in right}
        if len(texts) > 1 and right and None not in places:
            return len(places) / len(texts)
    places = {_place_of_letter(one) for one in right}
    num_lettered = _num_lettered(asked) if None not in places else 0
    known = num_lettered > 1 and places and max(place for place in places if place is not None) < num_lettered
    return len(places) / num_lettered if known else None


def _columns(source: Task, doc: Doc) -> Iterator[Sequence[object]]:
    if source.config.doc_to_choice is not None:
        yield _of_task(lambda: list(source.doc_to_choice(doc)))
    for name in COLUMNS:
        options = doc.get(name)
        options = options.get("text") if isinstance(options, Mapping) else options
        if isinstance(options, (list, tuple)):
            yield options


def _place_among(texts: Sequence[str], target: object) -> int | None:
    """Where a right answer stands among options: by its number, its words or its letter."""
    text = str(target).strip()
    place = target if isinstance(target, int) else texts.index(text) if text in texts else _place_of_letter(target)
    return place if place in range(len(texts)) else None


def _place_of_letter(target: object) -> int | None:
    """0 for ``A``, ``(a)`` or ``A.``; ``None`` for what is no lone letter."""
    letter = LETTER.fullmatch(str(target).strip())
    return ord(letter[1].upper()) - ord("A") if letter else None


def _dashed(text: str) -> list[str]:
    """The lines with a dash under the last ``Options:``."""
    lists = UNDER_OPTIONS.findall(text)
    return [line.strip().lstrip("-*\u2022").strip() for line in lists[-1].splitlines()] if lists else []


def _num_lettered(text: str) -> int:
    """How far the letters before a text's options go without a gap, as in ``(A) red (B) blue``."""
    first = FIRST_LISTED.search(text)
    num = 0
    for letter in LISTED.findall(text[first.start() :].lstrip("?!.:; ") if first else ""):
        num += letter == chr(ord("A") + num)
    return num
