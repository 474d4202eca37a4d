"""What a task is: its documents, its YAML and the code that asks and scores; and scores that follow from answers."""

import json
import site
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import write_pair

from twotower_eval import store
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.parts import with_imports
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import plan_from_json
from twotower_eval.store import environment

YAML = """
task: own
include: shared.yaml
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
doc_to_text: "{{q}} ="
process_results: !function code.score
metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]
"""
SHARED = """
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
doc_to_target: a
"""
CODE = "from helper_of_own import bonus\n\ndef score(doc, results):\n    return {'length': len(results[0]) + bonus()}\n"
HELPER = "import deeper_of_own.more\n\ndef bonus():\n    return deeper_of_own.more.BONUS\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one task: a YAML that includes another, a function beside it that imports two further files."""
    folder = tmp_path / "tasks"
    (folder / "deeper_of_own").mkdir(parents=True)
    (folder / "own.jsonl").write_text("".join(f'{{"q": "{n} + 1", "a": "{n + 1}"}}\n' for n in range(6)))
    (folder / "own.yaml").write_text(YAML)
    (folder / "shared.yaml").write_text(SHARED)
    (folder / "code.py").write_text(CODE)
    (folder / "helper_of_own.py").write_text(HELPER)
    (folder / "deeper_of_own" / "more.py").write_text("BONUS = 0\n")
    (folder / "unused.py").write_text("BONUS = 0\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(lm_tasks, "data_path", lambda *parts: folder)
    forget()
    yield folder
    forget()


def forget() -> None:
    """As in a new process."""
    lm_tasks.local_index.cache_clear()
    for name in ("helper_of_own", "deeper_of_own", "deeper_of_own.more"):
        sys.modules.pop(name, None)
    for name in [name for name in sys.modules if name.endswith("/tasks/code")]:
        del sys.modules[name]


def replace(name: str, old: str, new: str) -> Callable[[Path], str]:
    def edit(folder: Path) -> str:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        forget()
        return name

    edit.__name__ = name
    return edit


EDITS = [
    replace("own.yaml", "{{q}} =", "{{q}} =>"),
    replace("own.yaml", "higher_is_better: true", "higher_is_better: false"),
    replace("shared.yaml", "max_gen_toks: 4", "max_gen_toks: 5"),
    replace("code.py", "len(results[0])", "1000 + len(results[0])"),
    replace("helper_of_own.py", "more.BONUS", "more.BONUS + 1"),
    replace("deeper_of_own/more.py", "BONUS = 0", "BONUS = 7"),
    replace("own.jsonl", "5 + 1", "5 +  1"),
]
named = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)


def digest() -> str:
    [task] = suites.resolve_tasks(["own"])
    return task.digest


@named
def test_whatever_asks_or_scores_is_part_of_a_task(own: Path, edit: Callable[[Path], str]) -> None:
    before = digest()
    edit(own)
    assert digest() != before


def test_what_has_no_part_in_a_task_changes_nothing(own: Path, tmp_path: Path) -> None:
    before = suites.resolve_tasks(["own"])[0].parts
    replace("unused.py", "0", "1")(own)
    assert suites.resolve_tasks(["own"])[0].parts == before
    assert set(before) == {
        *("settings", "documents", "own.yaml", "shared.yaml", "code.py", "helper_of_own.py", "deeper_of_own/more.py"),
    }


