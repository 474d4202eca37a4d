"""Is the baseline at its best? What a speedup over it rests on, looked at once a launch, off the rounds.

How it is run, the least that a step has to read beside the bandwidth that a copy reaches here, and, for a Hugging Face
model, a few prompts decoded in turn by it and by transformers' own ``generate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import sizes
from twotower_eval.engine.models.config import NemotronHConfig
from twotower_eval.engine.models.protocol import Model, as_model
from twotower_eval.engine.models.transformers_model import ForwardError, TransformersModel
from twotower_eval.measure.speed.clock import CallClock
from twotower_eval.measure.speed.lanes import Lane
from twotower_eval.measure.speed.peak import copy_bytes_per_s
from twotower_eval.measure.speed.workloads import Calls
from twotower_eval.records import BaselineBest, Prompt

NUM_PROMPTS, NUM_TOKENS = 5, 24  # that are decoded beside transformers' own generate


def looked_at(
    lanes: Mapping[int, Sequence[Lane]], calls: Calls, model: Model, clock: CallClock, *, cuda_graphs: bool
) -> Iterator[BaselineBest]:
    """One record for the baseline cell of each batch size; ``model`` is the baseline's."""
    theirs = _of_transformers(model)
    bytes_per_s = copy_bytes_per_s(model.checkpoint.devices[0])
    for size, of_size in lanes.items():
        lane = next(lane for lane in of_size if lane.cell.arm == "baseline")
        rows = [ids for call in calls[size] for ids in lane.ids[call.id]]
        budget = max(call.max_new_tokens for call in calls[size])
        middle = sorted(map(len, rows))[len(rows) // 2] + budget // 2
        yield BaselineBest(
            cell=lane.cell.id,
            engine="own" if theirs is None else "transformers",
            cuda_graphs=cuda_graphs,
            attention=None if theirs is None else getattr(theirs.inner.config, "_attn_implementation", None),
            num_threads=torch.get_num_threads(),
            step_bytes=_step_bytes(model, size, middle),
            bytes_per_s=bytes_per_s,
            **({} if theirs is None else _beside_generate(theirs, rows, min(NUM_TOKENS, budget), clock)),
        )


def _of_transformers(model: object) -> TransformersModel | None:
    return model if isinstance(model, TransformersModel) else None


def _step_bytes(model: Model, batch_size: int, context_tokens: int) -> float | None:
    """The least that a step of one token reads: weights and, where the config tells, the context.

    Of an embedding of its own a step reads a row or so; experts of models that are not ours are not told apart.
    """
    parameters = {id(weight): weight for weight in model.parameters()} if hasattr(model, "parameters") else {}
    if not parameters:
        return None
    config = getattr(model, "config", None)
    if isinstance(config, NemotronHConfig):
        step = sizes.Step(
            part="ar_step",
            batch_size=batch_size,
            num_tokens=1,
            context_tokens=context_tokens,
            routing="independent",
        )
        return sizes.step_bytes(step, config, next(iter(parameters.values())).element_size())
    total = float(sum(weight.numel() * weight.element_size() for weight in parameters.values()))
    if (theirs := _of_transformers(model)) is not None:
        table, head = theirs.inner.get_input_embeddings().weight, theirs.inner.get_output_embeddings().weight
        total -= 0 if table is head else table.numel() * table.element_size()
    return total


def _beside_generate(
    model: TransformersModel, rows: Sequence[tuple[int, ...]], num_new: int, clock: CallClock
) -> dict[str, Any]:
    """Seconds of both for a few prompts, in turn, after one that is not counted."""
    decoder = make_decoder(as_model(model), "autoregressive")
    own_s, generate_s, same = [], [], True
    chosen = [rows[number % len(rows)] for number in range(NUM_PROMPTS + 1)]
    for number, ids in enumerate(chosen):
        began_s = clock()
        [made] = decoder.generate([Prompt(id=str(number), token_ids=ids)], max_new_tokens=num_new)
        half_s = clock()
        try:
            theirs = model.own_generate(torch.tensor([ids]), num_new)
        except ForwardError as error:
            return {"reason": str(error)}
        ended_s = clock()
        same &= list(made.token_ids) == theirs
        if number:
            own_s.append(half_s - began_s)
            generate_s.append(ended_s - half_s)
    return {"own_s": tuple(own_s), "generate_s": tuple(generate_s), "same_tokens": same}
