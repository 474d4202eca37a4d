"""Training batches, and how training runs the towers: the context tower over whole documents, the denoiser over all
blocks at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch import Tensor

from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.engine.models.nemotron_h import Mamba, MambaState, run_layers
from twotower_eval.engine.models.twotower import Denoiser, TwoTower
from twotower_eval.engine.ops import ssd
from twotower_eval.engine.ops.attention import attention
from twotower_eval.miniature.corpus import SHORT, Corpus, Document, training_documents
from twotower_eval.miniature.export import EOS_ID, PAD_ID, encode

SEPARATOR_SHARE = 0.1  # share of documents that follow an EOS, as in running text
PROMPT_WEIGHT = 0.1  # weight of a prompt token's loss in AR training: most prompts are random by design
FILLER_WEIGHT = 0.1  # weight of an EOS after the first one in a denoiser's loss


@dataclass(frozen=True)
class Batch:
    """A batch: token ids (N, S), which of them are real, prompt columns P, and each answer's length with its EOS."""

    ids_NS: Tensor
    valid_NS: Tensor
    num_prompt_columns: int
    answer_lengths_N: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(
            self.ids_NS.to(device), self.valid_NS.to(device), self.num_prompt_columns, self.answer_lengths_N.to(device)
        )

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding and filler not counted."""
        return int(self.valid_NS[:, : self.num_prompt_columns].sum() + self.answer_lengths_N.sum())


def make_batch(documents: list[tuple[list[int], list[int]]], multiple: int) -> Batch:
    """Lay out (prompt ids, answer ids with EOS) so that all answers start at one column, a multiple of ``multiple``."""
    prompt_columns = _rounded_up(max(len(prompt) for prompt, _ in documents), multiple)
    answer_columns = _rounded_up(max(len(answer) for _, answer in documents), multiple)
    rows, valid = [], []
    for prompt, answer in documents:
        padding = prompt_columns - len(prompt)
        rows.append([PAD_ID] * padding + prompt + answer + [EOS_ID] * (answer_columns - len(answer)))
        valid.append([False] * padding + [True] * (len(prompt) + answer_columns))
    lengths_N = torch.tensor([len(answer) for _, answer in documents])
    return Batch(torch.tensor(rows), torch.tensor(valid), prompt_columns, lengths_N)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def training_batches(
    seed: int, *, columns_per_batch: int, multiple: int, pool_size: int, corpus: Corpus = SHORT
) -> Iterator[Batch]:
    """An endless stream of batches. Each pool of documents is sorted by shape, cut into batches, and these are
    shuffled."""
    rng = Random(f"batches {seed}")
    stream = training_documents(seed, corpus=corpus)
    while True:
        pool = [encoded(document, rng) for document in islice(stream, pool_size)]
        pool.sort(key=lambda d: (_rounded_up(len(d[1]), multiple), _rounded_up(len(d[0]), multiple), rng.random()))
        batches, rest = [], pool
        while rest:
            taken = _take(rest, columns_per_batch, multiple)
            batches.append(make_batch(rest[:taken], multiple))
            rest = rest[taken:]
        rng.shuffle(batches)
        yield from batches


def encoded(document: Document, rng: Random) -> tuple[list[int], list[int]]:
    """The ids of a document's prompt, sometimes behind an EOS as in running text, and of its answer with EOS."""
    separator = [EOS_ID] if rng.random() < SEPARATOR_SHARE else []
    return separator + encode(document.prompt), [*encode(document.answer), EOS_ID]


def _take(documents: list[tuple[list[int], list[int]]], columns: int, multiple: int) -> int:
    """How many of the sorted documents fit into one batch of at most ``columns`` padded tokens."""
    widest_prompt = widest_answer = 0
    for count, (prompt, answer) in enumerate(documents):
        widest_prompt = max(widest_prompt, _rounded_up(len(prompt), multiple))
        widest_answer = max(widest_answer, _rounded_up(len(answer), multiple))
        if count and (count + 1) * (widest_prompt + widest_answer) > columns:
            return count
    return len(documents)


