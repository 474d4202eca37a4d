"""Documents with their requests: built by lm-eval, numbered and hashed, with stops and budget, their chance scores, and
near-duplicates."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import SupportsFloat, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from twotower_eval.errors import UserError
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.asked import (
    DecodingRequest,
    given_overrides,
    read_decoding_request,
    settings_text,
)
from twotower_eval.measure.suites.groups import SuiteTask, cluster_id
from twotower_eval.measure.suites.included import Included
from twotower_eval.measure.suites.lm_types import Doc, Instance, Task
from twotower_eval.records import (
    MEAN,
    PLAIN_TEXT,
    SUMMED_AGGREGATIONS,
    ChatOptions,
    ChatPrompt,
    Override,
    canonical_json,
    sha256_text,
)
from twotower_eval.strict import JsonObject
from twotower_eval.task_options import BUDGET_NAMES, OTHER_SEED, GenKwargs, Seeds

T = TypeVar("T")
FIRST_NATS, FAR_NATS, WITHOUT_CONTEXT_NATS = -1e-6, -1e6, -1.0  # by far, whatever length they are divided by
COLUMNS = ("choices", "options")
TEXT_METRICS = ("exact_match", "acc", "accuracy", "em")  # right or wrong; similarity metrics reward some wrong options
LETTER = re.compile(r"\(?([A-Za-z])[).:]?\.?")
LISTED = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s")
FIRST_LISTED = re.compile(r"(?:^|[?!.:;]\s*|\n\s*)A[).:]\s|\(A[).:]\s")  # not the A of "Plan A: …"
UNDER_OPTIONS = re.compile(r"(?im)^[^\S\n]*options:[^\S\n]*\n((?:[^\S\n]*[-*\u2022][^\S\n]+\S.*(?:\n|\Z))+)")


def chance_by_metric(source: Task, doc: Doc, instances: Sequence[Instance]) -> dict[str, float]:
    """Metric -> expected score of uniform guessing; only for metrics over options, and not those of likelihoods.

    ``source`` is the lm-eval task that scores ``doc`` by the answers to ``instances``.
    """
    better = [metric for metric, higher in source.higher_is_better().items() if higher is not False]
    try:
        with lm_tasks.quiet():
            return _chances(source, doc, instances, better)
    except _UnfitError:
        return {}  # an unusual scoring, which may still suit real answers


class _UnfitError(Exception):
    """The task's own code cannot handle this input."""


def _of_task(function: Callable[..., T], *given: object) -> T:
    """The result of the task's own code, or of lm-eval's around it, for this input."""
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
    """The document's scores if one option is by far the likeliest, and is the greedy one.

    The others follow in their order, cyclically: over all options each takes each place once.
    """
    places = [(at - option) % num_options for at in range(num_options)]
    asked = [(FIRST_NATS + place * FAR_NATS, place == 0) for place in places]
    asked += [(WITHOUT_CONTEXT_NATS, False)] * (num - num_options)
    scores = _of_task(lambda: dict(source.process_results(doc, asked)))
    return {metric: float(value) for metric, value in scores.items() if isinstance(value, (Real, np.bool_))}


def _is_share(metric: str, found: Sequence[Mapping[str, float]]) -> bool:
    """Whether a metric lies between 0 and 1 whichever option comes first; log-likelihoods do not."""
    return all(0 <= one.get(metric, -1) <= 1 for one in found)


def _share_listed(source: Task, doc: Doc) -> float | None:
    """Share of right options among those that a document lists; ``None`` if a right answer is not among them."""
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
    """Position of a right answer among options, by its number, its words or its letter."""
    text = str(target).strip()
    place = target if isinstance(target, int) else texts.index(text) if text in texts else _place_of_letter(target)
    return place if place in range(len(texts)) else None


def _place_of_letter(target: object) -> int | None:
    """0 for ``A``, ``(a)`` or ``A.``; ``None`` for anything but a single letter."""
    letter = LETTER.fullmatch(str(target).strip())
    return ord(letter[1].upper()) - ord("A") if letter else None


def _dashed(text: str) -> list[str]:
    """The lines with a dash under the last ``Options:``."""
    lists = UNDER_OPTIONS.findall(text)
    return [line.strip().lstrip("-*\u2022").strip() for line in lists[-1].splitlines()] if lists else []


