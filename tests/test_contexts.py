"""Contexts are values, rows do not see their neighbours' padding, and bfloat16 rounds where the reference does."""

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, tiny_pair
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.twotower import frequencies, sinusoid
from twotower_eval.records import Prompt

ATOL = 2e-5
K = 4
EVERY_MODEL = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def answers(model: Any, context: Any) -> Tensor:
    """All that can be asked of a context: logits of the next token and of a noisy block."""
    block_BK = ids(1, K, seed=9).expand(len(context.lengths), -1).clone()
    block_BK[:, 1::2] = model.mask_token_id
    denoised = model.denoise(block_BK, context, [0.5] * len(context.lengths))
    return torch.cat([model.next_logits(context)[:, None], denoised], dim=1)


def alone(model: Any, row: list[int]) -> Tensor:
    """The answers on a row's tokens prefilled at once, alone."""
    return answers(model, model.prefill(torch.tensor([row], dtype=torch.int64)))[0]


@EVERY_MODEL
def test_prefill_of_unequal_rows(name: str) -> None:
    """Padding is not seen, whatever stands there; the widest row may be shorter than the ids."""
    model, lengths = tiny_pair(name), [3, 1, 40, 7]
    rows = ids(4, 45)
    context = model.prefill(rows, lengths)
    assert context.lengths == tuple(lengths)
    got = answers(model, context)
    for row, length in enumerate(lengths):
        assert torch.allclose(got[row], alone(model, rows[row, :length].tolist()), atol=ATOL)


@EVERY_MODEL
def test_rows_of_no_tokens(name: str) -> None:
    """A length of 0 is legal beside others and alone, can be denoised upon and extended."""
    model, rows = tiny_pair(name), ids(3, 6)
    block = ids(3, K, seed=9)
    context = model.prefill(rows, [0, 6, 2])
    empty = model.prefill(rows[:1, :0])
    assert empty.lengths == (0,)
    denoised = model.denoise(block, context, [0.25, 0.5, 1.0])
    assert torch.allclose(denoised[0], model.denoise(block[:1], empty, [0.25])[0], atol=ATOL)
    extended = model.extend(context, block)
    got = answers(model, extended)
    for row, length in enumerate(extended.lengths):
        tokens = [*rows[row, : length - K].tolist(), *block[row].tolist()]
        assert torch.allclose(got[row], alone(model, tokens), atol=ATOL)


@EVERY_MODEL
def test_extending_is_prefilling_more(name: str) -> None:
    """Over many extensions of unequal rows, one token and a block at a time, past every growth of the buffer."""
    model, lengths = tiny_pair(name), [2, 5]
    rows = [r[:n].tolist() for r, n in zip(ids(2, 5), lengths, strict=True)]
    context = model.prefill(ids(2, 5), lengths)
    for step in range(40):
        new = ids(2, 1 if step % 3 else K, seed=step)
        context = model.extend(context, new)
        rows = [row + tokens for row, tokens in zip(rows, new.tolist(), strict=True)]
    got = answers(model, context)
    for row, tokens in enumerate(rows):
        assert torch.allclose(got[row], alone(model, tokens), atol=1e-4)


@EVERY_MODEL
@pytest.mark.parametrize("lengths", [[6, 6], [6, 2]])
def test_contexts_are_values(name: str, lengths: list[int]) -> None:
    """Extending an older context twice corrupts neither the newer one, nor the older, nor a selection of it."""
    model = tiny_pair(name)
    old = model.prefill(ids(2, 6), lengths)
    before, selection = answers(model, old), old.select([1, 0])
    first = model.extend(old, ids(2, K, seed=1))
    first_answers = answers(model, first)
    second = model.extend(old, ids(2, K, seed=2))
    second_answers = answers(model, second)
    first_longer = model.extend(first, ids(2, 1, seed=3))
    model.extend(selection, ids(2, K, seed=4))
    model.extend(second, ids(2, K, seed=5))
    assert torch.equal(answers(model, old), before)
    assert torch.equal(answers(model, first), first_answers)
    assert torch.equal(answers(model, second), second_answers)
    assert not torch.allclose(first_answers, second_answers, atol=0.01)
    for row, length in enumerate(lengths):
        tokens = [*ids(2, 6)[row, :length].tolist(), *ids(2, K, seed=1)[row].tolist(), int(ids(2, 1, seed=3)[row])]
        assert torch.allclose(answers(model, first_longer)[row], alone(model, tokens), atol=ATOL)


