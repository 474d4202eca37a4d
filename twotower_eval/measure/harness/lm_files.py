"""lm-eval's own result files beside the journals: ``results_DATE.json`` and ``samples_TASK_DATE.jsonl`` of each model.

A model here is a checkpoint with a decoder, which is what lm-eval calls a model. The files lie where
``lm_eval --output_path RUN/lm_eval --log_samples`` would put them, and hold what it would: the same keys, hashes,
targets, filtered answers, scores and standard errors, ``N/A`` where it has none; reports have their own intervals.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, SupportsFloat, cast

from twotower_eval.engine.models.protocol import Model
from twotower_eval.measure.harness.bootstrap import NUM_DRAWS, standard_error
from twotower_eval.measure.harness.filtered import Filtered, response
from twotower_eval.measure.harness.scoring import mean_item
from twotower_eval.measure.suites import BuiltDoc, BuiltTask, aggregation, aggregation_name, lm_tasks
from twotower_eval.measure.suites.lm_types import Task
from twotower_eval.records import MEAN, Cell, ChatUse, RunManifest, sha256_text

FOLDER, TEMPORARY, OLD = "lm_eval", "lm_eval.tmp", "lm_eval.old"  # within a run's folder
SOURCE = "twotower"  # how lm-eval knows our models
NOT_AVAILABLE = "N/A"
Json = dict[str, object]


@dataclass(kw_only=True, eq=False)
class _Model:
    """What is known so far of one model's results."""

    name: str
    cell: Cell
    model: Model | None
    results: dict[str, Json] = field(default_factory=dict)
    sources: dict[str, Task] = field(default_factory=dict)
    hashes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    members: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # of groups
    by_size: dict[str, bool] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)  # of groups: the one that they average


class LmEvalFiles:
    """Writes the files of one run, cell by cell, into a folder that gets its name when all is there.

    Use it as a context manager; an error leaves what was there before. ``with_samples=False`` leaves out the samples,
    which hold every prompt.
    """

    def __init__(self, run: Path, manifest: RunManifest, *, with_samples: bool) -> None:
        self._run, self._manifest, self._with_samples = run, manifest, with_samples
        self._date = datetime.now().isoformat().replace(":", "-")
        self._names = model_names(manifest.cells)
        self._models: dict[str, _Model] = {}

    def __enter__(self) -> LmEvalFiles:
        shutil.rmtree(self._run / TEMPORARY, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._models:
            for model in self._models.values():
                text = json.dumps(_results(model, self._manifest), indent=2, default=_plain, ensure_ascii=False)
                with self._open(model, f"results_{self._date}.json") as stream:
                    stream.write(text)
            self._put_in_place()
        shutil.rmtree(self._run / TEMPORARY, ignore_errors=True)

    @lm_tasks.quiet()
    def add(self, cell: Cell, task: BuiltTask, filtered: Sequence[Filtered], model: Model | None = None) -> None:
        """Take the answers of one cell; ``model`` tells of its tokenizer."""
        name = self._names[cell.id]
        held = self._models.setdefault(name, _Model(name=name, cell=cell, model=model))
        by_source: dict[int, list[Filtered]] = defaultdict(list)
        for found in filtered:
            by_source[id(found.source)].append(found)
        for own in by_source.values():
            leaf = task.name if len(by_source) == 1 else _task_name(own[0].source)
            held.sources[leaf] = own[0].source
            held.results[leaf] = _task_results(leaf, own, task.samples)
            if len(by_source) > 1:
                held.members[task.name].append(leaf)
                held.by_size[task.name], held.metrics[task.name] = True, task.metric
            self._write_samples(held, leaf, own, first_id=min(doc.doc_id for doc in own[0].docs))
        if task.group is not None:
            held.members[task.group].append(task.name)
            held.by_size[task.group], held.metrics[task.group] = task.by_size, task.metric

    def _write_samples(self, model: _Model, leaf: str, filtered: Sequence[Filtered], first_id: int) -> None:
        with contextlib.ExitStack() as stack:
            stream = None
            if self._with_samples:
                stream = stack.enter_context(self._open(model, f"samples_{leaf}_{self._date}.jsonl"))
            for found in filtered:
                for doc in found.docs:
                    model.hashes[leaf].append(doc.doc_sha256 + _prompt_sha256(doc) + doc.target_sha256)
                    if stream is not None:
                        sample = sample_of(found, doc, doc.doc_id - first_id)
                        stream.write(json.dumps(sample, default=_plain, ensure_ascii=False) + "\n")

    def _open(self, model: _Model, name: str) -> IO[str]:
        from lm_eval.utils import sanitize_model_name

        folder = self._run / TEMPORARY / sanitize_model_name(model.name)
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / name, "w", encoding="utf-8", errors="surrogatepass")

    def _put_in_place(self) -> None:
        shutil.rmtree(self._run / OLD, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._run / FOLDER, self._run / OLD)
        os.rename(self._run / TEMPORARY, self._run / FOLDER)
        shutil.rmtree(self._run / OLD, ignore_errors=True)


