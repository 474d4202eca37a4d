"""Every fast path against its plain reference: shapes, seeds, masks, groups, and bfloat16 within a stated tolerance."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from twotower_eval.engine.ops import attention, mamba, moe, norm, product, ssd

FLOAT32_RTOL = 2e-6  # of the largest value; sums in another order
DTYPES = [torch.float32, torch.bfloat16]
BFLOAT16_RTOL = 2e-2  # of the largest value: 8 bits of mantissa, a few roundings


def close(ours: Tensor, reference: Tensor, rtol: float = FLOAT32_RTOL) -> bool:
    """Whether the largest difference is within ``rtol`` of the largest value."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    ours, reference = ours.detach(), reference.detach()
    scale = float(reference.abs().max()) or 1.0
    return float((ours.double() - reference.double()).abs().max()) <= rtol * scale


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- state space recurrence


def ssd_inputs(S: int, G: int = 2, B: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    h, P, N = 4, 8, 6
    delta = torch.nn.functional.softplus(noise(B, S, h, seed=2, dtype=dtype))
    rate = -noise(h, seed=3, dtype=dtype).exp()
    b, c = noise(B, S, G, N, seed=4, dtype=dtype), noise(B, S, G, N, seed=5, dtype=dtype)
    return noise(B, S, h, P, seed=1, dtype=dtype), delta, rate, b, c, noise(B, h, P, N, seed=6, dtype=dtype)


@pytest.mark.parametrize(("S", "G"), [*itertools.product([1, 2, 31, 32, 33, 100], [1, 2, 4])])
def test_ssd(S: int, G: int) -> None:
    """From a seeded state, for lengths below, at and above whole chunks."""
    inputs = ssd_inputs(S, G)
    (y, state), (wanted_y, wanted_state) = ssd.ssd(*inputs), ssd.ssd_reference(*inputs)
    assert close(y, wanted_y)
    assert close(state, wanted_state)
    assert close(ssd.ssd_outputs(*inputs), wanted_y)


@pytest.mark.parametrize("chunk", [1, 3, 16, 50, 64])
def test_ssd_does_not_depend_on_chunk_size(chunk: int) -> None:
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        inputs = ssd_inputs(50, dtype=dtype)
        y, boundaries = ssd.ssd_chunked(*inputs, chunk=chunk)
        wanted_y, wanted_state = ssd.ssd_reference(*inputs)
        assert close(y, wanted_y, rtol)
        assert close(boundaries[:, -1], wanted_state, rtol)


def test_ssd_states_at_chunk_boundaries() -> None:
    """Boundary i is the state before chunk i: what the recurrence has after the chunks before it."""
    x, delta, rate, b, c, state = ssd_inputs(40)
    _, boundaries = ssd.ssd_chunked(x, delta, rate, b, c, state, chunk=16)
    assert boundaries.shape[1] == 4
    assert torch.equal(boundaries[:, 0], state)
    for index, end in ((1, 16), (2, 32), (3, 40)):
        _, wanted = ssd.ssd_reference(x[:, :end], delta[:, :end], rate, b[:, :end], c[:, :end], state)
        assert close(boundaries[:, index], wanted)


def test_ssd_in_two_parts_is_ssd_in_one() -> None:
    x, delta, rate, b, c, state = ssd_inputs(45)
    y, end = ssd.ssd(x, delta, rate, b, c, state)
    y1, middle = ssd.ssd(x[:, :7], delta[:, :7], rate, b[:, :7], c[:, :7], state)
    y2, end2 = ssd.ssd(x[:, 7:], delta[:, 7:], rate, b[:, 7:], c[:, 7:], middle)
    assert close(torch.cat([y1, y2], dim=1), y)
    assert close(end2, end)


@pytest.mark.parametrize("S", [1, 37])
def test_ssd_passes_over_padding(S: int) -> None:
    """delta = 0 leaves the state exactly as it is, whatever stands at the padded positions."""
    x, delta, rate, b, c, state = ssd_inputs(S)
    _, end = ssd.ssd(x * 1e6, torch.zeros_like(delta), rate, b * 1e6, c, state)
    assert torch.equal(end, state)


def test_ssd_with_strong_decay_stays_finite() -> None:
    """Decay to exp(-8000) within a chunk: differences of logarithms, never quotients of underflowed products."""
    for S in (16, 64):
        x, delta, rate, b, c, state = ssd_inputs(S)
        inputs = (x, delta.clamp(min=1) * 50, rate.clamp(max=-5), b, c, state)
        (y, end), (wanted_y, wanted_end) = ssd.ssd(*inputs), ssd.ssd_reference(*inputs)
        assert close(y, wanted_y)
        assert close(end, wanted_end)
        assert close(ssd.ssd_outputs(*inputs), wanted_y)


# --- convolution


@pytest.mark.parametrize(("S", "W", "bias"), [*itertools.product([1, 2, 3, 4, 11, 40], [2, 3, 4], [True, False])])
def test_causal_conv(S: int, W: int, bias: bool) -> None:
    """For few positions (one product of windows) and for many (shifted products)."""
    u, state, weight = noise(3, S, 10), noise(3, 10, W, seed=1), noise(10, W, seed=2)
    b = noise(10, seed=3) if bias else None
    assert close(mamba.causal_conv(u, state, weight, b), mamba.causal_conv_reference(u, state, weight, b))


@pytest.mark.parametrize(("B", "bias", "dtype"), [*itertools.product([1, 3], [True, False], DTYPES)])
def test_causal_conv_step(B: int, bias: bool, dtype: torch.dtype) -> None:
    """One position is the convolution of one position, and leaves the state that this leaves."""
    shapes = [(B, 1, 10), (B, 10, 4), (10, 4)]
    u, state, weight = (noise(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    b = noise(10, seed=3, dtype=dtype) if bias else None
    out, after = mamba.causal_conv_step(u, state, weight, b)
    wanted = mamba.causal_conv_reference(u, state, weight, b)
    assert close(out, wanted, FLOAT32_RTOL if dtype == torch.float32 else BFLOAT16_RTOL)
    assert torch.equal(after, mamba.next_conv_state(u, state, None))
    again, _ = mamba.causal_conv_step(u, after, weight, b)
    assert close(
        again,
        mamba.causal_conv_reference(u, after, weight, b),
        FLOAT32_RTOL if dtype == torch.float32 else BFLOAT16_RTOL,
    )


def test_causal_conv_bfloat16() -> None:
    u, state, weight, b = (t.bfloat16() for t in (noise(2, 9, 10), noise(2, 10, 4), noise(10, 4), noise(10)))
    ours = mamba.causal_conv(u, state, weight, b)
    assert close(ours, mamba.causal_conv_reference(u, state, weight, b), BFLOAT16_RTOL)
    wide = mamba.causal_conv_reference(u.float(), state.float(), weight.float(), b.float())
    assert close(ours.float(), wide, BFLOAT16_RTOL)


@pytest.mark.parametrize("first", [1, 2, 5, 8])
def test_conv_state_carries_on(first: int) -> None:
    """In two parts as in one, also where the first part is shorter than the window."""
    u, state, weight, b = noise(2, 9, 6), noise(2, 6, 4, seed=1), noise(6, 4, seed=2), noise(6, seed=3)
    middle = mamba.next_conv_state(u[:, :first], state, None)
    parts = [mamba.causal_conv(u[:, :first], state, weight, b), mamba.causal_conv(u[:, first:], middle, weight, b)]
    assert close(torch.cat(parts, dim=1), mamba.causal_conv(u, state, weight, b))
    assert torch.equal(mamba.next_conv_state(u[:, first:], middle, None), mamba.next_conv_state(u, state, None))


def test_conv_state_with_lengths() -> None:
    """Each row's state is as if its padding were not there; a row of length 0 keeps its state."""
    lengths = [0, 1, 3, 4, 7]
    u, state = noise(5, 7, 6), noise(5, 6, 4, seed=1)
    states = mamba.next_conv_state(u, state, torch.tensor(lengths))
    assert torch.equal(states[0], state[0])
    for row, length in enumerate(lengths[1:], start=1):
        alone = mamba.next_conv_state(u[row : row + 1, :length], state[row : row + 1], None)
        assert torch.equal(states[row], alone[0])


# --- norms


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 256), (2, 3, 64), (4, 1, 7)])
def test_rms_norm(shape: tuple[int, ...], trained: bool) -> None:
    """One row, several, and where gradients are wanted: three ways to compute it."""
    x, weight = noise(*shape) * 3, noise(shape[-1], seed=1).requires_grad_(trained)
    assert close(norm.rms_norm(x, weight, 1e-5), norm.rms_norm_reference(x, weight, 1e-5))
    half = norm.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    # float32 inside: only the last rounding is bfloat16's
    assert close(half, norm.rms_norm_reference(x.bfloat16(), weight.bfloat16(), 1e-5), 2**-7)


