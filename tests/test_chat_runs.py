"""Runs of chat models: what each arm is asked, what is recorded and said, and answers that begin behind thinking."""

from pathlib import Path
from typing import Any

import pytest
from chat_models import CHATML, LLAMA_3, QWEN_3, save_chat, write_chat_tasks
from hf_oracle import continued, lm_evals_hf, our_lm
from own_tasks import use_tasks
from pages import run_commands
from scripted_llama import byte_tokenizer, save_saying, save_tokenizer

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.engine.models.chat import ChatFormat, attach_format
from twotower_eval.errors import UserError
from twotower_eval.measure.suites import lm_tasks

NAMES = ("sums_generate_until", "sums_multiple_choice", "sums_loglikelihood")
FAST: dict[str, Any] = {"num_prompts": 2, "min_rounds": 1, "warmup_rounds": 0, "probes": 0, "costs": False}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("two")
    return save_chat(root / "one", CHATML), save_chat(root / "other", LLAMA_3)


def evaluated(model: Path, baseline: Path, out: Path, **fields: Any) -> store.Run:
    given = {"tasks": NAMES, "decoder": "autoregressive", "out": out, "progress": False, "max_new_tokens": 4}
    return tt.evaluate(model=str(model), baseline=str(baseline), **{**given, **fields}).record