def model_names(cells: Sequence[Cell]) -> dict[str, str]:
    """Cell id -> the name of its model: checkpoint and decoder, and whatever else tells the models of a run apart.

    ``org/name:block_diffusion:block_size=16:threshold=0.9``, of which lm-eval makes a folder's name.
    """
    named: dict[str, dict[tuple[object, ...], str]] = defaultdict(dict)
    keys = {}
    for cell in cells:
        checkpoint, decoder = cell.checkpoint, cell.decoder
        settings = [f"{name}={value}" for name, value in decoder.params.items() if value not in (False, None)]
        tower = [] if checkpoint.tower is None else [f"{checkpoint.tower}-tower"]
        name = ":".join([checkpoint.name, *tower, decoder.kind, *settings])
        keys[cell.id] = (name, (checkpoint.identity, checkpoint.tower, checkpoint.dtype, decoder.label, decoder.code))
        others = named[name]
        others.setdefault(keys[cell.id][1], name if not others else f"{name}:{checkpoint.dtype}:{len(others) + 1}")
    return {cell: named[name][key] for cell, (name, key) in keys.items()}


def sample_of(found: Filtered, doc: BuiltDoc, number: int) -> Json:
    """One line of a samples file, as lm-eval writes it.

    With several samples of a document that its task does not take together, ``filtered_resps`` holds the list of each
    request's, and a metric the mean over samples.
    """
    from lm_eval.utils import sanitize_list

    answers, rows = found.answers[doc.doc_id], found.rows[doc.doc_id]
    requests = range(len(doc.instances))
    items = found.items[doc.doc_id]
    return {
        "doc_id": number,
        "doc": doc.doc,
        "target": str(doc.source.doc_to_target(doc.doc)),
        "arguments": {
            f"gen_args_{at}": {f"arg_{place}": part for place, part in enumerate(instance.args)}
            for at, instance in enumerate(doc.instances)
        },
        "resps": sanitize_list([[response(sample[at]) for sample in rows] for at in requests]),
        "filtered_resps": sanitize_list(
            [answers[0][at] if len(answers) == 1 else [answer[at] for answer in answers] for at in requests]
        ),
        "filter": found.filter,
        "metrics": list(items),
        "doc_hash": doc.doc_sha256,
        "prompt_hash": _prompt_sha256(doc),
        "target_hash": doc.target_sha256,
        **{metric: _item(found.source, metric, held) for metric, held in items.items()},
    }


def _prompt_sha256(doc: BuiltDoc) -> str:
    """lm-eval's hash: of the first text of the first request."""
    return sha256_text(str(doc.instances[0].args[0]))


def _item(source: Task, metric: str, held: Sequence[object]) -> object:
    """A document's item: lm-eval's own, of several samples their mean where that is what the metric takes."""
    if len(held) == 1 or aggregation_name(source, metric) != MEAN:
        return held[0]
    values = [float(cast(SupportsFloat, mean_item(source, metric, one))) for one in held]
    return sum(values) / len(values)


