"""What a user can mend is one line, what cannot be computed has its reason, and every other error is a bug: a traceback
and exit code 1, never a verdict, a reason in a table or exit code 2."""

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_fixture as made
import torch
from own_tasks import task_yaml, use_tasks, write_tasks
from tiny_pair import write_pair

from twotower_eval import cli, store
from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.consistency import contradictions
from twotower_eval.analyse.compare.figures import ArmsDifferError, measured
from twotower_eval.analyse.compare.wholes import _resampled
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.transformers_model import ForwardError
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.errors import NoEstimate, UserError
from twotower_eval.measure import suites
from twotower_eval.measure.suites.datafiles import prepare
from twotower_eval.measure.verify.golden import load_golden
from twotower_eval.miniature.train import read_recipe, train_pair
from twotower_eval.plugin_calls import PluginError
from twotower_eval.records import Score, SpeedSample

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "twotower_eval"
BROAD = {"ValueError", "Exception", "BaseException"}
FOREIGN = "what somebody else's code may raise"
PLAIN = "one call of the standard library"

# Who may catch a bare ValueError, or more than that: around one call of code that is not this project's.
HANDLERS = {
    "strict.parse_json": "of Python's reader and its hooks",
    "decoder_settings._read": PLAIN,
    "resources.read_toml": "of whole numbers with thousands of digits",
    "plugin_calls.calls_of": FOREIGN,
    "plugin_calls.calls_in": FOREIGN,
    "plugin_calls.noting.noted": "noted, and raised on",
    "cli.main": "a note is added, and it is raised on",
    "cli.options._number": PLAIN,
    "cli.options.numbers": PLAIN,
    "store.environment._memory_bytes": PLAIN,
    "store.journal.Journal.append": "what was written is taken back, and it is raised on",
    "store.resume.resume": "the temporary file is removed, and it is raised on",
    "engine.ops.kernels.Kernel._prove": FOREIGN,
    "engine.plugin_source._spec": PLAIN,
    "engine.plugin_source._imported": PLAIN,
    "engine.models.config._as_interval": PLAIN,
    "engine.models.identity._content": PLAIN,
    "engine.models.probes.free_bytes": PLAIN,
    "engine.models.tokenizer.load_tokenizer": "tokenizers raises nothing finer than Exception",
    "engine.models.transformers_ar._load_inner": FOREIGN,
    "engine.families.backbone.load_inner": FOREIGN,
    "engine.families.diffusion_gemma._config": FOREIGN,
    "engine.models.transformers_ar.check_files": FOREIGN,
    "miniature.family_training.read_recipe": PLAIN,
    "engine.models.transformers_ar._class_tokens": FOREIGN,
    "engine.models.transformers_model.TransformersModel.own_generate": FOREIGN,
    "engine.models.transformers_model.TransformersModel._logits": FOREIGN,
    "miniature.recipes.read_recipe": PLAIN,
    "analyse.compare.consistency.moment_of": PLAIN,
    "measure.suites.asked._number": PLAIN,
    "measure.suites.documents._of_task": FOREIGN,
    "measure.suites.datafiles._text": PLAIN,
    "measure.suites.documents._num_tokens": PLAIN,
    "measure.suites.lm_tasks.load_task": FOREIGN,
    "measure.suites.lm_tasks.build_instances": FOREIGN,
    "measure.suites.lm_tasks.needing": FOREIGN,
    "measure.suites.parts._parsed": PLAIN,
    "measure.harness.scoring.parts_of": FOREIGN,
    "measure.harness.scoring._called": FOREIGN,
    "measure.harness.filtered._apply": FOREIGN,
    "measure.harness.filtered._given": FOREIGN,
    "measure.suites.lm_tasks._resolved": FOREIGN,
    "measure.suites.lm_tasks.load_yaml": "of lm-eval's reader, by its words; any other is raised on",
    "api.listing._plain": PLAIN,
    "api.listing._source": PLAIN,
    "task_options._one_seed": PLAIN,
    "task_options._value": PLAIN,
    "hub.snapshot": "what the hub's library may raise",
    "hub._shards": "of a JSON file, which whoever reads it then names",
    "engine.models.chat.ChatTemplate._written": FOREIGN,
    "engine.models.chat._tokenizer": FOREIGN,
    "engine.endpoints.client._seconds_of": PLAIN,
    "engine.endpoints.client._connections": "of the HTTP library, for what the environment says",
    "engine.endpoints.client.read_address": PLAIN,
    "engine.endpoints.streams.error_text": "of a server's JSON",
    "engine.endpoints.streams.read_document": "of a server's JSON",
    "engine.endpoints.model._vocab_size": "tokenizers raises nothing finer than Exception",
    "engine.endpoints.model.connect": "the client is closed, and it is raised on",
    "measure.harness.scoring._number": FOREIGN,
    "measure.speed.conditions._whole_memory": PLAIN,
    "measure.speed.watch._thread_s": PLAIN,
}