def _num_lettered(text: str) -> int:
    """Number of lettered options without a gap, as in ``(A) red (B) blue``."""
    first = FIRST_LISTED.search(text)
    num = 0
    for letter in LISTED.findall(text[first.start() :].lstrip("?!.:; ") if first else ""):
        num += letter == chr(ord("A") + num)
    return num


Shingles = NDArray[np.uint64]  # distinct, sorted

NUM_WORDS = 3
LEAST_SHINGLES = 8  # distinct shingles needed to call two texts alike
ALIKE = 0.5  # Jaccard: shared shingles over all of both; a word changed in twenty leaves 0.7
FORM_SHARE, FORM_LEAST = (
    0.25,
    20,
)  # share and minimum number of documents with a boilerplate shingle
BANDS, ROWS = 32, 3  # of minhashes: a pair at 0.5 meets in some band with 99 % probability
COMPARED = 8  # earlier documents of a bucket that each is compared with
# In scripts without spaces every character counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|\d+")


def families(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first text of its near-duplicate family; its own if it is alone or first.

    Deterministic; time grows linearly with the texts.
    """
    firsts = list(range(len(texts)))
    shingles = _without_form([_shingles(text) for text in texts])
    seen: dict[str, int] = {}
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    multipliers = np.random.default_rng(0).integers(1, 2**63, size=BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    for place, text in enumerate(texts):
        equal = seen.setdefault(" ".join(text.split()), place)
        if equal != place:
            _join(firsts, place, equal)
            continue
        own = shingles[place]
        if len(own) < LEAST_SHINGLES:
            continue
        least = (own[None, :] * multipliers[:, None]).min(axis=1)
        for band in range(BANDS):
            bucket = buckets[band, least[band * ROWS : (band + 1) * ROWS].tobytes()]
            for other in bucket:
                if _first(firsts, other) != _first(firsts, place) and _jaccard(own, shingles[other]) >= ALIKE:
                    _join(firsts, place, other)
            if len(bucket) < COMPARED:
                bucket.append(place)
    return [_first(firsts, place) for place in range(len(texts))]


def _shingles(text: str) -> Shingles:
    words = ["0" if word.isdigit() else word for word in WORD.findall(text.lower())]
    # Half of a surrogate pair, as web text may hold, is no UTF-8.
    rows = (words[i : i + NUM_WORDS] for i in range(len(words) - NUM_WORDS + 1))
    encoded = (" ".join(row).encode("utf-8", "surrogatepass") for row in rows if row != ["0"] * NUM_WORDS)
    return np.unique(np.fromiter((zlib.crc32(row) for row in encoded), dtype=np.uint64))


def _without_form(shingles: Sequence[Shingles]) -> list[Shingles]:
    """The shingles without those that too many documents hold to be a sign of a family."""
    held = Counter(shingle for own in shingles for shingle in own.tolist())
    most = max(FORM_LEAST, FORM_SHARE * len(shingles))
    form = np.array(sorted(shingle for shingle, num in held.items() if num >= most), dtype=np.uint64)
    return [np.setdiff1d(own, form, assume_unique=True) for own in shingles]


def _jaccard(one: Shingles, other: Shingles) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _first(firsts: list[int], place: int) -> int:
    while firsts[place] != place:
        firsts[place] = firsts[firsts[place]]
        place = firsts[place]
    return place


def _join(firsts: list[int], one: int, other: int) -> None:
    low, high = sorted((_first(firsts, one), _first(firsts, other)))
    firsts[high] = low


DEFAULT_MAX_NEW_TOKENS = 256  # for tasks without a budget; the default of lm-eval's own models
FEWSHOT_SEED = OTHER_SEED  # with seed 0


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltDoc:
    """A document with its requests; ``source`` is the lm-eval task that it comes from and that scores it."""

    doc_id: int
    doc: Doc
    source: Task
    instances: tuple[Instance, ...]
    cluster_id: str
    doc_sha256: str
    prompt_sha256: str
    target_sha256: str
    asked: frozenset[DecodingRequest]  # decoding settings of its requests
    overrides: tuple[Override, ...] = ()  # what the plan's gen_kwargs change of these

    @cached_property
    def chance(self) -> Mapping[str, float]:
        """The expected score of blind guessing under each metric over options."""
        return chance_by_metric(self.source, self.doc, self.instances)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of :func:`resolve_tasks` beside the names."""

    data_dir: Path | None
    limit: int | None
    seeds: Seeds
    samples: int | None
    max_new_tokens: int | None
    temperature: float | None
    included: Included
    num_fewshot: int | None
    gen_kwargs: GenKwargs
    chat: ChatOptions = PLAIN_TEXT
    render: lm_tasks.Render | None = None


def build_docs(
    name: str, leaf: str, source: Task, first_id: int, member: SuiteTask, build_options: BuildOptions
) -> list[BuiltDoc]:
    """All documents of the lm-eval task ``leaf``, numbered from ``first_id``, as documents of ``name``."""
    by_doc = defaultdict(list)
    how = (build_options.chat, build_options.render)
    for instance in lm_tasks.build_instances(leaf, source, build_options.seeds.fewshot, *how):
        by_doc[instance.doc_id].append(instance)
    docs = []
    for index in sorted(by_doc):
        instances = sorted(by_doc[index], key=lambda instance: instance.idx)
        asked: set[DecodingRequest] = set()
        overrides: dict[Override, None] = {}
        for instance in instances:
            instance.metadata = (name, first_id + index, 1)
            instance.task_name, instance.doc_id, instance.repeats = instance.metadata
            if generates(instance):
                own = instance.args[1]
                try:
                    request = _decoding_request(own, build_options)
                    settings = _generation_settings(own, member, build_options)
                except UserError as error:
                    raise UserError(f"task {name!r}: {error}") from error
                asked.add(request)
                overrides |= dict.fromkeys(given_overrides(name, own, build_options.gen_kwargs))
                instance.arguments = (instance.args[0], settings)
        docs.append(_doc(name, leaf, source, index, instances, frozenset(asked), tuple(overrides)))
    for doc in docs[:1]:
        _check_scoring(name, source, doc)
    return docs


def _check_scoring(name: str, source: Task, doc: BuiltDoc) -> None:
    """UserError if scoring needs a package, a file or the network that is not available.

    Scoring is tried on a made-up answer (which need not suit it), rather than failing after hours of generation.
    """
    made_up = {"generate_until": str(source.doc_to_target(doc.doc)), "loglikelihood_rolling": -1.0}
    results = [made_up.get(instance.request_type, (-1.0, False)) for instance in doc.instances]
    items: Mapping[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lm_tasks.needing(name, "its scoring", made_up=True):
            items = dict(source.process_results(dict(doc.doc), results))
        for metric in source.aggregation():
            if lm_tasks.aggregation_name(source, metric) not in {MEAN, *SUMMED_AGGREGATIONS}:
                with lm_tasks.needing(name, f"its metric {metric!r}", made_up=True):
                    lm_tasks.aggregation(source, metric)([items[metric]] if metric in items else [])


def _doc(
    name: str,
    leaf: str,
    source: Task,
    index: int,
    instances: Sequence[Instance],
    asked: frozenset[DecodingRequest],
    overrides: tuple[Override, ...],
) -> BuiltDoc:
    # doc and target hashes are lm-eval's own, so that they can be compared with its sample logs.
    from lm_eval.utils import handle_non_serializable

    doc, doc_id = instances[0].doc, instances[0].doc_id
    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    prompts = [instance_sha256(instance) for instance in instances]
    return BuiltDoc(
        doc_id=doc_id,
        doc=doc,
        source=source,
        instances=tuple(instances),
        cluster_id=cluster_id(name, leaf, doc, index, doc_id),
        doc_sha256=sha256_text(text),
        prompt_sha256=prompts[0] if len(prompts) == 1 else sha256_text("".join(prompts)),
        target_sha256=sha256_text(str(source.doc_to_target(doc))),
        asked=asked,
        overrides=overrides,
    )


def joins(docs: Sequence[BuiltDoc]) -> tuple[tuple[str, str], ...]:
    """Pairs of clusters that near-duplicates merge, the later one first."""
    firsts = families([own_text(doc) for doc in docs])
    pairs = ((doc.cluster_id, docs[first].cluster_id) for doc, first in zip(docs, firsts, strict=True))
    return tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def joined(docs: Sequence[BuiltDoc], pairs: Iterable[tuple[str, str]]) -> tuple[BuiltDoc, ...]:
    """The documents with clusters merged by these pairs."""
    into: dict[str, str] = {}

    def root(cluster: str) -> str:
        while cluster in into:
            cluster = into[cluster]
        return cluster

    for later, earlier in pairs:
        if root(later) != root(earlier):
            into[root(later)] = root(earlier)
    return tuple(dataclasses.replace(doc, cluster_id=root(doc.cluster_id)) for doc in docs)


def own_text(doc: BuiltDoc) -> str:
    """A document's own text without few-shot examples; all its texts if that is no text."""
    for text in (doc.source.doc_to_text(dict(doc.doc)), doc.source.doc_to_target(dict(doc.doc))):
        if isinstance(text, str) and text.strip():
            return text
    return " ".join(str(value) for value in doc.doc.values() if isinstance(value, str | list))


def instance_sha256(instance: Instance) -> str:
    """Hash of a request: the prompt of a generation, else all of its texts; of a chat its messages."""
    texts = [arg.asked if isinstance(arg, ChatPrompt) else arg for arg in instance.args if isinstance(arg, str)]
    return sha256_text(texts[0]) if len(texts) == 1 else sha256_text(canonical_json(texts))


def generates(instance: Instance) -> bool:
    """Whether a request is answered by generated text."""
    return bool(instance.request_type == "generate_until")


def check_options(docs: Sequence[BuiltDoc]) -> None:
    """UserError for a request to score an empty text: such an option would win or lose without any evidence.

    Blanks at the end of a context are scored with what follows, so they count.
    """
    for doc in docs:
        for instance in doc.instances:
            if instance.request_type != "loglikelihood" or instance.args[1]:
                continue
            if instance.args[0] == instance.args[0].rstrip():
                raise UserError(
                    f"task {instance.task_name!r}, document {doc.doc_id}: option {instance.idx + 1} is empty, so that "
                    "there is nothing to score: mend the document or leave the task out"
                )


def stops_and_budget(settings: JsonObject, default_budget: int) -> tuple[tuple[str, ...], int]:
    """Stop strings and token budget of a generation's settings, under any of their names.

    UserError for stops that are not text and for a budget that is no number of tokens.
    """
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"until must be a text or a list of texts, not {until!r}")
    budgets = ((name, settings.get(name)) for name in BUDGET_NAMES)
    name, budget = next((pair for pair in budgets if pair[1] is not None), ("", default_budget))
    return tuple(stop for stop in stops if stop), _num_tokens(name, budget)


def _num_tokens(name: str, value: object) -> int:
    try:
        number = math.nan if isinstance(value, bool) else float(cast(SupportsFloat, value))
    except (TypeError, ValueError):
        number = math.nan
    if not (number >= 1 and number.is_integer()):  # "not >=", so that NaN is refused too
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(number)


def _decoding_request(own: JsonObject, build_options: BuildOptions) -> DecodingRequest:
    """How a request asks to be decoded, with the plan's ``gen_kwargs`` over its own settings.

    UserError for one of these that no decoder here follows.
    """
    given = build_options.gen_kwargs
    request = read_decoding_request({**own, **given})
    if not_done := [pair for pair in request.unsupported if pair[0] in given]:
        raise UserError(f"--gen-kwargs asks for {settings_text(not_done)}: no decoder here does that: leave it out")
    return request


def _generation_settings(own: JsonObject, member: SuiteTask, build_options: BuildOptions) -> dict[str, object]:
    """The stops, budget and temperature that apply here; ``BuiltTask.asked`` has everything else that a task asks.

    The plan's own options count before its ``gen_kwargs``, these before the suite, and the suite before the task. A
    budget among ``gen_kwargs`` replaces the task's, whatever either is called.
    """
    given = build_options.gen_kwargs
    budget_given = any(given.get(name) is not None for name in BUDGET_NAMES)
    kept = {key: value for key, value in own.items() if not (budget_given and key in BUDGET_NAMES)}
    asked = {**kept, **given}
    stops, own_budget = stops_and_budget(asked, DEFAULT_MAX_NEW_TOKENS)
    suites_budget = None if budget_given else member.max_new_tokens
    budget = build_options.max_new_tokens or suites_budget or own_budget
    temperature = (
        read_decoding_request(asked).temperature if build_options.temperature is None else build_options.temperature
    )
    sampling = {} if temperature is None else {"do_sample": temperature > 0, "temperature": temperature}
    suites_stops = None if "until" in given else member.stop
    return {"until": list(stops if suites_stops is None else suites_stops), "max_gen_toks": budget, **sampling}