def said_by(run: store.Run, arm: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    cells = {cell.id for cell in run.manifest.cells if cell.arm == arm}
    return {
        (row.task, row.doc_id): (row.generation.token_ids, row.generation.num_prompt_tokens, row.answer)
        for row in run.generations
        if row.cell in cells
    }


def test_arms_of_unlike_templates_are_asked_the_same_messages_each_in_its_own(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks", 1))
    run = evaluated(*two, tmp_path / "out", apply_chat_template=True)
    candidate, baseline = run.manifest.chats or ()
    assert (candidate.arm, candidate.template, candidate.reads_alike) == ("candidate", CHATML, True)
    assert (baseline.arm, baseline.template, baseline.reads_alike) == ("baseline", LLAMA_3, False)
    digests = {(cell.arm, cell.workload.name): cell.workload.digest for cell in run.manifest.cells}
    hashes: dict[str, set[str]] = {"candidate": set(), "baseline": set()}
    arms = {cell.id: cell.arm for cell in run.manifest.cells}
    for score in run.scores:
        hashes[arms[score.cell]].add(score.prompt_sha256)
    for name in NAMES:
        assert digests["candidate", name] == digests["baseline", name]
    assert hashes["candidate"] == hashes["baseline"]
    # Each arm's answers are those of that model by itself, asked through its own template.
    turned = evaluated(two[1], two[0], tmp_path / "out", apply_chat_template=True)
    assert said_by(turned, "candidate") == said_by(run, "baseline")
    assert said_by(turned, "baseline") == said_by(run, "candidate")
    text = tt.report(run.path, out=tmp_path / "report").markdown
    assert "one was asked through its chat template (sha256 " in text
    assert "baseline and candidate were asked the same messages, each through its own chat template" in text


def test_a_model_of_one_template_reads_what_lm_eval_has_it_read(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    run = evaluated(*two, tmp_path / "out", apply_chat_template=True, tasks=NAMES[:1])
    messages = [{"role": "user", "content": "What is 4 + 4? "}]
    hf = lm_evals_hf(two[0])
    prompt = hf.apply_chat_template(messages)
    [text] = hf.generate_until(continued([prompt], ["\n"], 4))
    (ids, num_prompt_tokens, _) = said_by(run, "candidate")[NAMES[0], 0]
    assert hf.tok_decode(ids).split("\n")[0] == text
    assert num_prompt_tokens == len(hf.tok_batch_encode([prompt])[0][0])


def test_two_models_of_one_template_read_alike(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    same = save_chat(tmp_path / "same", CHATML, vocab_size=270)
    run = evaluated(two[0], same, tmp_path / "out", apply_chat_template=True, tasks=NAMES[:1])
    assert run.manifest.chats is not None
    assert [use.reads_alike for use in run.manifest.chats] == [True, True]
    assert len({use.sha256 for use in run.manifest.chats}) == 1


def test_a_task_that_changes_the_written_text_needs_one_template(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    written = lm_tasks._chat_prompt
    monkeypatch.setattr(lm_tasks, "_chat_prompt", lambda *given, **more: written(*given, **more) + " Well,")
    with pytest.raises(UserError, match="baseline and candidate have unlike templates: evaluate them apart"):
        evaluated(*two, tmp_path / "out", apply_chat_template=True, tasks=NAMES[:1])


def test_what_may_change_answers_makes_another_cell(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks", 1))
    seen = set()
    for fields in (
        {},
        {"apply_chat_template": True},
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"apply_chat_template": True, "enable_thinking": False},
        {"apply_chat_template": True, "think_end_token": "</think>"},
        {"apply_chat_template": True, "system_instruction": "Be brief."},
        {"gen_prefix": "It is"},
    ):
        run = evaluated(*two, tmp_path / "out", tasks=NAMES[:1], limit=1, max_new_tokens=1, **fields)
        seen.add(run.manifest.cells[0].id)
    assert len(seen) == 7


def test_an_instruct_model_without_its_template_is_warned_of(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    argv = ["run", "--model", str(two[0]), "--baseline", str(two[1]), "--decoder", "autoregressive"]
    argv += ["--max-new-tokens", "1", "--limit", "1", "--out", str(tmp_path / "out"), "--tasks"]
    for tasks, warned in ((NAMES[0], 1), (NAMES[1], 0)):
        assert cli.main([*argv, tasks]) == 0
        said = capsys.readouterr()
        assert said.err.count("warning: one has a chat template and is asked without it") == warned
        text = tt.report(said.out.strip().splitlines()[-1], out=tmp_path / "report").markdown
        assert text.count("one has a chat template and is asked without it") == warned


def test_timed_prompts_are_asked_the_same_way(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    fields = {"apply_chat_template": True, "tasks": NAMES[:1], "think_end_token": "5"}
    quality = evaluated(*two, tmp_path / "out", max_new_tokens=None, **fields)
    speed = tt.time(
        model=str(two[0]), baseline=str(two[1]), decoder="autoregressive", out=tmp_path / "out", progress=False,
        **fields, **FAST,
    ).record  # fmt: skip
    assert speed.manifest.chats == quality.manifest.chats
    asked = {(row.doc_id, row.prompt_sha256) for row in quality.generations}
    assert {(row.doc_id, row.prompt_sha256) for row in speed.generations} <= asked
    for arm in ("baseline", "candidate"):
        assert said_by(speed, arm).items() <= said_by(quality, arm).items()
    assert speed.scores


@pytest.mark.parametrize("until", [[], ["4 "], ["2"], ["."], ["hm"], ["<x>"]])
@pytest.mark.parametrize("end", ["</x>", "x", "nowhere", 3, 4, 2])
def test_answers_begin_behind_thinking_as_in_lm_eval(until: list[str], end: str | int, tmp_path: Path) -> None:
    """Stop strings end a text also where it thinks, a special token is no text, and blanks in front are dropped."""
    tokenizer = byte_tokenizer(special=("<s>", "</s>", "<|im_end|>", "<|x|>"))
    said = [token for text in ("hm, 4", " 4 ", "<|x|>", "</x>.", "<|x|>", " </x>", "\n 42") for token in (
        tokenizer.encode(text).ids)] + [1]  # fmt: skip
    save_saying(tmp_path, tokenizer.get_vocab_size(), said)
    save_tokenizer(tokenizer, tmp_path)
    hf = lm_evals_hf(tmp_path, think_end_token=end)
    lm = our_lm(tmp_path)
    attach_format(lm.model, ChatFormat(think_end_token=end))
    asked = continued(["a"], until, 48)
    assert lm.generate_until(asked) == hf.generate_until(asked)
    [row] = lm.journal.generations.values()
    thought = row.generation.token_ids[: row.num_thinking_tokens or 0]
    assert bool(thought) is (row.num_thinking_tokens is not None)
    assert not thought or (thought[-1] == end if isinstance(end, int) else end in hf.tok_decode(list(thought)))


def test_how_much_of_the_answers_is_thinking_is_said(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    fields = {"apply_chat_template": True, "tasks": NAMES[:1], "think_end_token": "</think>"}
    run = evaluated(*two, tmp_path / "out", **fields)
    text = tt.report(run.path, out=tmp_path / "report").markdown
    assert "0 of 3 answers of the baseline end their thinking" in text


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chat(tmp_path / "instruct", QWEN_3)
    save_chat(tmp_path / "other", LLAMA_3)
    run_commands("your-model.md", tmp_path, monkeypatch, "Chat models")
    runs = [store.load(path).manifest for path in store.find_runs(tmp_path / "results", "run")]
    assert [len(run.chats or ()) for run in runs] == [2, 2, 2, 2]
