"""Chat templates and thinking: every prompt and every answer as lm-eval's own ``hf`` has it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from chat_models import CHATML, GEMMA, LLAMA_3, TEMPLATES, save_chat, write_chat_tasks, write_template
from hf_oracle import lm_evals_hf
from lm_eval.tasks import TaskManager
from own_tasks import use_tasks

from twotower_eval import cli
from twotower_eval.analyse.report.provenance import command
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.chat import attach_format, has_chat_template, load_format
from twotower_eval.errors import UserError
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.suites import resolve_tasks
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_chat import chat_options
from twotower_eval.plan_files import plan_from_json
from twotower_eval.records import ChatOptions, to_json
from twotower_eval.sources import read_source

NAMES = ("sums_generate_until", "sums_multiple_choice", "sums_loglikelihood")
Ids = list[tuple[list[int], list[int]]]  # context and continuation; a generation has none


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    return {name: save_chat(root / name, template) for name, template in TEMPLATES.items()}


def lm_evals(folder: Path, tasks: Path, options: ChatOptions, names: Sequence[str] = NAMES) -> tuple[Ids, list[str]]:
    """What lm-eval's evaluator has its ``hf`` read, in tokens and as texts; no weights are used."""
    given = {} if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}
    hf = lm_evals_hf(folder, think_end_token=options.think_end_token, **given)
    ids: Ids = []
    texts: list[str] = []

    def generate_until(requests: list[Any], **_: Any) -> list[str]:
        for request in requests:
            texts.append(request.args[0])
            ids.append((hf.tok_batch_encode([request.args[0]])[0][0].tolist(), []))
        return [""] * len(requests)

    def loglikelihood_tokens(requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        for (context, _), before, after in requests:
            texts.append(context)
            ids.append((before, after))
        return [(-1.0, False)] * len(requests)

    hf.generate_until, hf._loglikelihood_tokens = generate_until, loglikelihood_tokens
    lm_eval.evaluator.simple_evaluate(
        model=hf,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=options.template or False,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        system_instruction=options.system_instruction,
        log_samples=False,
        bootstrap_iters=0,
    )
    return ids, texts


def ours(folder: Path, options: ChatOptions, names: Sequence[str] = NAMES) -> tuple[Ids, list[str]]:
    """The same of this project."""
    model, chat = load_model(folder), load_format(read_source(folder), options)
    attach_format(model, chat)
    lm = HarnessLM(model)
    ids: Ids = []
    texts: list[str] = []
    render = None if chat.template is None else chat.template.render
    for task in resolve_tasks(names, chat=options, render=render):
        for doc in task.docs:
            for request in doc.instances:
                key = (task.name, doc.doc_id, request.idx, 0)
                texts.append(str(request.args[0]))
                if task.generates:
                    ids.append((list(lm._prompt(request.args[0], key, 8).token_ids), []))
                else:
                    [(before, after)] = lm._split(request, key, "loglikelihood").pairs
                    ids.append((list(before), list(after)))
    return ids, texts


def same(folder: Path, tasks: Path, options: ChatOptions, names: Sequence[str] = NAMES) -> list[str]:
    """The texts, which have to be lm-eval's, token for token."""
    expected, their_texts = lm_evals(folder, tasks, options, names)
    found, texts = ours(folder, options, names)
    assert sorted(texts) == sorted(their_texts)
    assert sorted(found) == sorted(expected)
    return texts


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("shots", [0, 2])
def test_every_prompt_is_lm_evals_token_for_token(
    template: str, shots: int, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_chat_tasks(tmp_path, shots)
    use_tasks(monkeypatch, tasks)
    for multiturn in (True, False) if shots else (True,):
        texts = same(models[template], tasks, ChatOptions(template=True, fewshot_as_multiturn=multiturn))
        assert all(" + " in text and text != f"What is {i} + {i}? " for i, text in enumerate(texts))


@pytest.mark.parametrize("template", ["chatml", "llama-3", "qwen-3"])
def test_a_system_instruction_goes_where_lm_eval_puts_it(
    template: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_chat_tasks(tmp_path, 1, description="Add the numbers.\n")
    use_tasks(monkeypatch, tasks)
    options = ChatOptions(template=True, fewshot_as_multiturn=True, system_instruction="Be brief.")
    assert all("Be brief." in text and "Add the numbers." in text for text in same(models[template], tasks, options))


def test_a_system_instruction_without_a_template_stands_in_front(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_chat_tasks(tmp_path, 1)
    use_tasks(monkeypatch, tasks)
    texts = same(models["chatml"], tasks, ChatOptions(system_instruction="Be brief."))
    assert all(text.startswith("Be brief.") for text in texts)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prefix_of_the_answer_is_the_tasks_or_the_options(
    own: bool, template: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ChatOptions(template=True, fewshot_as_multiturn=True)
    with_prefix = write_chat_tasks(tmp_path / "with", 1, gen_prefix="The sum is")
    use_tasks(monkeypatch, with_prefix if own else write_chat_tasks(tmp_path / "without", 1))
    expected, _ = lm_evals(models[template], with_prefix, options)
    given = options if own else ChatOptions(template=True, fewshot_as_multiturn=True, gen_prefix="The sum is")
    found, texts = ours(models[template], given)
    assert sorted(found) == sorted(expected)
    assert all(text.endswith("The sum is") for text in texts)


@pytest.mark.parametrize("thinks", [True, False, None])
def test_whether_it_may_think_is_told_to_the_template(
    thinks: bool | None, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_chat_tasks(tmp_path)
    use_tasks(monkeypatch, tasks)
    options = ChatOptions(template=True, enable_thinking=thinks, think_end_token="</think>")
    texts = same(models["qwen-3"], tasks, options, NAMES[:1])
    assert all(text.endswith("</think>\n\n") is (thinks is False) for text in texts)


@pytest.mark.parametrize("template", ["llama-3", "chatml"])
def test_one_beginning_of_text_whether_the_template_writes_it_or_the_tokenizer(
    template: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path))
    found, _ = ours(models[template], ChatOptions(template=True))
    assert all(before.count(0) == 1 and before[0] == 0 for before, _ in found)


def test_a_description_that_the_template_does_not_take_is_left_out_and_said(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_chat_tasks(tmp_path, description="Add the numbers.\n")
    use_tasks(monkeypatch, tasks)
    assert not any("Add the" in text for text in same(models["gemma"], tasks, ChatOptions(template=True)))
    chat = load_format(read_source(models["gemma"]), ChatOptions(template=True))
    assert chat.template is not None
    chat.template.render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert chat.template.drops_system
    strict = load_format(read_source(models["gemma"]), ChatOptions(template=True, system_instruction="s"))
    assert strict.template is not None
    with pytest.raises(UserError, match=r"takes no system instruction \(System role not supported\): drop it"):
        strict.template.render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def test_one_of_several_templates_by_its_name(tmp_path: Path) -> None:
    folder = save_chat(tmp_path, {"default": CHATML, "rag": LLAMA_3})
    messages = [{"role": "user", "content": "hello"}]
    for name, source in ((True, CHATML), ("default", CHATML), ("rag", LLAMA_3)):
        chat = load_format(read_source(folder), ChatOptions(template=name))
        hf = lm_evals_hf(folder).tokenizer
        expected = hf.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
        assert chat.template is not None
        assert chat.template.render(messages) == expected
    with pytest.raises(UserError, match="no chat template 'raf': give --apply-chat-template one of default, rag"):
        load_format(read_source(folder), ChatOptions(template="raf"))
    write_template(folder, {"a": CHATML, "b": LLAMA_3})
    with pytest.raises(UserError, match=r"several chat templates and no default one: .* one of a, b"):
        load_format(read_source(folder), ChatOptions(template=True))


def test_templates_in_a_folder_of_their_own_count_for_the_model_too(tmp_path: Path) -> None:
    folder = save_chat(tmp_path, None)
    assert not has_chat_template(folder)
    before = load_model(folder).checkpoint
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(LLAMA_3, encoding="utf-8")
    assert has_chat_template(folder)
    assert load_model(folder).checkpoint.identity != before.identity
    chat = load_format(read_source(folder), ChatOptions(template="rag"))
    assert chat.template is not None
    assert chat.template.source == LLAMA_3


@pytest.mark.parametrize(
    ("template", "given", "words"),
    [
        (None, [], "has no chat template: drop --apply-chat-template, or take an instruct model"),
        (CHATML, ["rag"], "no chat template 'rag': give --apply-chat-template one of default"),
        ("{% for m in messages %}", [], "fails on the messages of these tasks (TemplateSyntaxError"),
        ("{{ messages[0]['content'] + 1 }}", [], "fails on the messages of these tasks (TypeError"),
        ("{{ raise_exception('never') }}", [], "fails on the messages of these tasks (TemplateError: never)"),
        (GEMMA, ["--system-instruction", "x"], "takes no system instruction (System role not supported): drop it"),
        ("{{ messages[0]['content'] | upper }}", ["--gen-prefix", "so it is"], "fails on the messages of these tasks"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "speed"])
def test_a_template_that_fails_is_one_line_before_weights_are_read(
    verb: str,
    template: str | None,
    given: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    folder = save_chat(tmp_path / "model", template)
    (folder / "model.safetensors").write_bytes(b"no weights")
    argv = [verb, "--model", str(folder), "--tasks", NAMES[0], "--apply-chat-template", *given]
    capsys.readouterr()
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_scored_option_is_never_thought_about(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path))
    argv = ["run", "--model", str(models["qwen-3"]), "--tasks", ",".join(NAMES), "--apply-chat-template"]
    argv += ["--enable-thinking", "--think-end-token", "</think>"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "sums_multiple_choice, sums_loglikelihood: options are scored" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not compatible with loglikelihood tasks"):
        lm_evals(models["qwen-3"], tmp_path, ChatOptions(enable_thinking=True, think_end_token="</think>"), NAMES[1:2])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fewshot_as_multiturn": True}, "give apply_chat_template, too"),
        ({"enable_thinking": False}, "give apply_chat_template, too"),
        ({"enable_thinking": True, "apply_chat_template": True}, "enable_thinking needs think_end_token"),
        ({"think_end_token": ""}, "think_end_token is empty"),
        ({"apply_chat_template": 3}, "apply_chat_template"),
    ],
)
@pytest.mark.parametrize("cls", [RunPlan, SpeedPlan])
def test_options_without_effect_are_refused(cls: type, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cls(**values)


def test_the_defaults_are_lm_evals() -> None:
    assert chat_options(RunPlan()) == ChatOptions()
    assert chat_options(RunPlan(apply_chat_template=True)).fewshot_as_multiturn
    assert not chat_options(RunPlan(apply_chat_template=True, fewshot_as_multiturn=False)).fewshot_as_multiturn
    assert RunPlan(apply_chat_template=False) == RunPlan()
    assert RunPlan(think_end_token="151668").think_end_token == 151668


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (["--apply-chat-template"], RunPlan(apply_chat_template=True)),
        (["--apply-chat-template", "--limit", "2"], RunPlan(apply_chat_template=True, limit=2)),
        (["--apply-chat-template", "rag", "--limit", "2"], RunPlan(apply_chat_template="rag", limit=2)),
        (["--apply-chat-template=rag"], RunPlan(apply_chat_template="rag")),
        (
            ["--apply-chat-template", "--no-fewshot-as-multiturn", "--system-instruction", "Be brief."],
            RunPlan(apply_chat_template=True, fewshot_as_multiturn=False, system_instruction="Be brief."),
        ),
        (["--gen-prefix", "So: ", "--think-end-token", "7"], RunPlan(gen_prefix="So: ", think_end_token=7)),
        (["--think-end-token", "</think>"], RunPlan(think_end_token="</think>")),
    ],
)
def test_what_is_typed_is_the_plan_and_back(words: list[str], plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RunPlan] = []

    def evaluated(plan: RunPlan, **_: Any) -> Path:
        made.append(plan)
        raise UserError("measured")

    monkeypatch.setattr("twotower_eval.api.measuring.evaluated", evaluated)
    assert cli.main(["run", *words]) == 2
    assert made == [plan]
    made.clear()
    assert cli.main(command(plan)[1:]) == 2
    assert made == [plan]
    assert plan_from_json(RunPlan, json.loads(json.dumps(to_json(plan)))) == plan
