"""Tasks of the user's own: folders, files, wildcards, tags, groups; the documents and prompts of lm-eval itself."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from twotower_eval import cli
from twotower_eval.errors import UserError
from twotower_eval.measure import suites
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.selection import select

TASK = """
task: {name}
{more}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl, train: {name}.jsonl}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}} ="
doc_to_target: a
generation_kwargs: {{until: ["#"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: sums
task: [sum_small, sum_large]
aggregate_metric_list: [{metric: exact_match, weight_by_size: true}]
"""


def write_task(folder: Path, name: str, more: str = "", num: int = 6) -> Path:
    """A task of sums with its documents; its examples come from the same file."""
    folder.mkdir(exist_ok=True, parents=True)
    docs = [{"q": f"{name}: {n} + 1", "a": str(n + 1)} for n in range(num)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, more=more))
    return path


@pytest.fixture(autouse=True)
def _no_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks take seconds to list; here it has one that the user's own replaces."""
    stock = {"arc_easy": lm_tasks.local_index()["miniature_sort"]}
    monkeypatch.setattr(lm_tasks, "stock_index", lambda: stock)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Four tasks: two of a group, two of a tag."""
    folder = tmp_path / "own"
    for name in ("sum_small", "sum_large"):
        write_task(folder, name, "num_fewshot: 2")
    for name in ("tens_one", "tens_two"):
        write_task(folder / "below", name, "tag: tens\nnum_fewshot: 0")
        shutil.copy(folder / "below" / f"{name}.jsonl", folder)  # where lm-eval looks for it
    (folder / "sums.yaml").write_text(GROUP)
    return folder


class Recorder(LM):
    """Keeps what lm-eval asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, list[tuple[Any, ...]]] = {}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        for one in requests:
            self.asked.setdefault(one.task_name, []).append(one.args)
        return ["1"] * len(requests)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What lm-eval asks of a model for tasks of a folder, by task."""

    def asked(folder: Path, tasks: Sequence[str], **options: Any) -> Mapping[str, list[tuple[Any, ...]]]:
        monkeypatch.chdir(folder)  # where lm-eval looks for files
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        recorder = Recorder()
        lm_eval.evaluator.simple_evaluate(
            recorder, tasks=manager.match_tasks(list(tasks)), task_manager=manager, bootstrap_iters=0, **options
        )
        return recorder.asked

    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: "")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    return asked


def ours(folder: Path, *tasks: str, **options: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The same of ours, by the single task that a document is of."""
    built = suites.resolve_tasks(tasks, include_path=[str(folder)], **options)
    found: dict[str, list[tuple[Any, ...]]] = {}
    for doc in (doc for task in built for doc in task.docs):
        found.setdefault(doc.source.config.task, []).extend(i.args for i in doc.instances)  # type: ignore[attr-defined]
    return found


def prompts(asked: Mapping[str, list[tuple[Any, ...]]]) -> dict[str, list[str]]:
    return {name: [args[0] for args in several] for name, several in asked.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [["sum_small"], ["sums"], ["tens"], ["tens_*"], ["sum_*", "tens"], ["sum?"]])
def test_tasks_groups_tags_and_wildcards_are_those_of_lm_eval(own: Path, theirs: Any, names: list[str]) -> None:
    assert prompts(ours(own, *names)) == prompts(theirs(own, names))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shots", [0, 1, 4])
def test_num_fewshot_is_that_of_lm_eval(own: Path, theirs: Any, shots: int) -> None:
    """A task that sets 0 keeps it there, too."""
    found = prompts(ours(own, "sums", "tens", num_fewshot=shots))
    assert found == prompts(theirs(own, ["sums", "tens"], num_fewshot=shots))
    assert found["sum_small"][0].count("=") == shots + 1
    assert found["tens_one"][0].count("=") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "like"),
    [
        ("temperature=0,max_gen_toks=3", {"max_gen_toks": 3, "until": ["#"]}),
        ('{"until": [";"]}', {"max_gen_toks": 6, "until": [";"]}),
        ("do_sample=True,temperature=0.5", {"max_gen_toks": 6, "until": ["#"], "temperature": 0.5, "do_sample": True}),
        ("temperature=0.5", {"max_gen_toks": 6, "until": ["#"]}),  # the task says do_sample: false
    ],
)
def test_gen_kwargs_are_those_of_lm_eval(own: Path, theirs: Any, given: str, like: dict[str, Any]) -> None:
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json
    from lm_eval.models.utils import normalize_gen_kwargs

    from twotower_eval.task_options import read_gen_kwargs

    parsed = try_parse_json(given)
    parsed = key_val_to_dict(given) if isinstance(parsed, str) else parsed
    assert read_gen_kwargs(given) == parsed
    found = ours(own, "sums", gen_kwargs=parsed)["sum_small"]
    asked = theirs(own, ["sums"], gen_kwargs=parsed)["sum_small"]
    assert [args[0] for args in found] == [args[0] for args in asked]
    for (_, mine), (_, their) in zip(found, asked, strict=True):
        normal = [normalize_gen_kwargs({"temperature": 0.0, **one}) for one in (mine, their)]
        keys = ("until", "max_gen_toks", "temperature", "do_sample")
        assert [normal[0][key] for key in keys] == [normal[1][key] for key in keys]
        assert {key: normal[0][key] for key in like} == like


