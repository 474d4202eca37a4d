"""What tasks ask of decoding: honoured, refused with what to give instead, or overridden and said; never dropped."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from tests.tiny_pair import write_pair
from twotower_eval import cli, store
from twotower_eval.analyse import report
from twotower_eval.engine import decoders
from twotower_eval.engine.models import load_model
from twotower_eval.measure import harness, suites
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.suites import groups, lm_tasks
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.progress import SilentProgress

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}own.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}} ="
doc_to_target: a
generation_kwargs: {{until: ["#"], max_gen_toks: 6{more}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: !function own_metric.length, aggregation: mean, higher_is_better: true}}
"""


class Own:
    """A tasks folder of its own: ``add`` writes a task of four documents that asks for more than stops and a budget."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        docs = [{"q": f"{n} + 1", "a": str(n + 1)} for n in range(4)]
        (folder / "own.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        metric = "def length(references, predictions, **_):\n    return float(len(predictions[0]))\n"
        (folder / "own_metric.py").write_text(metric)

    def add(self, name: str, more: str = "", end: str = "") -> str:
        asked = f", {more}" if more else ""
        (self.folder / f"{name}.yaml").write_text(YAML.format(name=name, folder="", more=asked) + end)
        lm_tasks.local_index.cache_clear()
        return name


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Own]:
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.setattr(lm_tasks, "data_path", lambda *parts: folder)
    yield Own(folder)
    lm_tasks.local_index.cache_clear()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def model(pair: Path) -> Any:
    return load_model(pair)


class Told(SilentProgress):
    """Keeps what the terminal is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def plan_of(pair: Path, *tasks: str, **options: Any) -> RunPlan:
    return RunPlan(model=str(pair), tasks=tasks, block_sizes=(4,), batch_size=3, **options)


def run(pair: Path, root: Path, *tasks: str, **options: Any) -> store.Run:
    return store.load(harness.run(plan_of(pair, *tasks, **options), root=root / "runs"))


def temperatures(found: store.Run) -> set[Any]:
    return {cell.decoder.params["temperature"] for cell in found.manifest.cells}


# What settings ask for


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": False},
        {"do_sample": False, "temperature": 0.0},
        {"do_sample": False, "temperature": 1},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.95, "top_k": 40},
        {"temperature": 0},
        {"temperature": 0.7},
        {"do_sample": None, "temperature": "0.5"},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "temperature": "1e-3"},
        {"top_p": 0.95},
    ],
)
def test_sampling_or_greedy_is_what_lm_eval_takes_it_for(settings: dict[str, Any]) -> None:
    """Sampling was done greedily, whatever was asked."""
    theirs = normalize_gen_kwargs({"until": [], **{k: v for k, v in settings.items() if v is not None}})
    asked = suites.read_decoding_request(settings)
    assert asked.unsupported == ()
    assert (asked.temperature or 0) == (float(theirs["temperature"]) if theirs["do_sample"] else 0.0)


NEUTRAL: dict[str, Any] = {
    "until": ["."], "max_gen_toks": 3, "max_new_tokens": 3, "do_sample": True, "temperature": 0.7, "top_p": 1.0,
    "top_k": 0, "min_p": 0, "typical_p": 1, "repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0,
    "length_penalty": 2.0, "early_stopping": True, "min_new_tokens": 0, "num_return_sequences": 1, "use_cache": False,
    "frequency_penalty": 0.0, "presence_penalty": "0", "penalty_alpha": None, "eos_token_id": None, "whatever": None,
}  # fmt: skip


def test_what_changes_nothing_is_not_asked_for() -> None:
    assert suites.read_decoding_request(NEUTRAL) == suites.DecodingRequest(temperature=0.7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", 0.95), ("top_k", 50), ("min_p", 0.1), ("typical_p", 0.9), ("repetition_penalty", 1.1),
        ("num_beams", 4), ("no_repeat_ngram_size", 3), ("min_new_tokens", 20), ("min_length", 5),
        ("num_return_sequences", 2), ("frequency_penalty", 0.5), ("presence_penalty", -1), ("penalty_alpha", 0.6),
        ("max_length", 512), ("seed", 1), ("eos_token_id", 7), ("guidance_scale", 1.5), ("temperture", 0.3),
        ("stop_strings", "x"), ("max_time", 2.0), ("ignore_eos", True),
    ],
)  # fmt: skip
def test_what_is_not_done_is_asked_for(key: str, value: Any) -> None:
    asked = suites.read_decoding_request({"do_sample": True, "temperature": 0.7, key: value})
    assert asked == suites.DecodingRequest(temperature=0.7, unsupported=((key, value),))


