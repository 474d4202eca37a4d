"""The command line: what it accepts, one-line errors, instant help, and how it ends after Ctrl-C."""

import dataclasses
import importlib
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import typer

from twotower_eval import cli, store
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_fields import option_of
from twotower_eval.records import RunManifest, to_json

HEAVY = {"torch", "lm_eval", "pandas", "matplotlib", "transformers", "datasets", "numpy"}
VERBS = [
    [],
    ["run"],
    ["speed"],
    ["size"],
    ["report"],
    ["calibrate"],
    ["claims"],
    ["claims", "check"],
    ["claims", "audit"],
    ["train"],
    ["train", "miniature"],
    ["data"],
    ["data", "prepare"],
]


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run what must fail with exit code 2 and one line; give that line."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "none")
def test_every_verb_has_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(" ".join(["Usage: twotower-eval", *verb]))
    assert err == ""


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize("verb", [[], ["run"], ["speed"], ["report"]], ids=lambda verb: " ".join(verb) or "none")
def test_help_imports_nothing_heavy(verb: list[str], record_property: Any) -> None:
    code = f"import sys; from twotower_eval.cli import main; main({[*verb, '--help']!r}); print(*sys.modules)"
    began_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    record_property("wall_s", time.perf_counter() - began_s)
    assert not {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()} & HEAVY


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rum"], "Did you mean 'run'"),
        (["run", "--block-size", "8"], "--block-sizes"),
        (["run", "--block-sizes", "eight"], "--block-sizes takes whole numbers separated by commas, not 'eight'"),
        (["run", "--thresholds", "0.9,1.5"], "a threshold is a probability, 1.5 is above 1"),
        (["data", "prepare", "no-such-folder", "there"], "no-such-folder: no such folder"),
        (["run", "--steps", "auto,all"], "--steps takes whole numbers or auto separated by commas"),
        (["run", "--thresholds", ","], "thresholds is empty"),
        (["run", "--limit", "0"], "limit must be 1 or more"),
        (["run", "--dtype", "float8"], "dtype must be auto or float32"),
        (["run", "--plan", "nowhere.toml"], "cannot read plan nowhere.toml"),
        (["run", "--resume", "nothing"], "'nothing' is no run"),
        (["speed", "--workload", "fast"], "workload must be fixed or answer"),
        (["speed", "--workload", "fixed"], "needs new_tokens"),
        (["report", "nothing"], "'nothing' is no run"),
        (["report"], "no runs in results"),
        (["claims", "check", "miniatur"], "did you mean 'miniature'?"),
        (["claims", "check", "miniature"], "no runs in results"),
        (["claims", "check", "miniature", "--claim", "fastr"], "did you mean 'faster'?"),
        (["claims", "audit", "miniature"], "no [published] numbers"),
        (["bench", "engine", "--rounds", "3"], "run make bench"),
        (["data", "prepare", "nowhere"], "Missing argument"),
        (["data", "prepare", "nowhere", "there"], "nowhere"),
        (["train", "minature"], "miniature"),
        (["claims"], "twotower-eval claims needs a command after it: check or audit"),
        (["data"], "twotower-eval data needs a command after it: prepare"),
        (["train"], "twotower-eval train needs a command after it: miniature"),
        (["run", "--batch-size", "many"], "--batch-size takes a whole number or auto, not 'many'"),
        (["run", "--limit", "0.1"], "--limit takes a whole number, not '0.1'"),
        (["run", "--temperature", "warm"], "--temperature takes a number, not 'warm'"),
        (["run", "--dtype", "bf16"], "dtype 'bf16' is unknown; did you mean bfloat16?"),
        (["verify", "--dtype", "half"], "dtype 'half' is unknown; did you mean float16?"),
        (["run", "--model", "gpt2"], "gpt2 is no folder here, nor in the Hugging Face cache"),
        (["report", "results/nope"], "'results/nope' is no run: there is no manifest.json in it\n"),
        (["calibrate", "--repetitions", "0"], "error: repetitions must be 1 or more, not 0\n"),
    ],
)
def test_user_errors_are_one_line_and_exit_two(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fail(capsys, *argv)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_the_traceback_is_there_for_who_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="is no run"):
        cli.main(["report", str(tmp_path)])


