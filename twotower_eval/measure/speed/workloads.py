"""What is timed: task prompts cut into calls, the same for every cell of a batch size and in every round."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, pairwise
from typing import Any, Literal, Protocol

from twotower_eval.engine.models.chat import format_of
from twotower_eval.engine.models.protocol import Model, text_codec
from twotower_eval.engine.models.tokenizer import fitted_prompt_ids, naming, prompt_ids
from twotower_eval.errors import UserError
from twotower_eval.names import plural
from twotower_eval.plan import SpeedPlan
from twotower_eval.plan_speed import all_served
from twotower_eval.records import (
    RequestKind,
    Workload,
    canonical_json,
    sha256_text,
)

# Includes a runaway of one in a hundred prompts with 98 % probability; whole batches of 1 to 128 by powers of two.
ENOUGH_PROMPTS = 384


class Request(Protocol):
    """A task's prompt with stops and budget, as ``suites.build_requests`` gives it."""

    @property
    def task(self) -> str: ...
    @property
    def doc_id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def prompt_sha256(self) -> str: ...
    @property
    def task_parts(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, kw_only=True)
class Call:
    """Prompts that are decoded together: their ``stop`` strings, whether EOS ends them, and their budget."""

    id: str
    requests: tuple[Request, ...]
    stop: tuple[str, ...]
    ignore_eos: bool
    max_new_tokens: int


@dataclass(frozen=True)
class PerSecond:
    """A rate of requests to servers, sent whatever these do."""

    rate: float
    arrivals: Literal["poisson", "constant"]

    def __str__(self) -> str:
        """``4 requests/s (poisson)``."""
        return f"{self.rate:g} requests/s ({self.arrivals})"


Load = int | PerSecond  # prompts of a call, of servers requests in flight; or a rate of requests
Calls = Mapping[Load, tuple[Call, ...]]


def prefix_of(load: Load) -> str:
    """How the ids of a load's calls begin."""
    return f"r{load.rate:g}" if isinstance(load, PerSecond) else f"b{load}"


def loads_of(plan: SpeedPlan) -> tuple[Load, ...]:
    """In which ways a plan's prompts are given to both arms."""
    if plan.request_rates is None:
        return plan.batch_sizes
    return tuple(PerSecond(rate, plan.arrivals or "poisson") for rate in plan.request_rates)


def is_stream(plan: SpeedPlan, load: Load) -> bool:
    """Whether all prompts of a round go to a server as one stream: at a rate, or several at a time in a closed loop.

    A model that is here takes the prompts of a call together, and so does a server that is compared with it.
    """
    return isinstance(load, PerSecond) or (load > 1 and all_served(plan))


def _together(plan: SpeedPlan) -> int:
    """Prompts that make whole calls of every size."""
    return math.lcm(*(load for load in loads_of(plan) if isinstance(load, int) and not is_stream(plan, load)), 1)


