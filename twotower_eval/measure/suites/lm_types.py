"""What we use of lm-eval's objects, which carry few types of their own: tasks, requests, filters, entries of the index.

Nothing here is ever made: lm-eval's own classes have these parts. What a task's own code gives may be of any kind, so
whoever reads it looks first, or catches what comes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

Doc = Mapping[str, object]  # a document, as its data set has it
Aggregation = Callable[[Sequence[object]], float]  # makes one number of an item from each document


class Instance(Protocol):
    """A request: what is asked of a model about one document, and later what it answered."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    request_type: str
    doc: dict[str, object]
    args: tuple[Any, ...]  # texts; behind the prompt of a generation its settings
    arguments: tuple[object, ...]  # the same, to be set
    idx: int
    doc_id: int
    task_name: str
    repeats: int
    metadata: tuple[str, int, int]
    resps: list[object]
    filtered_resps: dict[str, object]


class Filter(Protocol):
    """A chain of filters, which makes of each request's answers what is scored."""

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
    config: Config
    instances: list[Instance]
    _filters: Sequence[Filter]

    def set_fewshot_seed(self, seed: int) -> None:
        """Of the examples before a prompt."""

    def build_all_requests(self) -> None:
        """Fill ``instances``."""

    def doc_to_text(self, doc: Doc) -> object:
        """What a document asks."""

    def doc_to_target(self, doc: Doc) -> object:
        """Its right answer."""

    def doc_to_choice(self, doc: Doc) -> Sequence[object]:
        """Its options."""

    def process_results(self, doc: Doc, results: Sequence[object]) -> Mapping[str, object]:
        """By metric, what the answers to a document's requests are worth."""

    def aggregation(self) -> Mapping[str, Aggregation]:
        """By metric, what makes one number of all documents'."""

    def higher_is_better(self) -> Mapping[str, bool]:
        """By metric."""


class Kind(Protocol):
    """Of an entry: its name is TASK, GROUP or TAG."""

    name: str


class Entry(Protocol):
    """What lm-eval's index knows of a name."""

    kind: Kind
    yaml_path: Path
    cfg: Mapping[str, object]
    tags: Sequence[str]