# Who may raise a bare ValueError outside analyse/stats, whose functions check their arguments: all for wrong arguments.
RAISES = {
    "engine.models.autoregressive.host_lengths",
    "engine.models.twotower._time_tensor",
    "store.resume.RunWriter.append",
}


WANTED = (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler, ast.Call, ast.Assign, ast.AnnAssign)


@cache
def modules() -> dict[str, list[ast.AST]]:
    """Modules where anything is caught or raised -> their nodes that matter here."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        if any(word in text for word in ("except", "suppress", "ValueError")):
            found[name] = [node for node in ast.walk(ast.parse(text)) if isinstance(node, WANTED)]
    return found


def place_of(module: str, node: Any) -> str:
    """The module, class and function that a node is in."""
    defined = [one for one in modules()[module] if isinstance(one, (ast.FunctionDef, ast.ClassDef))]
    around = [one for one in defined if one.lineno <= node.lineno and (one.end_lineno or 0) >= node.lineno]
    return ".".join([module, *(one.name for one in sorted(around, key=lambda one: one.lineno))])


def names_in(node: ast.AST | None) -> set[str]:
    return {"BaseException"} if node is None else {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def caught_by(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
        return names_in(node)
    return names_in(node.type) if isinstance(node, ast.ExceptHandler) else set()


def broad_names() -> set[str]:
    """``ValueError`` and the names of tuples that hold it."""
    broad = set(BROAD)
    nodes = [node for found in modules().values() for node in found if isinstance(node, (ast.Assign, ast.AnnAssign))]
    tuples = [node for node in nodes if isinstance(node.value, ast.Tuple)]
    for _ in range(3):  # tuples made of tuples
        for node in tuples:
            if names_in(node.value) & broad:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                broad |= {target.id for target in targets if isinstance(target, ast.Name)}
    return broad


def test_nobody_catches_a_bare_value_error_but_around_one_foreign_call() -> None:
    broad = broad_names()
    assert {"MISTAKEN", "FAILURES", "LOAD_ERRORS", "FORWARD_ERRORS", "unfit"} <= broad
    found = set()
    for module, nodes in modules().items():
        for node in nodes:
            suppresses = isinstance(node, ast.Call) and "suppress" in names_in(node.func) | {
                getattr(node.func, "attr", "")
            }
            caught = names_in(node.type) if isinstance(node, ast.ExceptHandler) else set()
            if (caught | (names_in(node) if suppresses else set())) & broad:
                found.add(place_of(module, node))
    assert found - HANDLERS.keys() == set(), "catch UserError or NoEstimate, or the one call that raises, and list it"
    assert HANDLERS.keys() - found == set(), "stale: nothing is caught there any more"


def test_nobody_raises_a_bare_value_error_but_for_arguments() -> None:
    """Nor makes one, to be raised elsewhere."""
    found = {
        place_of(module, node)
        for module, nodes in modules().items()
        if not module.startswith("analyse.stats")
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ValueError"
    }
    assert found - RAISES == set(), "raise UserError or NoEstimate, or list it"
    assert RAISES - found == set(), "stale: nothing is raised there any more"


def test_both_kinds_are_value_errors_and_neither_is_the_other() -> None:
    """Who catches ValueError around a call into the library keeps catching them."""
    assert issubclass(UserError, ValueError)
    assert issubclass(NoEstimate, ValueError)
    assert not issubclass(UserError, NoEstimate)
    assert not issubclass(NoEstimate, UserError)
    assert issubclass(ArmsDifferError, UserError)
    assert issubclass(PluginError, UserError)
    assert not issubclass(ForwardError, ValueError)


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def broadcast_wrongly(*_: Any, **__: Any) -> Any:
    """Numpy's own ValueError."""
    return np.zeros(3) + np.zeros(4)


