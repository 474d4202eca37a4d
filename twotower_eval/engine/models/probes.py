"""Trial inputs for foreign models: lengths that a config names, rows of tokens, the results of whole rows, and
limits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from twotower_eval.engine.models.protocol import Segment
from twotower_eval.engine.models.quantised import is_packed
from twotower_eval.engine.models.transformers_cache import CacheContext
from twotower_eval.engine.models.transformers_model import TransformersModel
from twotower_eval.records import HALF_PRECISION
from twotower_eval.strict import JsonObject

Widening = Literal["at once", "by layer"]
SLACK = 1.1  # memory blocks are larger than requested
Narrow = list[tuple[Tensor, torch.dtype]]


def widening(inner: nn.Module, device: torch.device) -> Widening | None:
    """How the model can be widened to float32 in the free memory; None if it cannot."""
    outside, layers = _parts(inner)
    free = free_bytes(device)
    everything = [tensor for part in (outside, *layers) for tensor in part]
    if _needed(everything) <= free:
        return "at once"
    return "by layer" if max((_needed(outside + layer) for layer in layers), default=free + 1) <= free else None


@contextmanager
def widened(inner: nn.Module, how: Widening | None) -> Iterator[None]:
    """The model in float32; as it is where ``how`` is None."""
    outside, layers = _parts(inner)
    if how == "at once":
        outside, layers = [tensor for part in (outside, *layers) for tensor in part], []
    with ExitStack() as stack:
        if how is not None:
            narrow = _dtypes(outside)
            stack.callback(_narrow, narrow)
            _widen(narrow)
            for layer, tensors in zip(_layers(inner), layers, strict=False):
                _widen_while_running(layer, _dtypes(tensors), stack)
        yield


def free_bytes(device: torch.device) -> int:
    """Available memory: on a GPU with torch's cache, on Linux with the file cache."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        told = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
        if told is not None:
            return 1024 * int(told)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # the system does not report it
        return 0


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of modules; a layer's own lists, such as experts, run inside it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _parts(inner: nn.Module) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Half-precision tensors outside all layers, and those of each layer; some belong to several."""
    layers = [_half(layer) for layer in _layers(inner)]
    inside = {id(tensor) for layer in layers for tensor in layer}
    return [tensor for tensor in _half(inner) if id(tensor) not in inside], layers


def _half(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16) and not is_packed(tensor)]


def _needed(tensors: Sequence[Tensor]) -> float:
    """Extra bytes needed to widen tensors one after the other."""
    sizes = list({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
    return SLACK * (sum(sizes) + max(sizes, default=0))


def _dtypes(tensors: Sequence[Tensor]) -> Narrow:
    return list({id(tensor): (tensor, tensor.dtype) for tensor in tensors}.values())


def _widen(narrow: Narrow) -> None:
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()


def _narrow(narrow: Narrow) -> None:
    for tensor, dtype in narrow:
        tensor.data = tensor.data.to(dtype)


def _widen_while_running(layer: nn.Module, narrow: Narrow, stack: ExitStack) -> None:
    """Until the stack closes; narrow again whatever the layer raises."""

    def before(*_: object) -> None:
        _widen(narrow)

    def after(*_: object) -> None:
        _narrow(narrow)

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, always_call=True).remove)


Tokens = tuple[int, ...]
Pairs = Iterator[tuple[Tensor, Tensor]]  # logits (N, V) of a way, and what whole rows give there
# Of logits, in units of their spread: another order of sums through all layers. A lost position or an ignored window
# gives 0.1 and more. In half precision the mean over positions counts: there a router's near tie sends a token
# elsewhere now and then, and what passes may still lack a position. It finds what breaks down in that dtype alone.
LIMITS = {"float64": 5e-4, "float32": 5e-4, "float16": 0.1, "bfloat16": 0.5}
LEAST_SPREAD = 0.02  # of the largest logit: what is spread less is equal
STEPS = (1, 1, 1, 2, 1, 1)  # tokens read at once
SEED = 0
# Windows, chunks and blocks of attention or of a scan, original lengths of rotary factors, positions that scale
# queries, keys that a sparse attention keeps.
LENGTHS = re.compile(
    r"window|chunk|local_att|original_max|floor_scale|n_floor|block_size|index_topk|sparse.*(size|length|topk)"
)
COUNTS = re.compile(r"(layers|pattern|heads|theta|factor|type|types)$")  # of something else, under a name like theirs


