"""Models whose classes come with their files: run where that is asked for, and only there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import save_reading
from own_code import CODE, save_own, use_modules

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.engine.models.identity import file_digest

OPTION = "--trust-remote-code"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies such code; a process has one such folder."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def own(tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_modules(monkeypatch, modules)
    monkeypatch.chdir(tmp_path)
    return save_own(tmp_path / "own")


def test_without_the_option_one_line_names_it(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(tt.UserError, match=f"but one comes with it: to run its code, give {OPTION} "):
        tt.load_model(own)
    assert cli.main(["verify", str(own)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_code_that_ran_is_part_of_the_model(own: Path) -> None:
    model = tt.load_model(own, trust_remote_code=True)
    ran = [file for file in model.checkpoint.files if file.name.endswith(".py")]
    assert ran == [file_digest(own / name) for name in CODE], "and what did not run is not"
    edited = own.rename(own.with_name("edited"))
    (edited / "parts_own.py").write_text(CODE["parts_own.py"] + "# other code\n")
    other = tt.load_model(edited, trust_remote_code=True).checkpoint
    assert other.digest == model.checkpoint.digest
    assert other.identity != model.checkpoint.identity


def test_it_is_proved_and_gives_the_tokens_of_transformers(own: Path) -> None:
    model = tt.load_model(own, trust_remote_code=True)
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(own, trust_remote_code=True, dtype=torch.float32)
    prompts = [tt.Prompt(id=str(n), token_ids=tuple(range(5, 5 + n))) for n in (3, 7)]
    made = tt.make_decoder(model, "autoregressive").generate(prompts, max_new_tokens=6, eos_token_ids=())
    for prompt, answer in zip(prompts, made, strict=True):
        ids = list(prompt.token_ids)
        for _ in range(6):
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(answer.token_ids) == ids[len(prompt.token_ids) :]


def test_what_it_raises_is_one_line_that_says_where(own: Path) -> None:
    broken = CODE["parts_own.py"].replace(
        "    kept = torch", "    (_ for _ in ()).throw(OSError('rows'))\n    kept = torch"
    )
    folder = own.rename(own.with_name("broken"))
    (folder / "parts_own.py").write_text(broken)
    with pytest.raises(
        tt.UserError, match=r"code of broken: its \w+ raised OSError: rows at \S*parts_own\.py:6"
    ) as raised:
        tt.load_model(folder, trust_remote_code=True)
    assert "\n" not in str(raised.value)


def test_the_report_says_that_foreign_code_ran(own: Path) -> None:
    save_reading("llama", own.with_name("llama"))
    arms = ["--model", "own", OPTION, "--baseline", "llama"]
    tasks = ["--tasks", "miniature_sort", "--decoder", "autoregressive", "--trace", "0"]
    assert cli.main(["run", *arms, *tasks, "--limit", "2"]) == 0
    assert cli.main(["report"]) == 0
    (report,) = Path("reports").glob("*/report.md")
    text = report.read_text(encoding="utf-8")
    assert "**own ran code that came with it**, as --trust-remote-code allowed: configuration_own.py `" in text
    assert text.count("code that came with it") == 1
    assert "twotower-eval run --model own --trust-remote-code --baseline llama" in text
    (run,) = store.find_runs(Path("results"), "run")
    assert cli.main(["run", "--resume", str(run)]) == 0


def test_a_baseline_may_bring_its_own_code_alone(own: Path) -> None:
    fast = ["--num-prompts", "1", "--min-rounds", "1", "--warmup-rounds", "0", "--probes", "0", "--tasks"]
    timed = ["speed", "--baseline", "own", "--baseline-trust-remote-code", *fast, "miniature_sort", "--new-tokens", "4"]
    assert cli.main(timed) == 0
    assert cli.main(["verify", "own", OPTION]) == 0
