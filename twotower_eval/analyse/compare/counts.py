"""Sums of what decoding cost: tokens and forwards over many prompts. Ratios of sums, never means of ratios."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from twotower_eval.records import Generation, PromptTiming


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals over ``num_prompts`` prompts; ``num_forced_commits`` is ``None`` where the decoder forces none.

    ``num_prefill_forwards`` are the context forwards that read prompts, one for each that has any.
    """

    num_prompts: int
    num_tokens: int
    num_discarded_tokens: int
    num_context_forwards: int
    num_denoiser_forwards: int
    num_forced_commits: int | None
    num_finished: dict[str, int]
    num_prefill_forwards: int = 0

    @property
    def tokens_per_forward(self) -> float | None:
        """Useful tokens per forward pass of any kind, prefills included."""
        num_forwards = self.num_context_forwards + self.num_denoiser_forwards
        return self.num_tokens / num_forwards if num_forwards else None

    @property
    def tokens_per_nfe(self) -> float | None:
        """Useful tokens per denoiser pass; ``None`` without a denoiser."""
        return self.num_tokens / self.num_denoiser_forwards if self.num_denoiser_forwards else None

    @property
    def tokens_per_nfe_and_commit(self) -> float | None:
        """Useful tokens per denoiser pass or commit, prompts left out; ``None`` without a denoiser."""
        num_forwards = self.num_denoiser_forwards + self.num_context_forwards - self.num_prefill_forwards
        return self.num_tokens / num_forwards if self.num_denoiser_forwards else None

    @property
    def forced_share(self) -> float | None:
        """Share of all committed tokens, useful or discarded, that the step floor forced."""
        num_committed = self.num_tokens + self.num_discarded_tokens
        if self.num_forced_commits is None or num_committed == 0:
            return None
        return self.num_forced_commits / num_committed


def count(prompts: Iterable[Generation | PromptTiming]) -> Counts:
    """Add up generations, or the prompts of timed calls."""
    rows = list(prompts)
    forced = [row.num_forced_commits for row in rows if row.num_forced_commits is not None]
    finished = [row.finish for row in rows]
    return Counts(
        num_prompts=len(rows),
        num_tokens=sum(row.num_tokens for row in rows),
        num_discarded_tokens=sum(row.num_discarded_tokens for row in rows),
        num_context_forwards=sum(row.num_context_forwards for row in rows),
        num_denoiser_forwards=sum(row.num_denoiser_forwards for row in rows),
        num_forced_commits=sum(forced) if rows and len(forced) == len(rows) else None,
        num_finished={reason: finished.count(reason) for reason in ("eos", "stop", "length")},
        num_prefill_forwards=sum(min(1, row.num_context_forwards) for row in rows),
    )
