"""Chats of models behind a server: what is sent, what is told apart in the answer, what is refused, and runs.

The server is scripted here; tests/test_served.py has a real one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_models import CHATML, QWEN_3, save_chat, write_chat_tasks
from own_tasks import use_tasks
from scripted_server import NAME, Script, serving

import twotower_eval as tt
from twotower_eval import store
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.endpoints import client as client_module
from twotower_eval.engine.endpoints.chats import continues_messages
from twotower_eval.engine.endpoints.client import EndpointError
from twotower_eval.engine.endpoints.model import EndpointModel
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.chat import ChatFormat, attach_format
from twotower_eval.errors import UserError
from twotower_eval.measure import harness
from twotower_eval.plan import RunPlan
from twotower_eval.records import ChatPrompt, Prompt, chat_json

SUMS = "sums_generate_until"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
FAST: dict[str, Any] = {"num_prompts": 2, "min_rounds": 1, "warmup_rounds": 0, "probes": 1, "costs": False}


def template(messages: Sequence[Mapping[str, str]]) -> str:
    """A template whose tokens are words."""
    return "".join(f"<{one['role']}> {one['content']} </> " for one in messages) + "<assistant> "


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def script() -> Script:
    return Script(chat=template)


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with serving(script) as there:
        yield there


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("local") / "one", CHATML)


def connected(url: str, local: Path, **given: Any) -> EndpointModel:
    model: Any = load_model(url, tokenizer=local, chat=True)
    attach_format(model, ChatFormat(served=True, **given))
    assert isinstance(model, EndpointModel)
    return model


def answer(model: EndpointModel, prompt: str, *, clock: Any = None, **more: Any) -> Any:
    decoder = make_decoder(model, "endpoint", clock=clock)  # type: ignore[arg-type]
    given = Prompt(id="x", token_ids=(5,), text=prompt, seed=7)
    return decoder.generate([given], **{"max_new_tokens": 8, **more})[0]


def asked(messages: Sequence[Mapping[str, str]], begins: bool = True) -> ChatPrompt:
    return ChatPrompt("as the other arm reads it", chat_json(messages, begins))


def test_messages_go_to_the_chat_completions_and_no_completion_is_asked_for(
    script: Script, url: str, local: Path
) -> None:
    model = connected(url, local)
    made = answer(model, asked(ASKED), stop=["\n"])
    assert made.text == " four five."
    assert all("prompt" not in body for body in script.bodies)
    body = script.bodies[-1]
    assert body == {"model": NAME, "messages": ASKED, "max_tokens": 8, "temperature": 0.0, "stop": ["\n"]}
    assert made.served.num_prompt_tokens == len(template(ASKED).split())
    served = model.checkpoint.served
    assert served is not None
    assert served.prompts == "messages"
    made = make_decoder(model, "endpoint", temperature=0.5).generate(  # type: ignore[arg-type]
        [Prompt(id="x", token_ids=(5,), text=asked(ASKED), seed=7)], max_new_tokens=8
    )
    assert (script.bodies[-1]["temperature"], script.bodies[-1]["seed"]) == (0.5, 7)


def test_a_plain_text_is_asked_by_a_user(script: Script, url: str, local: Path) -> None:
    answer(connected(url, local), "Hello")
    assert script.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_the_budget_is_called_as_the_server_takes_it(script: Script, url: str, local: Path) -> None:
    script.refused = ["max_tokens"]
    answer(connected(url, local), asked(ASKED))
    assert script.bodies[-1]["max_completion_tokens"] == 8
    script.refused, script.chat = [], None
    with pytest.raises(EndpointError, match=r"status 404 \(Not Found\) for the model 'scripted'"):
        connected(url, local)


@pytest.mark.parametrize("clock", [None, time.perf_counter])
def test_thoughts_that_the_server_tells_apart_are_no_part_of_the_answer(
    clock: Any, script: Script, url: str, local: Path
) -> None:
    script.thinks = ["two", " twos"]
    made = answer(connected(url, local), asked(ASKED), clock=clock)
    assert made.text == " four five."
    assert made.num_discarded_tokens == len("two twos")  # a byte a token
    if clock is not None:
        assert made.served.num_pieces == 5
    whole = answer(connected(url, local, think_end_token="</think>"), asked(ASKED), clock=clock, stop=["five"])
    assert (whole.text, whole.finish) == ("two twos</think> four ", "stop")
    codec = load_model(local).tokenizer
    assert codec is not None
    [token] = codec.encode("<|x|>")
    special = answer(connected(url, local, think_end_token=token), asked(ASKED), clock=clock)
    assert special.text == codec.decode(special.token_ids) == "two twos four five."
    assert codec.decode_with_special(special.token_ids) == "two twos<|x|> four five."
    script.answer = lambda text: []
    assert answer(connected(url, local, think_end_token="</think>"), asked(ASKED)).text == "two twos</think>"


def test_an_answer_goes_on_only_where_the_server_continues_messages(script: Script, url: str, local: Path) -> None:
    begun = asked([*ASKED, {"role": "assistant", "content": "It is"}], begins=False)
    model = connected(url, local)
    model.check_chats([begun])
    answer(model, begun)
    body = script.bodies[-1]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    script.continues = False  # it ignores the wish
    model.check_chats([asked(ASKED)])
    with pytest.raises(UserError, match="begins another message where an answer is begun for it: leave out gen_prefix"):
        model.check_chats([begun])
    script.refused = ["continue_final_message"]
    assert not continues_messages(model)


def test_what_a_template_is_told_is_sent_and_refused_before_anything_long(
    script: Script, url: str, local: Path
) -> None:
    model = connected(url, local, template_args={"enable_thinking": False})
    model.check_chats([])
    answer(model, asked(ASKED))
    assert script.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    script.refused = ["chat_template_kwargs"]
    with pytest.raises(EndpointError, match=r"may not take chat_template_kwargs \(enable_thinking\)"):
        model.check_chats([])


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_local_model_and_an_endpoint_are_asked_the_same_messages(
    script: Script, url: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks", 1))
    told = {"tasks": (SUMS,), "apply_chat_template": True, "system_instruction": "Be brief."}
    for model, baseline in ((url, str(local)), (str(local), url)):
        script.bodies.clear()
        path = harness.run(RunPlan(model=model, baseline=baseline, **told), root=tmp_path / "out")  # type: ignore[arg-type]
        run = store.load(path)
        assert run.complete
        own = {body["messages"][-1]["content"]: body["messages"] for body in script.bodies if len(body["messages"]) > 1}
        assert len(own) == 3
        assert {tuple(one["role"] for one in messages) for messages in own.values()} == {
            ("system", "user", "assistant", "user")
        }
        hashes: dict[str, set[str]] = {}
        counts: dict[str, list[int]] = {}
        for row in sorted(run.generations, key=lambda row: row.doc_id):
            hashes.setdefault(row.cell, set()).add(row.prompt_sha256)
            counts.setdefault(row.cell, []).append(row.generation.num_prompt_tokens)
        one, other = hashes.values()
        assert one == other
        first, second = counts.values()
        assert first == second  # counted as the local arm's template writes them
        text = tt.report(path, out=tmp_path / "report").markdown
        assert "was sent the messages themselves, which its server wrote with its own chat template" in text
        assert "one was asked through its chat template (sha256 " in text
        assert "each through its own chat template" in text
        assert "Prompts are sent as messages" in text


def test_a_cell_says_that_chats_were_asked(
    script: Script, url: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    plain, chat, told = (
        harness.prepare(RunPlan(model=url, baseline=url, tasks=(SUMS,), tokenizer=str(local), **more)).jobs[0].cell  # type: ignore[arg-type]
        for more in (
            {},
            {"apply_chat_template": True},
            {"apply_chat_template": True, "chat_template_args": {"tone": "dry"}},
        )
    )
    assert chat.extra is not None
    assert chat.extra["chat_template"] == "the server's own"
    assert len({plain.id, chat.id, told.id}) == 3
    assert len({plain.workload.digest, chat.workload.digest, told.workload.digest}) == 3


def test_log_likelihoods_of_chats_are_refused_before_a_server_is_asked(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    nobody = "openai:http://127.0.0.1:9/v1#n"
    plan = RunPlan(
        model=nobody,
        baseline=str(local),
        tasks=("sums_multiple_choice", "sums_generate_until"),
        apply_chat_template=True,
    )
    with pytest.raises(UserError, match=r"^sums_multiple_choice need log-likelihoods, which no server gives of chats"):
        harness.prepare(plan)


def test_speed_streams_chats(
    script: Script, url: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    script.bodies.clear()
    result = tt.time(
        model=url, baseline=str(local), tasks=SUMS, apply_chat_template=True, new_tokens=4, out=tmp_path / "out",
        progress=False, **FAST,
    )  # fmt: skip
    assert result.record.complete
    timed = [body for body in script.bodies if body.get("stream")]
    assert timed
    assert all(body["messages"][-1]["role"] == "user" for body in timed)
    # New prompts are chats, too, whose question is made of two documents' questions.
    assert len({body["messages"][-1]["content"] for body in timed}) > 2
    assert not any("<|im_start|>" in one["content"] for body in timed for one in body["messages"])


def test_two_templates_and_a_word_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the template is told reaches it, as lm-eval's chat_template_args do; enable_thinking counts first."""
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    model = str(save_chat(tmp_path / "model", QWEN_3))

    def first(**more: Any) -> str:
        plan = RunPlan(model=model, baseline=model, decoder="ar", tasks=(SUMS,), apply_chat_template=True, **more)
        return str(harness.prepare(plan).tasks[0].docs[0].instances[0].args[0])

    assert first().endswith("assistant\n")
    assert first(chat_template_args="enable_thinking=false").endswith("<think>\n\n</think>\n\n")
    assert first(chat_template_args='{"enable_thinking": false}') == first(enable_thinking=False)
    told = {"chat_template_args": {"enable_thinking": False}, "think_end_token": "</think>"}
    assert first(enable_thinking=True, **told) == first()
    with pytest.raises(UserError, match="chat_template_args is told to the chat template: give apply_chat_template"):
        RunPlan(chat_template_args={"a": 1})
    with pytest.raises(UserError, match="chat_template_args takes key=value"):
        RunPlan(apply_chat_template=True, chat_template_args="a")