SHUFFLED = """
import random
import numpy

def mixed(docs):
    order = list(range(len(docs)))
    random.shuffle(order)
    return docs.select(order).map(lambda doc: {"q": f"{doc['q']} ({numpy.random.randint(10**6)})"})
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (0, {}),
        ((3, 4, 5), {"random_seed": 3, "numpy_random_seed": 4, "torch_random_seed": 5}),
        ((3, 4, 5, 6), {"random_seed": 3, "numpy_random_seed": 4, "torch_random_seed": 5, "fewshot_random_seed": 6}),
    ],
)
def test_seeds_are_those_of_lm_eval(own: Path, theirs: Any, seed: Any, seeds: dict[str, int]) -> None:
    (own / "mixing.py").write_text(SHUFFLED)
    write_task(own, "mixed", "process_docs: !function mixing.mixed\nnum_fewshot: 2")
    assert prompts(ours(own, "mixed", seed=seed)) == prompts(theirs(own, ["mixed"], **seeds))
    assert ours(own, "mixed", seed=seed) == ours(own, "mixed", seed=seed)


def test_a_later_folder_wins_and_both_win_over_shipped_and_stock_tasks(own: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_task(other, "sum_small", num=3)
    write_task(other, "miniature_sort", num=2)
    write_task(other, "arc_easy", num=1)
    paths = [str(own), str(other)]
    built = suites.resolve_tasks(["sum_small", "miniature_sort", "arc_easy"], include_path=paths)
    assert [task.num_docs_in_all for task in built] == [3, 2, 1]
    (first,) = suites.resolve_tasks(["sum_small"], include_path=paths[::-1])
    assert first.num_docs_in_all == 6


def test_a_task_is_named_by_its_file_or_folder(own: Path, tmp_path: Path) -> None:
    """Its documents lie beside it, wherever one is."""
    for names in ([f"{own}/sum_small.yaml"], [f"{own}/sum_sm*.yaml"]):
        assert [task.name for task in suites.resolve_tasks(names)] == ["sum_small"]
    folder = suites.resolve_tasks([str(own / "below")], limit=1)
    assert [task.name for task in folder] == ["tens_one", "tens_two"]
    by_name = suites.resolve_tasks(["sum_small"], include_path=[str(own)])[0]
    assert suites.resolve_tasks([f"{own}/sum_small.yaml"])[0].digest == by_name.digest


def test_the_digest_does_not_depend_on_where_a_folder_lies(own: Path, tmp_path: Path) -> None:
    here = suites.resolve_tasks(["tens_one"], include_path=[str(own)])[0]
    moved = own.rename(tmp_path / "moved")
    assert suites.resolve_tasks(["tens_one"], include_path=[str(moved)])[0].parts == here.parts


def test_a_suite_of_ones_own_is_named_by_its_file(own: Path) -> None:
    suite = own / "mine.toml"
    suite.write_text(
        '[[task]]\nname = "small"\nlm_eval = "sum_small"\nnum_fewshot = 1\nmax_new_tokens = 9\n'
        '[[task]]\nname = "large"\nlm_eval = "sum_large"\n'
    )
    (small, large) = suites.resolve_tasks([str(suite)], include_path=[str(own)])
    assert (small.name, large.name, small.max_new_tokens, large.max_new_tokens) == ("small", "large", 9, 6)
    (alone,) = suites.resolve_tasks([f"{suite}/large"], include_path=[str(own)])
    assert alone.digest == large.digest
    assert len(select([f"{suite}/*"], suites.read_included([str(own)]))) == 2
    # What the command line says counts before the suite.
    (short, _) = suites.resolve_tasks([str(suite)], include_path=[str(own)], gen_kwargs={"max_gen_toks": 4})
    assert short.max_new_tokens == 4


def test_wildcards_leave_out_what_minus_names(own: Path) -> None:
    built = suites.resolve_tasks(["sum_*", "tens_*", "-*_two", "-sum_l*"], include_path=[str(own)])
    assert [task.name for task in built] == ["sum_small", "tens_one"]
    assert [task.name for task in select(["paper-11/m*", "-mm*", "-mbpp*"])] == ["math500", "mgsm"]


def test_a_task_that_would_count_twice_is_refused_as_in_lm_eval(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    manager = TaskManager(include_path=str(own), include_defaults=False)
    with pytest.raises(ValueError, match="Duplicate task 'sum_"):
        manager.load(manager.match_tasks(["sum*"]))
    with pytest.raises(UserError, match=r"'sum\*' matches 'sum_small' and 'sums', which both have task .*-sums$"):
        suites.resolve_tasks(["sum*"], include_path=[str(own)])
    assert [task.name for task in suites.resolve_tasks(["sum*", "-sums"], include_path=[str(own)])] == [
        "sum_large",
        "sum_small",
    ]


BROKEN = {
    "task: x\nmetric_list: [": r"x\.yaml, line 3, column 1: not valid YAML",
    "task: x\ninclude: nothing.yaml\n": r"x\.yaml: it includes .*nothing\.yaml, which is not there",
    "dataset_path: json\n": r"x\.yaml is no task: it has neither `task: NAME` nor `group: NAME`",
    "- a\n- b\n": r"x\.yaml: Expected YAML dict",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_task_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=BROKEN[text]) as caught:
        suites.resolve_tasks([f"{tmp_path}/x.yaml"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [text for text in BROKEN if "task: x" in text])
@pytest.mark.parametrize("name", ["x", "x*"])
def test_what_was_looked_for_in_a_broken_file_is_said_to_be_there(tmp_path: Path, text: str, name: str) -> None:
    """lm-eval leaves such a file out without a word."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=BROKEN[text]):
        suites.resolve_tasks([name], include_path=[str(tmp_path)])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("doc_to_text", "doc_to_txt", r"task 'typo': unknown key 'doc_to_txt' \(did you mean 'doc_to_text'\?\)"),
        ("{{q}}", "{{qq}}", "'qq' is undefined"),
        ("typo.jsonl, train", "type.jsonl, train", r"no data file type\.jsonl, here or beside .*'typo\.jsonl'"),
        ("metric: exact_match", "metric: exact_mtch", r"task 'typo': .*metric 'exact_mtch'.*'exact_match'"),
        ("aggregation: mean", "aggregation: maen", r"task 'typo': .*aggregation 'maen'.*'mean'"),
        ("generate_until", "generate_untl", r"task 'typo': .*output_type 'generate_untl'.*'generate_until'"),
        ("test_split: test", "test_split: tset", r"task 'typo': .*'tset'"),
        ("doc_to_target: a", "doc_to_target: !function code.target", "task 'typo': .*'code'"),
    ],
)
def test_a_task_file_with_a_typo_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_task(tmp_path, "typo")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        suites.resolve_tasks(["typo"], include_path=[str(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--include-path", "{own}x"], r"--include-path .*ownx: no such folder \(did you mean .*/own\?\)"),
        (["--include-path", "{own}", "--tasks", "sum_smal"], r"unknown task 'sum_smal' \(did you mean 'sum_small'\?\)"),
        (["--include-path", "{own}", "--tasks", "sun_*"], r"'sun_\*' matches no task \(did you mean 'sum_\*'\?\)"),
        (["--include-path", "{own}", "--tasks", "sums,-sum_x*"], r"cannot leave out 'sum_x\*'"),
        (["--tasks", "{own}/sum_smal.yaml"], r"no task file .*sum_smal\.yaml \(did you mean .*/sum_small\.yaml\?\)"),
        (["--tasks", "{own}/suit.toml"], r"no suite file .*suit\.toml"),
        (["--tasks", "{own}/belw"], r"no task file or folder .*belw \(did you mean .*/below\?\)"),
        (["--tasks", "{own}/b*.yaml"], r"no task file .*b\*\.yaml"),
    ],
)
def test_mistakes_end_before_any_model_is_loaded(
    own: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("twotower_eval.engine.models.arms.load_arms", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main(["run", "--out", str(own / "runs"), *(option.format(own=own) for option in options)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