@dataclass(frozen=True)
class Probe:
    """``row`` crosses ``at`` tokens; ``fork`` begins with as many of it and ends otherwise; ``other`` is short.

    ``row_NV`` and ``fork_NV`` are the logits behind the positions from ``first`` on, ``other_NV`` those of all.
    """

    at: int
    row: Tokens
    fork: Tokens
    other: Tokens
    first: int
    row_NV: Tensor
    fork_NV: Tensor
    other_NV: Tensor

    def behind(self, length: int) -> Tensor:
        """Logits (1, V) behind the first ``length`` tokens of the row."""
        return self.row_NV[length - 1 - self.first, None]


def named_lengths(config: JsonObject) -> tuple[int, ...]:
    """The lengths that a config names anywhere, ascending."""
    return tuple(sorted({length for length in _lengths_in(config) if length > 1}))


def _lengths_in(value: object, named: bool = False) -> Iterator[int]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            is_length = bool(LENGTHS.search(str(name))) and not COUNTS.search(str(name))
            yield from _lengths_in(inner, is_length)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _lengths_in(inner, named)
    elif named and isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        yield int(value)


def make_probe(model: TransformersModel, at: int, length: int) -> Probe:
    """A probe across ``at`` tokens, its row ``length`` long: four passes without a cache."""
    tokens = drawn_tokens(model, 2 * length - at + 5)
    row, other = _with_padding(model, tokens[:length], at), tokens[length : length + 5]
    fork = row[:at] + tokens[length + 5 :][: length - at]
    first = max(0, at - 5)
    row_NV, fork_NV = (whole(model, ids, length - first) for ids in (row, fork))
    return Probe(at, row, fork, other, first, row_NV, fork_NV, whole(model, other, len(other)))


def whole(model: TransformersModel, row: Tokens, last: int) -> Tensor:
    """The reference: logits (last, V) after a row's last positions, by one pass over it alone."""
    return model.context_logits(_ids(row), last=last)[0]


def cached_steps(model: TransformersModel, probe: Probe) -> Pairs:
    """Steps across the length, one and several tokens at a time, beside a context that is dropped and another row;
    steps behind a row that was read across it; and, where rows run alone, a second row after the first."""
    start = max(1, probe.at - 3)
    context = model.prefill(_ids(probe.row[:start]))
    yield model.next_logits(context), probe.behind(start)
    if model.rows_together:
        model.extend(context, _ids(probe.other[:1]))
        beside = model.prefill(_ids(probe.other[:2]))
    sizes = [*STEPS, *([len(probe.row)] if model.pads_left else [])]  # states go on token by token: no more of them
    for size in sizes:
        piece = probe.row[start : start + size]
        if piece:
            start += len(piece)
            context = model.extend(context, _ids(piece))
            yield model.next_logits(context), probe.behind(start)
    if not model.rows_together:
        beside = model.prefill(_ids(probe.other[:1]))
        beside = model.extend(beside, _ids(probe.other[1:2]))
    yield model.next_logits(model.extend(beside, _ids(probe.other[2:3]))), probe.other_NV[2, None]
    context = model.prefill(_ids(probe.row[:-2]))
    for end in (-2, -1):
        context = model.extend(context, _ids((probe.row[end],)))
        yield model.next_logits(context), probe.row_NV[end, None]


def rows_together(model: TransformersModel, probe: Probe) -> Pairs:
    """Rows of unlike lengths beside each other, some across the length; some leave, another joins."""
    row, other = probe.row, probe.other
    near = max(1, probe.at - 2)
    rows = [(row, near), (other, 2), (other, 1), (row, len(row) - 2)]
    context = model.prefill(*_padded([tokens[:length] for tokens, length in rows]))
    yield model.next_logits(context), _behind(probe, rows)
    for _ in range(2):
        context, rows = _stepped(model, context, rows)
        yield model.next_logits(context), _behind(probe, rows)
    context, rows = context.select([0, 2]), [rows[0], rows[2]]
    if model.joins_contexts:
        context = context.join(model.prefill(_ids(other[:3])))
        rows.append((other, 3))
    context, rows = _stepped(model, context, rows)
    yield model.next_logits(context), _behind(probe, rows)


def beginnings(model: TransformersModel, probe: Probe) -> Pairs:
    """Rows that go on from one beginning, two by several tokens in one pass, another by fewer; where contexts can be
    joined, beside each other from then on."""
    start = max(1, probe.at - 2)
    beginning = model.prefill(_ids(probe.row[:start]))
    several = torch.tensor([tokens[start : probe.at + 2] for tokens in (probe.row, probe.row)])
    two = model.extend(beginning.select([0, 0]), several)
    yield model.next_logits(two), probe.behind(probe.at + 2).expand(2, -1)
    one = model.extend(beginning.select([0]), _ids(probe.row[start : probe.at]))
    yield model.next_logits(one), probe.behind(probe.at)
    if model.joins_contexts:
        rows = [(probe.row, probe.at + 2), (probe.row, probe.at + 2), (probe.row, probe.at)]
        context, rows = _stepped(model, two.join(one), rows)
        yield model.next_logits(context), _behind(probe, rows)