def capture_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunPlan, Path, Path | None]]:
    """Put a recorder in the place of the harness."""
    from twotower_eval.api import measuring

    calls: list[tuple[RunPlan, Path, Path | None]] = []

    def recorded(plan: RunPlan, *, root: Path, resume: Path | None, **_: object) -> Path:
        calls.append((plan, root, resume))
        return root / "done"

    monkeypatch.setattr(measuring, "evaluated", recorded)
    monkeypatch.setattr("twotower_eval.api.check_checkpoints", lambda plan, **_: plan)  # there are none
    return calls


def test_run_options_reach_the_plan_over_the_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = capture_runs(monkeypatch)
    toml = tmp_path / "plan.toml"
    toml.write_text('tasks = ["gsm8k"]\nlimit = 9\nblock_sizes = [4]\nseed = 3\n')
    options = "--limit 5 --block-sizes 8,16 --steps auto,4 --thresholds 0.8,0.9 --device cuda:0,cuda:1 --dtype bfloat16"
    more = "--samples 2 --batch-size 3 --likelihood exact --max-new-tokens 7 --data-dir d --model m --baseline b"
    argv = ["run", "--plan", str(toml), *options.split(), *more.split(), "--temperature", "0.5", "--out", "r"]
    assert cli.main(argv) == 0
    expected = RunPlan(
        tasks=("gsm8k",), limit=5, block_sizes=(8, 16), steps=("auto", 4), thresholds=(0.8, 0.9), seed=3,
        devices=("cuda:0", "cuda:1"), dtype="bfloat16", samples=2, batch_size=3, likelihood="exact",
        max_new_tokens=7, data_dir="d", model="m", baseline="b", temperature=0.5,
    )  # fmt: skip
    assert calls == [(expected, Path("r"), None)]
    assert capsys.readouterr().out.strip() == "r/done"


def test_options_are_taken_as_lm_eval_writes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With underscores, words of a list one by one, a switch with its value, a value that is left out."""
    calls = capture_runs(monkeypatch)
    argv = "--model m --baseline b --tasks gsm8k arc_easy --num_fewshot 2 --gen_kwargs temperature=0 max_gen_toks=4 "
    argv += "--apply_chat_template --fewshot_as_multiturn false --log_samples --include_path p --trust_remote_code "
    assert cli.main(["run", *argv.split(), "--system_instruction", "be_brief now", "--output_path", "out_put"]) == 0
    expected = RunPlan(
        model="m", baseline="b", tasks=("gsm8k", "arc_easy"), num_fewshot=2,
        gen_kwargs={"temperature": 0, "max_gen_toks": 4}, apply_chat_template=True, fewshot_as_multiturn=False,
        include_path=("p",), trust_remote_code=True, system_instruction="be_brief now",
    )  # fmt: skip
    assert calls == [(expected, Path("out_put"), None)]
    capsys.readouterr()
    assert "stray" in fail(capsys, "run", "--limit", "2", "stray")


def test_an_option_that_only_lm_eval_has_is_told_what_to_give_instead(capsys: pytest.CaptureFixture[str]) -> None:
    said = fail(capsys, "run", "--model_args", "pretrained=gpt2")
    assert "--model-args is an option of lm_eval; here: --model CKPT" in said
    assert fail(capsys, "run", "-t", "gsm8k") == "error: -t is an option of lm_eval; here: --tasks\n"
    assert "--resume RUN" in fail(capsys, "speed", "-c", "cache")
    assert "No such option: --nonsense" in fail(capsys, "run", "--nonsense")


@pytest.mark.parametrize("seed", ["42", "0", "42,42,42,42"])
def test_a_single_seed_says_how_it_differs_from_that_of_lm_eval(
    seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capture_runs(monkeypatch)
    assert cli.main(["run", "--seed", seed]) == 0
    line = "--seed 0 draws few-shot examples by 1234; lm_eval's --seed 0 is --seed 0,0,0,0\n"
    assert (line in capsys.readouterr().err) == (seed == "0")


def test_a_run_begins_with_its_power_plan() -> None:
    """The smallest drop that these documents can show was computed nowhere before a run."""
    from twotower_eval.analyse import stats
    from twotower_eval.api import measuring
    from twotower_eval.measure import suites

    def line(*names: str) -> str | None:
        return measuring.power_line(suites.resolve_tasks(names, limit=100), {"miniature_choice"})

    lines = [line("miniature_sort", "miniature_choice", "miniature_perplexity"), line("miniature_perplexity")]
    own = stats.PlannedTask(name="sort", num_clusters=100, accuracy=stats.ASSUMED_ACCURACY)
    shared = dataclasses.replace(own, name="choice", discordance=0.0)
    assert lines == [stats.power_text(stats.power_plan([own, shared], 1.0)), None]
    assert lines[0] is not None
    assert "the smallest drop of retention that 200 independent documents can show is" in lines[0]


PLANS = {"run": RunPlan, "speed": SpeedPlan, "size": SizingPlan, "verify": VerifyPlan}
OF_VERBS = {"plan", "out", "resume", "random_weights"}  # options that are no field of a plan


def options_of(verb: str) -> dict[str, Any]:
    """The options that a verb shows, by the parameters' names."""
    found: Any = typer.main.get_command(cli.app)
    return {one.name: one for one in found.commands[verb].params if not getattr(one, "hidden", False)}


