"""A plan and the command line that makes it: whatever a plan can hold can be typed, and gives that plan again."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made

from twotower_eval import cli, store
from twotower_eval.analyse import report
from twotower_eval.analyse.report.provenance import command, plan_of, typed
from twotower_eval.plan import AnyPlan, RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.records import to_json

# Every field off its default, so that a field without an option, or an option of another name, is found.
DECODING: dict[str, Any] = {
    "model": "my models/pair",
    "revision": "v1.0",
    "trust_remote_code": True,
    "family": "package.module:load",
    "baseline": "o'hara/gpt2",
    "baseline_revision": "refs/pr/2",
    "baseline_trust_remote_code": True,
    "baseline_family": "transformers",
    "baseline_decoder": "tests.two_parameters:Impatient",
    "baseline_set": {"patience": (3,), "choice": ("second",)},
    "baselines": ({"name": 'a "quick" one', "set": {"patience": 4}}, {"model": "gpt2", "decoder": "autoregressive"}),
    "tasks": ("miniature", "-miniature_sort"),
    "include_path": ("my tasks", "a,b"),
    "num_fewshot": 3,
    "gen_kwargs": {"until": ["\n", "'", '"'], "do_sample": False, "more": {"a": [1, None]}},
    "decoder": "tests.two_parameters:Impatient",
    "block_sizes": (8, 32),
    "steps": ("auto", 4),
    "thresholds": (0.99, 1 / 3, 1.0),
    "temperature": 0.7,
    "set": {"patience": (4, 1), "choice": ("second", "first")},
    "seed": (0, None, 1234, 11),
    "dtype": "bfloat16",
    "baseline_dtype": "float32",
    "devices": ("cuda:0", "cuda:1"),
    "baseline_device": "cuda:2",
    "attention": "sdpa",
    "baseline_attention": "eager",
    "cuda_graphs": True,
    "data_dir": "~/bench marks",
    "apply_chat_template": "rag",
    "system_instruction": 'Be brief,\nand "kind".',
    "fewshot_as_multiturn": False,
    "gen_prefix": "- so",
    "enable_thinking": True,
    "think_end_token": "</think>",
    "chat_template_args": {"tone": "a 'dry' one", "depth": 2, "tools": [True, None]},
}
RUN = RunPlan(
    **DECODING, samples=4, batch_size=32, limit=5, likelihood="bound", max_new_tokens=9, trace=0, log_samples=False
)
SPEED = SpeedPlan(
    **DECODING, batch_sizes=(1, 8), workload="fixed", prompt_tokens=100, new_tokens=64, num_prompts=3, min_rounds=2,
    min_seconds=1.5, warmup_rounds=0, costs=False, probes=3, threads=2, samples=1,
    launches=5,
)  # fmt: skip
SIZING = SizingPlan(
    config="tasks/configs/x.config.json", layers=4, block_sizes=(8,), batch_sizes=(2,), prompt_tokens=64,
    tokens_per_nfe=(1.25, 3.0), profile="results/a run", repeats=2, min_rounds=3, min_seconds=0.1, warmup_rounds=2,
    seed=5, dtype="float32", devices=("cuda",), threads=1, share_towers=True, cuda_graphs=True,
)  # fmt: skip
VERIFY = VerifyPlan(
    model="a pair",
    family="package.module:load",
    golden="g",
    draft="d",
    seed=2,
    dtype="float16",
    devices=("cuda:1",),
    revision="v1.0",
    trust_remote_code=True,
    attention="flex_attention",
)
SERVED = {"model": "openai:http://localhost:8000/v1#a", "baseline": "b", "tokenizer": "t", "request_timeout": 2.5}
SENT = {"model": SERVED["model"], "baseline": "openai:http://localhost:8001/v1#b", "request_rates": (0.5, 4.0)}
SERVED_RUN, SERVED_SPEED = RunPlan(**SERVED), SpeedPlan(**SERVED)
SENT_SPEED = SpeedPlan(**SENT, arrivals="constant")
PLAIN = (RunPlan(), SpeedPlan(), SizingPlan(config="c.json"), VerifyPlan())


class Parsed(Exception):
    """Carries the plan that the command line came to, out of the verb before it does anything."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What the command line's own parser makes of words as they are typed, in a home of its own."""

    def caught(plan: AnyPlan, *_: Any, **__: Any) -> None:
        raise Parsed(plan)

    monkeypatch.setattr("twotower_eval.api.measuring.evaluated", caught)
    monkeypatch.setattr("twotower_eval.api.measuring.timed_and_scored", caught)
    monkeypatch.setattr("twotower_eval.measure.sizing.run", caught)
    monkeypatch.setattr("twotower_eval.api.check_checkpoints", lambda plan, **_: plan)  # there are none
    monkeypatch.setattr("twotower_eval.measure.verify.verify", caught)
    monkeypatch.chdir(tmp_path)
    with store.create(tmp_path, made.manifest("profiled", "run", ())) as writer:  # --profile wants a run that is there
        writer.finish()

    def parsed(line: str) -> AnyPlan:
        with pytest.raises(Parsed) as found:
            cli.main([os.path.expanduser(word) for word in shlex.split(line)][1:])
        return found.value.args[0]

    return parsed


