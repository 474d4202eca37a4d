"""Types of the lm-eval objects used here (tasks, requests, filters, index entries), which carry few types of their own.

None is instantiated here: lm-eval's own classes have these attributes. What a task's own code returns may be of any
type, so callers check it or catch the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar, Protocol

Doc = Mapping[str, object]  # a document, as its data set has it
Aggregation = Callable[[Sequence[object]], float]  # makes one number of an item from each document


class Instance(Protocol):
    """A request about one document, later with its answers."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    request_type: str
    doc: dict[str, object]
    args: tuple[Any, ...]  # texts; behind the prompt of a generation its settings
    arguments: tuple[object, ...]  # the same, writable
    idx: int
    doc_id: int
    task_name: str
    repeats: int
    metadata: tuple[str, int, int]
    resps: list[object]
    filtered_resps: dict[str, object]


class Filter(Protocol):
    """A filter chain, which turns each request's answers into what is scored."""

    name: str

    def apply(self, instances: list[Instance]) -> None:
        """Fill ``filtered_resps`` under the filter's name."""


class Config(Protocol):
    """What a task's YAML says."""

    output_type: str
    metric_list: object
    filter_list: Sequence[Mapping[str, Any]] | None
    repeats: int
    doc_to_choice: object


class Task(Protocol):
    """A loaded task."""

    OUTPUT_TYPE: str
    VERSION: object
    config: Config
    eval_docs: Sized
    instances: list[Instance]
    _filters: Sequence[Filter]

    def dump_config(self) -> Mapping[str, object]:
        """What its YAML says."""

    def set_fewshot_seed(self, seed: int) -> None:
        """Set the seed of the few-shot examples."""

    def build_all_requests(self, **how: object) -> None:
        """Fill ``instances``; ``how`` prompts are asked."""

    def doc_to_text(self, doc: Doc) -> object:
        """The question of a document."""

    def doc_to_target(self, doc: Doc) -> object:
        """Its right answer."""

    def doc_to_choice(self, doc: Doc) -> Sequence[object]:
        """Its options."""

    def process_results(self, doc: Doc, results: Sequence[object]) -> Mapping[str, object]:
        """Metric -> value of the answers to a document's requests."""

    def aggregation(self) -> Mapping[str, Aggregation]:
        """Metric -> aggregation over all documents."""

    def higher_is_better(self) -> Mapping[str, bool]:
        """By metric."""


class Kind(Protocol):
    """The kind of an entry; its name is TASK, GROUP or TAG."""

    name: str


class Entry(Protocol):
    """An entry of lm-eval's index."""

    name: str
    kind: Kind
    yaml_path: Path
    cfg: Mapping[str, object]
    tags: Sequence[str]