def lose_wrongly(*_: Any, **__: Any) -> Any:
    """Torch's own ValueError."""
    return torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(5, dtype=torch.long))


def test_only_a_statistic_that_cannot_be_computed_has_a_reason() -> None:
    assert measured(raising(NoEstimate("no scores"))).reason == "no scores"
    with pytest.raises(ValueError, match="could not be broadcast"):
        measured(broadcast_wrongly)
    with pytest.raises(UserError, match="given wrongly"):
        measured(raising(UserError("given wrongly")))
    with pytest.raises(ValueError, match="is none of at_least"):
        measured(lambda: stats.limits("about", 1.0, 0.1))  # type: ignore[arg-type,return-value]


def bug(match: str, *argv: str) -> list[str]:
    """What Python's traceback ends with: the error itself goes on, with one line that asks to report it."""
    with pytest.raises(ValueError, match=match) as raised:
        cli.main([*argv])
    assert type(raised.value) is ValueError
    [note] = raised.value.__notes__
    assert "please report it" in note
    assert note.endswith(f"twotower-eval {' '.join(argv)}")
    return note.splitlines()


CLAIMS = """title = "mine"
[[point]]
name = "here"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8, temperature = 0.0 }
batch_size = 1
num_devices = 1
workload = "answer"
[[claim]]
name = "kept"
quantity = "retention"
subject = "pair"
baseline = "context-tower"
point = "here"
scope = ["arithmetic", "sorting"]
expected = 0.9
source = "a test"
[[claim]]
name = "fast"
quantity = "speedup_time"
subject = "pair"
baseline = "context-tower"
point = "here"
expected = 1.2
source = "a test"
"""


@pytest.mark.parametrize("statistic", ["retention", "speedup"])
def test_a_bug_in_a_statistic_is_no_verdict_and_no_reason_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistic: str
) -> None:
    """It was INCONCLUSIVE, with numpy's words for a reason."""
    paths = [
        made.quality_run(tmp_path / "results", num_docs=12, tasks=("arithmetic", "sorting"), perplexity=False),
        made.speed_run(tmp_path / "results", num_rounds=2, num_calls=3),
    ]
    claims = tmp_path / "mine.toml"
    claims.write_text(CLAIMS)
    monkeypatch.setattr(stats, statistic, broadcast_wrongly)
    bug("could not be broadcast", "claims", "check", str(claims), *map(str, paths))
    bug("could not be broadcast", "report", *map(str, paths), "--out", str(tmp_path / "report"))
    assert not list((tmp_path / "report").glob("*/report.md"))


def test_what_cannot_be_computed_is_inconclusive_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.quality_run(tmp_path / "results", num_docs=12, tasks=("arithmetic", "sorting"), perplexity=False)
    claims = tmp_path / "mine.toml"
    claims.write_text(CLAIMS)
    monkeypatch.setattr(stats, "retention", raising(NoEstimate("the moon was full")))
    assert cli.main(["claims", "check", str(claims), str(path), "--claim", "kept"]) == 4
    assert "the moon was full" in capsys.readouterr().out