@dataclass(frozen=True)
class CleanStates:
    """The context that the denoiser reads: keys and values (N, J, S, D) and, before each block at or after the prompt's
    end, the Mamba states (N, blocks, ...)."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    mamba: dict[int, MambaState]


def run_clean(
    model: ContextTower, batch: Batch, block_size: int | None, *, mixed_precision: bool = False
) -> tuple[Tensor, CleanStates]:
    """Hidden states (N, S, H) of the context tower, and with a ``block_size`` the states that blocks start from.

    With ``mixed_precision`` the linear layers multiply in bfloat16; scan, attention and residual stay in float32.
    """
    ids_NS, valid_NS = batch.ids_NS, batch.valid_NS
    width = ids_NS.shape[1]
    causal_SS = torch.ones(width, width, dtype=torch.bool, device=ids_NS.device).tril()
    itself_SS = torch.eye(width, dtype=torch.bool, device=ids_NS.device)
    mask_N1SS = ((causal_SS & valid_NS[:, None]) | itself_SS)[:, None]
    states = CleanStates({}, {}, {})
    chunk = block_size or ssd.CHUNK
    device = ids_NS.device.type

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states.keys[index], states.values[index] = k, v
        with torch.autocast(device, enabled=False):
            return attention(q.float(), k.float(), v.float(), mask_N1SS)

    def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
        start = mixer.empty_state(x.shape[0])
        z, u, delta = mixer.project(x, valid_NS)
        with torch.autocast(device, enabled=False):
            xs, b, c = mixer.convolve(u.float(), start.conv_BCW)
            y, boundaries = ssd.ssd_chunked(xs, delta, mixer.decay_rate(), b, c, start.ssm_BhPN, chunk=chunk)
        if block_size is not None:
            first = batch.num_prompt_columns // block_size
            tails = _conv_tails(u, mixer.config.conv_kernel, batch.num_prompt_columns, block_size)
            states.mamba[index] = MambaState(tails, boundaries[:, first:-1])
        return mixer.finish(y, xs, z)

    with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed_precision):
        x_NSH = run_layers(model.tower, model.tower.embed(ids_NS), attend=attend, mix=mix)
    return x_NSH, states


def _conv_tails(u_NSC: Tensor, num_taps: int, first_column: int, block_size: int) -> Tensor:
    """The last W raw inputs before each block, (N, blocks, C, W)."""
    starts = torch.arange(first_column, u_NSC.shape[1], block_size, device=u_NSC.device)
    columns = starts[:, None] + torch.arange(-num_taps, 0, device=u_NSC.device)
    return u_NSC[:, columns].transpose(2, 3)


def autoregressive_loss(model: ContextTower, batch: Batch, *, mixed_precision: bool = False) -> Tensor:
    """Mean negative log-likelihood (nats) of the next token; prompts have a small weight, filler none."""
    hidden_NSH, _ = run_clean(model, batch, None, mixed_precision=mixed_precision)
    width, start = batch.ids_NS.shape[1], batch.num_prompt_columns
    column_S = torch.arange(width, device=batch.ids_NS.device)
    weights_NS = torch.where(
        column_S < start, PROMPT_WEIGHT, (column_S < start + batch.answer_lengths_N[:, None]) * 1.0
    )
    weights_NS = weights_NS[:, 1:] * batch.valid_NS[:, :-1]
    chosen = weights_NS > 0
    logits_RV = model.head(model.tower.norm_f(hidden_NSH[:, :-1][chosen])).float()
    losses_R = torch.nn.functional.cross_entropy(logits_RV, batch.ids_NS[:, 1:][chosen], reduction="none")
    return (losses_R * weights_NS[chosen]).sum() / weights_NS.sum()


@dataclass(frozen=True)
class Noise:
    """Masked answers: ids (D, N, blocks, K), which are masked, the mask fraction of each block (D, N, blocks)."""

    ids: Tensor
    masked: Tensor
    t: Tensor


def draw_noise(
    batch: Batch,
    block_size: int,
    num_draws: int,
    mask_id: int,
    generator: torch.Generator,
    *,
    full_share: float,
    suffix_share: float,
) -> Noise:
    """Mask each block's tokens with its own probability, uniform in (0, 1), except that a ``full_share`` of blocks is
    masked wholly and a ``suffix_share`` of the others from a random position on.

    Decoding starts from wholly masked blocks and mostly fills them from the left, which scattered masks hardly ever
    show. At least one token is masked, so that every block contributes to the loss.
    """
    answers = batch.ids_NS[:, batch.num_prompt_columns :].unflatten(1, (-1, block_size))
    shape = (num_draws, *answers.shape)
    device = answers.device
    rate = torch.rand(shape[:-1], generator=generator, device=device)
    full = torch.rand(shape[:-1], generator=generator, device=device) < full_share
    noise = torch.rand(shape, generator=generator, device=device)
    masked = (noise < torch.where(full, 1.0, rate)[..., None]) | (noise == noise.amin(-1, keepdim=True))
    if suffix_share > 0:
        from_left = ~full & (torch.rand(shape[:-1], generator=generator, device=device) < suffix_share)
        first = torch.randint(block_size, shape[:-1], generator=generator, device=device)
        suffix = torch.arange(block_size, device=device) >= first[..., None]
        masked = torch.where(from_left[..., None], suffix, masked)
    ids = torch.where(masked, mask_id, answers.expand(shape))
    return Noise(ids, masked, masked.float().mean(-1))


@torch.no_grad()
def reveal(noise: Noise, logits: Tensor, batch: Batch, mask_id: int, generator: torch.Generator) -> Noise:
    """The masks left after a pass: right tokens stand where it was surest, as in decoding.

    Each block has its own threshold from 0.5 to 0.99, with 1 - threshold log-uniform. The surest masked token is always
    revealed and the least sure never, so that every block keeps contributing.
    """
    allowed = logits.view(*noise.ids.shape, -1).index_fill(-1, torch.tensor(mask_id, device=logits.device), -torch.inf)
    confidence = allowed.softmax(-1).amax(-1)
    draw = torch.rand(noise.t.shape, generator=generator, device=noise.t.device)
    threshold = 1 - 10 ** -(0.3 + 1.7 * draw)
    surest = confidence.masked_fill(~noise.masked, -1.0)
    least = confidence.masked_fill(~noise.masked, 2.0)
    taken = (surest > threshold[..., None]) | (surest == surest.amax(-1, keepdim=True))
    masked = noise.masked & (~taken | (least == least.amin(-1, keepdim=True)))
    return Noise(torch.where(masked, mask_id, _answers(batch, noise)), masked, masked.float().mean(-1))


def _answers(batch: Batch, noise: Noise) -> Tensor:
    """The clean answers in blocks, (D, N, blocks, K)."""
    block_size = noise.ids.shape[-1]
    answers = batch.ids_NS[:, batch.num_prompt_columns :].unflatten(1, (-1, block_size))
    expanded: Tensor = answers.expand(noise.ids.shape)
    return expanded


def teacher_probabilities(model: ContextTower, batch: Batch, hidden_NSH: Tensor) -> Tensor:
    """The context tower's distribution of each answer token given the right ones before it, (N, columns, V)."""
    before_NAH = hidden_NSH[:, batch.num_prompt_columns - 1 : -1]
    probabilities_NAV: Tensor = model.head(model.tower.norm_f(before_NAH)).float().softmax(-1)
    return probabilities_NAV