def test_lists_and_tables_are_asked_for_too() -> None:
    asked = suites.read_decoding_request({"bad_words_ids": [[1, 2]], "num_beams": 2, "length_penalty": 2.0})
    assert dict(asked.unsupported) == {"bad_words_ids": "[[1, 2]]", "num_beams": 2, "length_penalty": 2.0}
    odd = {"logit_bias": {1: math.inf}, "top_p": math.nan, "top_k": 2**70, "temperature": 1}
    texts = {"logit_bias": '{"1": Infinity}', "top_p": "NaN", "top_k": str(2**70)}
    assert dict(suites.read_decoding_request(odd).unsupported) == texts, "as a manifest can hold them"


def test_sampling_without_a_temperature_is_asked_for() -> None:
    for settings in ({"do_sample": True}, {"do_sample": True, "temperature": 0}):
        assert suites.read_decoding_request(settings).unsupported == (("do_sample", True),)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("do_sample: 'false'", "do_sample must be true or false, not 'false'"),
        ("temperature: hot", "could not convert string to float: 'hot'"),  # lm-eval's own words
        ("temperature: -1", "temperature must be a number of at least 0, not -1"),
        ("temperature: .nan", "temperature must be a number of at least 0, not nan"),
    ],
)
def test_values_that_mean_nothing_are_one_line(own: Own, more: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"task 'own': {message}"):
        suites.resolve_tasks([own.add("own", more)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number of at least 1, not 'many'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number of at least 1, not 1.5"),
        ({"max_tokens": True}, "max_tokens must be a whole number"),
        ({"until": [5]}, r"until must be a text or a list of texts, not \[5\]"),
        ({"until": 5}, "until must be a text or a list of texts, not 5"),
    ],
)
def test_stops_and_budgets_that_mean_nothing_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suites.stops_and_budget(settings, 256)


def test_a_budget_may_be_written_as_a_text() -> None:
    assert suites.stops_and_budget({"until": ".", "max_gen_toks": "16"}, 256) == ((".",), 16)


# Refused by default, before any model loads


def weightless(folder: Path) -> Path:
    """A checkpoint that ends in another error as soon as its weights are read: there are none."""
    (folder / "weightless").mkdir()
    (folder / "weightless" / "config.json").write_text('{"model_type": "llama"}')
    return folder / "weightless"


@pytest.mark.parametrize(
    ("more", "end", "message"),
    [
        ("top_p: 0.95, do_sample: true, temperature: 1.5", "", "top_p: 0.95: .*give --temperature 1.5 "),
        ("repetition_penalty: 5.0", "", "repetition_penalty: 5.0: .*give --temperature 0 "),
        ("num_beams: 4, do_sample: false", "", "num_beams: 4: no decoder here does that"),
        ("min_new_tokens: 20", "", "min_new_tokens: 20"),
        ("do_sample: true", "", "do_sample: true without a temperature above 0"),
        ("temperture: 0.7", "", r"temperture: 0.7, which is no known setting \(did you mean 'temperature'"),
        ("do_sample: false", "repeats: 3\n", "3 samples of each problem, which greedy decoding .*--samples 1, or a"),
    ],
)
def test_what_is_not_done_is_refused(tmp_path: Path, own: Own, more: str, end: str, message: str) -> None:
    """It was decoded greedily, one sample, without a word."""
    own.add("own", more, end)
    with pytest.raises(ValueError, match=f"task 'own' asks for {message}") as caught:
        run(weightless(tmp_path), tmp_path, "own")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_unlike_temperatures_are_refused(tmp_path: Path, own: Own) -> None:
    own.add("plain"), own.add("warm", "temperature: 0.7")
    with pytest.raises(ValueError, match=r"'plain' asks for temperature 0 and 'warm' for 0.7, .* run them"):
        run(weightless(tmp_path), tmp_path, "plain", "warm")