def test_contexts_leave_inference_mode() -> None:
    """What inference mode made can be extended outside it."""
    model = tiny_pair("all kinds")
    with torch.inference_mode():
        context = model.extend(model.prefill(ids(2, 6), [6, 2]), ids(2, K, seed=1))
    longer = model.extend(context, ids(2, 1, seed=2))
    tokens = [*ids(2, 6)[1, :2].tolist(), *ids(2, K, seed=1)[1].tolist(), *ids(2, 1, seed=2)[1].tolist()]
    assert torch.allclose(answers(model, longer)[1], alone(model, tokens), atol=ATOL)


@EVERY_MODEL
def test_denoising_changes_nothing(name: str) -> None:
    model = tiny_pair(name)
    context = model.prefill(ids(2, 6), [4, 6])
    before = answers(model, context)
    model.denoise(ids(2, 7, seed=3), context, None)
    assert torch.equal(answers(model, context), before)


@EVERY_MODEL
def test_selection_keeps_order_and_repeats(name: str) -> None:
    model, lengths, rows = tiny_pair(name), [5, 2, 7], ids(3, 7)
    context = model.prefill(rows, lengths)
    chosen = context.select([2, 0, 2])
    assert chosen.lengths == (7, 5, 7)
    assert torch.allclose(answers(model, chosen), answers(model, context)[[2, 0, 2]], atol=ATOL)
    shorter = context.select([1])
    assert shorter.max_length == 2
    grown = model.extend(shorter, ids(1, K, seed=1))
    tokens = [*rows[1, :2].tolist(), *ids(1, K, seed=1)[0].tolist()]
    assert torch.allclose(answers(model, grown)[0], alone(model, tokens), atol=ATOL)


@EVERY_MODEL
@pytest.mark.parametrize("first", [[5, 2, 7], [1], [0, 3]])
@pytest.mark.parametrize("second", [[9, 4], [1], [0]])
def test_joined_rows_are_those_of_both(name: str, first: list[int], second: list[int]) -> None:
    """Contexts of any lengths, the empty one too, joined and extended; neither part changes."""
    model, rows = tiny_pair(name), ids(5, 9)
    parts = [model.prefill(rows[: len(first)], first), model.prefill(rows[3 : 3 + len(second)], second)]
    before = [answers(model, part) for part in parts]
    joined = parts[0].join(parts[1])
    assert joined.lengths == (*first, *second)
    assert torch.allclose(answers(model, joined), torch.cat(before), atol=ATOL)
    new = ids(joined.batch_size, K, seed=2)
    grown = model.extend(joined, new)
    for part, before_BKV in zip(parts, before, strict=True):
        assert torch.equal(answers(model, part), before_BKV)
    for i, row in enumerate([*range(len(first)), *range(3, 3 + len(second))]):
        tokens = rows[row, : joined.lengths[i]].tolist() + new[i].tolist()
        assert torch.allclose(answers(model, grown)[i], alone(model, tokens), atol=ATOL)


@EVERY_MODEL
def test_rows_gathered_from_several_contexts(name: str) -> None:
    """In any order, from buffers of several sizes, with rows of no tokens; what they came from does not change."""
    model, rows = tiny_pair(name), ids(9, 90)
    long = model.prefill(rows[:3], [80, 3, 90])
    grown = model.extend(model.prefill(rows[3:6], [2, 20, 7]), ids(3, K, seed=1))
    parts = [(long, [1, 0]), (grown, [2]), (model.prefill(rows[6:], [5, 0, 9]), [2, 1]), (long, [2])]
    before = [answers(model, part) for part, _ in parts]
    gathered = long.gathered(parts)
    assert gathered.lengths == (3, 80, 11, 9, 0, 90)
    wanted = torch.cat([before_BKV[chosen] for before_BKV, (_, chosen) in zip(before, parts, strict=True)])
    assert torch.allclose(answers(model, gathered), wanted, atol=ATOL)
    new = ids(6, 20, seed=2)
    longer = model.extend(gathered, new)
    for (part, _), before_BKV in zip(parts, before, strict=True):
        assert torch.equal(answers(model, part), before_BKV)
    of_grown = [*rows[5, :7].tolist(), *ids(3, K, seed=1)[2].tolist()]
    for i, tokens in enumerate([rows[1, :3].tolist(), rows[0, :80].tolist(), of_grown, rows[8, :9].tolist(), []]):
        assert torch.allclose(answers(model, longer)[i], alone(model, tokens + new[i].tolist()), atol=1e-4)