def denoiser_loss(
    model: TwoTower,
    batch: Batch,
    states: CleanStates,
    noise: Noise,
    *,
    mixed_precision: bool = False,
    teacher_NAV: Tensor | None = None,
    soft_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood (nats) at masked positions, and the share of them predicted right.

    The 1/t weight of the bound is dropped. Blocks of filler only do not count. A ``soft_share`` of the target is the
    teacher's distribution.
    """
    logits = denoise_blocks(model.denoiser, batch, states, noise, mixed_precision=mixed_precision)
    return masked_loss(logits, batch, noise, teacher_NAV, soft_share)


def chained_loss(
    model: TwoTower,
    batch: Batch,
    states: CleanStates,
    noise: Noise,
    generator: torch.Generator,
    *,
    num_passes: int,
    mixed_precision: bool = False,
    teacher_NAV: Tensor | None = None,
    soft_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`denoiser_loss` averaged over passes, each on the masks that the last one left: the states of decoding."""
    losses, rights = [], []
    for number in range(num_passes):
        logits = denoise_blocks(model.denoiser, batch, states, noise, mixed_precision=mixed_precision)
        loss, right = masked_loss(logits, batch, noise, teacher_NAV, soft_share)
        losses.append(loss)
        rights.append(right)
        if number + 1 < num_passes:
            noise = reveal(noise, logits, batch, model.config.mask_token_id, generator)
    return torch.stack(losses).mean(), torch.stack(rights).mean()


def masked_loss(
    logits: Tensor, batch: Batch, noise: Noise, teacher_NAV: Tensor | None, soft_share: float
) -> tuple[Tensor, Tensor]:
    """The loss of these logits (D * N * blocks, K, V) and the share predicted right, see :func:`denoiser_loss`."""
    _, _, blocks, block_size = noise.ids.shape
    logits_RV, targets_R = logits.flatten(0, 1), _answers(batch, noise).flatten()
    column = torch.arange(blocks * block_size, device=targets_R.device).view(blocks, block_size)
    lengths = batch.answer_lengths_N[:, None, None]
    weights = torch.where(column < lengths, 1.0, FILLER_WEIGHT) * (column[:, :1] < lengths)
    weights_R = (weights * noise.masked).flatten()
    losses_R = torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="none")
    if teacher_NAV is not None and soft_share > 0:
        teacher = teacher_NAV.unflatten(1, (blocks, block_size)).expand(*noise.ids.shape, -1)
        soft_R = torch.nn.functional.cross_entropy(logits_RV, teacher.flatten(0, -2), reduction="none")
        taught_R = soft_share * (column < lengths).expand(noise.ids.shape).flatten()
        losses_R = losses_R + taught_R * (soft_R - losses_R)
    right_R = (logits_RV.argmax(-1) == targets_R) * weights_R
    return (losses_R * weights_R).sum() / weights_R.sum(), right_R.sum() / weights_R.sum()