def test_a_bug_ends_the_process_with_a_traceback_and_1(tmp_path: Path) -> None:
    """And whatever is mended by the user with one line and 2, in a process of its own as well."""
    body = "import sys; from twotower_eval import cli; from twotower_eval.analyse.claims import files\n"
    body += "if {bug}: files.claims_from = lambda *_: int('x')\nsys.exit(cli.main(['claims', 'audit', {name!r}]))"
    mine = tmp_path / "mine.toml"
    mine.write_text("title = 3\n")

    def ended(**given: object) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", body.format(**given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        return done.returncode, done.stderr.splitlines()

    code, lines = ended(bug=True, name=str(mine))
    assert code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == [
        "ValueError: invalid literal for int() with base 10: 'x'",
        f"This is a bug of twotower-eval or of a plug-in: please report it with this traceback and the command: "
        f"twotower-eval claims audit {mine}",
    ]
    code, lines = ended(bug=False, name=str(mine))
    assert code == 2
    assert len(lines) == 1


def test_a_bug_in_a_forward_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's ValueError was told as if the user could mend it."""
    options = ["--tasks", "miniature_sort", "--limit", "1", "--block-sizes", "16", "--thresholds", "0.8"]
    monkeypatch.setattr(TwoTower, "denoise", lose_wrongly)
    pair = write_pair(tmp_path / "pair")
    bug("to match target batch_size", "run", "--model", str(pair), *options, "--out", str(tmp_path / "results"))


def test_a_bug_in_a_check_is_not_a_check_that_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoTower, "denoise", lose_wrongly)
    bug("to match target batch_size", "verify", str(write_pair(tmp_path / "pair")), "--out", str(tmp_path / "results"))


