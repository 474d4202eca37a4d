"""What a server answers, read from one JSON document or from a stream of pieces (server-sent events).

A reply that is cut off, malformed or an error in disguise is :class:`Broken`, never a short answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

DATA, DONE = "data:", "[DONE]"
REASONING = ("reasoning_content", "reasoning")
SHOWN = 200  # characters of a server's own message
GIVEN_UP = ("abort", "error")  # what servers call the end of an answer that they did not finish
TOGETHER = 0.1  # of the mean gap between pieces: pieces that lie closer arrived together
Seconds = Callable[[], float]


class Broken(Exception):
    """A reply that cannot be read to its end; asking again may help."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer of a server.

    ``finish`` is its ``finish_reason``, ``stop_reason`` what else it says of the end: a stop string, a token id, or
    nothing (``tells_stop``: whether it says it at all). Tokens are as the server counts them. ``arrivals_s`` are the
    moments at which pieces of text came, thoughts among them, of a reply that was not streamed none; ``sent_s`` and
    ``ended_s`` enclose the last attempt, of a stream up to its own end. ``choice`` is the whole choice of a reply that
    was not streamed. ``reasoning`` is what a chat model thought, where the server tells it apart from the answer.
    ``num_cached_tokens`` of the prompt were in the server's cache; ``None`` where it does not say.
    """

    text: str
    finish: str
    reasoning: str = ""
    stop_reason: object = None
    tells_stop: bool = False
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    arrivals_s: tuple[float, ...] = ()
    sent_s: float = 0.0
    ended_s: float = 0.0
    num_retries: int = 0
    choice: Mapping[str, object] | None = None
    num_cached_tokens: int | None = None

    @property
    def num_arrivals(self) -> int:
        """Pieces of text, those that arrived together counted once."""
        return num_apart(self.arrivals_s)


def num_apart(moments_s: Sequence[float]) -> int:
    """How many of ascending moments lie apart: further than a tenth of the mean gap behind the one before.

    >>> num_apart([0.0, 1.0, 2.0]), num_apart([0.0, 0.001, 0.002, 1.0, 1.001, 1.002])
    (3, 2)
    """
    if len(moments_s) < 2:
        return len(moments_s)
    near_s = TOGETHER * (moments_s[-1] - moments_s[0]) / (len(moments_s) - 1)
    return 1 + sum(late - early > near_s for early, late in pairwise(moments_s))


def error_text(body: str) -> str:
    """A server's own error message from its body: OpenAI's form, FastAPI's, or the beginning of whatever it is."""
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        said = body
    for name in ("error", "detail", "message"):
        while isinstance(said, dict) and name in said:
            said = said[name]
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return " ".join(text.split())[:SHOWN]


def read_document(body: bytes) -> dict[str, object]:
    """A JSON object. Broken for anything else."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:  # too many brackets
        raise Broken(f"its reply is no JSON ({body[:60].decode('utf-8', 'replace')!r})") from error
    if not isinstance(said, dict):
        raise Broken("its reply is no JSON object")
    return said


def read_reply(said: Mapping[str, object]) -> Reply:
    """The reply in a whole document. Broken where it holds no finished answer."""
    if said.get("error"):
        raise Broken(f"its reply is an error: {error_text(json.dumps(said))}")
    choice = first_choice(said)
    text, finish = _text_of(choice), choice.get("finish_reason")
    if choice is None or text is None or not isinstance(finish, str):
        raise Broken("its reply holds no finished answer")
    return Reply(
        text=_paired(text),
        finish=_finished(finish),
        reasoning=_paired(_reasoning_of(choice)),
        **_stop_of(choice),
        **_usage(said),
        choice=choice,
    )


async def read_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines of a stream. Broken for bytes that are no UTF-8.

    They end with a line feed alone: a text in JSON may hold what Python calls the end of a line, too, such as U+2028.
    """
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n") if b"\n" in piece else (rest + piece,)
        for line in whole:
            yield _decoded(line)
    yield _decoded(rest)