def _task_results(leaf: str, filtered: Sequence[Filtered], num_samples: int) -> Json:
    """A task's entry under ``results``: every metric of every filter, aggregated as lm-eval does."""
    config = _config(filtered[0].source)
    made: Json = {}
    most = 0
    for found in filtered:
        for metric in dict.fromkeys(metric for doc in found.docs for metric in found.items[doc.doc_id]):
            held = [found.items[doc.doc_id][metric] for doc in found.docs if metric in found.items[doc.doc_id]]
            items = [_item(found.source, metric, one) for one in held]
            value, error = _aggregated(found.source, metric, items)
            made |= {f"{metric},{found.filter}": value, f"{metric}_stderr,{found.filter}": error}
            most = max(most, len(items))
    return {"name": leaf, "alias": config.get("task_alias") or leaf, "sample_len": most, **made}


def _aggregated(source: Task, metric: str, items: Sequence[object]) -> tuple[object, object]:
    function = aggregation(source, metric)
    error = standard_error(metric, function, items)
    return function(items), NOT_AVAILABLE if error is None else error


def _task_name(source: Task) -> str:
    return str(_config(source).get("task"))


def _config(source: Task) -> Json:
    """What the task's YAML says, without the function that reads local files in the place of its data set."""
    return {name: value for name, value in source.dump_config().items() if name != "custom_dataset"}


def _results(model: _Model, manifest: RunManifest) -> Json:
    """All of a results file."""
    groups = {name: _group(name, model, members) for name, members in model.members.items()}
    configs = {name: _config(source) for name, source in model.sources.items()}
    versions = {name: source.VERSION for name, source in model.sources.items()}
    better = {name: source.higher_is_better() for name, source in model.sources.items()}
    shots = {name: config.get("num_fewshot") or 0 for name, config in configs.items()}
    for name, members in model.members.items():
        known = [better[one] for one in members if one in better]
        better |= {name: known[0]} if known else {}
        own = {shots[one] for one in members if one in shots}
        shots |= {name: own.pop()} if len(own) == 1 else {}
    counts = {name: entry["sample_len"] for name, entry in model.results.items()}
    return {
        "results": {**model.results, **groups},
        **({"groups": groups} if groups else {}),
        "group_subtasks": dict(model.members),
        "configs": dict(sorted(configs.items())),
        "versions": dict(sorted({**dict.fromkeys(groups, NOT_AVAILABLE), **versions}.items())),
        "n-shot": dict(sorted(shots.items())),
        "higher_is_better": dict(sorted(better.items())),
        "n-samples": {
            name: {"original": len(source.eval_docs), "effective": counts[name]}
            for name, source in model.sources.items()
        },
        **_of_execution(model, manifest),
        "task_hashes": {name: sha256_text("".join(hashes)) for name, hashes in model.hashes.items()},
        **_of_model(model.name),
        **_of_chats(model.cell, manifest),
    }


