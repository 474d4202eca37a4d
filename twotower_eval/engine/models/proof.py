"""A Hugging Face model proves itself before it is measured: every fast way of running it gives what whole rows give.

What is right: a pass over the whole row, alone, without padding and without a cache, by the model's own code and mask.
A generated token is the one behind exactly the tokens before it; where rotary factors depend on how long the row is,
transformers' own ``generate`` gives something else, since its cache holds keys that were rotated by the factors of
shorter rows. A log-likelihood is read off one pass over context and continuation, as lm-eval's ``hf`` does.

Cheap by construction: some twenty forwards of a dozen tokens in float32, and about as many again in the model's own
dtype, and for each length that the config names (a window, an original length of rotary factors) and that contexts can
reach. Ways that fail are replaced by slower ones, which are tried in the same manner. Where even the plain pass depends
on later tokens, or on the calls before it, there is nothing right to compute, and the model is refused. Where float32
does not fit into memory, nothing can be proved, and whole rows are read alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from twotower_eval.engine.models import probes, transformers_types
from twotower_eval.engine.models.probes import (
    LIMITS,
    Pairs,
    Probe,
    Tokens,
    apart,
    difference,
    drawn_tokens,
    make_probe,
    named_lengths,
    whole,
    widened,
    widening,
)
from twotower_eval.engine.models.transformers_model import ForwardError, TransformersModel
from twotower_eval.engine.models.transformers_static import StaticSize
from twotower_eval.errors import UserError
from twotower_eval.records import HALF_PRECISION, FailedTrial, ProofCheck, Ways

BASE_AT, BASE_TOKENS = 6, 11
MAX_PROVED_TOKENS = 16_384  # beyond, masks alone fill memory: longer contexts are read the plain way
# Parameters times tokens of a pass that loading tries unasked (seconds on a CPU); longer lengths wait until it is known
# that contexts reach them.
CHEAP_PASS = 5e10
REACHING_PASS = {False: 4e11, True: 5e13}  # the same of the one pass before a run, on a CPU and on a GPU
CHECKS: Mapping[ProofCheck, Callable[[TransformersModel, Probe], Pairs]] = {
    "cached steps": probes.cached_steps,
    "rows beside each other": probes.rows_together,
    "whole rows in batches": probes.passes,
    "options in one row": probes.options,
}


@torch.inference_mode(False)
@torch.no_grad()
def prove(model: TransformersModel) -> None:
    """Choose the model's ways by trying short rows and the cheap ones of its named lengths.

    Contexts beyond a length that was not tried are read the plain way. UserError if the model cannot be right.
    """
    model.run_by(replace(model.ways, options_packed=model.may_pack))
    model.try_several, model.try_beginnings, model.try_static = reads_several, goes_on, steps_statically
    model.static_steps.same = lambda ours, theirs: difference(ours, theirs, model.precision) <= LIMITS[model.precision]
    with _refusing(model):
        with _in_float32(model):
            row = _prove(model)
        _check_finite(model, whole(model, row, len(row)))
        _prove_as_run(model)


def _prove(model: TransformersModel) -> Tokens:
    """Like :func:`prove`; returns the row that was read."""
    probe = _base_probe(model)
    _check_finite(model, torch.cat([probe.row_NV, probe.fork_NV, probe.other_NV]))
    again = whole(model, probe.row, len(probe.row_NV))
    if (found := difference(again, probe.row_NV, model.precision)) > LIMITS[model.precision]:
        raise UserError(f"{model.kind} gives other logits for the same row when it reads it again{_by(found)}")
    model.run_by(replace(model.ways, precision=model.precision))
    if model.precision in HALF_PRECISION:
        _run_unproved(model, probe)
        return probe.row
    _settle(model, probe, most_cached=0)
    lengths = named_lengths(model.inner.config.get_text_config().to_dict())
    model.run_by(model.ways, [n for n in lengths if BASE_AT < n < _room(model)])
    parameters = sum(parameter.numel() for parameter in model.inner.parameters())
    _prove_lengths(model, int(CHEAP_PASS // max(1, parameters)))
    return probe.row


def _run_unproved(model: TransformersModel, probe: Probe) -> None:
    """Read whole rows alone, without a cache: the only right way if no trial can tell faults from rounding."""
    _depends_on_length(model, probe)
    _read_plainly(model, 0, _needs_resets(model, probe))
    model.run_by(replace(model.ways, passes_together=False, proved_tokens=len(probe.row)))


def _prove_as_run(model: TransformersModel) -> None:
    """Try what was right in float32 again in the model's own dtype, where kernels may fail and numbers may overflow.
    Ways that fail are dropped; only large differences are looked for."""
    if model.ways.precision != model.precision:
        unproved = model.unproved
        _settle_ways(model, _base_probe(model), most_cached=0)
        model.run_by(model.ways, unproved)


@torch.inference_mode(False)
@torch.no_grad()
def prove_up_to(model: TransformersModel, longest: int) -> Ways:
    """Try the lengths that contexts of up to ``longest`` tokens reach; how the model is run then, for manifests.

    UserError if the model cannot be right.
    """
    longest_tried = min(longest, MAX_PROVED_TOKENS)
    if _is_open(model, longest_tried):
        with _refusing(model):
            with _in_float32(model):
                _prove_lengths(model, longest_tried)
            _prove_as_run(model)
    _check_reach(model, longest_tried)
    beyond = model.plain_beyond
    reached = beyond if beyond is not None and beyond < longest else None
    return replace(model.ways, checkpoint=model.checkpoint.identity, plain_beyond=reached)


def _check_reach(model: TransformersModel, longest: int) -> None:
    """One pass over as many tokens as contexts may have, as its settings may promise too many.

    UserError if it raises or gives no finite numbers. Skipped if it would take long, or more memory than there is.
    """
    length = min(longest, _room(model))
    parameters = sum(parameter.numel() for parameter in model.inner.parameters())
    if length <= model.ways.proved_tokens or length * parameters > REACHING_PASS[model.device.type == "cuda"]:
        return
    with suppress(torch.OutOfMemoryError):
        try:
            logits = whole(model, drawn_tokens(model, length), 1)
        except ForwardError as error:
            raise UserError(f"{model.kind} cannot read {length:,} tokens, as its settings allow: {error}") from error
        _check_finite(model, logits)


@torch.inference_mode(False)
@torch.no_grad()
def reads_several(model: TransformersModel) -> bool:
    """Whether several tokens that are read in one pass behind a context give the logits of rows that end with each.

    Attention does. Some states do, others begin anew; where rotary factors depend on how long the row is, none do.
    """
    row, known, num = drawn_tokens(model, min(BASE_TOKENS, _room(model))), 3, 4
    row_1S, found = torch.tensor([row]), math.inf
    with suppress(ForwardError), _in_float32(model):
        context = model.prefill(row_1S[:, :known])
        wanted = [(0, column) for column in range(num)]
        context, logits_NV = model.extend_logits(context, row_1S[:, known : known + num], [num], wanted)
        ours = [logits_NV]
        for at in range(known + num, len(row)):
            context = model.extend(context, row_1S[:, at : at + 1])
            ours.append(model.next_logits(context))
        theirs = [whole(model, row[: at + 1], 1) for at in range(known, len(row))]
        found = difference(torch.cat(ours), torch.cat(theirs), model.precision)
    return found <= LIMITS[model.precision]


@torch.inference_mode(False)
@torch.no_grad()
def goes_on(model: TransformersModel) -> bool:
    """Whether rows that go on beside each other from a beginning that was read once, by several tokens in one pass,
    give the logits of whole rows."""
    found = math.inf
    with suppress(ForwardError), _in_float32(model):
        found = apart(probes.beginnings(model, _base_probe(model)), model.precision)
    return found <= LIMITS[model.precision]


@torch.inference_mode(False)
@torch.no_grad()
def steps_statically(model: TransformersModel) -> bool:
    """Whether steps over a static cache give the logits of whole rows: rows of unlike lengths, one of which finishes,
    beside an empty slot."""
    row, found = drawn_tokens(model, min(BASE_TOKENS, _room(model))), math.inf
    starts = [3, 5]
    if len(row) < starts[-1] + 3:
        return False
    ids = torch.tensor([row[:5], row[:5]])
    size = StaticSize(slots=3, columns=len(row) + 2)
    with suppress(ForwardError), _in_float32(model):
        context, ours, theirs = model.prefill(ids, starts, static=size), [], []
        for at in range(len(row) - starts[-1]):
            if at == 2:
                context, starts = context.select([1]), starts[1:]
            context = model.extend(context, torch.tensor([[row[start + at]] for start in starts]))
            ours.append(model.next_logits(context))
            theirs += [whole(model, row[: start + at + 1], 1) for start in starts]
        found = difference(torch.cat(ours), torch.cat(theirs), model.precision)
    model.static_steps.forget()
    return found <= LIMITS[model.precision]


@contextmanager
def _in_float32(model: TransformersModel) -> Iterator[None]:
    """The model with weights widened to float32 as memory allows; unchanged if it does not, or if the model accesses
    its layers from outside."""
    how = widening(model.inner, model.device)
    if how == "by layer":
        try:
            with widened(model.inner, how), _wide_attention(model, how):
                whole(model, (0, 0), 1)
        except ForwardError:
            how = None
    with widened(model.inner, how), _wide_attention(model, how):
        yield


@contextmanager
def _wide_attention(model: TransformersModel, how: str | None) -> Iterator[None]:
    """Torch's own attention in the place of kernels that take no float32, which are tried in their own dtype later."""
    kernel = model.checkpoint.attention
    if how is None or kernel not in transformers_types.HALF_ONLY:
        yield
        return
    model.inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.inner.set_attn_implementation(kernel)