def passes(model: TransformersModel, probe: Probe) -> Pairs:
    """Whole rows in one pass: each beside a longer one, then another number of them."""
    three = model.context_logits(*_padded([probe.other, probe.row, probe.other[:1]]), last=2)
    yield three[0], probe.other_NV[-2:]
    yield three[1], probe.row_NV[-2:]
    yield three[2, 1:], probe.other_NV[:1]
    two = model.context_logits(*_padded([probe.row[:-1], probe.other[:3]]), last=1)
    yield two[0], probe.row_NV[-2, None]
    yield two[1], probe.other_NV[2, None]


def options(model: TransformersModel, probe: Probe) -> Pairs:
    """Two endings of a row beside each other, behind a context and behind none."""
    at, num_ends = probe.at, len(probe.row) - probe.at
    ends = [Segment(0, tokens[at:], tuple(range(num_ends))) for tokens in (probe.row, probe.fork)]
    wanted = torch.cat([probe.row_NV[at - 1 - probe.first :], probe.fork_NV[at - probe.first :]])
    for known in (0, max(1, at - 3)):
        context = model.prefill(_ids(probe.row[:known])) if known else None
        begin = Segment(-1, probe.row[known:at], (at - known - 1,))
        yield model.tree_logits(context, [begin, *ends]), wanted


def apart(pairs: Pairs, dtype: str) -> float:
    """How far a way's logits are from the reference: the worst position, or the mean in half precision."""
    ours, theirs = zip(*pairs, strict=True)
    return difference(torch.cat(ours), torch.cat(theirs), dtype)


def difference(ours_NV: Tensor, theirs_NV: Tensor, dtype: str) -> float:
    """The largest difference at each position, in units of the second's spread over the vocabulary; see ``LIMITS``.

    Infinite where either is not finite.
    """
    if not (torch.isfinite(ours_NV).all() and torch.isfinite(theirs_NV).all()):
        return float("inf")
    ours_NV, theirs_NV = ours_NV.cpu().double(), theirs_NV.cpu().double()  # MPS has no float64
    spread_N = torch.maximum(theirs_NV.std(-1), LEAST_SPREAD * theirs_NV.abs().amax(-1)).clamp(min=1e-30)
    apart_N = (ours_NV - theirs_NV).abs().amax(-1) / spread_N
    return float(apart_N.mean() if dtype in HALF_PRECISION else apart_N.max())


def _stepped(
    model: TransformersModel, context: CacheContext, rows: Sequence[tuple[Tokens, int]]
) -> tuple[CacheContext, list[tuple[Tokens, int]]]:
    """Every row's next token read."""
    ids_B1 = torch.tensor([[tokens[length]] for tokens, length in rows])
    return model.extend(context, ids_B1), [(tokens, length + 1) for tokens, length in rows]


def _behind(probe: Probe, rows: Sequence[tuple[Tokens, int]]) -> Tensor:
    known = {id(probe.row): probe.behind, id(probe.other): lambda length: probe.other_NV[length - 1, None]}
    found: list[Callable[[int], Tensor]] = [known[id(tokens)] for tokens, _ in rows]
    return torch.cat([behind(length) for behind, (_, length) in zip(found, rows, strict=True)])


def drawn_tokens(model: TransformersModel, number: int) -> Tokens:
    """Random tokens without those that the config names, which may be padding or pictures."""
    named: set[int] = set()
    for name, value in model.inner.config.to_dict().items():
        if "token_id" in name or "token_index" in name:
            named |= {value} if isinstance(value, int) else {*value} if isinstance(value, list) else set()
    usable = [token for token in range(model.vocab_size) if token not in named] or [0]
    drawn = torch.randint(len(usable), (number,), generator=torch.Generator().manual_seed(SEED))
    return tuple(usable[index] for index in drawn.tolist())


def _with_padding(model: TransformersModel, row: Tokens, at: int) -> Tokens:
    """A padding token in it, which may be a model's EOS, and is one of a context like others: what no attention mask
    covers is no padding. Some models count their positions by it."""
    pad = getattr(model.inner.config.get_text_config(), "pad_token_id", None)
    return (*row[: at - 1], pad, *row[at:]) if isinstance(pad, int) and 0 <= pad < model.vocab_size else row


def _ids(row: Sequence[int]) -> Tensor:
    return torch.tensor([row], dtype=torch.int64)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), [len(row) for row in rows]
