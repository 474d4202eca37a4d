"""One part of a report: what every renderer returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: a title, Markdown below it, and the files that the Markdown links to.

    ``tables`` are frames of raw values by name: with ``--format csv`` each is written as ``tables/NAME.csv``.
    """

    title: str
    markdown: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
