"""What a model is read from: a folder, a repository of the Hugging Face hub, or the endpoint of a server.

Nothing here imports torch. :func:`read_source` says what a user's text means, :func:`located` finds the files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twotower_eval.errors import UserError
from twotower_eval.resources import SHIPPED, data_path

ENDPOINT = "openai:"  # what the name of a server's model begins with
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from, and what it is called in titles and tables.

    A ``folder`` has its path. A ``hub`` model has the ``revision`` that was asked for, and once it is located the
    ``commit`` behind it and the ``folder`` of its files. An ``endpoint`` has the ``url`` that follows ``openai:``.
    """

    kind: Literal["folder", "hub", "endpoint"]
    name: str
    folder: Path | None = None
    url: str | None = None
    revision: str | None = None
    commit: str | None = None

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
        return self.url or f"{self.name}@{self.revision or ''}"


SHIPPED_PAIR = Source(kind="folder", name=SHIPPED, folder=data_path("miniature", "pair"))
GivenModel = str | os.PathLike[str] | Source


def read_source(given: GivenModel) -> Source:
    """What a user's text means: an existing folder of that path, the shipped pair's name, an endpoint, a hub name.

    Nothing is looked up outside this machine. UserError for a text that can be none of these.

    >>> read_source("openai:http://localhost:8000/v1#name").kind
    'endpoint'
    """
    if isinstance(given, Source):
        return given
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{given!r} is no checkpoint folder: give its path")
    text = os.fspath(given)
    folder = Path(text)
    if text.startswith(ENDPOINT):
        return Source(kind="endpoint", name=text.removeprefix(ENDPOINT), url=text.removeprefix(ENDPOINT))
    if folder.is_dir():
        return Source(kind="folder", name=folder.resolve().name, folder=folder)
    if text == SHIPPED:
        return SHIPPED_PAIR
    if isinstance(given, Path) or folder.exists() or not HUB_NAME.fullmatch(text):
        raise UserError(f"{folder}: no such checkpoint folder")
    return Source(kind="hub", name=text)


def located(source: Source, *, needs_config: bool = True) -> Source:
    """A source whose files are here. UserError where they cannot be.

    ``needs_config``: its config.json says how it is read, as no family was named. An endpoint stays as it is.
    """
    if source.kind == "endpoint":
        return source
    if source.kind == "hub" and source.folder is None:
        raise UserError(
            f"{source.name} is no folder here; hub names are not downloaded: give the folder of a checkpoint"
        )
    if needs_config and not (source.files / "config.json").is_file():
        raise UserError(f"{source.folder} is no checkpoint folder: it has no config.json")
    return source
