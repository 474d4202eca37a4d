"""One part of a report: what every renderer returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: a title, Markdown below it, and the files that the Markdown links to."""

    title: str
    markdown: str
    files: Mapping[str, bytes] = field(default_factory=dict)
