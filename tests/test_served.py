"""A real server, from a package: ``transformers serve`` on a tiny model, beside the same model loaded here."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from chat_models import QWEN_3, save_chat, write_chat_tasks
from own_tasks import use_tasks

from tests.hf_models import save_reading
from twotower_eval import store
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.endpoints.model import EndpointModel
from twotower_eval.engine.models import load_model
from twotower_eval.errors import UserError
from twotower_eval.measure import harness
from twotower_eval.plan import RunPlan
from twotower_eval.records import Prompt

pytestmark = pytest.mark.slow
TEXTS = ("sort 31 12 77", "add 1 2=", "the")
STARTS_S = 120.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reading("llama", tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def url(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(llama, tmp_path_factory.mktemp("cache")) as there:
        yield there


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat") / "instruct", QWEN_3, adds_bos=False)


@pytest.fixture(scope="module")
def chat_url(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(chat, tmp_path_factory.mktemp("cache")) as there:
        yield there


@contextmanager
def served(model: Path, cache: Path) -> Iterator[str]:
    """The endpoint of a server that is up; it lists what a cache holds, which is nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (cache / "hub").mkdir()
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    said = (cache / "log").open("w")
    server = subprocess.Popen(
        [*command, "--device", "cpu"], env={**os.environ, "HF_HOME": str(cache)}, stdout=said, stderr=said
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, cache / "log")
        yield f"openai:http://127.0.0.1:{port}/v1#{model}"
    finally:
        server.terminate()
        server.wait(10)
        said.close()


def _wait_for(health: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + STARTS_S
    while time.monotonic() < until_s and server.poll() is None:
        try:
            if httpx2.get(health).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()[-800:]}")


def test_answers_equal_those_of_the_same_model_here(url: str, llama: Path) -> None:
    """Token for token at temperature 0, alone and beside each other, whole and streamed."""
    here, there = load_model(llama), load_model(url, tokenizer=llama)
    assert isinstance(there, EndpointModel)
    assert not there.sends_ids  # this server takes texts only
    prompts = [Prompt.from_text(text, here, id=text) for text in TEXTS]
    asked = {"max_new_tokens": 12, "eos_token_ids": here.eos_token_ids}
    assert here.tokenizer is not None
    ours = make_decoder(here, "autoregressive").generate(prompts, **asked)  # type: ignore[arg-type]
    for clock in (None, time.perf_counter):
        decoder = make_decoder(there, "endpoint", clock=clock)  # type: ignore[arg-type]
        theirs = decoder.generate(prompts, **asked)  # type: ignore[arg-type]
        assert [one.text for one in theirs] == [one.text for one in ours]
        # Of tokens that write nothing a server tells nothing.
        written = [tuple(token for token in one.token_ids if here.tokenizer.decode([token])) for one in ours]
        assert [one.token_ids for one in theirs] == written


def test_a_run_scores_both_alike(url: str, llama: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=url, baseline=str(llama), tasks=("miniature_sort",), limit=3, max_new_tokens=16, batch_size=2)
    run = store.load(harness.run(plan, root=tmp_path))
    texts: dict[str, list[str | None]] = {}
    for row in sorted(run.generations, key=lambda row: row.doc_id):
        texts.setdefault(row.cell, []).append(row.generation.text)
    one, other = texts.values()
    assert one == other
    assert run.complete


@pytest.mark.parametrize("told", [{}, {"chat_template_args": {"enable_thinking": False}}])
def test_chats_are_answered_as_by_the_same_model_here(
    told: dict[str, object], chat_url: str, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same greedy texts for the same messages through the same template, and the same number of tokens. A tokenizer
    that adds BOS itself would do so here, as in lm-eval's hf, and not there."""
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks", 1))
    plan = RunPlan(
        model=chat_url, baseline=str(chat), tasks=("sums_generate_until",), batch_size=2, max_new_tokens=12,
        apply_chat_template=True, system_instruction="Be brief.", **told,
    )  # fmt: skip
    run = store.load(harness.run(plan, root=tmp_path / "out"))
    texts: dict[str, list[str | None]] = {}
    counts: dict[str, list[int | None]] = {}
    for row in sorted(run.generations, key=lambda row: row.doc_id):
        made = row.generation
        texts.setdefault(row.cell, []).append(made.text)
        counts.setdefault(row.cell, []).append(
            made.num_prompt_tokens if made.served is None else made.served.num_prompt_tokens
        )
    one, other = texts.values()
    assert one == other
    assert any(one)
    first, second = counts.values()
    assert first == second


def test_a_chat_that_this_server_would_not_continue_is_refused(
    chat_url: str, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tasks(monkeypatch, write_chat_tasks(tmp_path / "tasks"))
    plan = RunPlan(
        model=chat_url, baseline=str(chat), tasks=("sums_generate_until",), apply_chat_template=True, gen_prefix="So:"
    )
    with pytest.raises(UserError, match="begins another message where an answer is begun for it"):
        harness.prepare(plan)
