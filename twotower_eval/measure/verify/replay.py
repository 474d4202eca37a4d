"""What replays of reference outputs share: forwards, sampler runs with the order of their commits, bounds.

``golden.json`` names the family, and its ``forwards``, ``runs`` and likelihoods; tensors lie in ``golden.safetensors``
beside it. What one family's entries mean is said in a file of that family, by functions that give a :class:`Compared`
for each entry. An entry that its folder marks as not comparable is counted, and says why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.rows import quantile
from twotower_eval.engine.models.counting import reads_prompts
from twotower_eval.errors import UserError
from twotower_eval.records import Generation

Kind = Literal["logits", "run", "count", "likelihood"]
ATOL = RTOL = 5e-5  # of float32 logits, log-probabilities and losses: what another order of sums makes of them


class Table(dict[str, Any]):
    """A table of a golden.json. UserError, naming the key, where it lacks what is asked of it."""

    def __missing__(self, key: str) -> object:
        where = f" of {self['name']}" if "name" in self else ""
        raise UserError(f"golden.json: a table{where} has no {key!r}")


def table(found: Mapping[str, object]) -> Table:
    """The same table; each table inside is a :class:`Table`, too."""
    return Table((key, _with_tables(value)) for key, value in found.items())


def _with_tables(value: object) -> object:
    if isinstance(value, Mapping):
        return table(value)
    return [_with_tables(one) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A folder's description and tensors."""

    meta: Table
    tensors: Mapping[str, Tensor]

    def tensor(self, name: object) -> Tensor:
        """A tensor by name; what follows a space in the name is a remark. UserError where there is none."""
        found = self.tensors.get(str(name).split(" ")[0])
        if found is None:
            raise UserError(f"golden.safetensors has no tensor {name!r}, which golden.json names")
        return found

    def entries(self, *keys: str) -> list[Table]:
        """The entries of a list of the description; none where it has no such list."""
        found: object = next((self.meta[key] for key in keys if key in self.meta), [])
        if not isinstance(found, list) or not all(isinstance(entry, Table) for entry in found):
            raise UserError(f"golden.json: {keys[0]} must be a list of tables")
        return found


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One entry replayed. ``value`` is the difference of numbers that is nearest to its ``limit``, ``largest`` the
    largest one; ``exact`` is for tokens and counts.

    ``skipped`` says why an entry is not compared.
    """

    kind: Kind
    name: str
    value: float = 0.0
    limit: float = 0.0
    largest: float = 0.0
    exact: bool = True
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether it agrees; NaN never does."""
        return self.exact and self.value <= self.limit


def logits(name: str, ours: Tensor, theirs: Tensor) -> Compared:
    """Tensors of numbers, within the tolerances of float32."""
    if ours.shape != theirs.shape:
        raise UserError(f"golden {name} has shape {tuple(theirs.shape)}, the model gives {tuple(ours.shape)}")
    return _close("logits", name, ours, theirs)


def likelihood(name: str, ours: float | Tensor, theirs: float | Tensor) -> Compared:
    """A log-likelihood or a bound, within the tolerances of float32."""
    return _close("likelihood", name, torch.as_tensor(ours), torch.as_tensor(theirs))


def _close(kind: Kind, name: str, ours: Tensor, theirs: Tensor) -> Compared:
    """Every number within its own tolerance; shown is the one that is nearest to it."""
    ours, theirs = ours.double().cpu().flatten(), theirs.double().flatten()
    if not theirs.numel():
        return Compared(kind=kind, name=name)
    apart, allowed = (ours - theirs).abs(), ATOL + RTOL * theirs.abs()
    at = int((apart / allowed).argmax())  # of NaN, if there is one
    return Compared(
        kind=kind, name=name, value=float(apart[at]), limit=float(allowed[at]), largest=float(apart.nan_to_num().max())
    )


class Recorded:
    """Recorded draws in place of a random stream, in the order in which they were made."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self._draws = list(draws)

    @property
    def left(self) -> int:
        """Draws that nothing has asked for."""
        return len(self._draws)

    def uniform(self, row: int, num: int) -> Tensor:
        """The next draw. UserError where the recording has another number of them."""
        if not self._draws or self._draws[0].numel() != num:
            raise UserError(f"golden.safetensors has no draw of {num} numbers where the decoder makes one")
        return self._draws.pop(0).flatten()

    def drawn(self, rows: Sequence[int], probability_BKV: Tensor) -> Tensor:
        """Tokens (len(rows), K) of distributions, by the next draws."""
        draws = [self.uniform(row, probability_BKV.shape[1]) for row in rows]
        return quantile(probability_BKV, torch.stack(draws).to(probability_BKV.device))

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Gumbel noise from the next draw."""
        return -torch.log(-torch.log(self.uniform(0, len(rows) * math.prod(shape)).reshape(len(rows), *shape))).to(
            device
        )