@pytest.mark.parametrize(
    "plan",
    [RUN, SPEED, SIZING, VERIFY, SERVED_RUN, SERVED_SPEED, SENT_SPEED, *PLAIN],
    ids=lambda plan: type(plan).__name__,
)
def test_a_plan_is_what_its_command_line_makes(plan: AnyPlan, parse) -> None:
    if isinstance(plan, SizingPlan) and plan.profile:
        plan = dataclasses.replace(plan, profile="profiled")
    line = typed(command(plan))
    if isinstance(plan, RunPlan | SpeedPlan) and plan.data_dir:
        plan = dataclasses.replace(plan, data_dir=os.path.expanduser(plan.data_dir))  # as a shell does
    assert parse(line) == plan


@pytest.mark.parametrize("plan", [RUN, SPEED, SIZING, VERIFY], ids=lambda plan: type(plan).__name__)
def test_every_field_of_a_plan_is_tried(plan: AnyPlan) -> None:
    """A new field of a plan fails here until the plans above hold it, and then above unless an option sets it."""
    served = {**SERVED, **SENT, "arrivals": "constant"} if isinstance(plan, RunPlan | SpeedPlan) else {}
    fields = [field for field in dataclasses.fields(plan) if field.name not in served]
    untried = [field.name for field in fields if getattr(plan, field.name) == field.default]
    assert untried == []


def test_what_stands_at_its_default_goes_unsaid() -> None:
    assert [typed(command(plan)) for plan in PLAIN] == [
        "twotower-eval run",
        "twotower-eval speed",
        "twotower-eval size c.json",
        "twotower-eval verify",
    ]


@pytest.mark.parametrize("plan", [RUN, SPEED, SIZING, VERIFY], ids=lambda plan: type(plan).__name__)
def test_a_plan_is_read_back_from_a_manifest(plan: AnyPlan) -> None:
    verb = command(plan)[1]
    assert plan_of(verb, to_json(plan)) == plan


BEGUN = {
    "script": ("/x/.venv/bin/twotower-eval", "run", "--plan", "mine.toml"),
    "module": ("/x/site-packages/twotower_eval/cli/__main__.py", "run", "--limit", "5"),
    "notebook": ("/x/ipykernel_launcher.py", "-f", "/home/me/.local/share/jupyter/kernel-1.json", "--out", "no"),
    "pytest": ("/x/bin/pytest", "-q", "-x"),
    "python": ("-c",),
    "none": (),
}


@pytest.mark.parametrize("argv", BEGUN.values(), ids=BEGUN.keys())
def test_a_report_says_what_can_be_typed_whatever_began_the_run(tmp_path: Path, argv: tuple[str, ...]) -> None:
    """Printed was sys.argv: a kernel's arguments, a test runner's, the path of a module's file."""
    plan = RunPlan(tasks=("arithmetic",), thresholds=(0.99,), limit=5)
    path = made.quality_run(tmp_path, num_docs=20, tasks=("arithmetic",), argv=argv, plan=to_json(plan))
    folder = report.write([path], tmp_path / "reports", sections=["reproduce"])
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert "twotower-eval run --tasks arithmetic --thresholds 0.99 --limit 5" in lines
    assert f"twotower-eval report {path.name}" in lines


def test_a_plan_that_no_option_makes_is_said_so(tmp_path: Path) -> None:
    path = made.quality_run(tmp_path, num_docs=20, tasks=("arithmetic",), plan={"tasks": ["arithmetic"], "haste": 1})
    folder = report.write([path], tmp_path / "reports", sections=["reproduce"])
    assert "# no command of this version makes its plan (unknown key 'haste'" in (folder / "report.md").read_text()


@pytest.mark.parametrize("home", ["/home/alice", "/Users/Alice B", "/root"])
def test_a_path_in_a_home_is_one_that_anyone_can_type(tmp_path: Path, home: str, parse) -> None:
    """What came from the plan, and no more from argv, named the home of whoever ran it."""
    plan = RunPlan(model=f"{home}/my models/pair", baseline=f"{home}/base", data_dir=home, tasks=("arithmetic",))
    path = made.quality_run(tmp_path / "runs", num_docs=20, tasks=("arithmetic",), plan=to_json(plan))
    run = store.load(path)
    cells = tuple(
        dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, source=f"{home}/base"))
        for cell in run.manifest.cells
    )
    manifest = dataclasses.replace(run.manifest, cells=cells)
    path = made.write(tmp_path / "again", manifest, [*run.scores, *run.generations, *run.likelihoods])
    folder = report.write([path], tmp_path / "reports", sections=["setup", "reproduce"])
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert home not in text
    [line] = [line for line in text.splitlines() if line.startswith("twotower-eval run")]
    assert line.startswith("twotower-eval run --model ~/'my models/pair' --baseline ~/base")
    there = {name: os.path.expanduser(value) for name, value in {"baseline": "~/base", "data_dir": "~"}.items()}
    assert parse(line) == dataclasses.replace(plan, model=os.path.expanduser("~/my models/pair"), **there)
