"""Models behind a server: requests and their faults, what a server is taken for, answers and log-likelihoods.

The server is scripted here; tests/test_served.py has a real one.
"""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from lm_eval.api.instance import Instance

from tests.hf_models import save_reading
from tests.scripted_server import NAME, Script, serving
from twotower_eval import store
from twotower_eval.cli import main
from twotower_eval.decoder_settings import baseline_spec
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.endpoints import client as client_module
from twotower_eval.engine.endpoints.client import Ask, Client, EndpointError, read_address
from twotower_eval.engine.endpoints.decoder import cut
from twotower_eval.engine.endpoints.model import EndpointModel
from twotower_eval.engine.endpoints.scorer import token_logprobs
from twotower_eval.engine.endpoints.streams import Broken, Reply, num_apart, read_lines, read_reply, read_stream
from twotower_eval.engine.models import load_model
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import ScoreRequest
from twotower_eval.errors import UserError
from twotower_eval.measure import harness
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.plan import RunPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_sources import check_checkpoints
from twotower_eval.records import Prompt, Retried, to_json

SORT = "miniature_sort"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again is asked soon, and nobody's key is used."""
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with serving(script) as there:
        yield there


def connected(url: str, **more: Any) -> EndpointModel:
    model = load_model(url, tokenizer="miniature", **more)
    assert isinstance(model, EndpointModel)
    return model


def answers(model: EndpointModel, *texts: str, **more: Any) -> list[Any]:
    prompts = [Prompt.from_text(text, model, id=text) for text in texts]
    return make_decoder(model, "endpoint").generate(prompts, **{"max_new_tokens": 8, **more})  # type: ignore[arg-type]


# --- requests --------------------------------------------------------------------------------------------------------


def test_an_address_is_read_from_what_a_user_types() -> None:
    whole = read_address("openai:http://localhost:8000/v1#org/name")
    assert (whole.url, whole.name) == ("http://localhost:8000/v1", "org/name")
    assert read_address("http://h:1").url == "http://h:1/v1"
    assert read_address("http://h:1/api/#n").url == "http://h:1/api"
    for wrong in ("openai:", "openai:localhost:8000#n", "openai:ftp://h/v1", "openai:http://h/v1?x=1#n"):
        with pytest.raises(UserError, match="an endpoint is written as openai:http://HOST:PORT/v1#NAME"):
            read_address(wrong)


@pytest.mark.parametrize(
    "wrong",
    ["http://[::1/v1", "http://h:abc/v1", "http://h:99999/v1", "http://a b/v1", "http://h\x00/v1", "http://☃.no"],
)
def test_an_address_that_no_url_has_is_refused_as_one(wrong: str) -> None:
    with pytest.raises(UserError, match="an endpoint is written as"):
        read_address(f"openai:{wrong}#n")