def denoise_blocks(
    denoiser: Denoiser, batch: Batch, states: CleanStates, noise: Noise, *, mixed_precision: bool = False
) -> Tensor:
    """Logits (D * N * blocks, K, V) for every block of every document under every draw, in one pass.

    With ``mixed_precision`` the linear layers multiply in bfloat16; the scan, attention, residual stream and head
    stay in float32.
    """
    draws, documents, blocks, block_size = noise.ids.shape
    mask = _block_mask(batch, blocks, block_size).repeat(draws, 1, 1, 1)
    device = batch.ids_NS.device.type

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_join_blocks(t.float(), draws * documents) for t in (q, k, v))
        keys = torch.cat([states.keys[index].repeat(draws, 1, 1, 1), k], dim=2)
        values = torch.cat([states.values[index].repeat(draws, 1, 1, 1), v], dim=2)
        with torch.autocast(device, enabled=False):
            return _split_blocks(attention(q, keys, values, mask), blocks)

    def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
        seed = MambaState(*(t.flatten(0, 1).repeat(draws, *[1] * (t.ndim - 2)) for t in states.mamba[index]))
        z, u, delta = mixer.project(x)
        with torch.autocast(device, enabled=False):
            xs, b, c = mixer.convolve(u.float(), seed.conv_BCW)
            y, _ = ssd.ssd(xs, delta, mixer.decay_rate(), b, c, seed.ssm_BhPN)
        return mixer.finish(y, xs, z)

    x = denoiser.tower.embed(noise.ids.flatten(0, 2))
    modulation = denoiser.modulation(noise.t.flatten())
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed_precision):
        x = run_layers(denoiser.tower, x, attend=attend, mix=mix, modulation=modulation)
    return denoiser.logits(x)


def _join_blocks(heads: Tensor, rows: int) -> Tensor:
    """(rows * blocks, heads, K, D) -> (rows, heads, blocks * K, D)."""
    joined: Tensor = heads.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)
    return joined


def _split_blocks(heads: Tensor, blocks: int) -> Tensor:
    """(rows, heads, blocks * K, D) -> (rows * blocks, heads, K, D)."""
    split: Tensor = heads.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1)
    return split


def _block_mask(batch: Batch, blocks: int, block_size: int) -> Tensor:
    """Mask (N, 1, blocks * K, S + blocks * K): a noisy block sees the clean context before it, and all of itself."""
    device = batch.ids_NS.device
    block = torch.arange(blocks, device=device).repeat_interleave(block_size)
    clean_block = (torch.arange(batch.ids_NS.shape[1], device=device) - batch.num_prompt_columns) // block_size
    past = (clean_block < block[:, None])[None] & batch.valid_NS[:, None]
    own = (block[:, None] == block)[None].expand(past.shape[0], -1, -1)
    return torch.cat([past, own], dim=2)[:, None]
