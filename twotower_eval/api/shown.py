"""Results of the reading verbs: verdicts, audits and report pages, which also display themselves in a notebook."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from twotower_eval.analyse import claims as claims_room
from twotower_eval.analyse.words import kind_text
from twotower_eval.analyse.words.glossary import term_lines
from twotower_eval.errors import UserError
from twotower_eval.records import Claim, Verdict

if TYPE_CHECKING:
    import pandas as pd

    from twotower_eval.analyse.compare import Runs
    from twotower_eval.api.summary import Table

T = TypeVar("T")
FRAME_HEIGHT = 720  # pixels of a report within a notebook


class Shown(Sequence[T], Generic[T]):
    """A sequence that has lines of text, as the command line prints them."""

    def __init__(self, items: Sequence[T]) -> None:
        self._items = tuple(items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    @property
    def lines(self) -> list[str]:
        """What the command line prints."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        return f"<pre style='white-space: pre-wrap'>{escape(repr(self))}</pre>"


class ExitCode(int):
    """An exit code that may also be called, as ``Verdicts.exit_code`` once was a method."""

    _strict: int

    def __new__(cls, code: int, *, strict: int) -> ExitCode:
        made = super().__new__(cls, code)
        made._strict = strict
        return made

    def __call__(self, *, strict: bool = False) -> int:
        return self._strict if strict else int(self)


class Verdicts(Shown[Verdict]):
    """Verdicts in the order of their claims; :meth:`of` finds one by its claim's name."""

    def __init__(self, claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> None:
        super().__init__(verdicts)
        self.claims = tuple(claims)

    def of(self, claim: str) -> Verdict:
        """The verdict on a claim; UserError if it was not judged."""
        for verdict in self:
            if verdict.claim == claim:
                return verdict
        raise UserError(f"no verdict on a claim {claim!r}; judged are {', '.join(one.claim for one in self)}")

    @property
    def lines(self) -> list[str]:
        """One line for each verdict, one that counts them, and one for each term in them that needs explaining."""
        found = claims_room.verdict_lines(self.claims, self)
        return [*found, *term_lines("\n".join(found))]

    @property
    def strict_line(self) -> str:
        """A line on what ``--strict`` counts differently; empty if nothing."""
        return claims_room.strict_line(self)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of ``twotower-eval claims check``."""
        return ExitCode(claims_room.exit_code(self), strict=self.strict_exit_code)

    @property
    def strict_exit_code(self) -> int:
        """The exit code of ``twotower-eval claims check --strict``."""
        return claims_room.exit_code(self, strict=True)

    def to_frame(self) -> pd.DataFrame:
        """A row for each verdict, with its estimate, its bounds and its reason."""
        from twotower_eval.api import frames

        claims = {claim.name: claim for claim in self.claims}
        rows = []
        for one in self:
            claim, found = claims[one.claim], one.estimate
            ends = (None, None, None) if found is None else (found.value, found.low, found.high)
            rows.append(
                {
                    "claim": one.claim,
                    "outcome": one.outcome,
                    "scope": one.scope,
                    "quantity": claim.quantity,
                    "relation": claim.relation,
                    "expected": claim.expected,
                    "margin": claim.margin,
                    **dict(zip(("measured", "measured_low", "measured_high"), ends, strict=True)),
                    "judged_at": one.level,
                    "reason": one.reason,
                    "failed_gates": ", ".join(kind_text(gate.kind) for gate in one.gates if gate.outcome == "failed"),
                    "runs": " ".join(one.evidence),
                }
            )
        return frames.table_of(rows)


class Audit(Shown[claims_room.AuditLine]):
    """The audit of published numbers."""

    @property
    def lines(self) -> list[str]:
        """One line for each finding, then one that counts them."""
        return claims_room.audit_lines(self)

    @property
    def exit_code(self) -> int:
        """The exit code of ``twotower-eval claims audit``: 3 if a published number is contradicted."""
        return claims_room.audit_code(self)


@dataclass(frozen=True)
class Page(os.PathLike[str]):
    """A report on disk. ``path`` is the file to open: ``report.html`` if it was asked for, else ``report.md``.

    In a notebook it displays itself, pictures included. ``runs`` are those that it is about.
    """

    folder: Path
    name: str
    runs: Runs | None = field(default=None, repr=False, compare=False)

    @property
    def tables(self) -> tuple[Table, ...]:
        """Its most important numbers in a few small tables."""
        from twotower_eval.api import summary

        return () if self.runs is None else summary.tables(self.runs)

    @property
    def path(self) -> Path:
        """The file to open."""
        return self.folder / self.name

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def markdown(self) -> str:
        """The report's text."""
        from twotower_eval.analyse.report import MARKDOWN

        return (self.folder / MARKDOWN).read_text(encoding="utf-8")

    @property
    def html(self) -> str:
        """The report as one self-contained HTML page: no script, no request to any server, pictures inside."""
        from twotower_eval.analyse.report.page import page

        return page(self.markdown, {file.name: file.read_bytes() for file in sorted(self.folder.glob("*.png"))})

    def _repr_html_(self) -> str:
        # A frame of its own: the page's styles are not the notebook's.
        inside = escape(self.html)
        style = f"width: 100%; height: {FRAME_HEIGHT}px; border: 1px solid #ccc"
        return f'<iframe sandbox srcdoc="{inside}" style="{style}"></iframe>'