def test_a_suites_samples_are_asked_for(tmp_path: Path, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 one sample stood for the suite's twenty, and only a note in the manifest said so."""
    member = groups.SuiteTask(name="own", parts={"": own.add("own")}, samples=20)
    monkeypatch.setattr("twotower_eval.measure.suites.build.select", lambda names, included: [member])
    with pytest.raises(ValueError, match=r"asks for 20 samples of each problem, .* give --samples 1"):
        run(weightless(tmp_path), tmp_path, "own")


def test_the_adapter_refuses_by_itself(model: Any) -> None:
    def ask(**settings: Any) -> list[Instance]:
        arguments = ("The quick", {"until": ["#"], "max_gen_toks": 4, **settings})
        return [Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))]

    def lm(**params: Any) -> HarnessLM:
        return HarnessLM(model, decoder=decoders.make_decoder(model, "autoregressive", **params))

    plain = lm().generate_until(ask(do_sample=False, top_p=0.5))
    for settings in ({"repetition_penalty": 5.0}, {"num_beams": 4}, {"min_new_tokens": 20}):
        with pytest.raises(ValueError, match=f"task 't' asks for {next(iter(settings))}"):
            lm().generate_until(ask(**settings))
    with pytest.raises(ValueError, match=r"asks for temperature 1.5, and the decoder's is 0"):
        lm().generate_until(ask(do_sample=True, temperature=1.5))
    assert lm(temperature=1.5).generate_until(ask(do_sample=True, temperature=1.5)) != plain
    assert lm(temperature=1.5).generate_until(ask()) != plain, "a decoder that samples was asked for in so many words"


# Honoured


def test_a_tasks_temperature_and_repeats_are_honoured(pair: Path, tmp_path: Path, own: Own) -> None:
    own.add("own", "do_sample: true, temperature: 1.5", "repeats: 3\n")
    found = run(pair, tmp_path, "own")
    assert temperatures(found) == {1.5}
    assert len({(row.cell, row.doc_id, row.repeat) for row in found.generations}) == 2 * 4 * 3
    assert len({row.generation.text for row in found.generations}) > 8
    assert found.manifest.overrides == ()
    again = store.load(harness.run(plan_of(pair, "own"), root=tmp_path, resume=found.path))
    assert again.scores == found.scores
    given = run(pair, tmp_path, "own", temperature=1.5, samples=3)
    texts = [{(row.doc_id, row.repeat, row.generation.text) for row in one.generations} for one in (found, given)]
    assert texts[0] == texts[1]
    assert {cell.id for cell in found.manifest.cells}.isdisjoint(cell.id for cell in given.manifest.cells)


class Replay(LM):
    """Gives lm-eval the texts of a journal, in the order in which it asks for samples."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__()
        self.texts = {(row.doc_id, row.repeat): row.generation.text for row in rows}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        seen: dict[int, int] = {}
        answers = []
        for request in requests:
            answers.append(self.texts[request.doc_id, seen.setdefault(request.doc_id, 0)])
            seen[request.doc_id] += 1
        return answers

    def loglikelihood(self, requests: Any) -> Any:
        raise AssertionError

    loglikelihood_rolling = loglikelihood


FILTERS = """repeats: 4
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: lower, filter: [{function: lowercase}, {function: take_first}]}
  - {name: vote, filter: [{function: take_first_k, k: 3}, {function: majority_vote}, {function: take_first}]}
