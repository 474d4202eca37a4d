"""A hub on this machine's loopback, as huggingface_hub asks one; and a cache in its layout, made by hand."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


def commit_of(files: Mapping[str, bytes]) -> str:
    """Forty digits that stand for these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write_cache(
    cache: Path,
    repo: str,
    files: Mapping[str, bytes],
    *,
    refs: tuple[str, ...] = ("main",),
    lacks: tuple[str, ...] = (),
) -> str:
    """A snapshot in a hub cache as other programs leave it: blobs, links to them, references; its commit.

    ``lacks``: files whose link is there, but not what it leads to, as where a download was cut.
    """
    home = cache / ("models--" + repo.replace("/", "--"))
    commit = commit_of(files)
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (home / name).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        if name not in lacks:
            blob.write_bytes(content)
        link = home / "snapshots" / commit / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (home / "refs" / ref).write_text(commit, encoding="utf-8")
    return commit


@dataclass
class FakeHub:
    """Repositories with their revisions; ``gated`` ones need a token. ``asked`` are the requests so far."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    status: int | None = None  # what every request is answered with, instead
    url: str = ""

    def add(self, repo: str, files: Mapping[str, bytes], *revisions: str) -> str:
        """Files under a repository's revisions, by default its main branch; their commit."""
        commit = commit_of(files)
        for revision in (*(revisions or ("main",)), commit):
            self.repos.setdefault(repo, {})[revision] = dict(files)
        return commit

    def downloaded(self) -> list[str]:
        return sorted({one.rpartition("/")[2] for one in self.asked if one.startswith("GET") and "/resolve/" in one})


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status is not None:
            self.answer(self.hub.status, b"<html>not here</html>", {"Content-Type": "text/html"})
            return
        if path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            repo, _, tree = repo.partition("/tree/")
            found = self.found(repo, tree or rest or "main")
            if found is not None:
                self.answer(200, json.dumps(listing(found) if tree else about(repo, found)).encode())
            return
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self.found(repo, revision)
        if found is None:
            return
        if repo in self.hub.gated and self.headers.get("Authorization") is None:
            self.refuse(401, "GatedRepo")
        elif name not in found:
            self.refuse(404, "EntryNotFound")
        else:
            said = {"ETag": f'"{hashlib.sha256(found[name]).hexdigest()}"', "X-Repo-Commit": commit_of(found)}
            self.answer(200, found[name], said)

    def found(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if repo not in self.hub.repos:
            self.refuse(401 if self.headers.get("Authorization") is None else 404, "RepoNotFound")
        elif revision not in self.hub.repos[repo]:
            self.refuse(404, "RevisionNotFound")
        else:
            return self.hub.repos[repo][revision]
        return None

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b'{"error": "no"}', {"X-Error-Code": code})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def about(repo: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {"id": repo, "sha": commit_of(files), "siblings": [{"rfilename": name} for name in files]}


def listing(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in files.items()
    ]


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub as a server on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def go_online(monkeypatch: pytest.MonkeyPatch, url: str, token: str | None = None) -> None:
    """As HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN would have it, were they set before the library is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