@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_gated_group_rms_norm(num_groups: int) -> None:
    y, z, weight = noise(2, 5, 32), noise(2, 5, 32, seed=1), noise(32, seed=2)
    ours = norm.gated_group_rms_norm(y, z, weight, 1e-5, num_groups)
    assert close(ours, norm.gated_group_rms_norm_reference(y, z, weight, 1e-5, num_groups))
    half = norm.gated_group_rms_norm(y, z.bfloat16(), weight.bfloat16(), 1e-5, num_groups)
    wanted = norm.gated_group_rms_norm_reference(y, z.bfloat16(), weight.bfloat16(), 1e-5, num_groups)
    assert close(half, wanted, 2**-7)


def test_eps_counts_where_values_are_small() -> None:
    x, weight = noise(2, 16) * 1e-3, torch.ones(16)
    assert close(norm.rms_norm(x, weight, 1e-2), norm.rms_norm_reference(x, weight, 1e-2))
    assert not close(norm.rms_norm(x, weight, 1e-2), norm.rms_norm_reference(x, weight, 1e-5), 0.1)


@pytest.mark.parametrize("rows", [1, 3])
def test_norm_of_zeros(rows: int) -> None:
    """Zeros stay zeros. With eps 0 they are 0 / 0 in every row count, never an error on the host."""
    x, weight = torch.zeros(rows, 16), noise(16)
    assert torch.equal(norm.rms_norm(x, weight, 1e-5), x)
    assert norm.rms_norm(x, weight, 0.0).isnan().all()
    assert norm.rms_norm_reference(x, weight, 0.0).isnan().all()


