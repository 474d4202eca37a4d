"""A diffusion transformer of text in plain torch: the network of MDLM, BD3-LM and RADD.

Modules bear the checkpoints' own names. Keys are kept before they are rotated, so that a cache may be moved along the
positions. Shape letters: B rows, S new tokens, T key columns (those of the past first), H hidden size, J heads, D head
dim, C size of the condition, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Past
from twotower_eval.errors import FileError

NUM_FEATURES = 256  # of the noise level
SLOWEST = 1e4  # the longest wavelength of features of the noise level, and of rotary angles, over 2 pi
EPS = 1e-5
PARTS = 6  # of a block's modulation: shift, scale and gate of attention, then of the feed-forward part


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a network. ``condition`` None: it is told no noise level, and its norms have a bias."""

    vocab_size: int
    hidden_size: int
    num_blocks: int
    num_heads: int
    condition: int | None


class Norm(nn.Module):
    """Layer norm in float32 with a gain, maybe with a bias."""

    def __init__(self, size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x_BSH: Tensor) -> Tensor:
        """The same shape and dtype."""
        normed_BSH = nn.functional.layer_norm(x_BSH.float(), x_BSH.shape[-1:], eps=EPS) * self.weight
        return (normed_BSH if self.bias is None else normed_BSH + self.bias).to(x_BSH.dtype)


class Embedding(nn.Module):
    """Rows of a table by id."""

    def __init__(self, num: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num, size))

    def forward(self, ids_BS: Tensor) -> Tensor:
        """(B, S, H)."""
        return self.embedding[ids_BS]


class NoiseLevel(nn.Module):
    """What a network is told of the noise level: features of it, through two layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        first = nn.Linear(NUM_FEATURES, size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma_B: Tensor) -> Tensor:
        """The condition (B, C)."""
        half = NUM_FEATURES // 2
        frequencies = torch.exp(-math.log(SLOWEST) * torch.arange(half, device=sigma_B.device) / half)
        angles = sigma_B.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        condition_BC: Tensor = nn.functional.silu(self.mlp(features.to(next(self.mlp.parameters()).dtype)))
        return condition_BC


class Rotary(nn.Module):
    """The angles of positions; a buffer, as checkpoints hold it."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", SLOWEST ** (-torch.arange(0, head_dim, 2) / head_dim))

    def rotated(self, x_BJSD: Tensor, positions_BS: Tensor) -> Tensor:
        """Queries or keys at their positions; the first half of a head pairs with the second."""
        angles_BSd = positions_BS[:, :, None].float() * self.inv_freq.float()
        angles_B1SD = torch.cat([angles_BSd, angles_BSd], dim=-1)[:, None]
        first, second = x_BJSD.float().chunk(2, dim=-1)
        turned_BJSD = torch.cat([-second, first], dim=-1)
        return (x_BJSD.float() * angles_B1SD.cos() + turned_BJSD * angles_B1SD.sin()).to(x_BJSD.dtype)


@dataclass(frozen=True)
class View:
    """Where the tokens of a call stand, where all columns do, and which columns each token sees."""

    positions_BS: Tensor
    positions_BT: Tensor
    visible_BST: Tensor


