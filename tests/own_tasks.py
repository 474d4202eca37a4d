"""Tasks of a test's own, as YAML and JSONL in a folder, and a model whose answers are written down."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from twotower_eval.measure.suites import BuiltTask, instance_sha256, lm_tasks
from twotower_eval.records import Generation, GenerationRow, Likelihood, LikelihoodRow

Answer = Callable[[Instance], Any]


def task_yaml(name: str, rows: str, kind: str, metrics: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A task on ``rows`` (the name of a JSONL file) with the columns prompt and answer, or choices and gold."""
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{rows}.jsonl"}},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": kind,
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "metric_list": list(metrics),
    }
    if kind == "generate_until":
        config["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": 16}
    if kind == "multiple_choice":
        config |= {"doc_to_choice": "choices", "doc_to_target": "gold"}
    if kind == "loglikelihood_rolling":
        config |= {"doc_to_text": "", "doc_to_target": "text"}
    return {**config, **more}


def write_tasks(
    folder: Path,
    configs: Iterable[Mapping[str, Any] | str],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    code: str = "",
) -> None:
    """Write YAML (as text, where it names functions), JSONL files and the code beside them."""
    for number, config in enumerate(configs):
        text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False)
        (folder / f"task_{number}.yaml").write_text(text)
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "utils.py").write_text(code)


def use_tasks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the tasks in the folder be the local ones, and no stock tasks."""
    index = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).task_index
    monkeypatch.setattr(lm_tasks, "local_index", lambda: index)
    monkeypatch.setattr(lm_tasks, "stock_index", dict)


def rows_of(task: BuiltTask, cell: str, answer: Answer) -> list[GenerationRow | LikelihoodRow]:
    """The journal of a model that answers so."""
    return [_row(task, cell, instance, answer(instance)) for doc in task.docs for instance in doc.instances]


def _row(task: BuiltTask, cell: str, instance: Instance, answer: Any) -> GenerationRow | LikelihoodRow:
    key = {
        "cell": cell,
        "task": task.name,
        "doc_id": instance.doc_id,
        "request_index": instance.idx,
        "repeat": 0,
        "prompt_sha256": instance_sha256(instance),
    }
    if instance.request_type == "generate_until":
        generation = Generation(
            prompt_id=str(instance.doc_id), token_ids=(1,), text=answer, finish="eos", num_prompt_tokens=1,
            num_tokens=1, num_discarded_tokens=0, num_context_forwards=1, num_denoiser_forwards=0,
        )  # fmt: skip
        return GenerationRow(**key, generation=generation)
    rolling = instance.request_type == "loglikelihood_rolling"
    nats, greedy = (answer, False) if rolling else answer
    likelihood = Likelihood(logprob_nats=nats, is_greedy=greedy, kind="exact")
    request = "loglikelihood_rolling" if rolling else "loglikelihood"
    return LikelihoodRow(**key, request=request, num_tokens=1, likelihood=likelihood)


class Written(LM):
    """lm-eval's side of the same model."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def _all(self, requests: list[Instance]) -> list[Any]:
        return [self.answer(request) for request in requests]

    generate_until = loglikelihood = loglikelihood_rolling = _all
