"""Configs of model sizes: by their file, or for shipped ones by their name, as suites and claims are named."""

from __future__ import annotations

from pathlib import Path

from twotower_eval.plan import data_path


def config_file(name: str) -> Path:
    """The file that is meant; ValueError with the shipped names where there is none."""
    file = Path(name)
    if file.is_file():
        return file
    shipped = {config_name(path): path for path in sorted(data_path("tasks", "configs").glob("*.json"))}
    if name not in shipped:
        raise ValueError(f"{name!r} is neither a file nor a shipped config; shipped are {', '.join(shipped)}")
    return shipped[name]


def config_name(file: Path) -> str:
    """The file's name without what says that it is a config."""
    return file.name.removesuffix(".json").removesuffix(".config")
