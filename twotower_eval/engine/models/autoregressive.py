"""The context tower with its head: a causal language model; alone, the autoregressive baseline of a pair.

Shape letters: see ops/__init__.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.config import NemotronHConfig
from twotower_eval.engine.models.context import (
    Context,
    KeyValueBuffer,
    Writer,
    ends_of,
    logits_by_rows,
    writable_buffer,
)
from twotower_eval.engine.models.graphs import StepGraphs
from twotower_eval.engine.models.nemotron_h import Attention, Mamba, MambaState, Tower, run_layers
from twotower_eval.engine.models.protocol import Segment
from twotower_eval.engine.ops import product
from twotower_eval.engine.ops.attention import attend as attend_to
from twotower_eval.engine.ops.attention import attention, kernel_for_few, seen

PIECE_ROWS, MIN_PIECE = 256, 64  # token rows that a CPU takes at once; positions of a piece, however many its rows


class ContextTower(LanguageModel):
    """Causal tower and head. Rows of a batch are right-padded; values after ``lengths_B`` have no effect.

    ``last_alone``: if only the last position is needed, a CPU computes only that one in the layers after the last that
    mixes positions.
    """

    branch_tokens = 2048
    verifies = uneven_rows = True
    verified_up_to = None

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = config
        self.graphs: StepGraphs | None = None
        self.last_alone = True
        self.tower = Tower(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """The device of this tower's weights."""
        return self.head.weight.device

    @property
    def step_devices(self) -> tuple[torch.device, ...]:
        """The devices of the steps, see :class:`models.graphs.Stepped`."""
        return (self.device,)

    def take_steps_from(self, graphs: StepGraphs) -> None:
        """Use these graphs for small extensions from now on."""
        self.graphs = graphs

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """Run the tower over prompts. A length of 0 is legal and gives the empty context."""
        lengths = host_lengths(ids_BS, lengths_B)
        ids_BS = ids_BS[:, : max(lengths)]
        empty = self.empty_context(ids_BS.shape[0])
        return self._advance(empty, ids_BS, lengths, last=True)[0] if max(lengths) else empty

    def extend(self, context: Context, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """The context after K more tokens in every row, or ``lengths_B`` of them. ``context`` itself stays valid."""
        if lengths_B is None and self.graphs is not None and self.graphs.serves(*ids_BK.shape):
            return self.graphs.extend(self, context, ids_BK)
        return self._advance(context, ids_BK, host_lengths(ids_BK, lengths_B), last=True)[0]

    def extend_logits(
        self, context: Context, ids_BK: Tensor, lengths_B: Sequence[int], wanted: Sequence[tuple[int, int]]
    ) -> tuple[Context, Tensor]:
        """See :meth:`extend`; also logits (M, V) float32 after the ``wanted`` (row, column) among the new tokens."""
        extended, hidden_BKH = self._advance(context, ids_BK, host_lengths(ids_BK, lengths_B))
        places_M2 = torch.tensor(wanted, dtype=torch.int64, device=hidden_BKH.device).view(-1, 2)
        return extended, self._logits(hidden_BKH[places_M2[:, 0], places_M2[:, 1]])

    def tree_logits(self, context: Context | None, segments: Sequence[Segment]) -> Tensor:
        """Logits (M, V) float32 after the wanted positions of a token tree on a context of one row, in their order.

        ``None`` is the empty context.
        """
        return logits_by_rows(self, self.empty_context(1) if context is None else context, segments)

    def next_logits(self, context: Context) -> Tensor:
        """Logits of each row's next token, (B, V) float32."""
        return self._logits(context.last_hidden_BH)

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """Logits after every position, (B, S, V) float32; with ``last`` = n only after each row's last n, (B, n, V).

        Rows shorter than n repeat their first position on the left.
        """
        lengths = host_lengths(ids_BS, lengths_B)
        _, hidden_BSH = self._advance(self.empty_context(ids_BS.shape[0]), ids_BS, lengths)
        if last is not None:
            ends_B = torch.tensor(lengths, device=hidden_BSH.device)
            columns_BS = (ends_B[:, None] + torch.arange(-last, 0, device=hidden_BSH.device)).clamp(min=0)
            hidden_BSH = hidden_BSH.gather(1, columns_BS[..., None].expand(-1, -1, hidden_BSH.shape[-1]))
        return self._logits(hidden_BSH)

    def empty_context(self, batch_size: int) -> Context:
        """The context of no tokens; its next-token logits, those of a zero hidden state, mean nothing."""
        cfg, weight = self.config, self.head.weight
        shape = (batch_size, cfg.num_key_value_heads, 0, cfg.head_dim)
        mixers = {i: layer.mixer for i, layer in enumerate(self.tower.layers)}
        attentions = [i for i, mixer in mixers.items() if isinstance(mixer, Attention)]
        return Context(
            lengths=(0,) * batch_size,
            buffer=KeyValueBuffer(
                {i: weight.new_empty(shape) for i in attentions}, {i: weight.new_empty(shape) for i in attentions}, 0
            ),
            write_mark=0,
            mamba={i: mixer.empty_state(batch_size) for i, mixer in mixers.items() if isinstance(mixer, Mamba)},
            last_hidden_BH=weight.new_zeros(batch_size, cfg.hidden_size),
        )

    def _advance(
        self, context: Context, ids_BS: Tensor, new_lengths: tuple[int, ...], *, last: bool = False
    ) -> tuple[Context, Tensor]:
        """The context after the new tokens, and their hidden states (B, S, H) before the final norm; with ``last``,
        those computed for each row's last token.

        A CPU reads in pieces that fit its cache; memory grows with S only by hidden states.
        """
        num_new, width = ids_BS.shape[1], max(MIN_PIECE, PIECE_ROWS // ids_BS.shape[0])
        if self.device.type != "cpu" or num_new <= width:
            return self._advance_at_once(context, ids_BS, new_lengths, last)
        hidden = []
        for start in range(0, num_new, width):
            piece_BS = ids_BS[:, start : start + width]
            lengths = tuple(min(max(length - start, 0), piece_BS.shape[1]) for length in new_lengths)
            context, hidden_BSH = self._advance_at_once(context, piece_BS, lengths, last)
            hidden.append(hidden_BSH)
        return context, context.last_hidden_BH[:, None] if last else torch.cat(hidden, dim=1)

    def _advance_at_once(
        self, context: Context, ids_BS: Tensor, new_lengths: tuple[int, ...], last: bool
    ) -> tuple[Context, Tensor]:
        num_new, device = ids_BS.shape[1], self.device
        padded = any(length != num_new for length in new_lengths)
        new_lengths_B = torch.tensor(new_lengths, device=device) if padded else None
        valid_BS = torch.arange(num_new, device=device) < new_lengths_B[:, None] if new_lengths_B is not None else None
        buffer, write = writable_buffer(context, num_new), Writer(context.lengths, num_new, device)
        end = context.max_length + num_new
        few = kernel_for_few(self.head.weight, context.batch_size, num_new, end, self.config.head_dim) is not None
        ends_B = ends_of(context, device) if few else None
        mask, causal = (None, False) if few else _causal_mask(context, num_new, device)
        mamba: dict[int, MambaState] = {}

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            write(buffer.keys[index], k)
            write(buffer.values[index], v)
            keys, values = buffer.keys[index][:, :, :end], buffer.values[index][:, :, :end]
            if ends_B is not None:
                return attend_to(q, keys, values, ends_B, end, behind=False)
            return attention(q, keys, values, mask, is_causal=causal)

        def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
            y: Tensor
            y, mamba[index] = mixer(x, context.mamba[index], valid_BS, new_lengths_B)
            return y

        x_BSH = self.tower.embed(ids_BS.to(device=device, dtype=torch.int64))
        alone = last and self.last_alone and num_new > 1 and device.type == "cpu"
        wanted = (lambda x: _last_column(x, new_lengths_B)) if alone else None
        x_BSH = run_layers(self.tower, x_BSH, attend=attend, mix=mix, wanted=wanted)
        last_BH = x_BSH[:, -1] if x_BSH.shape[1] == 1 else _last_column(x_BSH, new_lengths_B)[:, 0]
        buffer.num_writes += 1
        extended = Context(
            lengths=tuple(old + new for old, new in zip(context.lengths, new_lengths, strict=True)),
            buffer=buffer,
            write_mark=buffer.num_writes,
            mamba=mamba,
            last_hidden_BH=_last_hidden(last_BH, new_lengths_B, context),
        )
        return extended, x_BSH

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = product.linear(self.tower.norm_f(hidden), self.head.weight)
        return logits.float()


def _causal_mask(context: Context, num_new: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """Mask (B, 1, S, T) or None, and whether plain causality is all of it. Slots below a query's position are real."""
    if context.uniform and num_new == 1:
        return None, False
    if context.max_length == 0:
        return None, True
    return seen(ends_of(context, device), num_new, context.max_length + num_new, behind=False)[1], False


def _last_column(x_BSH: Tensor, new_lengths_B: Tensor | None) -> Tensor:
    """Each row's last real position, (B, 1, H); the first one for rows without any."""
    if new_lengths_B is None:
        return x_BSH[:, -1:]
    index_B = (new_lengths_B - 1).clamp(min=0)
    return x_BSH.gather(1, index_B[:, None, None].expand(-1, 1, x_BSH.shape[-1]))


def _last_hidden(last_BH: Tensor, new_lengths_B: Tensor | None, context: Context) -> Tensor:
    """Each row's hidden state at its last real token; rows without new tokens keep their old one."""
    if new_lengths_B is None:
        return last_BH
    return torch.where(new_lengths_B[:, None] > 0, last_BH, context.last_hidden_BH.to(last_BH.dtype))


def host_lengths(ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    """Lengths as host integers, checked against the batch; None: all rows are full."""
    batch_size, width = ids_BS.shape
    if lengths_B is None:
        return (width,) * batch_size
    lengths = tuple(int(n) for n in (lengths_B.tolist() if isinstance(lengths_B, Tensor) else lengths_B))
    if len(lengths) != batch_size or any(not 0 <= n <= width for n in lengths):
        raise ValueError(f"lengths {lengths} do not fit token ids of shape {tuple(ids_BS.shape)}")
    return lengths
