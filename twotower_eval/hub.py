"""Models of the Hugging Face hub: from its cache on this machine where that holds all files, else downloaded.

huggingface_hub does the work, and heeds ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and
``HF_ENDPOINT``. Pickles are never downloaded.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.utils import filter_repo_objects, tqdm, validate_repo_id  # type: ignore[attr-defined]

from twotower_eval.errors import UserError
from twotower_eval.records import COMMIT, CONFIG_FILES, INDEX_FILE, SINGLE_FILE

# What is read of a model: "config" its config.json, "tokenizer" all small files, "settings" the same of a model whose
# weights are to follow, "all" also its weights.
Extent = Literal["config", "tokenizer", "settings", "all"]
WITHOUT_WEIGHTS = ("config", "tokenizer")
SETTINGS_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
CODE_PATTERNS = ("*.py",)
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ot", ".onnx", ".safetensors")
NESTED = "*/*"  # files in folders of a repository: other formats, other checkpoints
MISSES = (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, RevisionResolutionError)
FAILURES = (  # what the library raises where the hub or the network fails; OSError also for a disk that is full
    *MISSES,
    httpx2.HTTPError,
    OSError,
    XetDownloadError,
)
# What it raises for an answer that no hub gives: no JSON, or without what belongs into it.
NO_HUB_ANSWERS = (json.JSONDecodeError, KeyError, TypeError, AssertionError)


class SilentBar(tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def snapshot(
    name: str, revision: str | None, *, extent: Extent, code: bool = False, silent: bool = False
) -> tuple[Path, str]:
    """The folder of a model's files at a revision (None: the default branch), and the commit behind it.

    Nothing is asked of the hub where its cache is known to hold all files. ``code``: with the source files of a model
    that brings its own. ``silent``: without progress bars. UserError, one line, where there is no such model or
    revision, no access, no connection, or no safetensors file.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name} is no folder here, and no name on the hub: {_line(error)}") from error
    get = _Getter(name=name, extent=extent, code=code, silent=silent)
    commit = _cached_commit(name, revision)
    if commit is not None and (folder := get.cached(commit)) is not None:
        return folder, commit
    try:
        commit = _commit(name, revision)
        return get.fetched(commit), commit
    except FAILURES as error:
        if commit is not None and (folder := get.unlisted(commit)) is not None:
            return folder, commit
        raise UserError(_told(error, name, revision)) from error


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision was when the cache last heard of it."""
    try:
        return str(HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved)
    except RevisionResolutionError:
        return None


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision is now; where the hub does not answer, what the cache last heard."""
    try:
        if revision is not None and COMMIT.fullmatch(
            revision
        ):  # nobody is asked about these: say now if nobody is there
            HfApi().model_info(name, revision=revision, timeout=constants.DEFAULT_REQUEST_TIMEOUT)
        offline = constants.is_offline_mode()
        return str(HfApi().resolve_revision(name, revision=revision, local_files_only=offline).resolved)
    except NO_HUB_ANSWERS as error:
        raise UserError(f"what answers at {constants.ENDPOINT} is no Hugging Face hub: see HF_ENDPOINT") from error


