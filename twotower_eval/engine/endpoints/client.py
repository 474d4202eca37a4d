"""Requests to an OpenAI-compatible server: beside each other, tried again a few times, and never silently.

All of them run in one event loop in a thread of its own, which keeps connections open for a while between calls. The
caller waits in its own thread, so that Ctrl-C stops it at once.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

from twotower_eval.engine.endpoints.streams import (
    Broken,
    Reply,
    error_text,
    read_document,
    read_lines,
    read_reply,
    read_stream,
)
from twotower_eval.errors import UserError
from twotower_eval.records import RequestFault, Retried
from twotower_eval.sources import ENDPOINT

C = TypeVar("C")
T = TypeVar("T")
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_TRIES, FIRST_WAIT_S, MAX_WAIT_S = 5, 0.5, 60.0
PROBE = "One, two, three, four, five, six, seven,"  # any plain text, to try a server with
TIMEOUT_S, CONNECT_S, CLOSE_S, READ_OUT_S = 600.0, 10.0, 1.0, 0.05
IDLE_S = 4.0  # servers on uvicorn close what is idle for five: a request that crosses that would be a failed answer
LATER = (408, 425, 429)  # statuses that may be another one a moment later; so may all from 500 on
NO_ENTRY = (401, 403)
Seconds = Callable[[], float]


class EndpointError(UserError):
    """A server that cannot be used, or that failed too often; ``status`` is that of its answer, if it gave one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Address:
    """The base URL of a server's API, and the name that the model has there; None: the only one it has."""

    url: str
    name: str | None