def _decoded(line: bytes) -> str:
    try:
        return line.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        raise Broken(f"its stream is no UTF-8 ({line[:60].decode('utf-8', 'replace')!r})") from error


def _paired(text: str) -> str:
    """A text whose characters beyond U+FFFF may have been sent in two halves, one behind the other."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _finished(finish: str) -> str:
    if finish in GIVEN_UP:
        raise Broken(f"its answer is not finished: the server ended it with finish_reason {finish!r}")
    return finish


async def read_stream(lines: AsyncIterator[str], now: Seconds) -> Reply:
    """The reply in a stream of events, with the moment of every piece of text. Broken where it ends before its end."""
    texts: list[str] = []
    thoughts: list[str] = []
    arrivals_s: list[float] = []
    finish: str | None = None
    stop: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    done, num_events = False, 0
    async for line in lines:
        content = line[len(DATA) :].strip() if line.startswith(DATA) else ""
        if not content:
            continue
        num_events += 1
        if content == DONE:
            done = True
            break
        event = read_document(content.encode())
        if event.get("error"):
            raise Broken(f"its stream reports an error: {error_text(content)}")
        if event.get("usage"):
            counts = _usage(event)
        choice = first_choice(event)
        text, thought = _text_of(choice), _reasoning_of(choice)
        if text or thought:
            arrivals_s.append(now())
            texts.append(text or "")
            thoughts.append(thought)
        if isinstance(choice.get("finish_reason"), str):
            finish, stop = str(choice["finish_reason"]), _stop_of(choice)
    ended_s = now()
    if not num_events:
        raise Broken("its reply is no stream of events, which timing needs")
    if finish is None:
        raise Broken(f"its stream {'says no reason for its end' if done else 'is cut off'} after {len(texts)} pieces")
    return Reply(
        text=_paired("".join(texts)),
        finish=_finished(finish),
        reasoning=_paired("".join(thoughts)),
        **stop,
        **counts,
        arrivals_s=tuple(arrivals_s),
        ended_s=ended_s,
    )


def first_choice(said: Mapping[str, object]) -> Mapping[str, object]:
    """The first of a reply's choices; empty where there is none, as in the last event of a stream with its counts."""
    choices = said.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else {}
    return found if isinstance(found, dict) else {}


def _text_of(choice: Mapping[str, object]) -> str | None:
    """The text of a completion, of a chat message, or of a piece of either."""
    if isinstance(choice.get("text"), str):
        return cast(str, choice["text"])
    for name in ("message", "delta"):
        part = choice.get(name)
        if isinstance(part, dict):
            content = part.get("content")
            return content if isinstance(content, str) else "" if content is None else None
    return None


def _reasoning_of(choice: Mapping[str, object]) -> str:
    """What was thought, under either of the names that servers give it; empty where a reply tells nothing of it."""
    part = choice.get("message", choice.get("delta"))
    found = (part.get(name) for name in REASONING) if isinstance(part, dict) else ()
    return next((one for one in found if isinstance(one, str)), "")


def _stop_of(choice: Mapping[str, object]) -> dict[str, Any]:
    return {"stop_reason": choice.get("stop_reason"), "tells_stop": "stop_reason" in choice}


def _usage(said: Mapping[str, object]) -> dict[str, Any]:
    """A server's own counts of tokens, by the names of a Reply's fields; ``None`` for those that it does not give."""
    usage = _table(said.get("usage"))
    counts = {
        "num_prompt_tokens": usage.get("prompt_tokens"),
        "num_tokens": usage.get("completion_tokens"),
        "num_cached_tokens": _table(usage.get("prompt_tokens_details")).get("cached_tokens"),
    }
    return {name: num if isinstance(num, int) and num >= 0 else None for name, num in counts.items()}


def _table(said: object) -> Mapping[str, object]:
    return said if isinstance(said, dict) else {}