@pytest.mark.parametrize("verb", PLANS)
def test_options_are_the_fields_of_the_plan(verb: str) -> None:
    """Both ways: a field without an option is found, and an option that no field stands behind."""
    fields = [field.name for field in dataclasses.fields(PLANS[verb])]
    assert [name for name in options_of(verb) if name not in OF_VERBS] == fields


@pytest.mark.parametrize("verb", PLANS)
def test_the_default_that_help_shows_is_the_plans(verb: str) -> None:
    """Typed as it is shown, a default makes the plan that it is the default of; of the rest nothing is shown."""
    for field in dataclasses.fields(PLANS[verb]):
        option = options_of(verb)[field.name]
        [*_, shown] = re.findall(r"\[([^][]*)\]\.$", option.help) or [None]
        if field.default is None or field.default is False or field.default == "":
            assert shown == option_of(PLANS[verb], field.name)[0].unset, field.name
            continue
        if field.default is True:
            assert (shown, option.secondary_opts) == (field.name, [f"--no-{field.name.replace('_', '-')}"])
            continue
        hint = get_type_hints(PLANS[verb])[field.name]
        given = float(shown) if hint is float else int(shown) if hint is int else shown
        if field.name == "baseline":  # an option that may be given several times
            given = [shown]
        assert cli.options.read(PLANS[verb], field.name, given) == field.default, field.name


def test_what_help_says_of_a_number_of_prompts_is_what_is_taken() -> None:
    from twotower_eval.measure.speed.workloads import ENOUGH_PROMPTS

    assert f"[{ENOUGH_PROMPTS}, or all there are]" in options_of("speed")["num_prompts"].help


def test_choices_in_help_are_those_of_the_plan() -> None:
    assert (
        options_of("run")["dtype"].help
        == "auto, float32, bfloat16 or float16; auto: the checkpoint's own, float32 on a CPU [auto]."
    )
    assert options_of("run")["attention"].help.startswith(
        "Attention of Hugging Face models: sdpa, eager, flash_attention_2 or flex_attention ["
    )
    for verb in PLANS:
        assert not [one for one in options_of(verb).values() if "typing" in one.help or "<class" in one.help]
    kinds = "exact, context_tower, denoiser_left_to_right or bound"
    assert options_of("run")["likelihood"].help == f"{kinds} [context_tower]."


def test_speed_takes_the_options_of_size_and_shows_none_of_them() -> None:
    found: Any = typer.main.get_command(cli.app)
    hidden = {one.name for one in found.commands["speed"].params if getattr(one, "hidden", False)}
    sizing, speed = ({field.name for field in dataclasses.fields(cls)} for cls in (SizingPlan, SpeedPlan))
    assert hidden == sizing - speed - {"config"}


