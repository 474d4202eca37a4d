"""When requests to a server are sent and what their times are, in a made-up time in which waiting takes none."""

import asyncio
import json
import selectors
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx2
import pytest

from tests.scripted_server import NAME, Script, serving
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.endpoints import client as client_module
from twotower_eval.engine.endpoints.decoder import Answered, EndpointDecoder, Order
from twotower_eval.engine.models import load_model
from twotower_eval.records import Prompt


class Leaps(selectors.DefaultSelector):
    """Waits for nothing but what other threads hand in: where a time is given, that much of it has passed."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None:
            self.passed_s += timeout
        return ready


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop in whose time nothing is late."""

    def __init__(self) -> None:
        self.leaps = Leaps()
        super().__init__(self.leaps)

    def time(self) -> float:
        return self.leaps.passed_s


@dataclass
class Server(httpx2.AsyncBaseTransport):
    """Answers each prompt after its own seconds, ``places`` at a time, and keeps streams open ``open_s`` longer."""

    seconds: dict[str, float]
    places: int = 1000
    open_s: float = 0.0

    def __post_init__(self) -> None:
        self.free = asyncio.Semaphore(self.places)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return httpx2.Response(200, json={"data": [{"id": NAME}]})
        body = json.loads(await request.aread())
        if isinstance(body["prompt"], list):
            return httpx2.Response(400, json={"detail": "prompt must be a string"})
        if not body.get("stream"):
            return httpx2.Response(200, json={"choices": [{"text": "1;", "finish_reason": "stop"}]})
        return httpx2.Response(200, stream=Pieces(self, body["prompt"]))


@dataclass
class Pieces(httpx2.AsyncByteStream):
    """One streamed answer."""

    server: Server
    text: str

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with self.server.free:
            await asyncio.sleep(self.server.seconds.get(self.text, 0.0))
        yield b'data: {"choices": [{"text": "12;", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
        if self.server.open_s:
            await asyncio.sleep(self.server.open_s)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[LeapingLoop]:
    """The loops of clients that are made."""
    made: list[LeapingLoop] = []

    def new() -> LeapingLoop:
        made.append(LeapingLoop())
        return made[-1]

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(client_module.asyncio, "new_event_loop", new)
    return made


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """The server that clients reach: the first of the list."""
    servers: list[Server] = []
    real = httpx2.AsyncClient
    monkeypatch.setattr(client_module.httpx2, "AsyncClient", lambda **given: real(transport=servers[0], **given))
    return servers


def streamed(
    server: Server, http: list[Server], loops: list[LeapingLoop], due_s: list[float], in_flight: int | None = None
) -> list[Answered]:
    """What becomes of a stream of the server's prompts, due at these moments."""
    http.append(server)
    model = load_model(f"openai:http://there/v1#{NAME}", tokenizer="miniature")
    decoder = make_decoder(model, "endpoint", clock=loops[-1].time)
    assert isinstance(decoder, EndpointDecoder)
    orders = [
        Order(prompt=Prompt.from_text(text, model, id=text), max_new_tokens=8, eos_token_ids=(), stop=(), due_s=at)
        for text, at in zip(server.seconds, due_s, strict=True)
    ]
    return decoder.stream(orders, in_flight=in_flight)


def times(answered: list[Answered]) -> list[tuple[float, float, float]]:
    """When each was due, sent and answered."""
    return [(round(one.due_s, 6), round(one.sent_s, 6), round(one.ended_s, 6)) for one in answered]


def test_in_a_closed_loop_a_place_that_is_free_is_taken_at_once(http: list[Server], loops: list[LeapingLoop]) -> None:
    server = Server({"a": 1.0, "b": 3.0, "c": 1.0, "d": 2.0, "e": 1.0})
    found = streamed(server, http, loops, [0.0] * 5, in_flight=2)
    assert times(found) == [(0, 0, 1), (0, 0, 3), (1, 1, 2), (2, 2, 4), (3, 3, 4)]


def test_at_a_rate_requests_are_sent_when_due_and_charged_for_all_that_they_wait(
    http: list[Server], loops: list[LeapingLoop]
) -> None:
    """A server of one place stalls once: what is due behind that waits for it, and its latency says so."""
    server = Server({"a": 0.5, "b": 4.0, "c": 0.5, "d": 0.5}, places=1)
    found = streamed(server, http, loops, [0.0, 1.0, 2.0, 3.0])
    assert times(found) == [(0, 0, 0.5), (1, 1, 5), (2, 2, 5.5), (3, 3, 6)]
    assert [one.result.finish_s for one in found] == pytest.approx([0.5, 4.0, 3.5, 3.0])  # type: ignore[union-attr]


def test_an_answer_ends_with_its_stream_and_not_with_the_connection(
    http: list[Server], loops: list[LeapingLoop]
) -> None:
    server = Server({"a": 1.0, "b": 1.0}, open_s=3600.0)
    one, other = times(streamed(server, http, loops, [0.0, 0.0], in_flight=1))
    assert one == (0, 0, 1)
    assert other[1] < 1.1
    assert other[2] == pytest.approx(other[1] + 1.0)


@pytest.mark.parametrize("asks_for_stream", [True, False])
def test_requests_that_follow_each_other_share_a_connection(asks_for_stream: bool) -> None:
    """A new one for each would be on the clock, and of more weight the faster a server answers."""
    script = Script()
    body = {"model": NAME, "prompt": "x", "max_tokens": 8, "stream": asks_for_stream}
    with serving(script) as url:
        client = client_module.Client(client_module.read_address(url))
        for _ in range(4):
            client.ask([client_module.Ask(path="completions", body=body, label="x")], on_reply=lambda at, reply: None)
        client.close()
    assert script.num_connections == 1
