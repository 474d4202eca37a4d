"""Rows are selected and joined without copies, until a model is called; whatever is held serves somebody."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from twotower_eval.engine.models.counting import MAX_HELD, CountedContext, CountingModel

calls: list[str] = []


@dataclass(frozen=True)
class Held:
    """A context that is the names of its rows."""

    names: tuple[str, ...]

    def select(self, rows: Sequence[int]) -> "Held":
        calls.append("select")
        return Held(tuple(self.names[row] for row in rows))

    def join(self, other: "Held") -> "Held":
        calls.append("join")
        return Held(self.names + other.names)


class HeldInOneCopy(Held):
    @staticmethod
    def gathered(parts: Sequence[tuple[Held, Sequence[int]]]) -> Held:
        calls.append("gather")
        return Held(tuple(part.names[row] for part, rows in parts for row in rows))


class Model:
    """Contexts of the kind it is made with; prompts are named by their only token, and by the times extended."""

    def __init__(self, kind: type[Held]) -> None:
        self.kind = kind

    def prefill(self, ids_BS: Tensor, lengths: Sequence[int]) -> Held:
        return self.kind(tuple(str(int(token)) for token in ids_BS[:, 0]))

    def extend(self, context: Held, ids_BK: Tensor) -> Held:
        assert len(context.names) == len(ids_BK)
        return self.kind(tuple(name + "+" for name in context.names))


def prefilled(kind: type[Held], num: int, first: int = 0) -> tuple[CountingModel, CountedContext]:
    model = CountingModel(Model(kind), 100)
    rows = range(first, first + num)
    calls.clear()
    return model, model.prefill(rows, torch.tensor([[row] for row in rows]), [1] * num)


@pytest.mark.parametrize(
    ("kind", "copies"), [(HeldInOneCopy, ["gather"]), (Held, ["select", "select", "join", "join"])]
)
def test_rows_are_copied_once_and_only_for_a_call(kind: type[Held], copies: list[str]) -> None:
    model, context = prefilled(kind, 6)
    extended = model.extend(context.select([1, 2, 4]), torch.zeros(3, 1))
    calls.clear()
    left, _ = context.select([0, 3, 5]).select([0, 2]), calls
    joined = left.join(extended).join(prefilled(kind, 2, first=6)[1]).select([0, 1, 2, 4, 5, 6])
    assert joined.rows == (0, 5, 1, 4, 6, 7)
    assert calls == []
    assert joined.inner.names == ("0", "5", "1+", "4+", "6", "7")
    assert joined.inner is joined.inner
    assert calls == copies
    assert joined.select(range(6)) is joined
    assert context.inner.names == tuple("012345")
    assert model.num_context_forwards[:6] == [1, 2, 2, 1, 2, 1]


def test_a_whole_context_is_not_copied() -> None:
    model, context = prefilled(Held, 3)
    assert model.extend(context.select([0, 1, 2]), torch.zeros(3, 1)).inner.names == ("0+", "1+", "2+")
    assert calls == []


def test_contexts_of_which_little_is_left_are_let_go() -> None:
    _, pool = prefilled(HeldInOneCopy, 8)
    for start in range(8, 80, 8):
        pool = pool.select(range(len(pool.rows) // 2)).join(prefilled(HeldInOneCopy, 8, first=start)[1])
        assert pool.num_held <= MAX_HELD * len(pool.rows)
    assert pool.inner.names == tuple(map(str, pool.rows))