class Block(nn.Module):
    """Attention and a feed-forward part, both after a norm, moved and gated by the condition if there is one."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, biased = sizes.hidden_size, sizes.condition is None
        self.num_heads = sizes.num_heads
        self.norm1, self.norm2 = Norm(hidden, bias=biased), Norm(hidden, bias=biased)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden)
        )
        if sizes.condition is not None:
            self.adaLN_modulation = nn.Linear(sizes.condition, PARTS * hidden)

    def forward(
        self, x_BSH: Tensor, condition_BC: Tensor | None, rotary: Rotary, view: View, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The tokens one layer on, and unrotated keys and values (B, J, T, D) of all columns."""
        if condition_BC is None:
            attended_BSH, kept = self._attended(self.norm1(x_BSH), rotary, view, past)
            x_BSH = x_BSH + attended_BSH
            return x_BSH + self.mlp(self.norm2(x_BSH)), kept
        parts = self.adaLN_modulation(condition_BC)[:, None].chunk(PARTS, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        attended_BSH, kept = self._attended(moved(self.norm1(x_BSH), shift_a, scale_a), rotary, view, past)
        x_BSH = x_BSH + gate_a * attended_BSH
        return x_BSH + gate_m * self.mlp(moved(self.norm2(x_BSH), shift_m, scale_m)), kept

    def _attended(
        self, x_BSH: Tensor, rotary: Rotary, view: View, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        num_rows, num_new, _ = x_BSH.shape
        heads = self.attn_qkv(x_BSH).view(num_rows, num_new, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        out_BJSD = nn.functional.scaled_dot_product_attention(
            rotary.rotated(query, view.positions_BS),
            rotary.rotated(key, view.positions_BT),
            value,
            attn_mask=view.visible_BST[:, None],
        )
        return self.attn_out(out_BJSD.transpose(1, 2).reshape(num_rows, num_new, -1)), (key, value)


def moved(x_BSH: Tensor, shift_B1H: Tensor, scale_B1H: Tensor) -> Tensor:
    """Adaptive layer norm: scaled by one more than the scale, then shifted."""
    return x_BSH * (1 + scale_B1H) + shift_B1H


class Head(nn.Module):
    """The last norm and the output matrix."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm_final = Norm(sizes.hidden_size, bias=sizes.condition is None)
        self.linear = nn.Linear(sizes.hidden_size, sizes.vocab_size)
        if sizes.condition is not None:
            self.adaLN_modulation = nn.Linear(sizes.condition, 2 * sizes.hidden_size)

    def forward(self, x_BSH: Tensor, condition_BC: Tensor | None) -> Tensor:
        """Logits (B, S, V) float32."""
        x_BSH = self.norm_final(x_BSH)
        if condition_BC is not None:
            x_BSH = moved(x_BSH, *self.adaLN_modulation(condition_BC)[:, None].chunk(2, dim=-1))
        logits_BSV: Tensor = self.linear(x_BSH).float()
        return logits_BSV


class DiT(nn.Module):
    """The network. Whoever calls it says where tokens stand, and what each sees."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vocab_embed = Embedding(sizes.vocab_size, sizes.hidden_size)
        if sizes.condition is not None:
            self.sigma_map = NoiseLevel(sizes.condition)
        self.rotary_emb = Rotary(sizes.hidden_size // sizes.num_heads)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_blocks))
        self.output_layer = Head(sizes)

    def nothing(self, num_rows: int) -> Past:
        """No columns yet."""
        sizes = self.sizes
        empty = self.vocab_embed.embedding.new_zeros(num_rows, sizes.num_heads, 0, sizes.hidden_size // sizes.num_heads)
        return Past((empty,) * sizes.num_blocks, (empty,) * sizes.num_blocks)

    def read(
        self, ids_BS: Tensor, view: View, past: Past | None = None, *, sigma_B: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """Logits (B, S, V) float32 at every token, and unrotated keys and values of the past's columns, then of these.

        ``sigma_B`` None: no noise level, which a network that takes one is told as 0.
        """
        device = self.vocab_embed.embedding.device
        past = past or self.nothing(len(ids_BS))
        view = View(view.positions_BS.to(device), view.positions_BT.to(device), view.visible_BST.to(device))
        condition_BC = None
        if self.sizes.condition is not None:
            sigma_B = torch.zeros(len(ids_BS)) if sigma_B is None else sigma_B
            condition_BC = self.sigma_map(sigma_B.to(device))
        x_BSH = self.vocab_embed(ids_BS.to(device))
        kept = []
        for block, *before in zip(self.blocks, past.keys, past.values, strict=True):
            x_BSH, columns = block(x_BSH, condition_BC, self.rotary_emb, view, tuple(before))
            kept.append(columns)
        return self.output_layer(x_BSH, condition_BC), Past(tuple(k for k, _ in kept), tuple(v for _, v in kept))

    def whole(self, ids_BS: Tensor, lengths: Sequence[int], *, sigma_B: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of rows padded on the right, in which every token sees its whole row."""
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        visible_BST = (positions_BS < torch.tensor(list(lengths))[:, None])[:, None].expand(-1, ids_BS.shape[1], -1)
        return self.read(ids_BS, View(positions_BS, positions_BS, visible_BST), sigma_B=sigma_B)[0]


def new_dit(sizes: Sizes, std: float = 0.05) -> DiT:
    """One to be trained: weights drawn from torch's generator, and all gates closed, so that each block begins as the
    identity (adaLN-Zero, arXiv 2212.09748)."""
    network = DiT(sizes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name:
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std)
    return network


def load_dit(folder: Path, sizes: Sizes, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: str) -> DiT:
    """The network with these tensors. FileError for names or shapes that do not fit; rotary frequencies, which follow
    from the sizes, may be absent."""
    with torch.device("meta"):
        network = DiT(sizes)
    wanted = network.state_dict()
    given = {"rotary_emb.inv_freq": Rotary(sizes.hidden_size // sizes.num_heads).inv_freq, **tensors}
    for problem, names in (("lacks", wanted.keys() - given.keys()), ("has unexpected", given.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            first = sorted(names)[0]
            raise FileError(f"{folder}: checkpoint {problem} tensor {first}{more}; it does not fit its config.json")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{list(tensor.shape)}, but its config.json makes it {list(wanted[name].shape)}"
            raise FileError(f"{folder}: checkpoint tensor {name} has shape {shapes}")
    network.load_state_dict(given, assign=True)
    keep = network.rotary_emb.inv_freq.float()
    network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    network.rotary_emb.inv_freq = keep.to(device)
    return network
