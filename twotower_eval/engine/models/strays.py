"""Forwards that go past whoever counts them: a decoder may reach a model's inside, or hold a model of its own.

The networks are watched where tokens enter them: their embeddings, their first layers, and the models of transformers
as a whole. What enters there outside of a forward that was noted is a stray. A copy of a network that the harness never
saw, and arithmetic on a model's tensors alone, are seen by none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import TypeVar

from torch import nn

from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Model

T = TypeVar("T")


class Strays:
    """Counts what enters the networks of some models outside of noted forwards, while it is asked to."""

    def __init__(self, models: Iterable[Model]) -> None:
        models = list(models)
        self._entrances = _entrances(models)
        self._with_graphs = [part for model in models for part in _networks(model) if "graphs" in vars(part)]
        self._running: Sequence[int] = ()
        self.num = 0

    @contextmanager
    def noted(self, watched: WatchedModel) -> Iterator[None]:
        """Count from nothing what is not inside a forward of ``watched``; see ``num`` afterwards."""
        self._running, self.num = watched.running, 0
        with ExitStack() as stack:
            for module in self._entrances:
                stack.callback(module.register_forward_pre_hook(self._entered).remove)
            for graphs in {id(part.graphs): part.graphs for part in self._with_graphs if part.graphs}.values():
                for name in ("extend", "denoise"):
                    setattr(graphs, name, self._heard(getattr(graphs, name)))
                    stack.callback(delattr, graphs, name)
            yield

    def _entered(self, module: nn.Module, given: object) -> None:
        if get_ident() not in self._running:
            self.num += 1

    def _heard(self, step: Callable[..., T]) -> Callable[..., T]:
        """A step from a graph, in which no module is called."""

        def heard(*given: object) -> T:
            if get_ident() not in self._running:
                self.num += 1
            return step(*given)

        return heard


def _networks(model: Model) -> list[nn.Module]:
    """The modules that a model is, or holds."""
    if isinstance(model, nn.Module):
        return list(model.modules())
    held = vars(model).values() if hasattr(model, "__dict__") else ()
    return [module for part in held if isinstance(part, nn.Module) for module in part.modules()]


def _entrances(models: Iterable[Model]) -> list[nn.Module]:
    """Where tokens enter: embeddings, the first of every list of layers, and what is called as a whole."""
    found: dict[int, nn.Module] = {}
    for model in models:
        networks = _networks(model)
        firsts = [part[0] for part in networks if isinstance(part, nn.ModuleList) and len(part)]
        wholes = [whole for whole in (getattr(model, "inner", None),) if isinstance(whole, nn.Module)]
        for module in (*wholes, *firsts, *(part for part in networks if isinstance(part, nn.Embedding))):
            found[id(module)] = module
    return list(found.values())