@dataclass(frozen=True, kw_only=True)
class _Getter:
    """Gets a model's files into the cache; each method returns their folder."""

    name: str
    extent: Extent
    code: bool
    silent: bool

    def cached(self, commit: str) -> Path | None:
        """Without the hub; None unless it is known which files there are, and all that are needed are here."""
        try:
            self._files(commit)
            return self.fetched(commit, local=True)
        except MISSES:
            return None

    def fetched(self, commit: str, *, local: bool = False) -> Path:
        """What is missing is downloaded, weights last."""
        get = partial(
            snapshot_download,
            self.name,
            revision=commit,
            ignore_patterns=[NESTED],
            local_files_only=local,
            tqdm_class=SilentBar if self.silent else None,
        )
        folder = Path(get(allow_patterns=self._patterns))
        files = self._files(commit)
        if self.extent not in WITHOUT_WEIGHTS:
            weights = _weights(self.name, files, folder)
            if self.extent == "all":
                get(allow_patterns=[glob.escape(file) for file in weights])
        return folder

    def unlisted(self, commit: str) -> Path | None:
        """As the cache has it where the hub does not answer.

        A cache that other programs filled does not say which files a model has. UserError if some are missing for
        certain.
        """
        try:
            folder = Path(snapshot_download(self.name, revision=commit, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            return None
        missing = [file for file in self._needed(commit, folder) if not (folder / file).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise UserError(
                f"{self.name} is in the Hugging Face cache, but not whole: it lacks {missing[0]}{more}, and {_no_hub()}"
            )
        return folder

    def _needed(self, commit: str, folder: Path) -> list[str]:
        """The files that have to be there, as far as that is known."""
        try:
            files: Collection[str] = self._files(commit)
        except CachedRepoTreeNotFoundError:
            if self.extent == "config":
                return [CONFIG_FILES[0]]
            has_shards = (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file()
            links = sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists())
            cut = filter_repo_objects(links, allow_patterns=self._patterns)  # linked to what is not there
            if self.extent == "tokenizer":
                return [*cut]
            return [*cut, *(sorted(_shards(folder)) if has_shards else [SINGLE_FILE])]
        small = filter_repo_objects(files, allow_patterns=self._patterns, ignore_patterns=[NESTED])
        return [*small, *(_weights(self.name, files, folder) if self.extent == "all" else ())]

    def _files(self, commit: str) -> set[str]:
        """All files of the repository; CachedRepoTreeNotFoundError where the cache does not know."""
        return {file.path for file in get_cached_repo_tree(self.name, revision=commit)}

    @property
    def _patterns(self) -> list[str]:
        """The files that are small."""
        if self.extent == "config":
            return [CONFIG_FILES[0]]
        return [*SETTINGS_PATTERNS, *(CODE_PATTERNS if self.code else ())]


def _weights(name: str, files: Collection[str], folder: Path) -> list[str]:
    """The safetensors files of a repository with these files; UserError where it has none."""
    if SINGLE_FILE in files:
        return [SINGLE_FILE]
    if INDEX_FILE in files:
        return sorted(_shards(folder))
    others = sorted(file for file in files if Path(file).suffix in OTHER_WEIGHTS)
    held = f", only {others[0]}{' and more' if others[1:] else ''}" if others else ""
    raise UserError(f"{name} on the hub has no {SINGLE_FILE} or {INDEX_FILE}{held}: name a repository of safetensors")


def _shards(folder: Path) -> set[str]:
    """Files that the index of a folder names; none where it says nothing, which whoever reads it then says."""
    try:
        data = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    named = data.get("weight_map") if isinstance(data, dict) else None
    return {str(file) for file in named.values()} if isinstance(named, dict) else set()


def _no_hub() -> str:
    """Why the hub cannot help."""
    if constants.is_offline_mode():
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    return f"the hub at {constants.ENDPOINT} cannot be reached"


def _told(error: BaseException, name: str, revision: str | None) -> str:
    """What went wrong, in one line."""
    while isinstance(error, MISSES) and error.__cause__ is not None:
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        if get_token() is None:
            return f"{name} is gated: accept its terms at {page}, then set HF_TOKEN or log in with `hf auth login`"
        return f"{name} is gated, and the token in use has no access to it: ask for it at {page}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} on the hub has no revision {revision!r}: see {page}/tree/main"
    if isinstance(error, RepositoryNotFoundError):
        private = "; a private one needs HF_TOKEN" if get_token() is None else " that the token in use may see"
        return f"{name} is no folder here, and the hub has no model of this name{private}"
    if isinstance(error, HfHubHTTPError):
        return f"the hub at {constants.ENDPOINT} answers {error.response.status_code} when asked for {name}"
    if isinstance(error, (*MISSES, OfflineModeIsEnabled, httpx2.TransportError)) or constants.is_offline_mode():
        at = f" at revision {revision!r}" if revision else ""
        return f"{name} is no folder here, nor{at} in the Hugging Face cache {constants.HF_HUB_CACHE}, and {_no_hub()}"
    return f"{name} cannot be downloaded: {_line(error)}"


def _line(error: BaseException) -> str:
    """An exception's text on one line, not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