LOADERS = {
    "import_module": "import importlib\nBONUS = importlib.import_module('rules_of_own').BONUS\n",
    "__import__": "BONUS = __import__('rules_of_own').BONUS\n",
    "exec": "from pathlib import Path\nexec(Path(__file__).with_name('rules_of_own.py').read_text())\n",
    "lazily": (
        "import sys\nfrom pathlib import Path\n\ndef bonus():\n"
        "    sys.path.insert(0, str(Path(__file__).parent / 'lib'))\n"
        "    from rules_in_lib import BONUS\n    return BONUS\n"
    ),
    "file": "from pathlib import Path\nBONUS = int((Path(__file__).parent / 'lib/bonus.json').read_text())\n",
    "glob": "from pathlib import Path\nBONUS = len([*(Path(__file__).parent / 'lib').glob('*.json')][0].read_text())\n",
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_and_data_that_are_loaded_by_hand_are_part_of_a_task(own: Path, loader: str) -> None:
    """Only imports were followed: a rule read with ``import_module`` or ``open`` could be mended between two scores."""
    (own / "lib").mkdir()
    files = {"rules_of_own.py": "BONUS = 0\n", "lib/rules_in_lib.py": "BONUS = 0\n", "lib/bonus.json": "0"}
    for name, text in files.items():
        (own / name).write_text(text)
    (own / "helper_of_own.py").write_text(LOADERS[loader] + ("" if loader == "lazily" else "bonus = lambda: BONUS\n"))
    before = digest()
    reached = {"file": "lib/bonus.json", "glob": "lib/bonus.json", "lazily": "lib/rules_in_lib.py"}
    name = reached.get(loader, "rules_of_own.py")
    (own / name).write_text(files[name].replace("0", "7"))
    forget()
    assert digest() != before


def test_code_of_lm_evals_own_tasks_is_followed_too() -> None:
    stock = lm_tasks.roots()[1]
    found = {file.relative_to(stock).as_posix() for file in with_imports([stock / "ifeval" / "utils.py"])}
    assert {f"ifeval/{name}.py" for name in ("utils", "instructions", "instructions_registry")} <= found
    assert not any("site-packages" in name for name in found)


@pytest.mark.parametrize("place", ["lib/python3/site-packages", "python3/dist-packages", "of the user"])
def test_installed_packages_are_no_part_of_a_task_wherever_they_lie(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """With ``pip install --user``, or Debian's packages, an import of numpy made 176 files part of a task."""
    (tmp_path / place / "package_of_others").mkdir(parents=True)
    (tmp_path / place / "package_of_others" / "__init__.py").write_text("")
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "of the user"))
    monkeypatch.syspath_prepend(str(tmp_path / place))
    (own / "helper_of_own.py").write_text("import package_of_others\n")
    assert with_imports([own / "helper_of_own.py"]) == {(own / "helper_of_own.py").resolve()}
    (tmp_path / "checkout" / "package_of_ours").mkdir(parents=True)
    (tmp_path / "checkout" / "package_of_ours" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    (own / "helper_of_own.py").write_text("import package_of_others, package_of_ours\n")
    assert len(with_imports([own / "helper_of_own.py"])) == 2


@pytest.mark.parametrize("edited", ["first_of_two", "second_of_two"])
def test_files_of_one_name_are_parts_of_their_own(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    """Of two files of one name, in folders of one name, only one was held against its digest."""
    places = ("first_of_two", "second_of_two")
    for place in places:
        (tmp_path / "lib" / place / "common").mkdir(parents=True)
        (tmp_path / "lib" / place / "common" / "rules.py").write_text("BONUS = 0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    text = "def bonus():\n    from {}.common import rules\n    from {}.common import rules\n    return rules.BONUS\n"
    (own / "helper_of_own.py").write_text(text.format(*places))
    before = suites.resolve_tasks(["own"])[0].parts
    (tmp_path / "lib" / edited / "common" / "rules.py").write_text("BONUS = 7\n")
    forget()
    after = suites.resolve_tasks(["own"])[0].parts
    assert {name for name in after if after[name] != before.get(name)} == {f"{edited}/common/rules.py"}


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    pair = write_pair(tmp_path / "pair", hybrid_override_pattern="*", num_hidden_layers=1)
    return RunPlan(model=str(pair), tasks=("own",), block_sizes=(4,))


def stopped(plan: RunPlan, root: Path) -> Path:
    """A run that was killed while its scores were written."""
    path = harness.run(plan, root=root)
    (path / "done.json").unlink()
    lines = (path / "scores.jsonl").read_text().splitlines(keepends=True)
    (path / "scores.jsonl").write_text("".join(lines[:3]))
    return path


def values(path: Path) -> list[float | None]:
    return [score.value for score in store.load(path).scores]


@named
def test_a_resume_after_an_edit_of_the_task_names_the_file(
    own: Path, plan: RunPlan, tmp_path: Path, edit: Callable[[Path], str]
) -> None:
    """Documents were scored by the old rule before the stop and by the mended one after it."""
    path = stopped(plan, tmp_path / "runs")
    before = values(path)
    name = {"own.jsonl": "documents"}.get(named_file := edit(own), named_file)
    with pytest.raises(ValueError, match=rf"cannot resume.*{name} of task 'own' was changed"):
        harness.run(plan, root=tmp_path / "runs", resume=path)
    assert values(path) == before


def test_a_stopped_run_of_an_unchanged_task_goes_on(own: Path, plan: RunPlan, tmp_path: Path) -> None:
    path = stopped(plan, tmp_path / "runs")
    forget()
    harness.run(plan, root=tmp_path / "runs", resume=path)
    assert store.load(path).complete
    assert len(values(path)) == 12


# Scores and answers on disk


def edit_row(path: Path, name: str, line: int, change: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(text) for text in (path / name).read_text().splitlines()]
    change(rows[line - 1])
    (path / name).write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def higher(row: dict[str, Any]) -> None:
    row["value"] += 1


@pytest.mark.parametrize("line", [1, 3])
def test_an_edited_score_is_never_certified(own: Path, plan: RunPlan, tmp_path: Path, line: int) -> None:
    """A score edited by hand in a run without its closing file survived a resume, which then called it complete."""
    path = stopped(plan, tmp_path / "runs")
    edit_row(path, "scores.jsonl", line, higher)
    with pytest.raises(ValueError, match=rf"scores.jsonl, line {line}: task 'own', document \d has another score"):
        harness.run(plan, root=tmp_path / "runs", resume=path)
    assert not store.load(path).complete


@pytest.mark.parametrize("field", ["headline", "cluster_id", "higher_is_better"])
def test_every_field_of_a_score_counts(own: Path, plan: RunPlan, tmp_path: Path, field: str) -> None:
    path = stopped(plan, tmp_path / "runs")
    edit_row(path, "scores.jsonl", 2, lambda row: row.update({field: "x" if field == "cluster_id" else not row[field]}))
    with pytest.raises(ValueError, match=rf"scores.jsonl, line 2.*{field} is"):
        harness.run(plan, root=tmp_path / "runs", resume=path)


def test_a_score_that_no_answer_gives_is_refused(own: Path, plan: RunPlan, tmp_path: Path) -> None:
    path = stopped(plan, tmp_path / "runs")
    edit_row(path, "scores.jsonl", 3, lambda row: row.update(doc_id=99))
    with pytest.raises(ValueError, match=r"scores.jsonl, line 3: task 'own', document 99 has a score that no answer"):
        harness.run(plan, root=tmp_path / "runs", resume=path)
    assert not store.load(path).complete


def test_edited_answers_are_noticed(own: Path, plan: RunPlan, tmp_path: Path) -> None:
    path = harness.run(plan, root=tmp_path / "runs")
    for name in ("done.json", "scores.jsonl"):
        (path / name).unlink()
    edit_row(path, "generations.jsonl", 2, lambda row: row["generation"].update(num_context_forwards=1))
    with pytest.raises(ValueError, match=r"generations.jsonl: lines 1 to \d+ were changed after they were written"):
        harness.run(plan, root=tmp_path / "runs", resume=path)


@pytest.mark.parametrize("field", ["text", "token_ids"])
def test_an_answer_edited_after_the_last_event_contradicts_itself(
    own: Path, plan: RunPlan, tmp_path: Path, field: str
) -> None:
    path = harness.run(plan, root=tmp_path / "runs")
    for name in ("done.json", "scores.jsonl"):
        (path / name).unlink()
    events = (path / "events.jsonl").read_text().splitlines(keepends=True)
    (path / "events.jsonl").write_text(events[0])
    made = store.load(path).generations[1].generation
    assert made.finish == "length"
    other = {"text": "42", "token_ids": [made.token_ids[0] ^ 1, *made.token_ids[1:]]}[field]
    edit_row(path, "generations.jsonl", 2, lambda row: row["generation"].update({field: other}))
    with pytest.raises(ValueError, match=r"generations.jsonl, line 2: .* a text that is not that of its tokens"):
        harness.run(plan, root=tmp_path / "runs", resume=path)


def timed(plan: RunPlan, root: Path) -> Path:
    how = SpeedPlan(
        model=plan.model, tasks=plan.tasks, block_sizes=(4,), thresholds=(0.5,), num_prompts=2, min_rounds=1,
        warmup_rounds=0, costs=False,
    )  # fmt: skip
    return speed.run(how, suites.build_requests(suites.resolve_tasks(plan.tasks)), root=root)


def again(path: Path, root: Path) -> Path:
    """Resume a timing as the verb does."""
    plan = plan_from_json(SpeedPlan, store.load(path).manifest.plan)
    requests = suites.build_requests(suites.resolve_tasks(plan.tasks))
    return harness.score_journal(speed.run(plan, requests, root=root, resume=path))


def test_timed_answers_are_scored_by_the_code_that_they_were_timed_for(
    own: Path, plan: RunPlan, tmp_path: Path
) -> None:
    path = timed(plan, tmp_path / "runs")
    replace("helper_of_own.py", "more.BONUS", "more.BONUS + 1")(own)
    for step in (harness.score_journal, lambda path: again(path, tmp_path / "runs")):
        with pytest.raises(ValueError, match=r"helper_of_own.py of task 'own' was changed"):
            step(path)
    assert not store.load(path).scores


def test_timed_answers_are_scored_by_the_packages_that_they_were_timed_under(
    own: Path, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own manifest stood in for what is installed when its answers are scored."""
    path = timed(plan, tmp_path / "runs")
    others = {**environment.package_versions(), "sacrebleu": "0.1", "torch": "0.1"}
    monkeypatch.setattr(environment, "package_versions", lambda: others)
    with pytest.raises(ValueError, match=r"cannot resume.*: sacrebleu was [\d.]+, is 0.1\. Start"):
        harness.score_journal(path)


def test_an_edited_score_of_a_timed_answer_is_never_certified(own: Path, plan: RunPlan, tmp_path: Path) -> None:
    """The resumed timing called the run complete before anyone looked at its scores."""
    path = harness.score_journal(timed(plan, tmp_path / "runs"))
    (path / "done.json").unlink()
    edit_row(path, "scores.jsonl", 1, higher)
    with pytest.raises(ValueError, match=r"scores.jsonl, line 1: task 'own', document \d .*or was edited"):
        again(path, tmp_path / "runs")
    assert not store.load(path).complete
