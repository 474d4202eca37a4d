"""Documents with their requests: made by lm-eval, numbered, hashed, with the stops and the budget that hold here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import SupportsFloat, cast

from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.asked import Asked, decoding_asked
from twotower_eval.measure.suites.chance import chance_by_metric
from twotower_eval.measure.suites.families import families
from twotower_eval.measure.suites.files import SuiteTask, cluster_id
from twotower_eval.measure.suites.lm_types import Doc, Instance, Task
from twotower_eval.records import MEAN, SUMMED_AGGREGATIONS, canonical_json, sha256_text

DEFAULT_MAX_NEW_TOKENS = 256  # for tasks that name no budget; lm-eval's own models default to the same
FEWSHOT_SEED = 1234  # lm-eval's own default, so that seed 0 gives the prompts that lm-eval gives
BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


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
    asked: frozenset[Asked]  # how its texts are to be made

    @cached_property
    def chance(self) -> Mapping[str, float]:
        """What blind guessing scores under each metric that has options to guess among."""
        return chance_by_metric(self.source, self.doc, self.instances)


@dataclass(frozen=True)
class Wishes:
    """What the caller of :func:`resolve_tasks` asks for beside the names."""

    data_dir: Path | None
    limit: int | None
    seed: int
    samples: int | None
    max_new_tokens: int | None
    temperature: float | None


def build_docs(name: str, leaf: str, source: Task, first_id: int, member: SuiteTask, wishes: Wishes) -> list[BuiltDoc]:
    """All documents of the lm-eval task ``leaf``, numbered from ``first_id`` on as documents of ``name``."""
    by_doc = defaultdict(list)
    for instance in lm_tasks.build_instances(leaf, source, FEWSHOT_SEED + wishes.seed):
        by_doc[instance.doc_id].append(instance)
    docs = []
    for index in sorted(by_doc):
        instances = sorted(by_doc[index], key=lambda instance: instance.idx)
        asked = set()
        for instance in instances:
            instance.metadata = (name, first_id + index, 1)
            instance.task_name, instance.doc_id, instance.repeats = instance.metadata
            if generates(instance):
                try:
                    asked.add(decoding_asked(instance.args[1]))
                    settings = _generation_settings(instance.args[1], member, wishes)
                except UserError as error:
                    raise UserError(f"task {name!r}: {error}") from error
                instance.arguments = (instance.args[0], settings)
        docs.append(_doc(name, leaf, source, index, instances, frozenset(asked)))
    for doc in docs[:1]:
        _check_scoring(name, source, doc)
    return docs


def _check_scoring(name: str, source: Task, doc: BuiltDoc) -> None:
    """UserError where scoring needs a package, a file or the network that is not there.

    It is tried on one made-up answer, which need not suit it, rather than after hours on those of models.
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
    name: str, leaf: str, source: Task, index: int, instances: Sequence[Instance], asked: frozenset[Asked]
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
        doc_sha256=_sha256(text),
        prompt_sha256=prompts[0] if len(prompts) == 1 else sha256_text("".join(prompts)),
        target_sha256=_sha256(str(source.doc_to_target(doc))),
        asked=asked,
    )


def joins(docs: Sequence[BuiltDoc]) -> tuple[tuple[str, str], ...]:
    """Pairs of clusters that near-duplicates among the documents make one, the later one first."""
    firsts = families([own_text(doc) for doc in docs])
    pairs = ((doc.cluster_id, docs[first].cluster_id) for doc, first in zip(docs, firsts, strict=True))
    return tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def joined(docs: Sequence[BuiltDoc], pairs: Iterable[tuple[str, str]]) -> tuple[BuiltDoc, ...]:
    """Documents in the clusters that these pairs leave of theirs."""
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
    """What a document asks or holds by itself, without examples before it; all its texts where these are no text."""
    for text in (doc.source.doc_to_text(dict(doc.doc)), doc.source.doc_to_target(dict(doc.doc))):
        if isinstance(text, str) and text.strip():
            return text
    return " ".join(str(value) for value in doc.doc.values() if isinstance(value, str | list))


def instance_sha256(instance: Instance) -> str:
    """Hash of what a model is asked: the prompt of a generation, else all texts of the request."""
    texts = [arg for arg in instance.args if isinstance(arg, str)]
    return _sha256(texts[0]) if len(texts) == 1 else _sha256(canonical_json(texts))


def _sha256(text: str) -> str:
    # Web text may hold half of a surrogate pair, which strict UTF-8 refuses.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def generates(instance: Instance) -> bool:
    """Whether a request is answered in text."""
    return bool(instance.request_type == "generate_until")


def check_options(docs: Sequence[BuiltDoc]) -> None:
    """UserError for a request to score no text: whatever it were given, such an option would win or lose for nothing.

    Blanks that end a context are scored with what follows, so that they are something.
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
    """Stop strings and token budget in lm-eval's settings of a generation, under any of the names it goes by.

    UserError for stops that are no text and for a budget that is no number of tokens.
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


def _generation_settings(own: JsonObject, member: SuiteTask, wishes: Wishes) -> dict[str, object]:
    """The stops, the budget and the temperature that hold here; what else a task asks is in ``BuiltTask.asked``."""
    stops, own_budget = stops_and_budget(own, DEFAULT_MAX_NEW_TOKENS)
    budget = wishes.max_new_tokens or member.max_new_tokens or own_budget
    temperature = decoding_asked(own).temperature if wishes.temperature is None else wishes.temperature
    sampling = {} if temperature is None else {"do_sample": temperature > 0, "temperature": temperature}
    return {"until": list(stops if member.stop is None else member.stop), "max_gen_toks": budget, **sampling}
