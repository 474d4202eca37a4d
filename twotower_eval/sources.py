"""What a model is read from: a folder, a repository of the Hugging Face hub, or the endpoint of a server.

Nothing here imports torch. :func:`read_source` says what a user's text means, :func:`located` finds the files.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from twotower_eval.errors import UserError
from twotower_eval.records import COMMIT, CONFIG_FILES
from twotower_eval.resources import SHIPPED, data_path

if TYPE_CHECKING:
    from twotower_eval.hub import Extent

FOREIGN = "transformers_modules"  # the package into which transformers copies code that comes with a model
ENDPOINT = "openai:"  # what the name of a server's model begins with
SHOWN_COMMIT = 8  # digits of a commit in a name; the report has all of them beside the checkpoint
CACHED = re.compile(r"models--(.+)")  # the folder of a repository in the Hugging Face cache; its snapshots lie below
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from, and what it is called in titles and tables.

    A ``folder`` has its path. A ``hub`` model has the name of its ``repo``, the ``revision`` that was asked for (None:
    the default branch), the ``commit`` behind it once that is known, and once it is located the ``folder`` of its
    files. Such a folder that is named by its path in the Hugging Face cache has ``repo`` and ``commit``, too. An
    ``endpoint`` has the ``url`` that follows ``openai:``. ``trust_remote_code``: Python code that comes with its files
    may be run. ``attention`` is how a Hugging Face model computes it, where that is said.
    """

    kind: Literal["folder", "hub", "endpoint"]
    name: str
    folder: Path | None = None
    url: str | None = None
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False
    attention: str | None = None

    def __str__(self) -> str:
        """How errors name it."""
        return self.name if self.kind != "folder" else str(self.folder)

    @property
    def files(self) -> Path:
        """The folder of its files; UserError for a model that has none here."""
        if self.folder is None:
            raise UserError(f"{self.name} has no files here: a folder or a hub name is needed")
        return self.folder

    @property
    def place(self) -> str:
        """Equal for two sources of one model: the folder's own path, the endpoint's URL, or the name on the hub."""
        if self.folder is not None:
            return str(self.folder.resolve())
        return self.url or f"{self.repo}@{self.commit or self.revision or ''}"


SHIPPED_PAIR = Source(kind="folder", name=SHIPPED, folder=data_path("miniature", "pair"))
GivenModel = str | os.PathLike[str] | Source


def read_source(
    given: GivenModel, revision: str | None = None, *, trust_remote_code: bool = False, attention: str | None = None
) -> Source:
    """What a user's text means: an existing folder of that path, the shipped pair's name, an endpoint, a hub name.

    A hub name may end with ``@revision``; ``revision`` beside it then says the same, or which commit that was. Nothing
    is looked up outside this machine. UserError for a text that can be none of these.

    >>> read_source("openai:http://localhost:8000/v1#name").kind
    'endpoint'
    >>> read_source("org/model@v1").revision
    'v1'
    """
    if not isinstance(given, Source | str | os.PathLike):
        raise UserError(f"{given!r} is no checkpoint folder: give its path")
    source = given if isinstance(given, Source) else _read(given)
    if trust_remote_code:
        source = dataclasses.replace(source, trust_remote_code=True)
    if attention is not None:
        source = dataclasses.replace(source, attention=attention)
    if revision is None:
        return source
    if source.kind != "hub" or source.repo is None:
        raise UserError(f"revision {revision!r} has no effect on {source.name}: only models of the hub have revisions")
    if COMMIT.fullmatch(revision):
        return dataclasses.replace(source, commit=revision)
    if source.revision not in (None, revision):
        raise UserError(f"{source} and revision {revision!r} say different things: give one of them")
    return dataclasses.replace(source, revision=revision, name=_shown(source.repo, revision))


def _read(given: str | os.PathLike[str]) -> Source:
    text = os.fspath(given)
    folder = Path(text)
    if text.startswith(ENDPOINT):
        return Source(kind="endpoint", name=text.removeprefix(ENDPOINT), url=text.removeprefix(ENDPOINT))
    if folder.is_dir():
        return _of_folder(folder)
    if text == SHIPPED:
        return SHIPPED_PAIR
    if not isinstance(given, Path) and text.startswith(("http://", "https://")):
        raise UserError(f"{text}: a model behind a server is written as {ENDPOINT}{text.partition('#')[0]}#NAME")
    repo, at, revision = text.partition("@")
    if isinstance(given, Path) or folder.exists() or not HUB_NAME.fullmatch(repo):
        raise UserError(f"{folder}: no such checkpoint folder")
    if at and (not revision or Path(repo).is_dir()):
        raise UserError(f"{text}: {'a folder has no revisions' if revision else 'name a revision behind the @'}")
    commit = revision if COMMIT.fullmatch(revision) else None
    return Source(kind="hub", name=_shown(repo, revision), repo=repo, revision=revision or None, commit=commit)


def _shown(repo: str, revision: str) -> str:
    if not revision:
        return repo
    return f"{repo}@{revision[:SHOWN_COMMIT] if COMMIT.fullmatch(revision) else revision}"


def is_repo(text: str) -> bool:
    """Whether a text names a repository of the hub with its owner or a revision, and no folder that is here."""
    repo, at, revision = text.partition("@")
    named = HUB_NAME.fullmatch(repo) is not None and bool("/" in repo or (at and revision))
    return named and not Path(text).exists()


def _of_folder(folder: Path) -> Source:
    """A folder, which may be one of a snapshot in the Hugging Face cache: then it is called as its repository is."""
    resolved = folder.resolve()
    cached = CACHED.fullmatch(resolved.parent.parent.name)
    if cached is None or resolved.parent.name != "snapshots" or not COMMIT.fullmatch(resolved.name):
        return Source(kind="folder", name=resolved.name, folder=folder)
    repo = cached[1].replace("--", "/")
    return Source(kind="folder", name=repo, folder=folder, repo=repo, commit=resolved.name)


def located(source: Source, *, extent: Extent = "all", needs_config: bool = True, silent: bool = False) -> Source:
    """A source whose files are here: a model of the hub is taken from its cache, or downloaded with progress.

    ``extent`` is what is needed of them (see :mod:`hub`), ``needs_config``: config.json, as no family was named. An
    endpoint stays as it is. UserError where a file that is needed is nowhere.
    """
    if source.kind == "endpoint":
        return source
    if source.kind == "hub" and source.repo is not None:
        from twotower_eval.hub import snapshot

        asked, code = source.commit or source.revision, source.trust_remote_code
        folder, commit = snapshot(source.repo, asked, extent=extent, code=code, silent=silent)
        source = dataclasses.replace(source, folder=folder, commit=commit)
    if needs_config and not (source.files / CONFIG_FILES[0]).is_file():
        raise UserError(f"{source} is no checkpoint folder: it has no {CONFIG_FILES[0]}")
    return source