@contextmanager
def _refusing(model: TransformersModel) -> Iterator[None]:
    """UserError for anything that plain passes raise: there is no slower way."""
    try:
        yield
    except ForwardError as error:
        raise UserError(f"{model.kind} cannot be run, not even without a cache: {error}") from error


def _prove_lengths(model: TransformersModel, longest: int) -> None:
    """Try the untried lengths that this many tokens reach, shortest first, until one of them rules out all other ways.

    None is tried in half precision, where it would show nothing.
    """
    while _is_open(model, longest) and model.precision not in HALF_PRECISION:
        length, *others = unproved = model.unproved
        before = replace(model.ways, short_of_memory_at=None)
        model.run_by(before)
        try:
            _settle(
                model, make_probe(model, length, min(length + 8 + length // 8, _room(model))), most_cached=length - 2
            )
        except torch.OutOfMemoryError:  # four rows in float32: the run's own may fit
            model.run_by(replace(before, short_of_memory_at=length), unproved)
            return
        model.run_by(model.ways, others if model.ways.plain_beyond is None else ())


def _is_open(model: TransformersModel, longest: int) -> bool:
    return bool(model.unproved) and model.unproved[0] - 2 < longest


def _base_probe(model: TransformersModel) -> Probe:
    length = min(BASE_TOKENS, _room(model))
    return make_probe(model, min(BASE_AT, length - 4), length)


def _room(model: TransformersModel) -> int:
    return model.max_length or sys.maxsize


def _settle(model: TransformersModel, probe: Probe, most_cached: int) -> None:
    """Keep the model's ways that are right across the probe's length.

    If nothing else helps, contexts beyond ``most_cached`` tokens are read the plain way.
    """
    tried = max(model.ways.proved_tokens, len(probe.row))
    if _depends_on_length(model, probe):
        _read_plainly(model, most_cached, _needs_resets(model, probe))
    else:
        _settle_ways(model, probe, most_cached)
    model.run_by(replace(model.ways, proved_tokens=tried))


def _settle_ways(model: TransformersModel, probe: Probe, most_cached: int) -> None:
    """Like :func:`_settle`, for models whose row does not change as it grows."""
    _settle_rows(model, probe, most_cached)
    if model.ways.passes_together and (failure := _failure(model, "whole rows in batches", probe)):
        model.run_by(replace(model.ways, passes_together=False, failed=(*model.ways.failed, failure)))
    if model.ways.options_packed and (failure := _failure(model, "options in one row", probe)):
        model.run_by(replace(model.ways, options_packed=False, failed=(*model.ways.failed, failure)))


def _depends_on_length(model: TransformersModel, probe: Probe) -> bool:
    """Whether a row's logits change when only later tokens are added. UserError if the model is not causal."""
    limit, num_common = LIMITS[model.precision], probe.at - probe.first
    _check_finite(model, torch.cat([probe.row_NV, probe.fork_NV]))
    found = difference(probe.fork_NV[:num_common], probe.row_NV[:num_common], model.precision)
    if found > limit:
        raise UserError(
            f"{model.kind} is not causal as its config.json has it: a later token changes what is predicted before it"
            f"{_by(found)}, so no log-likelihood can be read off it (encoders want is_decoder, if they were trained so)"
        )
    shorter = max(1, num_common - 2)
    below = whole(model, probe.row[: probe.first + shorter], shorter)
    return difference(below, probe.row_NV[:shorter], model.precision) > limit


def _check_finite(model: TransformersModel, logits: torch.Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise UserError(f"{model.kind} gives logits that are not finite, in {model.precision}")


def _by(found: float) -> str:
    return f" (by {found:.2g} of the logits' spread)" if math.isfinite(found) else ""


def _needs_resets(model: TransformersModel, probe: Probe) -> bool:
    """Whether a row changes after a longer one. UserError if a short row does not undo that."""

    def behind(row: Tokens) -> torch.Tensor:
        whole(model, row, 1)
        return whole(model, probe.row[: probe.at + 1], 1)

    short, long = behind(probe.row[:2]), behind(probe.row)
    if difference(long, short, model.precision) <= LIMITS[model.precision]:
        return False
    if difference(behind(probe.row[:2]), short, model.precision) <= LIMITS[model.precision]:
        return True
    raise UserError(f"{model.kind} gives other logits for the same row when it has read another one before")


def _settle_rows(model: TransformersModel, probe: Probe, most_cached: int) -> None:
    """Find the fastest right way to continue from a context, if any."""
    before = model.ways
    if not before.cached:
        return
    failed = list(before.failed)
    for ways in _candidates(model):
        model.run_by(ways)
        across = [probe] if ways == before or not most_cached else [_base_probe(model), probe]
        checks: list[ProofCheck] = ["cached steps"]
        if ways.rows_together:
            checks.append("rows beside each other")
        failures = (_failure(model, check, one) for one in across for check in checks)
        failure = next((found for found in failures if found), None)
        if failure is None:
            model.run_by(replace(ways, failed=tuple(failed)))
            return
        failed.append(failure)
    model.run_by(replace(before, failed=tuple(failed)))
    _read_plainly(model, most_cached, before.resets_first)
    if model.ways.cached and _failure(model, "cached steps", make_probe(model, max(2, most_cached - 6), most_cached)):
        _read_plainly(model, 0, before.resets_first)


def _candidates(model: TransformersModel) -> list[Ways]:
    """The current ways, then slower ones."""
    alone = replace(model.ways, rows_together=False, options_packed=False)
    found = []
    for ways in (model.ways, alone):
        found += [ways, replace(ways, positions_passed=True)] if model.takes_positions else [ways]
    return [ways for number, ways in enumerate(found) if ways not in found[:number]]


def _read_plainly(model: TransformersModel, most_cached: int, resets: bool = False) -> None:
    """Read contexts beyond that many tokens whole, alone, without a cache."""
    ways = replace(model.ways, plain_beyond=most_cached, resets_first=resets)
    if not most_cached:
        ways = replace(ways, cached=False, rows_together=True, options_packed=False, positions_passed=False)
        ways = replace(ways, plain_beyond=0 if resets else None)
    model.run_by(ways)


def _failure(model: TransformersModel, check: ProofCheck, probe: Probe) -> FailedTrial | None:
    """What is wrong with the model's ways by one check; None if nothing."""
    limit, error, found = LIMITS[model.precision], None, float("inf")
    try:
        found = apart(CHECKS[check](model, probe), model.precision)
    except ForwardError as raised:
        error = str(raised)
    if found <= limit:
        return None
    return FailedTrial(
        check=check,
        num_tokens=len(probe.row),
        difference=found if math.isfinite(found) else None,
        limit=limit,
        error=error or (None if math.isfinite(found) else "its logits are not finite"),
        positions_passed=model.ways.positions_passed,
        rows_together=model.ways.rows_together,
        precision=model.precision,
    )