"""


@pytest.mark.parametrize("end", ["repeats: 3\n", FILTERS], ids=["default filter", "filters"])
def test_a_tasks_own_repeats_score_as_in_lm_eval(
    pair: Path, tmp_path: Path, own: Own, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A mean over samples stood where lm-eval scores the first, or what its filters make of all."""
    own.add("own", "do_sample: true, temperature: 1.5", end)
    found = run(pair, tmp_path, "own")
    cell = found.manifest.cells[1]
    monkeypatch.chdir(own.folder)
    theirs = lm_eval.evaluator.simple_evaluate(
        model=Replay([row for row in found.generations if row.cell == cell.id]),
        tasks=["own"],
        task_manager=TaskManager(include_path=str(own.folder), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]["own"]
    expected = {(s["doc_id"], s["filter"], metric): s[metric] for s in theirs for metric in ("length", "exact_match")}
    ours = {(s.doc_id, s.filter, s.metric): s.value for s in found.scores if s.cell == cell.id}
    assert ours == expected
    assert len({value for (_, _, metric), value in ours.items() if metric == "length"}) > 1


def test_repeats_of_log_likelihoods_are_all_the_same(own: Own) -> None:
    choice = YAML.replace("generate_until", "multiple_choice").replace("doc_to_target: a", "doc_to_target: 0")
    choice = "\n".join(line for line in choice.splitlines() if not line.startswith("generation_kwargs"))
    choice = (
        choice.partition("metric_list")[0] + 'doc_to_choice: ["1", "2"]\nmetric_list: [{{metric: acc}}]\nrepeats: 5\n'
    )
    (own.folder / "own.yaml").write_text(choice.format(name="own", folder=""))
    lm_tasks.local_index.cache_clear()
    [task] = suites.resolve_tasks(["own"])
    assert (task.samples, task.asked) == (1, suites.DecodingRequest())
    assert suites.settle([task], temperature=None, samples=None) == suites.Decoding(temperature=0.0, overrides=())


# Overridden in so many words


def test_an_override_is_said_in_manifest_terminal_and_report(pair: Path, tmp_path: Path, own: Own) -> None:
    own.add("own", "do_sample: true, temperature: 1.5, top_p: 0.95", "repeats: 3\n")
    own.add("other", "top_p: 0.95, temperature: 1")
    told = Told()
    plan = plan_of(pair, "own", "other", temperature=0.0, samples=1)
    path = harness.run(plan, root=tmp_path / "runs", progress=told)
    found = store.load(path)
    assert temperatures(found) == {0.0}
    assert len(found.generations) == 2 * 2 * 4
    made = {(one.task, one.setting, one.asked, one.done, one.option) for one in found.manifest.overrides}
    assert made == {
        ("own", "top_p", 0.95, None, "temperature"),
        ("own", "temperature", 1.5, 0.0, "temperature"),
        ("own", "samples", 3, 1, "samples"),
        ("other", "top_p", 0.95, None, "temperature"),
        ("other", "temperature", 1.0, 0.0, "temperature"),
    }
    lines = [
        "own, other ask for top_p: 0.95, not done: --temperature overrides it",
        "own asks for temperature: 1.5, done with 0: --temperature overrides it",
        "own asks for samples: 3, done with 1: --samples overrides it",
    ]
    begun = next(at for at, note in enumerate(told.notes) if "requests" in note)
    assert {f"warning: {line}" for line in lines} <= set(told.notes[:begun])
    text = (report.write([path], tmp_path / "reports") / "report.md").read_text()
    assert all(line in text.replace("\\", "") for line in lines)


def test_sampling_from_greedy_tasks_is_an_override_too(pair: Path, tmp_path: Path, own: Own) -> None:
    own.add("greedy", "do_sample: false"), own.add("silent")
    found = run(pair, tmp_path, "greedy", "silent", temperature=1.0, samples=2, limit=2)
    assert [(one.task, one.setting) for one in found.manifest.overrides] == [("greedy", "temperature")]
    assert temperatures(found) == {1.0}


def test_temperature_zero_needs_a_word_on_samples_too(tmp_path: Path, own: Own) -> None:
    own.add("own", "do_sample: true, temperature: 1.5", "repeats: 3\n")
    with pytest.raises(ValueError, match=r"3 samples of each problem, which greedy .* give --samples 1"):
        run(weightless(tmp_path), tmp_path, "own", temperature=0.0)


def test_options_of_the_command_line_override(tmp_path: Path, pair: Path, own: Own, capsys: Any) -> None:
    own.add("own", "do_sample: true, temperature: 1.5, top_p: 0.9")
    words = ["run", "--model", str(pair), "--tasks", "own", "--limit", "1", "--block-sizes", "4"]
    words += ["--out", str(tmp_path / "o")]
    assert cli.main(words) == 2
    assert (
        "task 'own' asks for top_p: 0.9: no decoder here does that; give --temperature 1.5" in capsys.readouterr().err
    )
    assert cli.main([*words, "--temperature", "1.5"]) == 0
    assert "warning: own asks for top_p: 0.9, not done: --temperature overrides it" in capsys.readouterr().err


def test_a_decoder_without_a_temperature_cannot_sample(pair: Path, tmp_path: Path, own: Own) -> None:
    own.add("own", "do_sample: true, temperature: 1.5")
    plan = RunPlan(model=str(pair), tasks=("own",), decoder="tests.fake_decoder:Sleepy")
    with pytest.raises(ValueError, match="has no temperature"):
        harness.run(plan, root=tmp_path)


# Timed answers


def timed_plan(pair: Path, *tasks: str, **options: Any) -> list[str]:
    words = ["speed", "--model", str(pair), "--tasks", ",".join(tasks), "--block-sizes", "4", "--num-prompts", "2"]
    words += ["--min-rounds", "2", "--warmup-rounds", "0", "--no-costs"]
    return words + [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_timed_answers_are_made_as_the_tasks_ask(pair: Path, tmp_path: Path, own: Own, capsys: Any) -> None:
    """Timed were greedy answers to tasks that sample."""
    own.add("own", "do_sample: true, temperature: 1.5")
    assert cli.main([*timed_plan(pair, "own"), "--out", str(tmp_path)]) == 0
    timed = store.load(Path(capsys.readouterr().out.strip()))
    assert temperatures(timed) == {1.5}
    evaluated = run(pair, tmp_path, "own", samples=2, limit=4)
    found = [
        {(r.doc_id, r.repeat, r.generation.token_ids) for r in one.generations if one.cells[r.cell].arm == "candidate"}
        for one in (timed, evaluated)
    ]
    assert found[0]
    assert found[0] <= found[1]


def test_several_samples_are_not_timed_without_a_word(pair: Path, tmp_path: Path, own: Own, capsys: Any) -> None:
    own.add("own", "do_sample: true, temperature: 1.5, top_k: 5", "repeats: 3\n")
    words = [*timed_plan(pair, "own"), "--out", str(tmp_path)]
    assert cli.main(words) == 2
    assert "top_k: 5" in capsys.readouterr().err
    assert cli.main([*words, "--temperature", "1.5"]) == 2
    assert (
        "asks for 3 samples of each problem, and speed times one a round: give --samples 1" in capsys.readouterr().err
    )
    assert cli.main([*words, "--temperature", "1.5", "--samples", "1"]) == 0
    said = capsys.readouterr()
    assert "warning: own asks for samples: 3, done with 1: --samples overrides it" in said.err
    timed = store.load(Path(said.out.strip()))
    assert [one.setting for one in timed.manifest.overrides] == ["top_k", "samples"]
    assert len(timed.scores) == 2 * 2 * 2


def test_a_fixed_workload_takes_nothing_but_prompts(pair: Path, tmp_path: Path, own: Own, capsys: Any) -> None:
    own.add("own", "num_beams: 4, do_sample: true, temperature: 1.5", "repeats: 3\n")
    words = timed_plan(pair, "own", workload="fixed", new_tokens=3)
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    timed = store.load(Path(capsys.readouterr().out.strip()))
    assert temperatures(timed) == {0.0}
    assert timed.manifest.overrides == ()


def test_speed_times_one_sample_a_round() -> None:
    with pytest.raises(ValueError, match="one sample a round: samples can be 1 only, not 3"):
        SpeedPlan(samples=3)


def test_overrides_are_read_back(pair: Path, tmp_path: Path, own: Own) -> None:
    own.add("own", "bad_words_ids: [[1, 2]], num_beams: 2")
    found = run(pair, tmp_path, "own", temperature=0.0, limit=1)
    asked = {one.setting: one.asked for one in found.manifest.overrides}
    assert asked == {"bad_words_ids": "[[1, 2]]", "num_beams": 2}
    bare = {k: v for k, v in json.loads((found.path / "manifest.json").read_text()).items() if k != "overrides"}
    assert "overrides" not in bare
    (found.path / "done.json").unlink()
    (found.path / "manifest.json").write_text(json.dumps(bare))
    assert store.load(found.path).manifest == dataclasses.replace(found.manifest, overrides=()), "as runs before had it"