def make_run(root: Path, plan: RunPlan | SpeedPlan) -> Path:
    verb: Literal["run", "speed"] = "run" if isinstance(plan, RunPlan) else "speed"
    manifest = RunManifest(
        schema=1, run_id=store.new_run_id(verb), verb=verb, argv=(), plan=to_json(plan), plan_sha256="", cells=(),
        started_at="2026-11-23T10:15:00+00:00", project_version="0.1.0", commit=None, dirty=None, packages={},
        machine={}, seeds={},
    )  # fmt: skip
    with store.create(root, manifest) as writer:
        return writer.path


def test_resume_takes_the_plan_from_the_run_by_folder_or_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = capture_runs(monkeypatch)
    plan = RunPlan(tasks=("a", "b"), thresholds=(0.7,), limit=4)
    path = make_run(tmp_path, plan)
    assert cli.main(["run", "--resume", str(path), "--out", str(tmp_path)]) == 0
    assert cli.main(["run", "--resume", path.name, "--out", str(tmp_path), "--batch-size", "2"]) == 0
    assert calls == [(plan, tmp_path, path), (dataclasses.replace(plan, batch_size=2), tmp_path, path)]
    capsys.readouterr()
    assert "drop --plan" in fail(capsys, "run", "--resume", str(path), "--plan", "p.toml")


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from twotower_eval.api import measuring

    make_run(tmp_path, RunPlan())  # an older run that must not be named

    def interrupted(plan: RunPlan, *, root: Path, resume: Path | None, **_: object) -> Path:
        make_run(root, plan)
        raise KeyboardInterrupt

    old = set(tmp_path.iterdir())
    monkeypatch.setattr(measuring, "evaluated", interrupted)
    assert cli.main(["run", "--out", str(tmp_path)]) == 130
    [begun] = set(tmp_path.iterdir()) - old
    assert f"twotower-eval run --resume {begun}\n" in capsys.readouterr().err