# --- attention


@pytest.mark.parametrize(("S", "T", "J"), [*itertools.product([1, 5], [5, 9], [1, 2, 4])])
def test_attention(S: int, T: int, J: int) -> None:
    """Plain, causal (square only) and with a mask per row, for several query heads on one key-value head."""
    q, k, v = noise(2, 4, S, 8), noise(2, J, T, 8, seed=1), noise(2, J, T, 8, seed=2)
    assert close(attention.attention(q, k, v), attention.attention_reference(q, k, v))
    mask = noise(2, 1, S, T, seed=3) > 0
    mask[..., 0] = True
    assert close(attention.attention(q, k, v, mask), attention.attention_reference(q, k, v, mask))
    if S == T:
        ours = attention.attention(q, k, v, is_causal=True)
        assert close(ours, attention.attention_reference(q, k, v, is_causal=True))


def test_masked_keys_change_nothing() -> None:
    q, k, v = noise(1, 2, 3, 8), noise(1, 1, 6, 8, seed=1), noise(1, 1, 6, 8, seed=2)
    mask = torch.arange(6).lt(4)[None, None, None]
    assert close(attention.attention(q, k, v, mask), attention.attention(q, k[:, :, :4], v[:, :, :4]))


def test_attention_bfloat16() -> None:
    q, k, v = (t.bfloat16() for t in (noise(2, 4, 5, 8), noise(2, 2, 9, 8, seed=1), noise(2, 2, 9, 8, seed=2)))
    wanted = attention.attention_reference(q.float(), k.float(), v.float())
    assert close(attention.attention(q, k, v).float(), wanted, BFLOAT16_RTOL)


# --- mixture of experts


def routing(num_groups: int = 1, top_groups: int = 1, *, per_token: int = 2, normalise: bool = True) -> moe.Routing:
    return moe.Routing(
        experts_per_token=per_token, num_groups=num_groups, top_groups=top_groups, normalise=normalise, scale=2.5
    )


