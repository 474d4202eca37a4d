"""Files that ship with the package, and TOML files as they are read everywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.strict import check_whole_numbers, decode_utf8

SHIPPED = "miniature"  # the pair that is part of the package


def data_path(*parts: str) -> Path:
    """Where the package's data lies, in a checkout and in an installed wheel alike.

    ``data_path("tasks", …)`` is beside the package in a checkout and inside it in a wheel; everything else, such as
    ``data_path("miniature", "pair")``, lies inside the package in both.
    """
    package = Path(__file__).resolve().parent
    if parts[:1] != ("tasks",):
        return package.joinpath(*parts)
    shipped = package / "_data" / "tasks"
    return (shipped if shipped.is_dir() else package.parent / "tasks").joinpath(*parts[1:])


def checkpoint_folder(name: str) -> Path:
    """A checkpoint's folder by its path, or the shipped pair's by its name: unless a folder here is called like it."""
    is_shipped = name == SHIPPED and not Path(name).is_dir()
    return data_path("miniature", "pair") if is_shipped else Path(name)


def refuse_no_checkpoint(folder: Path, *, needs_config: bool = True) -> None:
    """UserError where ``folder`` cannot be a checkpoint; ``needs_config``: its config.json says how it is read."""
    if not folder.is_dir():
        if folder.is_absolute() or folder.exists() or len(folder.parts) > 2 or folder.parts[:1] == ("..",):
            raise UserError(f"{folder}: no such checkpoint folder")
        raise UserError(f"{folder} is no folder here; hub names are not downloaded: give the folder of a checkpoint")
    if needs_config and not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint folder: it has no config.json")


def read_toml(path: Path, what: str) -> dict[str, object]:
    """The values of a TOML file; a missing or broken one is a UserError that says what it was read as."""
    try:
        text = decode_utf8(path.read_bytes(), f"{what} {path}").replace("\r\n", "\n")
        values = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} {path} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{what} {path} is nested too deeply to be read") from error
    except UserError:
        raise
    except ValueError as error:  # nothing else is left that tomllib does not call a fault of TOML
        raise UserError(f"{what} {path}: a whole number has more digits than Python reads") from error
    check_whole_numbers(values, f"{what} {path}")
    return values