def make_calls(plan: SpeedPlan, requests: Sequence[Request]) -> Calls:
    """Choose ``plan.num_prompts`` prompts and cut them into calls of each batch size: the same prompts for all sizes.

    On the ``answer`` workload the prompts of a call share stops and budget, tasks take turns, and a task's prompts are
    spread over all of its lengths. Without a number, ``ENOUGH_PROMPTS`` are chosen, or as many as make whole batches.
    UserError if there are fewer than asked for, or no whole batch.
    """
    together = _together(plan)
    wanted = _wanted(plan, together)
    if plan.workload == "answer":
        chosen = _spread(requests, together, wanted)
    else:
        chosen = list(requests[:wanted])
        if plan.num_prompts is None:
            chosen = chosen[: len(chosen) // together * together]
    if not chosen or (len(chosen) < wanted and plan.num_prompts is not None):
        batches = f" in batches of {together} from one task" if plan.workload == "answer" and together > 1 else ""
        raise UserError(f"{wanted} prompts wanted{batches}, the tasks give {len(chosen)}: name more tasks")
    widest = max((load for load in loads_of(plan) if isinstance(load, int) and is_stream(plan, load)), default=0)
    if len(chosen) < 2 * widest:
        raise UserError(
            f"{plural(len(chosen), 'prompt')} cannot keep {widest} requests in flight for long: take at least "
            f"{2 * widest} prompts (--num-prompts), or fewer requests (--concurrency)"
        )
    return {load: _cut(plan, chosen, load) for load in loads_of(plan)}


def untimed_tasks_text(plan: SpeedPlan, requests: Sequence[Request]) -> str:
    """A warning where so few prompts are asked for that tasks have none among them; empty where all have."""
    tasks = list(dict.fromkeys(request.task for request in requests))
    chosen = (request for calls in make_calls(plan, requests).values() for call in calls for request in call.requests)
    untimed = sorted({*tasks} - {request.task for request in chosen})
    if not untimed or plan.num_prompts is None:
        return ""
    enough = len(tasks) * _together(plan)
    more = f"--num-prompts {enough} or more" if enough > plan.num_prompts else "more prompts (--num-prompts)"
    return (
        f"warning: {plural(plan.num_prompts, 'prompt')} of {plural(len(tasks), 'task')}: not timed: "
        f"{', '.join(untimed)}; to time every task, take {more}"
    )


def _wanted(plan: SpeedPlan, together: int) -> int:
    """How many prompts: the default is rounded up to whole batches, a given number must make them."""
    fitting = math.ceil((plan.num_prompts or ENOUGH_PROMPTS) / together) * together
    if plan.num_prompts not in (fitting, None):
        sizes = ", ".join(map(str, plan.batch_sizes))
        raise UserError(
            f"{plan.num_prompts} prompts cannot be cut into whole batches of {sizes}: take --num-prompts {fitting}"
        )
    return fitting


def _spread(requests: Sequence[Request], together: int, wanted: int) -> list[Request]:
    """Prompts in groups of ``together`` that share task, stops and budget; tasks in turn, each spread over its lengths.

    A task's first prompts may be unlike the rest, so each kind is sampled from all of its lengths.
    """
    by_kind: dict[tuple[str, tuple[str, ...], int], list[Request]] = defaultdict(list)
    for request in requests:
        by_kind[request.task, request.stop, request.max_new_tokens].append(request)
    most = max((len(group) for group in by_kind.values()), default=0) // together
    in_turn = (kind for turn in range(most) for kind, group in by_kind.items() if (turn + 1) * together <= len(group))
    turns = list(islice(in_turn, wanted // together))
    chosen = {kind: iter(_strata(by_kind[kind], num * together)) for kind, num in Counter(turns).items()}
    return list(chain.from_iterable(islice(chosen[kind], together) for kind in turns))


def _strata(group: Sequence[Request], num: int) -> list[Request]:
    """One prompt from each of ``num`` equally large strata of lengths, in the group's order.

    The first of each stratum is taken, so that a run on a task's first documents holds most of what is timed. Of
    documents that share a cluster one is taken if the others suffice.
    """
    first_of: dict[str, Request] = {}
    for i, request in enumerate(group):
        first_of.setdefault(getattr(request, "cluster_id", None) or f"#{i}", request)
    if len(first_of) >= num:
        group = list(first_of.values())
    by_length = sorted(range(len(group)), key=lambda i: (len(group[i].text), i))
    edges = [i * len(group) // num for i in range(num + 1)]
    places = sorted(min(by_length[low:high]) for low, high in pairwise(edges))
    return [group[place] for place in places]


def _cut(plan: SpeedPlan, chosen: Sequence[Request], load: Load) -> tuple[Call, ...]:
    calls = []
    size = 1 if isinstance(load, PerSecond) or is_stream(plan, load) else load
    for index, start in enumerate(range(0, len(chosen), size)):
        batch = tuple(chosen[start : start + size])
        fixed = plan.workload == "fixed"
        call = Call(
            id=f"{prefix_of(load)}-{index}",
            requests=batch,
            stop=() if fixed else batch[0].stop,
            ignore_eos=fixed,
            max_new_tokens=plan.new_tokens or batch[0].max_new_tokens,
        )
        calls.append(call)
    return tuple(calls)


def make_workload(plan: SpeedPlan, calls: Sequence[Call], load: Load, num_devices: int | None) -> Workload:
    """The workload of a cell. Its digest covers the prompts, what ends them and what scores the answers, but not the
    cut into batches."""
    asked: list[Any] = [
        [r.task, r.doc_id, r.prompt_sha256, c.stop, c.max_new_tokens] for c in calls for r in c.requests
    ]
    asked.append(scored_tasks(plan, calls))
    # Part of the name, and so of the cell: times with and without graphs are never pooled.
    graphs = ", CUDA graphs" if plan.cuda_graphs else ""
    requests: RequestKind | None = "closed" if is_stream(plan, load) else None
    sent = f", {load}" if isinstance(load, PerSecond) else ", closed loop" if requests else ""
    return Workload(
        kind=plan.workload,
        name=f"{plan.workload}: {', '.join(plan.tasks)}{graphs}{sent}",
        digest=sha256_text(canonical_json(asked)),
        max_new_tokens=max(call.max_new_tokens for call in calls),
        batch_size=load if isinstance(load, int) else None,
        prompt_tokens=plan.prompt_tokens,
        num_devices=num_devices,
        requests=load.arrivals if isinstance(load, PerSecond) else requests,
        request_rate=load.rate if isinstance(load, PerSecond) else None,
    )


def scored_tasks(plan: SpeedPlan, calls: Iterable[Call]) -> dict[str, dict[str, str]]:
    """Parts of the tasks whose timed answers are scored, by name."""
    if plan.workload != "answer":
        return {}
    return {request.task: dict(request.task_parts) for call in calls for request in call.requests}


def encode_calls(
    plan: SpeedPlan, calls: Calls, requests: Sequence[Request], model: Model
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """A model's token ids of every prompt, by call id. UserError if the model has no tokenizer or no room."""
    if model.tokenizer is None:
        raise UserError(f"checkpoint {model.checkpoint.name} has no tokenizer files: prompts are text, it needs one")
    known: dict[tuple[str, int], tuple[int, ...]] = {}
    encoded = {}
    for call in chain.from_iterable(calls.values()):
        for request in call.requests:
            key = (request.task, request.doc_id)
            if key not in known:
                fixed = plan.workload == "fixed"
                with naming(f"task {request.task!r}, document {request.doc_id}"):
                    # As in an evaluation of the same prompt: its end, if there is no room for the whole.
                    ids = (
                        _fixed_ids(plan, request, requests, model)
                        if fixed
                        else fitted_prompt_ids(model, request.text, call.max_new_tokens)[0]
                    )
                known[key] = tuple(ids)
        encoded[call.id] = tuple(known[request.task, request.doc_id] for request in call.requests)
    return encoded


def count_truncated(plan: SpeedPlan, calls: Calls, model: Model) -> dict[str, tuple[int, int]]:
    """Task -> how many prompts a model is timed on, and how many of them are truncated."""
    asked = {(r.task, r.doc_id): (call, r) for of_size in calls.values() for call in of_size for r in call.requests}
    counted: dict[str, tuple[int, int]] = {}
    for call, request in asked.values():
        num_prompts, num_truncated = counted.get(request.task, (0, 0))
        # A fixed workload sets its prompt length and is refused without room.
        cut = plan.workload == "answer" and fitted_prompt_ids(model, request.text, call.max_new_tokens)[1]
        counted[request.task] = num_prompts + 1, num_truncated + cut
    return counted


def _fixed_ids(plan: SpeedPlan, request: Request, requests: Sequence[Request], model: Model) -> list[int]:
    """A prompt of ``plan.prompt_tokens`` tokens: this one and those after it, cyclically, cut at the end.

    Natural text, because models degenerate on random ids, which a mixture of experts routes unlike any text.
    """
    ids = prompt_ids(model, request.text)
    if plan.prompt_tokens is not None:
        first = next(i for i, other in enumerate(requests) if other is request)
        for other in cycle([*requests[first + 1 :], *requests[: first + 1]]):
            if len(ids) >= plan.prompt_tokens:
                break
            text = format_of(model).text(other.text)
            ids = [*ids, *(text_codec(model).encode(f"\n{text}") if text else ids[:1])]
        ids = ids[: plan.prompt_tokens]
    needed = len(ids) + (plan.new_tokens or 0)
    if model.max_length is not None and needed > model.max_length:
        raise UserError(
            f"{needed} tokens of prompt and output do not fit into {model.max_length} tokens of {model.checkpoint.name}"
        )
    return ids