def capture_speed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put recorders in the place of timing and of scoring."""
    from twotower_eval.measure import harness, speed

    calls: list[Any] = []

    def timed(plan: SpeedPlan, requests: list[Any], *, root: Path, resume: Path | None, **_: object) -> Path:
        calls.append(("timed", plan, len(requests), resume))
        return root / "timed"

    def scored(path: Path) -> Path:
        calls.append(("scored", path))
        return path

    monkeypatch.setattr(speed, "run", timed)
    monkeypatch.setattr(harness, "score_journal", scored)
    return calls


def test_speed_options_reach_the_plan_and_answers_are_scored_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = capture_speed(monkeypatch)
    options = "--tasks miniature_sort --batch-sizes 1,4 --block-sizes 8 --steps 4 --thresholds 0.9 --num-prompts 8"
    more = "--min-rounds 3 --min-seconds 1.5 --warmup-rounds 2 --threads 1 --seed 5 --new-tokens 9"
    assert cli.main(["speed", *options.split(), *more.split(), "--out", str(tmp_path)]) == 0
    expected = SpeedPlan(
        tasks=("miniature_sort",), batch_sizes=(1, 4), block_sizes=(8,), steps=(4,), thresholds=(0.9,), num_prompts=8,
        min_rounds=3, min_seconds=1.5, warmup_rounds=2, threads=1, seed=5, new_tokens=9,
    )  # fmt: skip
    [(_, plan, num_requests, resume), scored] = calls
    assert (plan, resume) == (expected, None)
    assert num_requests >= 200, "prompts are chosen from all documents"
    assert scored == ("scored", tmp_path / "timed")
    assert capsys.readouterr().out == f"{tmp_path / 'timed'}\n"


def test_fixed_workloads_answer_nothing_and_are_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = capture_speed(monkeypatch)
    options = "--tasks miniature_sort --workload fixed --new-tokens 9 --prompt-tokens 32"
    assert cli.main(["speed", *options.split(), "--out", str(tmp_path)]) == 0
    assert [call[0] for call in calls] == ["timed"]
    assert calls[0][1].prompt_tokens == 32


def test_speed_resumes_with_its_own_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = capture_speed(monkeypatch)
    plan = SpeedPlan(tasks=("miniature_sort",), num_prompts=4)
    path = make_run(tmp_path, plan)
    assert cli.main(["speed", "--resume", str(path), "--out", str(tmp_path)]) == 0
    assert calls[0][1:] == (plan, calls[0][2], path)


def test_a_run_is_not_resumed_as_the_other_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path, RunPlan())
    assert "is a 'run', not a 'speed'" in fail(capsys, "speed", "--resume", str(path))


def test_a_real_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    code = "import signal, sys, time; from twotower_eval import api, cli\n"
    # A job that a script put into the background, such as this suite itself, ignores the signal otherwise.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "def wait(*args, **named): print('waiting', flush=True); time.sleep(60)\n"
    code += "api.evaluate = wait; sys.exit(cli.main(['run', '--out', sys.argv[1]]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted before a run was started\n"


def test_report_takes_the_newest_run_of_each_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from twotower_eval.analyse import report

    calls: list[Any] = []

    def read(paths: list[Path], claims: str | None) -> Any:
        calls.append([list(paths), claims])
        return reading(paths)

    def write_of(runs: Any, out: Path, **options: Any) -> Path:
        calls[-1] += [out, options]
        return out / "id"

    reading = report.read
    monkeypatch.setattr(report, "read", read)
    monkeypatch.setattr(report, "write_of", write_of)
    path = make_run(tmp_path / "results", RunPlan())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 0
    assert cli.main(["report", path.name, "--out", "elsewhere", "--section", "a:b", "--section", "c"]) == 0
    assert cli.main(["report", "--html", "--format", "csv", "--claims", "mine.toml"]) == 0
    assert cli.main(["report", "--format", "csv", "--format", "model-card"]) == 0
    assert cli.main(["report", "--format", "csv,model-card"]) == 0
    there = Path("results") / path.name
    plain = {"sections": None, "html": False, "csv": False, "model_card": False}
    assert calls == [
        [[there], None, Path("reports"), plain],
        [[there], None, Path("elsewhere"), plain | {"sections": ["a:b", "c"]}],
        [[there], "mine.toml", Path("reports"), plain | {"html": True, "csv": True}],
        *2 * [[[there], None, Path("reports"), plain | {"csv": True, "model_card": True}]],
    ]
    said = capsys.readouterr()
    both = "reports/id/report.md\nreports/id/model-card.md\n"
    assert said.out == "reports/id/report.md\nelsewhere/id/report.md\nreports/id/report.html\n" + 2 * both
    assert said.err == 4 * f"the newest of each verb: {path.name}\n"
    make_run(tmp_path / "results", RunPlan())
    assert cli.main(["report"]) == 0
    taken = calls[-1][0][0].name
    assert (
        capsys.readouterr().err
        == f"the newest of each verb: {taken}; 1 older run in results is not used; name runs to use them\n"
    )


def test_noise_of_imports_is_not_shown_and_all_else_is() -> None:
    """torchao and torch wrote six lines to the terminal as transformers imported them."""
    torchao = importlib.util.find_spec("torchao")
    sources = {"torch.utils._pytree": Path(importlib.import_module("torch.utils._pytree").__file__ or "")}
    sources |= {"torchao": Path(torchao.origin)} if torchao is not None and torchao.origin else {}
    for name, noise in cli.IMPORT_NOISE.items():
        logger = logging.getLogger(name)
        if name in sources:
            assert noise in sources[name].read_text(encoding="utf-8"), f"{name} no longer says it so"

        def shown(level: int, text: str, logger: logging.Logger = logger) -> bool:
            return bool(logger.filter(logging.LogRecord(logger.name, level, "file", 1, text, (), None)))

        assert not shown(logging.WARNING, f"{noise} and more")
        assert shown(logging.ERROR, f"{noise} and more")
        assert shown(logging.WARNING, "out of memory")
        assert shown(logging.WARNING, f"something else, then {noise}")


def test_a_library_user_keeps_the_loggers_as_they_are() -> None:
    code = "import logging, twotower_eval; twotower_eval.evaluate; print(logging.getLogger('torchao').filters)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