def test_a_key_proxies_and_certificates_that_cannot_be_used_are_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = read_address(url)
    for name, value in (("ALL_PROXY", "foo://h:1"), ("SSL_CERT_FILE", "/nowhere")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(UserError, match=r"127\.0\.0\.1.*what the environment says"):
                Client(address)
    for key in ("sesämé", "sesame\nopen"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as found:
            Client(address)
        assert "ses" not in str(found.value)


def test_a_key_is_read_without_the_line_end_of_its_file(
    script: Script, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.key = "sesame"
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\n")
    assert connected(url).checkpoint.name == NAME


def test_a_password_in_an_address_is_neither_taken_nor_shown() -> None:
    for given in ("http://me:secret@h:1/v1", "http://me:sec/ret@h:1/v1", "http:/me:secret@h/v1"):
        with pytest.raises(UserError, match="OPENAI_API_KEY") as found:
            read_address(f"openai:{given}#n")
        assert "ret" not in str(found.value)


@pytest.mark.parametrize("fault", ["429", "429 0", "500", "503", "drop", "malformed"])
def test_a_request_that_fails_is_asked_again_and_told(fault: str, script: Script, url: str) -> None:
    model, heard = connected(url), []
    model.on_retry = heard.append
    script.faults = {"add": [fault, fault]}
    first, second = answers(model, "add 1 2=", "sort 2 1=")
    assert first.text == second.text == " four five."
    assert (first.served.num_retries, second.served.num_retries) == (2, 0)
    assert [(one.label, one.attempt) for one in heard] == [("add 1 2=", 1), ("add 1 2=", 2)]
    assert all(isinstance(one, Retried) and one.detail for one in heard)


@pytest.mark.parametrize("fault", ["cut", "error in stream"])
def test_a_stream_that_breaks_is_no_short_answer(fault: str, script: Script, url: str) -> None:
    model = connected(url)
    decoder = make_decoder(model, "endpoint", clock=time.perf_counter)  # type: ignore[arg-type]
    script.faults = {"add": [fault]}
    [made] = decoder.generate([Prompt.from_text("add 1 2=", model)], max_new_tokens=8)
    assert (made.text, made.served.num_retries) == (" four five.", 1)  # type: ignore[union-attr]


def test_the_time_that_a_server_asks_for_is_waited(script: Script, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_WAIT_S", 0.01)
    heard: list[Retried] = []
    model = connected(url)
    model.on_retry = heard.append
    script.faults = {"add": ["429 7", "429 Wed, 21 Oct 2015 07:28:00 GMT", "429 soon"]}
    answers(model, "add 1 2=")
    assert [one.wait_s for one in heard] == [0.01, 0.0, pytest.approx(0.004)]


def test_a_request_that_keeps_failing_is_given_up_in_one_line(script: Script, url: str) -> None:
    model = connected(url)
    script.faults = {"add": ["500"] * 9}
    with pytest.raises(EndpointError, match=r"add 1 2= failed 5 times, at last: status 500 \(made to fail with 500\)"):
        answers(model, "add 1 2=")
    assert len(script.faults["add"]) == 4


def test_a_refused_request_is_not_repeated(script: Script, url: str) -> None:
    model = connected(url)
    script.faults = {"add": ["400", "400"]}
    with pytest.raises(EndpointError, match="status 400"):
        answers(model, "add 1 2=")
    assert len(script.faults["add"]) == 1


def test_a_server_that_says_nothing_times_out(script: Script, url: str) -> None:
    model = connected(url, request_timeout=0.2)
    script.faults, script.slow_s = {"add": ["slow"] * 9}, 0.4
    with pytest.raises(EndpointError, match="no answer in time"):
        answers(model, "add 1 2=")


def test_requests_run_beside_each_other_up_to_the_limit(script: Script, url: str) -> None:
    model = connected(url)
    script.faults, script.slow_s = {"prompt": ["slow"] * 8}, 0.05
    texts = [f"prompt {number}" for number in range(8)]
    answers(model, *texts, max_batch_size=3)
    assert script.most_at_once == 3
    script.faults["prompt"] = ["slow"] * 8
    answers(model, *texts)
    assert script.most_at_once == 8


def test_answers_are_heard_as_they_come_and_in_the_callers_thread(script: Script, url: str) -> None:
    model = connected(url)
    script.faults, script.slow_s = {"slow": ["slow"]}, 0.1
    heard: list[tuple[str, str]] = []
    made = answers(
        model, "slow", "fast", on_finish=lambda one: heard.append((one.prompt_id, threading.current_thread().name))
    )
    assert [name for name, _ in heard] == ["fast", "slow"]
    assert [one.prompt_id for one in made] == ["slow", "fast"]
    assert {thread for _, thread in heard} == {threading.current_thread().name}


def test_an_interrupt_ends_the_waiting_at_once(script: Script, url: str) -> None:
    client = Client(read_address(url))
    script.faults, script.slow_s = {"x": ["slow"]}, 5.0
    asks = [
        Ask(path="completions", body={"model": NAME, "prompt": text, "max_tokens": 1}, label=text)
        for text in ("x", "y")
    ]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.ask(asks, on_reply=interrupt)
    assert time.monotonic() - began_s < 2
    client.close()


def test_the_key_goes_into_the_header_and_nowhere_else(
    script: Script, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.key = "sesame"
    with pytest.raises(EndpointError, match=r"status 401.*put its key into OPENAI_API_KEY"):
        connected(url)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert "sesame" not in str(to_json(connected(url).checkpoint))


# --- what a server is taken for --------------------------------------------------------------------------------------


def test_what_is_known_of_a_model_is_stated(script: Script, url: str) -> None:
    checkpoint = connected(url).checkpoint
    assert (checkpoint.name, checkpoint.family, checkpoint.dtype) == (NAME, "openai", "unknown")
    assert checkpoint.served is not None
    assert checkpoint.served.name == NAME
    assert f"openai:{checkpoint.source}" in url
    assert dict(checkpoint.served.facts) == {"id": '"scripted"', "owned_by": '"tests"'}
    script.listed = [{**script.listed[0], "created": 2}]
    assert connected(url).checkpoint.digest == checkpoint.digest  # when it was listed says nothing
    script.listed = [{**script.listed[0], "max_model_len": 99}]
    assert connected(url).checkpoint.digest != checkpoint.digest


def test_a_wrong_name_is_answered_with_what_the_server_has(script: Script, url: str) -> None:
    with pytest.raises(EndpointError, match="for the model 'other'; it lists scripted"):
        connected(url.replace(NAME, "other"))


def test_a_name_may_be_left_out_where_there_is_only_one(script: Script, url: str) -> None:
    plain = url.partition("#")[0]
    assert connected(plain).checkpoint.name == NAME
    script.listed = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(EndpointError, match=r"name the model behind a #.*it lists a, b"):
        connected(plain)
    script.listed = None  # a server that lists nothing can be asked all the same
    assert connected(url).checkpoint.served.facts == ()  # type: ignore[union-attr]


def test_an_unreachable_server_is_one_line() -> None:
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1: models: cannot be reached"):
        connected("openai:http://127.0.0.1:9/v1#n")


def test_tokens_are_counted_with_a_tokenizer_that_is_here(script: Script, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --tokenizer FOLDER"):
        load_model(url)
    script.listed = [{"id": NAME, "root": str(save_reading("llama", tmp_path / "llama"))}]
    assert load_model(url).checkpoint.served.tokenizer == "llama"  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_model(url, tokenizer=tmp_path)


def test_prompts_go_as_ids_only_where_they_are_read_like_their_text(script: Script, url: str) -> None:
    assert not connected(url).sends_ids  # refused
    codec = load_model("miniature").tokenizer
    assert codec is not None
    script.decode, script.count = codec.decode, lambda text: len(codec.encode(text, True))
    model = connected(url)
    assert model.sends_ids
    assert answers(model, "add 1 2=")[0].text == " four five."
    assert script.bodies[-1]["prompt"] == codec.encode("add 1 2=", True)
    script.answer = lambda text: [text[-3:]]
    script.decode = lambda ids: codec.decode(ids)[::-1]  # another tokenizer's ids
    assert not connected(url).sends_ids
    script.decode, script.count = codec.decode, lambda text: 1 + len(codec.encode(text, True))
    assert not connected(url).sends_ids


def test_a_text_goes_without_the_bos_that_the_server_adds(url: str, script: Script, tmp_path: Path) -> None:
    model = connected(url)
    bos = model.tokenizer.bos_token_id
    if bos is None or model.tokenizer.encode("", True)[:1] != [bos]:
        model.tokenizer = _WithBos(model.tokenizer)
    answers(model, "<bos>add 1 2=")
    assert script.bodies[-1]["prompt"] == "add 1 2="


class _WithBos:
    """A tokenizer that begins every text with BOS, written ``<bos>``."""

    bos_token_id = 1

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids = self._codec.encode(text.removeprefix("<bos>")) if text else []
        return [*([1] if add_special_tokens or text.startswith("<bos>") else []), *ids]

    def prompt_ids(self, text: str) -> list[int]:
        return self.encode(text, not text.startswith("<bos>"))

    def decode_with_special(self, ids: Any) -> str:
        return "".join("<bos>" if one == 1 else self._codec.decode([one]) for one in ids)


def test_a_family_and_an_endpoint_have_to_fit(url: str) -> None:
    with pytest.raises(UserError, match="family transformers reads files"):
        load_model(url, family="transformers")
    with pytest.raises(UserError, match="family openai is for servers"):
        load_model("miniature", family="openai")


def test_no_other_decoder_takes_an_endpoint_and_the_endpoints_takes_no_other_model(url: str) -> None:
    with pytest.raises(UserError, match="decoder 'autoregressive' reads a model's logits"):
        make_decoder(connected(url), "autoregressive")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="decoder 'endpoint' is for models behind a server"):
        make_decoder(load_model("miniature"), "endpoint")


# --- replies ---------------------------------------------------------------------------------------------------------


def streamed(*lines: str, at_s: tuple[float, ...] = ()) -> Reply:
    async def given() -> AsyncIterator[str]:
        for line in lines:
            yield line

    moments = iter(at_s or range(100))
    return asyncio.run(read_stream(given(), lambda: float(next(moments))))


def test_a_stream_is_read_to_its_end() -> None:
    reply = streamed(
        ": ping", "", 'data: {"choices": [{"text": "a"}]}', 'data: {"choices": [{"delta": {"content": "b"}}]}',
        'data: {"choices": [{"text": "", "finish_reason": "length", "stop_reason": null}]}',
        'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}', "data: [DONE]",
    )  # fmt: skip
    assert (reply.text, reply.finish, reply.num_prompt_tokens, reply.num_tokens) == ("ab", "length", 3, 2)
    assert reply.arrivals_s == (0.0, 1.0)
    assert reply.tells_stop


@pytest.mark.parametrize(
    "lines",
    [
        ['data: {"choices": [{"text": "a"}]}'],
        ['data: {"choices": [{"text": "a"}]}', "data: [DONE]"],
        ['data: {"choices": [{"te'],
        ['data: {"error": {"message": "out of memory"}}'],
        [],
        ['data: {"choices": [{"text": "a", "finish_reason": "abort"}]}', "data: [DONE]"],
        ['data: {"choices": [{"text": "a", "finish_reason": "error"}]}', "data: [DONE]"],
        ["data: " + "[" * 100_000],
    ],
)
def test_a_stream_without_an_end_is_broken(lines: list[str]) -> None:
    with pytest.raises(Broken):
        streamed(*lines)


def test_a_reply_that_is_no_stream_is_called_so() -> None:
    with pytest.raises(Broken, match="no stream of events"):
        streamed('{"choices": [{"text": "a", "finish_reason": "stop"}]}')


def test_an_answer_that_the_server_gave_up_is_no_short_answer() -> None:
    with pytest.raises(Broken, match="not finished: the server ended it with finish_reason 'abort'"):
        read_reply({"choices": [{"text": "4", "finish_reason": "abort"}]})


def test_no_error_is_none_and_empty_events_say_nothing() -> None:
    said = {"error": None, "choices": [{"text": "a", "finish_reason": "stop"}]}
    assert read_reply(said).text == "a"
    assert streamed("data:", f"data: {json.dumps(said)}", "data: [DONE]").text == "a"


def test_lines_of_a_stream_end_where_events_do_and_nowhere_in_a_text() -> None:
    text = "a\u2028b\x85c\x0bd\x1ce 😀"
    event = json.dumps({"choices": [{"text": text, "finish_reason": "stop"}]}, ensure_ascii=False)
    sent = f": ping\r\n\r\ndata: {event}\r\n\r\ndata: [DONE]".encode()

    async def given(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(sent), size):
            yield sent[start : start + size]

    for size in (1, 3, 1000):  # within a character, too
        assert asyncio.run(read_stream(read_lines(given(size)), lambda: 0.0)).text == text


def test_bytes_that_are_no_text_are_broken() -> None:
    async def given() -> AsyncIterator[bytes]:
        yield b'data: {"choices": [{"text": "\xff", "finish_reason": "stop"}]}\n'

    with pytest.raises(Broken, match="no UTF-8"):
        asyncio.run(read_stream(read_lines(given()), lambda: 0.0))


def test_a_character_sent_in_halves_is_one() -> None:
    halves = [
        f'data: {{"choices": [{{"text": "{half}", "finish_reason": "stop"}}]}}' for half in ("\\ud83d", "\\ude00")
    ]
    assert streamed(*halves).text == "😀"
    assert streamed(halves[0]).text == "\ufffd"


def test_pieces_that_come_together_are_one_arrival() -> None:
    assert num_apart([]) == 0
    assert num_apart([1.0]) == 1
    steady = [0.1 * n for n in range(20)]
    assert num_apart(steady) == 20
    assert num_apart([10.0 * canvas + 0.001 * n for canvas in range(4) for n in range(32)]) == 4


@pytest.mark.parametrize(
    ("reply", "sent", "found"),
    [
        (Reply(text="a b", finish="stop", stop_reason=None, tells_stop=True), True, ("a b", "eos")),
        (Reply(text="a b", finish="stop", stop_reason="\n", tells_stop=True), True, ("a b", "stop")),
        (Reply(text="a b", finish="stop", stop_reason=2, tells_stop=True), True, ("a b", "eos")),
        (Reply(text="a b", finish="stop"), True, ("a b", "stop")),
        (Reply(text="a b", finish="stop"), False, ("a b", "eos")),
        (Reply(text="a b", finish="length"), True, ("a b", "length")),
        (Reply(text="a\nb", finish="length"), True, ("a", "stop")),
    ],
)
def test_why_an_answer_ended(reply: Reply, sent: bool, found: tuple[str, str]) -> None:
    assert cut(reply, ["\n"], sent) == found


# --- log-likelihoods -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reading("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("ways", [("prompt_logprobs",), ("echo",)])
def test_log_likelihoods_equal_those_of_the_same_model_here(
    ways: tuple[str, ...], script: Script, url: str, llama: Path
) -> None:
    local = load_model(llama)
    codec = local.tokenizer
    assert codec is not None
    script.decode, script.count, script.ways = codec.decode, lambda text: len(codec.encode(text, True)), ways
    script.logprobs = lambda ids: local.context_logits(torch.tensor([list(ids)]))[0].log_softmax(-1).tolist()
    remote = load_model(url, tokenizer=llama)
    likeliest = local.context_logits(torch.tensor([[5, 6, 7]]))[0, -1].argmax().item()
    requests = [
        ScoreRequest(context_ids=(5, 6, 7), continuation_ids=tail) for tail in ((8, 9), (10,), (int(likeliest),))
    ]
    here, there = (make_scorer(model, "exact").score(requests) for model in (local, remote))
    for one, other in zip(here, there, strict=True):
        assert other.logprob_nats == pytest.approx(one.logprob_nats, abs=1e-4)
        assert other.is_greedy == one.is_greedy
    assert there[2].is_greedy


def test_what_is_scored_leaves_room_for_the_token_that_a_server_makes(script: Script, url: str, llama: Path) -> None:
    """As lm-eval's own client of such servers has it."""
    codec = load_model(llama).tokenizer
    assert codec is not None
    script.decode, script.count, script.ways = codec.decode, lambda text: len(codec.encode(text, True)), ("echo",)
    script.logprobs = lambda ids: [[-1.0] * 1000 for _ in ids]
    script.max_length, script.listed = 128, [{"id": NAME, "max_model_len": 128}]
    model = load_model(url, tokenizer=llama)
    lm = HarnessLM(model, scorer=make_scorer(model, "exact"))
    text = " ".join(f"word {number}" for number in range(60))
    asked = [Instance("loglikelihood", {}, (text, " more"), 0, metadata=("own", 0, 1))]
    assert lm.loglikelihood(asked)
    assert len(script.bodies[-1]["prompt"]) == 127
    whole = [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("own", 0, 1))]
    [nats] = HarnessLM(model, scorer=make_scorer(model, "exact")).loglikelihood_rolling(whole)
    assert nats == -len(codec.encode(text, True))  # every token once
    assert max(len(body["prompt"]) for body in script.bodies) == 127


def test_log_probabilities_of_others_that_are_null_or_unranked_are_no_trap() -> None:
    echoed = {"logprobs": {"token_logprobs": [None, -1.0], "top_logprobs": [None, {"a": None, "b": -0.5}]}}
    ranked = {"prompt_logprobs": [None, {"6": {"logprob": -1.0}, "7": {"logprob": -0.5}}]}
    for choice, way in ((echoed, "echo"), (ranked, "prompt_logprobs")):
        reply = Reply(text="", finish="length", choice=choice)
        assert token_logprobs(reply, (5, 6), way) == [(-1.0, False)]  # type: ignore[arg-type]
    best = {"prompt_logprobs": [None, {"6": {"logprob": -0.2}, "7": {"logprob": -0.5}}]}
    assert token_logprobs(Reply(text="", finish="length", choice=best), (5, 6), "prompt_logprobs") == [(-0.2, True)]


def test_a_server_that_has_moved_is_named(script: Script, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(read_address(url))
    moved = httpx2.Response(307, headers={"location": "https://h/v2/x"}, request=httpx2.Request("POST", "http://h"))
    assert "status 307 (moved to https://h/v2/x" in str(client._refusal(moved))
    client.close()


def test_a_server_without_prompt_logprobs_is_refused_before_anything_long(script: Script, url: str) -> None:
    plan = RunPlan(model=url, baseline="miniature", tasks=("miniature_choice",), limit=2)
    with pytest.raises(UserError, match="takes no prompts as token ids"):
        harness.prepare(plan)
    codec = load_model("miniature").tokenizer
    assert codec is not None
    script.decode, script.count = codec.decode, lambda text: len(codec.encode(text, True))
    with pytest.raises(UserError, match="gives none of a prompt"):
        harness.prepare(plan)


# --- run -------------------------------------------------------------------------------------------------------------


def sorting(text: str) -> list[str]:
    """Right answers to the last line of a prompt of the sorting task, one character a piece."""
    return list("12 34;\n")


def test_a_run_is_journalled_resumed_and_told_of_its_retries(script: Script, url: str, tmp_path: Path) -> None:
    script.answer = sorting
    plan = RunPlan(model=url, baseline="miniature", tasks=(SORT,), limit=5, batch_size=2)
    prompts = [doc.instances[0].args[0] for doc in harness.prepare(plan).tasks[0].docs]
    script.faults = {prompts[3]: ["500"] * 5}
    with pytest.raises(EndpointError, match="failed 5 times"):
        harness.run(plan, root=tmp_path)
    [path] = tmp_path.iterdir()
    before = store.load(path)
    cell = next(cell.id for cell in before.manifest.cells if cell.arm == "candidate")
    kept = [row.doc_id for row in before.generations if row.cell == cell]
    assert 0 < len(kept) < 5
    script.faults = {prompts[3]: ["drop"]}
    num_asked = len(script.bodies)
    run = store.load(harness.run(plan, root=tmp_path, resume=path))
    made = [row for row in run.generations if row.cell == cell]
    assert sorted(row.doc_id for row in made) == [0, 1, 2, 3, 4]
    assert run.complete
    own = [body for body in script.bodies[num_asked:] if body["prompt"] in prompts]
    assert len(own) == 5 - len(kept) + 1
    retried = [event for event in run.events if event["kind"] == "retried"]
    assert {event["fault"] for event in retried} == {"server error", "dropped"}
    assert {event["label"] for event in retried} == {f"{SORT}/3/0/0"}
    assert not run.witnessed or all(row.cell != cell for row in run.witnessed)


def test_two_endpoints_are_counted_with_the_tokenizer_that_is_given(script: Script, tmp_path: Path) -> None:
    script.answer = sorting
    other = Script(answer=sorting)
    with serving(script) as one, serving(other) as two:
        plan = RunPlan(model=one, baseline=two, tasks=(SORT,), limit=3, tokenizer="miniature")
        run = store.load(harness.run(plan, root=tmp_path))
    assert [cell.decoder.kind for cell in run.manifest.cells] == ["endpoint", "endpoint"]
    assert len({cell.checkpoint.digest for cell in run.manifest.cells}) == 2
    assert len({row.generation.text for row in run.generations}) == 1
    assert all(row.generation.num_tokens == len(row.generation.token_ids) for row in run.generations)


def test_a_fault_is_one_line_and_exit_2(script: Script, url: str, tmp_path: Path, capsys: Any) -> None:
    lines = {
        "cannot be reached": ["--model", "openai:http://127.0.0.1:9/v1#n"],
        "it lists scripted": ["--model", url.replace(NAME, "other")],
    }
    for said, words in lines.items():
        asked = ["run", *words, "--baseline", "miniature", "--tasks", SORT, "--limit", "1", "--out", str(tmp_path)]
        assert main(asked) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert said in told[0]
    assert not list(tmp_path.iterdir())


def test_what_has_no_effect_on_an_endpoint_is_refused() -> None:
    url = "openai:http://h:1/v1#n"
    with pytest.raises(UserError, match="tokenizer is for endpoints"):
        check_checkpoints(RunPlan(tokenizer="x"))
    with pytest.raises(UserError, match="dtype has no effect on models behind a server"):
        check_checkpoints(RunPlan(model=url, dtype="bfloat16"))
    check_checkpoints(RunPlan(model=url, dtype="bfloat16", baseline="miniature"))
    check_checkpoints(RunPlan(model=url, apply_chat_template=True))
    with pytest.raises(UserError, match="a server applies its own chat template, and 'tools' names none of it"):
        check_checkpoints(RunPlan(model=url, apply_chat_template="tools"))
    check_checkpoints(RunPlan(model=url, baseline="miniature", apply_chat_template="tools"))
    with pytest.raises(UserError, match="verify looks at logits"):
        check_checkpoints(VerifyPlan(model=url))
    with pytest.raises(UserError, match="request_timeout must be above 0"):
        RunPlan(model=url, request_timeout=0.0)
    with pytest.raises(UserError, match="answer workload"):
        SpeedPlan(model=url, workload="fixed", new_tokens=4)
    assert RunPlan(model=url).decoder == baseline_spec(RunPlan(model=url)).kind == "endpoint"
    assert baseline_spec(RunPlan(baseline=url)).kind == "endpoint"
    assert baseline_spec(RunPlan(model=url, baseline="miniature")).kind == "autoregressive"
    assert dataclasses.replace(RunPlan(model=url)).decoder == "endpoint"