def test_an_error_of_the_reading_side_names_its_file_and_is_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.quality_run(tmp_path / "results", num_docs=3, tasks=("arithmetic",), perplexity=False)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"cells": 3}))
    assert cli.main(["report", str(path), "--out", str(tmp_path / "report")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path / 'manifest.json'}: RunManifest: cells must be a list")


def test_arms_that_differ_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other_prompt(row: made.Row) -> made.Row:
        if isinstance(row, Score) and row.doc_id == 1 and row.value is not None:
            return dataclasses.replace(row, doc_sha256="0" * 64) if row.cell == first[0] else row
        return row

    first: list[str] = []

    def edit(row: made.Row) -> made.Row:
        first.append(row.cell)
        return other_prompt(row)

    tasks = ("arithmetic",)
    path = made.quality_run(tmp_path / "results", num_docs=3, tasks=tasks, perplexity=False, edit=edit)
    assert cli.main(["report", str(path), "--out", str(tmp_path / "report")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "differs between baseline and candidate" in line


def test_scores_of_two_groups_in_one_task_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(row: made.Row) -> made.Row:
        return dataclasses.replace(row, group="odd") if isinstance(row, Score) and row.doc_id == 1 else row

    path = made.quality_run(tmp_path / "results", num_docs=6, tasks=("arithmetic",), perplexity=False, edit=edit)
    assert cli.main(["report", str(path), "--out", str(tmp_path / "report")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "task 'arithmetic' has scores of two groups, None and odd" in line


def test_parts_that_do_not_fit_together_are_a_reason() -> None:
    """Numpy's words about the shapes of arrays were the reason."""
    named = dict.fromkeys(("cell", "task", "cluster_id", "doc_sha256", "prompt_sha256", "target_sha256", "filter"), "x")
    score = Score(
        **named,
        doc_id=0,
        metric="f1",
        higher_is_better=True,
        headline=True,
        scored_by="generation",
        value=None,
        aggregation="f1",
        parts=(1.0, 2.0),
    )
    other = dataclasses.replace(score, doc_id=1, cluster_id="1", parts=(1.0, 2.0, 3.0))
    assert _resampled([[score, other]], [None]) == "the documents' parts in the score are not all of one kind"


def test_ratios_beyond_all_numbers_have_a_reason() -> None:
    seconds = np.array([[1e-300, 2e-300], [2e-300, 1e-300]])
    tokens = np.full((2, 2), 10.0)
    calls = stats.TimedCalls(
        baseline_s=seconds * 1e300 * 1e300,
        candidate_s=seconds,
        baseline_tokens=tokens,
        candidate_tokens=tokens,
        launches=["a", "b"],
        fixed=True,
    )
    assert (
        measured(lambda: stats.speedup(calls)).reason == "the ratio, or an end of its interval, is too large a number"
    )


def test_a_time_beyond_all_clocks_ends_no_report(tmp_path: Path) -> None:
    """It is more nanoseconds than a number holds."""

    def edit(row: made.Row) -> made.Row:
        return dataclasses.replace(row, wall_s=1e300) if isinstance(row, SpeedSample) else row

    run = store.load(made.speed_run(tmp_path, num_rounds=3, num_calls=2, edit=edit))
    contradictions(run)


def test_a_section_of_somebodys_own_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mysection.py").write_text("def render(runs):\n    return int('no number')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = made.quality_run(tmp_path / "results", num_docs=3, tasks=("arithmetic",), perplexity=False)
    argv = ["report", str(path), "--out", str(tmp_path / "report"), "--section", "mysection:render"]
    assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: section mysection:render: its render raised ValueError: invalid literal for int()")
    assert "mysection.py:2 in render" in line


def test_a_family_of_somebodys_own_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "myfamily.py").write_text("def load(folder, *, devices, dtype, tower):\n    return int('no number')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"family myfamily:load: its load raised ValueError: .* at .*myfamily.py:2"):
        load_model(write_pair(tmp_path / "pair"), family="myfamily:load")


def test_a_bug_in_our_own_loading_is_no_fault_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as what is wrong with the checkpoint."""
    from twotower_eval.engine.models import checkpoint

    pair = write_pair(tmp_path / "pair")
    monkeypatch.setattr(checkpoint, "build", broadcast_wrongly)
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        load_model(pair)
    assert type(raised.value) is ValueError


CODE = "def text(doc):\n    return str(int(doc['prompt']))\n"


def test_a_tasks_own_code_that_fails_on_its_documents_is_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = task_yaml("own", "rows", "generate_until", [{"metric": "exact_match"}])
    rows = [{"prompt": prompt, "answer": "b"} for prompt in ("1", "one")]  # the first is tried when the task is loaded
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items() if key != "doc_to_text")
    write_tasks(tmp_path, [text + "doc_to_text: !function utils.text\n"], {"rows": rows}, CODE)
    use_tasks(monkeypatch, tmp_path)
    words = r"task 'own': its own code fails on its documents \(ValueError: invalid literal"
    with pytest.raises(UserError, match=words):
        suites.resolve_tasks(["own"])


def test_a_bug_in_what_is_known_of_chance_is_no_scoring_of_its_own_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was passed over, and the document had no chance."""
    from twotower_eval.measure.suites import documents

    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    rows = [{"prompt": "a", "choices": ["x", "y"], "gold": 0}]
    write_tasks(tmp_path, [task_yaml("own", "rows", "multiple_choice", metrics)], {"rows": rows})
    use_tasks(monkeypatch, tmp_path)
    monkeypatch.setattr(documents, "_is_share", broadcast_wrongly)
    [task] = suites.resolve_tasks(["own"])
    with pytest.raises(ValueError, match="could not be broadcast"):
        _ = task.docs[0].chance


def test_what_libraries_say_of_files_is_the_users(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for content in (b"\xff\xfe", b"steps = " + b"9" * 5000, b"steps ="):
        recipe.write_bytes(content)
        with pytest.raises(UserError, match=r"recipe\.toml: not a readable recipe"):
            read_recipe(recipe)
    with pytest.raises(UserError, match="device 'abacus' cannot be used here"):
        train_pair(tmp_path / "training", device="abacus")
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm" / "mgsm_en.tsv").write_text("How many?\t,\n")
    with pytest.raises(UserError, match="line 1: not a question, a tab and a whole number"):
        prepare(tmp_path, tmp_path / "out", ["mgsm"])
    golden = tmp_path / "golden"
    golden.mkdir()
    (golden / "golden.json").write_text('{"prompts": {}}')
    (golden / "golden.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"golden\.safetensors: not a whole safetensors file"):
        load_golden(golden, None, "cpu")
