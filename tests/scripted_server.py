"""An OpenAI-compatible server on the loopback that answers as a test says, and fails as it says."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "scripted"
Fault = str  # "429", "500", "drop", "malformed", "cut", "error in stream", "slow", "400"


@dataclass
class Script:
    """What the server does. ``faults`` holds, by the text of a prompt, what happens to its first requests, one each.

    ``answer`` gives a prompt's text as a list of pieces; ``decode`` reads token ids, None: they are refused. Of a
    ``chat`` is a template that begins an answer; None: no chats are answered. ``continues``: a last message of the
    assistant goes on where that is asked for. ``thinks`` are pieces in front of a chat's answer, ``refused`` fields of
    bodies. Of a ``logprobs`` function of ids the server serves ``ways``. ``gap_s`` passes between pieces, ``slow_s``
    before a slow answer. ``places`` requests are answered at a time, the others wait. ``cached`` says how many tokens
    of a prompt are in a cache. ``refuses`` gives the status of a request that is refused, by how many came before it.
    Beyond ``max_length`` tokens of prompt and answer a request is refused. ``lingers_s`` is how long a stream stays
    open behind its own end.
    """

    answer: Callable[[str], Sequence[str]] = lambda text: [" four", " five", "."]
    decode: Callable[[Sequence[int]], str] | None = None
    count: Callable[[str], int] = lambda text: len(text.split())
    chat: Callable[[Sequence[Mapping[str, str]]], str] | None = None
    continues: bool = True
    thinks: Sequence[str] = ()
    refused: Sequence[str] = ()
    logprobs: Callable[[Sequence[int]], list[Any]] | None = None
    ways: tuple[str, ...] = ()
    listed: Any = field(default_factory=lambda: [{"id": NAME, "object": "model", "created": 1, "owned_by": "tests"}])
    key: str | None = None
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    gap_s: float = 0.0
    slow_s: float = 1.0
    tells_stop: bool = True
    takes_stream_options: bool = True
    places: int | None = None
    cached: Callable[[int], int] | None = None
    refuses: Callable[[int], Fault | None] = lambda number: None
    max_length: int | None = None
    lingers_s: float = 0.0
    # What was seen.
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_connections: int = 0
    num_at_once: int = 0
    most_at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.free = threading.Semaphore(self.places or 10_000)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def setup(self) -> None:
        with self.server.script.lock:
            self.server.script.num_connections += 1
        super().setup()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        script = self.server.script
        if not self._enters():
            return
        if script.listed is None:
            self._send({"detail": "Not Found"}, 404)
        else:
            self._send({"object": "list", "data": script.listed})

    def do_POST(self) -> None:
        script = self.server.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._enters():
            return
        with script.lock:
            script.bodies.append(body)
            script.num_at_once += 1
            script.most_at_once = max(script.most_at_once, script.num_at_once)
        try:
            with script.free:
                self._complete(script, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # who asked has gone
        finally:
            with script.lock:
                script.num_at_once -= 1

    def _complete(self, script: Script, body: dict[str, Any]) -> None:
        is_chat = self.path.endswith("/chat/completions")
        if body["model"] != NAME:
            return self._send({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        for name in script.refused:
            if name in body:
                return self._send({"error": {"message": f"Unsupported parameter: '{name}'"}}, 400)
        if is_chat and script.chat is None:
            return self._send({"detail": "Not Found"}, 404)
        prompt = _chat_text(script, body) if is_chat else body["prompt"]
        if isinstance(prompt, list):
            if script.decode is None:
                return self._send({"detail": "prompt must be a string."}, 400)
            text = script.decode(prompt)
        else:
            text = prompt
        if "stream_options" in body and not script.takes_stream_options:
            return self._send({"detail": "Unexpected fields"}, 422)
        with script.lock:
            fault = next((own.pop(0) for key, own in script.faults.items() if own and key in text), None)
        fault = fault or script.refuses(len(script.bodies))
        if fault is not None and self._fails(script, fault, body):
            return None
        num_prompt = len(prompt) if isinstance(prompt, list) else script.count(prompt)
        if script.max_length is not None and num_prompt + _budget(body) > script.max_length:
            said = f"This model's maximum context length is {script.max_length} tokens."
            return self._send({"error": {"message": said}}, 400)
        pieces, finish, stop = _ended(list(script.answer(text)), body)
        usage: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": len(pieces), "total_tokens": 0}
        if script.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": script.cached(num_prompt)}
        end = {"finish_reason": finish, **({"stop_reason": stop} if script.tells_stop else {})}
        if body.get("stream"):
            return self._stream(script, pieces, end, usage if "stream_options" in body else None, is_chat=is_chat)
        choice: dict[str, Any] = {"index": 0, "text": "".join(pieces), **end}
        if is_chat:
            thoughts = {"reasoning_content": "".join(script.thinks)} if script.thinks else {}
            message = {"role": "assistant", "content": choice.pop("text"), **thoughts}
            choice["message"] = message
        if script.logprobs is not None and isinstance(prompt, list):
            choice |= _logprobs(script, prompt, body)
        return self._send({"object": "text_completion", "choices": [choice], "usage": usage})

    def _enters(self) -> bool:
        key = self.server.script.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._send({"error": {"message": "Unauthorized"}}, 401)
        return False

    def _fails(self, script: Script, fault: Fault, body: dict[str, Any]) -> bool:
        """Fail as told; whether the request is over."""
        if fault == "slow":
            time.sleep(script.slow_s)
            return False
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
        elif fault == "malformed":
            self._raw(b'{"choices": [{"text": "half')
        elif fault in ("cut", "error in stream"):
            self._begin_stream()
            self._event({"choices": [{"text": " four", "finish_reason": None}]})
            if fault == "cut":
                self.close_connection = True
                self.connection.shutdown(2)
            else:
                self._event({"error": "CUDA out of memory"})
                self._chunk(b"")
        elif fault.startswith("429"):
            self._send(
                {"error": {"message": "Too many requests"}}, 429, {"Retry-After": fault.partition(" ")[2] or "0"}
            )
        else:
            self._send({"error": {"message": f"made to fail with {fault}"}}, int(fault))
        return True

    def _stream(
        self,
        script: Script,
        pieces: Sequence[str],
        end: dict[str, Any],
        usage: dict[str, Any] | None,
        *,
        is_chat: bool,
    ) -> None:
        self._begin_stream()
        if is_chat:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        for piece in script.thinks if is_chat else ():
            self._event({"choices": [{"index": 0, "delta": {"reasoning_content": piece}}]})
        for piece in pieces:
            said = {"delta": {"content": piece}} if is_chat else {"text": piece}
            self._event({"choices": [{"index": 0, **said, "finish_reason": None}]})
            time.sleep(script.gap_s)
        self._event({"choices": [{"index": 0, **({"delta": {}} if is_chat else {"text": ""}), **end}]})
        if usage is not None:
            self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        time.sleep(script.lingers_s)
        self._chunk(b"")

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _send(self, said: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._raw(json.dumps(said).encode(), status, headers)

    def _raw(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _chat_text(script: Script, body: dict[str, Any]) -> str:
    """The messages as the server's template writes them; what it does not know of a body it ignores."""
    assert script.chat is not None
    *before, last = body["messages"]
    if last["role"] == "assistant" and body.get("continue_final_message") and script.continues:
        return script.chat(before) + last["content"]
    return script.chat(body["messages"])