def scores_written_out(
    x: list[float], gate: list[list[float]], bias: list[float], rule: moe.Routing
) -> tuple[list[float], list[float]]:
    """One token's sigmoid scores, and the scores by which experts are chosen, in plain Python."""
    scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(x, row, strict=True)))) for row in gate]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(gate) // rule.num_groups
    if rule.num_groups > 1:
        totals = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(rule.num_groups)]
        kept = sorted(range(rule.num_groups), key=lambda g: -totals[g])[: rule.top_groups]
        choice = [c if e // size in kept else 0.0 for e, c in enumerate(choice)]
    return scores, choice


@pytest.mark.parametrize("shift", [0.0, -0.7, -3.0])
@pytest.mark.parametrize(
    "rule",
    [
        routing(),
        routing(normalise=False, per_token=1),
        routing(4, 1, per_token=3),
        routing(4, 2, per_token=3),
        routing(3, 3, per_token=5),
        routing(12, 4, per_token=3),
    ],
    ids=repr,
)
def test_route(rule: moe.Routing, shift: float) -> None:
    """Negative biases too, with which experts of dropped groups (choice score 0.0) can win."""
    x, gate, bias = noise(20, 6), noise(12, 6, seed=1), noise(12, seed=2) * 0.3 + shift
    chosen_RA, weights_RA = moe.route(x, gate, bias, rule)
    assert weights_RA.dtype == torch.float32
    for row in range(20):
        scores, choice = scores_written_out(x[row].tolist(), gate.tolist(), bias.tolist(), rule)
        chosen = chosen_RA[row].tolist()
        assert len(set(chosen)) == rule.experts_per_token
        # experts of dropped groups tie at 0.0, and any of them will do
        best = sorted(choice, reverse=True)[: rule.experts_per_token]
        assert sorted((choice[e] for e in chosen), reverse=True) == pytest.approx(best, rel=1e-6)
        total = sum(scores[e] for e in chosen) if rule.normalise else 1.0
        assert weights_RA[row].tolist() == pytest.approx([2.5 * scores[e] / total for e in chosen], rel=1e-6)


def test_dropped_groups_let_experts_through_where_the_bias_is_very_negative() -> None:
    """The reference fills dropped groups with 0.0, not -inf: with all choices below 0 a dropped expert wins."""
    x, gate = noise(5, 6), noise(8, 6, seed=1)
    rule = routing(4, 1, per_token=1)
    chosen_RA, _ = moe.route(x, gate, torch.full((8,), -3.0), rule)
    scores = torch.sigmoid(x @ gate.T) - 3.0
    kept_R = scores.unflatten(1, (4, 2)).sum(-1).argmax(1)
    assert (chosen_RA[:, 0] // 2 != kept_R).all()


@pytest.mark.parametrize("R", [1, 3, moe.GATHER_MAX_ROWS, moe.GATHER_MAX_ROWS + 1, 40])
@pytest.mark.parametrize("per_token", [1, 3])
def test_experts(R: int, per_token: int) -> None:
    """Gathered, sorted, all of them and one by one, with experts that nobody chose."""
    x, up, down = noise(R, 8), noise(6, 10, 8, seed=1), noise(6, 8, 10, seed=2)
    chosen = noise(R, 5, seed=3).topk(per_token).indices
    weights = noise(R, per_token, seed=4).abs()
    wanted = moe.experts_reference(x, chosen, weights, up, down)
    for ours in (moe.experts, moe._experts_gathered, moe._experts_sorted, moe._experts_in_place):
        assert close(ours(x, chosen, weights, up, down), wanted)


def test_small_experts_and_the_shared_one_as_one() -> None:
    x, up, down = noise(5, 8), noise(6, 10, 8, seed=1), noise(6, 8, 10, seed=2)
    shared_up, shared_down = noise(14, 8, seed=5), noise(8, 14, seed=6)
    chosen, weights = noise(5, 6, seed=3).topk(2).indices, noise(5, 2, seed=4).abs()
    wanted = moe.experts_reference(x, chosen, weights, up, down) + moe.mlp(x, shared_up, shared_down)
    given = (up, down, shared_up, shared_down)
    assert moe.serves_joined(x, *given)
    assert close(moe.experts_joined(x, chosen, weights, moe.join(*given)), wanted)
    assert close(moe.experts_and_shared(x, chosen, weights, *given), wanted)


def test_experts_bfloat16() -> None:
    x, up, down = noise(7, 8).bfloat16(), noise(6, 10, 8, seed=1).bfloat16(), noise(6, 8, 10, seed=2).bfloat16()
    chosen, weights = noise(7, 6, seed=3).topk(2).indices, noise(7, 2, seed=4).abs()
    wanted = moe.experts_reference(x.float(), chosen, weights, up.float(), down.float())
    for ours in (
        moe._experts_gathered,
        moe._experts_sorted,
        moe._experts_in_place,
        moe.experts_reference,
    ):
        assert close(ours(x, chosen, weights, up, down).float(), wanted, BFLOAT16_RTOL)


@pytest.mark.parametrize(("per_token", "normalise"), [(1, False), (3, True), (3, False)])
def test_one_row_routed_on_the_host(per_token: int, normalise: bool) -> None:
    """The same experts with the same weights, biases that change the choice included."""
    rule = moe.Routing(experts_per_token=per_token, num_groups=1, top_groups=1, normalise=normalise, scale=2.5)
    gate, bias = noise(12, 8), noise(12, seed=1)
    for seed in range(20):
        x = noise(1, 8, seed=100 + seed)
        chosen_RA, weights_RA = moe.route(x, gate, bias, rule)
        ours = dict(moe.route_row(x, gate.double(), bias.tolist(), rule))
        assert ours.keys() == set(chosen_RA[0].tolist())
        for expert, weight in zip(chosen_RA[0].tolist(), weights_RA[0].tolist(), strict=True):
            assert ours[expert] == pytest.approx(weight, rel=1e-6)


def test_one_row_of_experts() -> None:
    """The shared expert and the chosen ones, whichever they are."""
    x, up, down = noise(1, 8), noise(6, 10, 8, seed=1), noise(6, 8, 10, seed=2)
    shared_up, shared_down = noise(14, 8, seed=3), noise(8, 14, seed=4)
    for chosen in ([4, 1, 3], [0, 5, 2]):
        weights = [0.7, 1.9, 0.01]
        routed = moe.experts_reference(x, torch.tensor([chosen]), torch.tensor([weights]), up, down)
        pairs = list(zip(chosen, weights, strict=True))
        ours = moe.experts_of_row(x, pairs, up, down, shared_up, shared_down)
        assert close(ours, routed + moe.mlp(x, shared_up, shared_down))


def test_experts_can_be_trained() -> None:
    """One row too: what is written in place for speed must not be needed by the gradient."""
    up, down = noise(6, 10, 8, seed=1).requires_grad_(), noise(6, 8, 10, seed=2).requires_grad_()
    for rows in (1, 5):
        given = (noise(rows, 8), noise(rows, 6, seed=3).topk(2).indices, noise(rows, 2, seed=4).abs(), up, down)
        found = [
            torch.autograd.grad(function(*given).square().sum(), (up, down))
            for function in (moe.experts, moe.experts_reference)
        ]
        assert all(close(ours, wanted, 1e-5) for ours, wanted in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [1, 2, product.FEW_ROWS, product.FEW_ROWS + 1])
@pytest.mark.parametrize(("outputs", "turned", "dtype"), [*itertools.product([6, 7], [True, False], DTYPES)])
def test_products_of_few_rows(rows: int, outputs: int, turned: bool, dtype: torch.dtype) -> None:
    """In halves, the other way round, and plainly; of rows that lie apart too; contiguous whatever the way."""
    weight = noise(outputs, 5, seed=1, dtype=dtype)
    weight = weight.t().contiguous().t() if turned else weight
    for x in (noise(rows, 5, dtype=dtype), noise(rows, 11, dtype=dtype)[:, 3:8], noise(1, rows, 5, dtype=dtype)):
        ours = product.linear(x, weight)
        assert ours.shape == (*x.shape[:-1], outputs)
        assert ours.is_contiguous()
        assert close(ours, x @ weight.t(), FLOAT32_RTOL if dtype == torch.float32 else BFLOAT16_RTOL)


def test_products_of_few_rows_can_be_trained() -> None:
    for rows in (1, 3):
        x, weight = noise(rows, 5), noise(6, 5, seed=1).requires_grad_()
        [ours] = torch.autograd.grad(product.linear(x, weight).square().sum(), [weight])
        [wanted] = torch.autograd.grad((x @ weight.t()).square().sum(), [weight])
        assert close(ours, wanted)


def test_mlp_is_squared_relu() -> None:
    x, up, down = noise(3, 4), noise(5, 4, seed=1), noise(4, 5, seed=2)
    assert close(moe.mlp(x, up, down), ((x @ up.T).clamp(min=0) ** 2) @ down.T)