@EVERY_MODEL
def test_the_last_position_alone(name: str) -> None:
    """Layers that serve each row's last position alone give it what it has among all; rows without new tokens keep
    theirs. In several pieces too."""
    model, rows = tiny_pair(name), ids(3, 150)
    for lengths in ([150, 150, 150], [150, 2, 70], [9, 64, 65]):
        context = model.prefill(rows, lengths)
        wanted = model.context_logits(rows, lengths, last=1)[:, 0]
        assert torch.allclose(model.next_logits(context), wanted, atol=1e-4)
        longer = model.extend(context, ids(3, K, seed=1), [0, K, 1])
        assert torch.equal(longer.last_hidden_BH[0], context.last_hidden_BH[0])
        for row, num_new in ((1, K), (2, 1)):
            tokens = rows[row, : lengths[row]].tolist() + ids(3, K, seed=1)[row, :num_new].tolist()
            assert torch.allclose(answers(model, longer)[row], alone(model, tokens), atol=1e-4)


@EVERY_MODEL
def test_context_logits_of_unequal_rows(name: str) -> None:
    """All positions or each row's last n; rows shorter than n repeat their first position on the left."""
    model, lengths, rows = tiny_pair(name), [6, 2, 4], ids(3, 6)
    every = model.context_logits(rows, torch.tensor(lengths))
    assert every.dtype == torch.float32
    last = model.context_logits(rows, lengths, last=3)
    assert last.shape == (3, 3, VOCAB)
    for row, length in enumerate(lengths):
        single = model.context_logits(rows[row : row + 1, :length])[0]
        assert torch.allclose(every[row, :length], single, atol=ATOL)
        columns = [max(0, length - 3 + i) for i in range(3)]
        assert torch.allclose(last[row], single[columns], atol=ATOL)


@EVERY_MODEL
def test_time_is_each_rows_own(name: str) -> None:
    """A t per row equals that row alone; one number is meant for all; None is no conditioning, unlike t = 0."""
    model = tiny_pair(name)
    context, block = model.prefill(ids(3, 5), [5, 1, 3]), ids(3, K, seed=1)
    rows = model.denoise(block, context, torch.tensor([1.0, 0.25, 0.0]))
    for row, t in enumerate((1.0, 0.25, 0.0)):
        single = model.denoise(block[row : row + 1], context.select([row]), t)
        assert torch.allclose(rows[row], single[0], atol=ATOL)
    assert torch.equal(model.denoise(block, context, 0.5), model.denoise(block, context, [0.5] * 3))
    assert not torch.allclose(model.denoise(block, context, 0.0), model.denoise(block, context, None), atol=0.01)


@pytest.mark.parametrize("lengths", [[4], [4, 7], [-1, 2]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        tiny_pair().prefill(ids(2, 6), lengths)
    with pytest.raises(ValueError, match="t_B has 3 entries for 2 rows"):
        tiny_pair().denoise(ids(2, K), tiny_pair().prefill(ids(2, 6)), [0.1, 0.2, 0.3])


def test_bfloat16_rounds_time_as_the_reference_does() -> None:
    """t = 0.1875 times 1000 is 187.5, which bfloat16 makes 188; in float32 it stays."""
    t = torch.tensor([0.1875])
    angles = frequencies(torch.device("cpu"))
    for dtype, scaled in ((torch.bfloat16, 188.0), (torch.float32, 187.5)):
        wanted = torch.cat([(scaled * angles).cos(), (scaled * angles).sin()])
        assert torch.equal(sinusoid(t, dtype)[0], wanted)
    assert sinusoid(t, torch.bfloat16).dtype == torch.float32


@EVERY_MODEL
def test_bfloat16(name: str) -> None:
    """Everything runs in bfloat16 and stays near float32; router weights and SSM states keep float32."""
    wide, narrow = tiny_pair(name), tiny_pair(name, torch.bfloat16)
    for parameter_name, parameter in narrow.named_parameters():
        router = parameter_name.endswith(("gate.weight", "e_score_correction_bias"))
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16), parameter_name
    rows, lengths = ids(3, 9), [9, 1, 4]
    contexts = [model.extend(model.prefill(rows, lengths), ids(3, K, seed=1)) for model in (wide, narrow)]
    for state in contexts[1].mamba.values():
        assert (state.ssm_BhPN.dtype, state.conv_BCW.dtype) == (torch.float32, torch.bfloat16)
    exact, rounded = (answers(model, context) for model, context in zip((wide, narrow), contexts, strict=True))
    assert rounded.dtype == torch.float32
    error = (exact - rounded).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.15  # a random router may choose another expert: a mean, not a maximum
    decoder = make_decoder(narrow, "block_diffusion", block_size=K, threshold=0.3)
    [g] = decoder.generate([Prompt(id="p", token_ids=(5, 6))], max_new_tokens=10)
    assert g.num_tokens == 10