def _budget(body: dict[str, Any]) -> int:
    return int(body.get("max_tokens", body.get("max_completion_tokens", 16)))


def _ended(pieces: list[str], body: dict[str, Any]) -> tuple[list[str], str, Any]:
    """Pieces within the budget and before a stop string, which is left out as vLLM does."""
    finish, stop = ("length", None) if len(pieces) > _budget(body) else ("stop", None)
    pieces = pieces[: _budget(body)]
    found = [(at, one) for one in body.get("stop", ()) if (at := "".join(pieces).find(one)) >= 0]
    if found:
        at, stop = min(found)
        kept, finish = "".join(pieces)[:at], "stop"
        pieces = [piece for n, piece in enumerate(pieces) if len("".join(pieces[: n + 1])) <= at]
        pieces += [rest] if (rest := kept[len("".join(pieces)) :]) else []
    return pieces, finish, stop


def _logprobs(script: Script, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
    """Both ways to give log-probabilities, of a function that gives a row of them behind every token."""
    assert script.logprobs is not None
    rows = script.logprobs(ids)
    own = [rows[at][token] for at, token in enumerate(ids[1:])]
    best = [max(range(len(row)), key=row.__getitem__) for row in rows[:-1]]
    if "prompt_logprobs" in body and "prompt_logprobs" in script.ways:
        tables = [
            {
                str(token): {"logprob": own[at], "rank": 1 + (best[at] != token)},
                str(best[at]): {"logprob": max(rows[at]), "rank": 1},
            }
            for at, token in enumerate(ids[1:])
        ]
        return {"prompt_logprobs": [None, *tables]}
    if body.get("echo") and "echo" in script.ways:
        top = [{str(best[at]): max(rows[at]), str(token): own[at]} for at, token in enumerate(ids[1:])]
        return {"logprobs": {"token_logprobs": [None, *own, -1.0], "top_logprobs": [None, *top, {"x": -1.0}]}}
    return {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script

    def handle_error(self, *_: object) -> None:
        """Connections that end early are what tests are about."""


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The endpoint of a running server, as ``--model`` takes it."""
    server = _Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"openai:http://127.0.0.1:{server.server_address[1]}/v1#{NAME}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