def read_address(text: str) -> Address:
    """``openai:http://localhost:8000/v1#name``, with or without ``openai:`` and ``#name``. UserError for anything else.

    A URL without a path has ``/v1``.

    >>> read_address("openai:http://localhost:8000#tiny")
    Address(url='http://localhost:8000/v1', name='tiny')
    """
    url, _, name = text.removeprefix(ENDPOINT).partition("#")
    host = url.partition("//")[2].partition("/")[0]
    try:
        parts, _ = urlsplit(url), httpx2.URL(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_url = has_host and not parts.query and " " not in url
    except (ValueError, httpx2.InvalidURL):  # urlsplit's for brackets and ports
        is_url = False
    if "@" in (host if is_url else url):  # it would be stored with the plan
        raise UserError(f"an endpoint's address has no user name and no password: put the key into {KEY_VARIABLE}")
    if not is_url:
        raise UserError(f"{text}: an endpoint is written as {ENDPOINT}http://HOST:PORT/v1#NAME")
    path = parts.path.rstrip("/") or "/v1"
    return Address(url=parts._replace(path=path).geturl(), name=name or None)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: its path behind the base URL, its body, and what it is called in messages and events.

    ``start_s`` is how long after the call's start it is sent, at the earliest.
    """

    path: str
    body: Mapping[str, object]
    label: str
    start_s: float = 0.0

    @property
    def streams(self) -> bool:
        """Whether the reply comes in pieces."""
        return bool(self.body.get("stream"))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A request that got no whole answer, and was asked once: what went wrong, and the moments that enclose it."""

    fault: RequestFault
    detail: str
    sent_s: float
    ended_s: float


class _Failed(Exception):
    """An attempt that may be repeated; ``wait_s`` as the server asked for, if it did."""

    def __init__(
        self, fault: RequestFault, detail: str, *, wait_s: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(detail)
        self.fault, self.detail, self.wait_s, self.status = fault, detail, wait_s, status


Heard = SimpleQueue[tuple[int, Reply | Failure] | Retried | None]  # what the loop's thread tells the caller's


class Client:
    """One server. ``timeout_s`` is how long it may be silent; a server that takes no connection is given up sooner."""

    def __init__(self, address: Address, *, timeout_s: float | None = None) -> None:
        self.address = address
        self.timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        self._http = _connections(address, self.timeout_s)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run_loop, args=(self._loop,), name="requests", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end_loop, self._loop, self._http, thread)

    def close(self) -> None:
        """End all connections and the thread, as happens when nobody holds the client any more."""
        self._end()

    def get(self, path: str) -> dict[str, object]:
        """A document of the server, asked for once. EndpointError where there is none."""
        return self._waited(self._run(self._document("GET", path, None)), path)

    def post(self, path: str, body: Mapping[str, object]) -> dict[str, object]:
        """The reply to one body, asked for once."""
        return self._waited(self._run(self._document("POST", path, body)), path)

    def ask(
        self,
        asks: Sequence[Ask],
        *,
        at_once: int | None = None,
        on_reply: Callable[[int, Reply], None],
        on_retry: Callable[[Retried], None] = lambda retried: None,
        on_failure: Callable[[int, Failure], None] | None = None,
        now: Seconds = time.perf_counter,
    ) -> None:
        """Ask everything, at most ``at_once`` beside each other, in their order; replies as they come.

        The callbacks run in the caller's thread. EndpointError as soon as one request is refused or has failed
        ``MAX_TRIES`` times; the others are then given up. With ``on_failure`` each is asked once, and it hears of those
        that failed. Moments in the replies are ``now()``.
        """
        heard: Heard = SimpleQueue()
        once = on_failure is not None
        future = self._run(self._all(asks, at_once or max(1, len(asks)), heard, now, once))
        future.add_done_callback(lambda _: heard.put(None))
        try:
            while (item := heard.get()) is not None:
                if isinstance(item, Retried):
                    on_retry(item)
                elif isinstance(item[1], Reply):
                    on_reply(item[0], item[1])
                elif on_failure is not None:
                    on_failure(item[0], item[1])
            self._waited(future, "")
        finally:
            future.cancel()

    async def _all(self, asks: Sequence[Ask], at_once: int, heard: Heard, now: Seconds, once: bool) -> None:
        places, began_s = asyncio.Semaphore(at_once), now()

        async def one(index: int, ask: Ask) -> None:
            await asyncio.sleep(max(0.0, began_s + ask.start_s - now()))
            async with places:
                heard.put(
                    (index, await (self._or_failure(ask, now) if once else self._until_answered(ask, heard, now)))
                )

        async with asyncio.TaskGroup() as group:
            for index, ask in enumerate(asks):
                group.create_task(one(index, ask))

    async def _or_failure(self, ask: Ask, now: Seconds) -> Reply | Failure:
        sent_s = now()
        try:
            return replace(await self._once(ask, now), sent_s=sent_s)
        except _Failed as failed:
            return Failure(fault=failed.fault, detail=failed.detail, sent_s=sent_s, ended_s=now())

    async def _until_answered(self, ask: Ask, heard: Heard, now: Seconds) -> Reply:
        for attempt in range(1, MAX_TRIES + 1):
            sent_s = now()
            try:
                reply = await self._once(ask, now)
                return replace(reply, sent_s=sent_s, num_retries=attempt - 1)
            except _Failed as failed:
                if attempt == MAX_TRIES:
                    raise self._error(f"{ask.label} failed {attempt} times, at last: {failed.detail}") from failed
                asked_s = FIRST_WAIT_S * 2 ** (attempt - 1) if failed.wait_s is None else failed.wait_s
                wait_s = min(MAX_WAIT_S, asked_s)
                heard.put(
                    Retried(label=ask.label, attempt=attempt, fault=failed.fault, detail=failed.detail, wait_s=wait_s)
                )
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def _once(self, ask: Ask, now: Seconds) -> Reply:
        if not ask.streams:
            reply = _told(read_reply, await self._document("POST", ask.path, ask.body))
            return replace(reply, ended_s=now())
        try:
            async with self._http.stream("POST", ask.path, json=ask.body) as response:
                if not response.is_success:
                    await response.aread()
                    raise self._refusal(response)
                lines = read_lines(response.aiter_bytes())
                reply = await read_stream(lines, now)
                await _read_out(lines)
                return reply
        except Broken as error:
            raise _Failed("broken reply", str(error)) from error
        except httpx2.RequestError as error:
            raise _dropped(error) from error

    async def _document(self, method: str, path: str, body: Mapping[str, object] | None) -> dict[str, object]:
        """The JSON object that one request gives. _Failed where another attempt may help, else EndpointError."""
        try:
            response = await self._http.request(method, path, json=body)
        except httpx2.RequestError as error:
            raise _dropped(error) from error
        if not response.is_success:
            raise self._refusal(response)
        return _told(read_document, response.content)

    def _refusal(self, response: httpx2.Response) -> Exception:
        status, text = response.status_code, error_text(response.text)
        if response.has_redirect_location:
            text = f"moved to {response.headers['location']}: give the address that answers itself"
        said = f"status {status}" + (f" ({text})" if text else "")
        if status in NO_ENTRY:
            return self._error(f"{said}: put its key into {KEY_VARIABLE}", status)
        if status in LATER or status >= 500:
            fault: RequestFault = "refused for now" if status in LATER else "server error"
            return _Failed(fault, said, wait_s=_seconds_of(response.headers.get("retry-after")), status=status)
        return self._error(said, status)

    def _error(self, said: str, status: int | None = None) -> EndpointError:
        return EndpointError(f"{self.address.url}: {said}", status)

    def _run(self, work: Coroutine[object, object, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _waited(self, future: Future[T], path: str) -> T:
        """The result of work in the loop; what failed in it, as one error."""
        try:
            return future.result()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        except _Failed as failed:
            raise self._error(f"{path}: {failed.detail}", failed.status) from failed
        except CancelledError:  # what ended it is raised already
            raise AssertionError("the requests were given up") from None
        finally:
            future.cancel()


def _connections(address: Address, timeout_s: float) -> httpx2.AsyncClient:
    """What sends the requests. UserError for a key, proxies or certificates of the environment that cannot be used."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{KEY_VARIABLE} holds characters that are in no key")
    try:
        return httpx2.AsyncClient(
            base_url=address.url,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_S),
        )
    except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
        raise UserError(
            f"{address.url}: what the environment says of proxies (HTTP_PROXY, ALL_PROXY) or certificates "
            f"(SSL_CERT_FILE) cannot be used: {error}"
        ) from error


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end_loop(loop: asyncio.AbstractEventLoop, http: httpx2.AsyncClient, thread: threading.Thread) -> None:
    """Close the connections, then the loop, whose thread ends with it."""

    async def end() -> None:
        await http.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is not thread:
        thread.join(CLOSE_S)


async def _read_out(lines: AsyncIterator[str]) -> None:
    """Read what a server sends behind the end of a stream: a connection serves the next request only once it is empty,
    and a new one for every request would be on the clock. A server that goes on sending, or breaks, is left."""
    with suppress(TimeoutError, Broken, httpx2.RequestError):
        async with asyncio.timeout(READ_OUT_S):
            async for _ in lines:
                pass


def _told(read: Callable[[C], T], content: C) -> T:
    try:
        return read(content)
    except Broken as error:
        raise _Failed("broken reply", str(error)) from error


def _seconds_of(retry_after: str | None) -> float | None:
    """How long a server asks to be left alone, in seconds or until a date; None if it says nothing readable."""
    if retry_after is None or retry_after.strip().isdecimal():
        return float(retry_after) if retry_after else None
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _dropped(error: httpx2.RequestError) -> _Failed:
    said = str(error) or type(error).__name__
    if isinstance(error, httpx2.TimeoutException):
        is_connect = isinstance(error, httpx2.ConnectTimeout)
        return _Failed("timed out", "no connection in time" if is_connect else "no answer in time")
    if isinstance(error, httpx2.ConnectError):
        return _Failed("dropped", f"cannot be reached ({said})")
    return _Failed("dropped", f"the connection broke ({said})")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