def _group(name: str, model: _Model, members: Sequence[str]) -> Json:
    """A group's entry: the mean of its metric over its members, by documents or equally, under every filter."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    entries = [model.results[member] for member in members if member in model.results]
    sizes = [cast(int, entry["sample_len"]) for entry in entries]
    made: Json = {"name": name, "alias": name, "sample_len": sum(sizes)}
    keys = [key for key in entries[0] if key.startswith(f"{model.metrics[name]},")] if entries else []
    for key in keys:
        error_key = key.replace(",", "_stderr,", 1)
        if any(key not in entry or not isinstance(entry[key], int | float) for entry in entries):
            continue
        errors = [entry[error_key] for entry in entries]
        known = NOT_AVAILABLE not in errors
        pooled = pooled_sample_stderr(errors, sizes) if known and model.by_size[name] else NOT_AVAILABLE
        if known and not model.by_size[name]:
            pooled = unweighted_mean_stderr(errors)
        values = [entry[key] for entry in entries]
        made |= {key: aggregate_subtask_metrics(values, sizes, model.by_size[name]), error_key: pooled}
    return made


def _of_execution(model: _Model, manifest: RunManifest) -> Json:
    """What ``simple_evaluate`` tells of the model and the machine."""
    plan, seeds, checkpoint, packages = manifest.plan, manifest.seeds, model.cell.checkpoint, manifest.packages
    return {
        "config": {
            "model": SOURCE,
            "model_args": model_args(model.cell),
            "model_dtype": checkpoint.dtype,
            "model_revision": checkpoint.revision,
            "model_sha": checkpoint.identity,
            "batch_size": str(plan.get("batch_size")),
            "batch_sizes": [],
            "device": ",".join(checkpoint.devices),
            "use_cache": None,
            "limit": plan.get("limit"),
            "bootstrap_iters": NUM_DRAWS,
            "gen_kwargs": plan.get("gen_kwargs"),
            "random_seed": seeds.get("python", seeds.get("run")),
            "numpy_seed": seeds.get("numpy", seeds.get("run")),
            "torch_seed": seeds.get("run"),
            "fewshot_seed": seeds.get("fewshot"),
        },
        "git_hash": manifest.commit,
        "date": datetime.fromisoformat(manifest.started_at).timestamp(),
        "pretty_env_info": json.dumps({"packages": packages, "machine": manifest.machine}, default=str),
        "transformers_version": packages.get("transformers", NOT_AVAILABLE),
        "lm_eval_version": packages.get("lm-eval", NOT_AVAILABLE),
        "upper_git_hash": None,
        **_of_tokenizer(model.model),
    }


def model_args(cell: Cell) -> Json:
    """What ``lm_eval --model twotower --model_args`` would be given for this cell."""
    checkpoint, decoder = cell.checkpoint, cell.decoder
    params = {name: value for name, value in decoder.params.items() if value is not None}
    tower = {} if checkpoint.tower is None else {"tower": checkpoint.tower}
    return {"pretrained": checkpoint.source, **tower, "dtype": checkpoint.dtype, "decoder": decoder.kind, **params}


def _of_tokenizer(model: Model | None) -> Json:
    codec = None if model is None else model.tokenizer
    if codec is None or model is None:
        return {}

    def token(token_id: int | None) -> list[str | None]:
        return [None if token_id is None else codec.decode_with_special([token_id]), str(token_id)]

    return {
        "tokenizer_pad_token": token(None),
        "tokenizer_eos_token": token(codec.eos_token_id),
        "tokenizer_bos_token": token(codec.bos_token_id),
        "eot_token_id": codec.eos_token_id,
        "max_length": model.max_length,
    }


def _of_model(name: str) -> Json:
    """The fields that lm-eval's tracker adds."""
    from lm_eval.utils import sanitize_model_name

    return {
        "model_source": SOURCE,
        "model_name": name,
        "model_name_sanitized": sanitize_model_name(name),
        "total_evaluation_time_seconds": None,
    }


def _of_chats(cell: Cell, manifest: RunManifest) -> Json:
    """How prompts were asked, as lm-eval's tracker says it; of a server's template it knows nothing but an empty
    text."""
    plan, use = manifest.plan, _use_of(cell, manifest)
    said, multiturn = plan.get("system_instruction"), plan.get("fewshot_as_multiturn")
    template = None if use is None else use.template or ""
    return {
        "system_instruction": said,
        "system_instruction_sha": sha256_text(str(said)) if said else None,
        "fewshot_as_multiturn": True if multiturn is None and plan.get("apply_chat_template") else multiturn,
        "chat_template": template,
        "chat_template_sha": sha256_text(template) if template else None,
    }


def _use_of(cell: Cell, manifest: RunManifest) -> ChatUse | None:
    """How the cell's model was asked through a chat template, if it was."""
    is_served = cell.checkpoint.served is not None
    own = [use for use in manifest.chats or () if use.applied and (use.arm, bool(use.served)) == (cell.arm, is_served)]
    named = [use for use in own if use.checkpoint == cell.checkpoint.name]
    return next(iter((*named, *own)), None)


def _plain(value: object) -> object:
    """What JSON has no form for, as lm-eval writes it."""
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)
