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