class Stream(Recorded):
    """Recorded draws whose bounds do not matter: one row takes the numbers of a draw that another leaves."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__([torch.cat([draw.flatten() for draw in draws])] if draws else [])

    @property
    def left(self) -> int:
        """Numbers that nothing has asked for."""
        return sum(draw.numel() for draw in self._draws)

    def uniform(self, row: int, num: int) -> Tensor:
        """The next numbers. UserError where the recording has fewer."""
        if self.left < num:
            raise UserError(f"golden.safetensors has {self.left} numbers left where the decoder draws {num}")
        taken, self._draws = self._draws[0][:num], [self._draws[0][num:]]
        return taken


def tokens(name: str, ours: Sequence[int], theirs: Sequence[int], *, quirk: str = "") -> Compared:
    """A sampler's tokens, exactly."""
    return Compared(kind="run", name=name, exact=list(ours) == list(theirs), skipped=quirk)


def counts(name: str, ours: object, theirs: object, *, quirk: str = "") -> Compared:
    """Calls, or the order of commits, exactly."""
    return Compared(kind="count", name=name, exact=ours == theirs, skipped=quirk)


def numbers_of_calls(name: str, found: Mapping[str, int], given: Table, *, quirk: str = "") -> Compared:
    """Calls by their kinds, exactly; kinds that are told here alone or there alone have nothing to be held to."""
    both = found.keys() & given.keys()
    ours, theirs = ({kind: numbers[kind] for kind in sorted(both)} for numbers in (found, given))
    return counts(f"{name}: numbers of calls", ours, theirs, quirk=quirk)


def quirk_of(run: Table) -> str:
    """Why a run is not to be compared; empty for those that are."""
    if run.get("compare") is False:
        return "recorded to document a quirk"
    return "its order hangs on how equal values are sorted" if run.get("tie_order_dependent") else ""


def until(token_ids: Sequence[int], stops: Container[int]) -> list[int]:
    """The tokens before the first stop."""
    return list(itertools.takewhile(lambda token: token not in stops, token_ids))


def commit_calls(generation: Generation, length: int) -> list[int | None]:
    """For each position behind the prompt the 1-based denoiser call that committed it; None: still masked."""
    found: list[int | None] = [None] * length
    for call, step in enumerate(generation.trace or (), 1):
        for position in step.positions:
            found[position] = call
    return found


class Noted:
    """A model that notes its forwards in order, a letter each: P a prefill, S an extension, D a denoise, and for a part
    of a block d, or what ``letter_of_part`` says of its places."""

    def __init__(self, model: object, letter_of_part: Callable[[Tensor, Sequence[int]], str] = lambda *_: "d") -> None:
        self._model: Any = model
        self._letter_of_part = letter_of_part
        self.calls = ""

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def prefill(self, ids_BS: Tensor, lengths_B: Sequence[int] | None = None) -> object:
        """The model's own; noted where there is something to read, and that is a forward."""
        if ids_BS.shape[1] and (lengths_B is None or max(lengths_B)) and reads_prompts(self._model):
            self.calls += "P"
        return self._model.prefill(ids_BS, lengths_B)

    def extend(self, context: object, ids_BK: Tensor) -> object:
        """The model's own, noted where it is a forward."""
        self.calls += "S" if reads_prompts(self._model) else ""
        return self._model.extend(context, ids_BK)

    def denoise(self, *given: object) -> object:
        """The model's own, noted."""
        self.calls += "D"
        return self._model.denoise(*given)

    def denoise_kept(self, *given: object) -> object:
        """The model's own, noted."""
        self.calls += "D"
        return self._model.denoise_kept(*given)

    def denoise_part(self, part_BM: Tensor, starts: Sequence[int], *given: object) -> object:
        """The model's own, noted."""
        self.calls += self._letter_of_part(part_BM, starts)
        return self._model.denoise_part(part_BM, starts, *given)
