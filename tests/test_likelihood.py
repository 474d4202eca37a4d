"""Every kind of likelihood against a slow direct computation, and what no batch may change."""

import itertools
import math
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, tiny_pair

from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.likelihood import MAX_ROWS
from twotower_eval.engine.scorers.pieces import ScoreRequest, target_logprobs

EVERY_MODEL = pytest.mark.parametrize("name", ARCHITECTURES)
K = 3
ATOL = 1e-4
REQUESTS = (
    ScoreRequest(context_ids=(5, 6, 7), continuation_ids=(8, 9, 10, 11, 12, 13, 14), seed=1),
    ScoreRequest(context_ids=(1,), continuation_ids=(20,), seed=2),
    ScoreRequest(context_ids=tuple(range(4, 24)), continuation_ids=(30, 31, 32), seed=3),
    ScoreRequest(context_ids=(5, 6), continuation_ids=(7, 8), seed=1),
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def causal_by_hand(model: Any, request: ScoreRequest) -> tuple[float, bool]:
    """Token by token, each from a pass over all before it."""
    total, greedy, known = 0.0, True, list(request.context_ids)
    for token in request.continuation_ids:
        logprobs = model.context_logits(torch.tensor([known]))[0, -1].double().log_softmax(-1)
        total += float(logprobs[token])
        greedy &= int(logprobs.argmax()) == token
        known.append(token)
    return total, greedy


def denoised(model: Any, prefix: tuple[int, ...], block: list[int]) -> torch.Tensor:
    """Log-probabilities (K, V) of a block, the mask token excluded, at the block's actual mask fraction."""
    fraction = block.count(model.mask_token_id) / len(block)
    context = model.prefill(torch.tensor([prefix], dtype=torch.int64).view(1, -1))
    logits = model.denoise(torch.tensor([block]), context, [fraction])[0].double()
    logits[:, model.mask_token_id] = -torch.inf
    return logits.log_softmax(-1)


def blocks_of(request: ScoreRequest) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prefix and tokens of each block; blocks start at the continuation."""
    tokens = request.continuation_ids
    return [(request.context_ids + tokens[:i], tokens[i : i + K]) for i in range(0, len(tokens), K)]


def left_to_right_by_hand(model: Any, request: ScoreRequest) -> tuple[float, bool]:
    total, greedy = 0.0, True
    for prefix, truth in blocks_of(request):
        for position, token in enumerate(truth):
            block = [*truth[:position], *[model.mask_token_id] * (K - position)]
            logprobs = denoised(model, prefix, block)[position]
            total += float(logprobs[token])
            greedy &= int(logprobs.argmax()) == token
    return total, greedy


def expected_bound(model: Any, request: ScoreRequest) -> float:
    """The bound's expectation: every number of masks equally likely, every choice of them too."""
    total = 0.0
    for prefix, truth in blocks_of(request):
        m = len(truth)
        for n in range(1, m + 1):
            choices = list(itertools.combinations(range(m), n))
            for chosen in choices:
                padded = [*truth, *[model.mask_token_id] * (K - m)]
                block = [model.mask_token_id if i in chosen else token for i, token in enumerate(padded)]
                logprobs = denoised(model, prefix, block)
                total += m / n * sum(float(logprobs[i, truth[i]]) for i in chosen) / len(choices) / m
    return total


@EVERY_MODEL
def test_context_tower(name: str) -> None:
    """Also of a causal model alone, where it is called exact."""
    model = tiny_pair(name)
    for scored, kind in ((model, "context_tower"), (model.context_tower, "exact")):
        results = make_scorer(scored, kind).score(REQUESTS)
        for request, ours in zip(REQUESTS, results, strict=True):
            total, greedy = causal_by_hand(model, request)
            assert ours.logprob_nats == pytest.approx(total, abs=ATOL)
            assert (ours.is_greedy, ours.kind, ours.stderr_nats, ours.num_draws) == (greedy, kind, None, None)


SHARED = tuple(range(4, 19))
MANY = tuple(  # a common beginning, questions on it, options on them; one within another, one twice, one alone
    ScoreRequest(context_ids=SHARED + question, continuation_ids=option, seed=seed)
    for seed, (question, option) in enumerate(
        itertools.product(
            [(), (20,), (20, 21, *range(22, 33)), (5,) * 9],
            [(8,), (9,), (8, 9, 10, 11), (8, 9, 12), tuple(range(4, 13))],
        )
    )
)
MANY = (*MANY, MANY[3], ScoreRequest(context_ids=(30, 31), continuation_ids=(8, 9), seed=99))


@EVERY_MODEL
@pytest.mark.parametrize("max_tokens", [1, 30])
@pytest.mark.parametrize("kind", ["context_tower", "denoiser_left_to_right", "bound"])
def test_what_is_shared_changes_nothing(name: str, kind: Any, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces large and small, contexts kept or not: every request has the likelihood that it has alone."""
    model = tiny_pair(name)
    scorer = make_scorer(model, kind, block_size=K, num_draws=4)
    alone = [scorer.score([request])[0] for request in MANY]
    monkeypatch.setattr(model, "branch_tokens", max_tokens)
    monkeypatch.setattr("twotower_eval.engine.scorers.likelihood.MAX_TOKENS", max_tokens)
    for ours, wanted in zip(scorer.score(MANY), alone, strict=True):
        assert ours.logprob_nats == pytest.approx(wanted.logprob_nats, abs=ATOL)
        assert ours.is_greedy == wanted.is_greedy
        assert (ours.stderr_nats or 0) == pytest.approx(wanted.stderr_nats or 0, abs=ATOL)


@EVERY_MODEL
def test_trees_and_rows_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the model's way to read trees."""
    model = tiny_pair(name)
    by_tree = make_scorer(model, "context_tower").score(MANY)
    monkeypatch.setattr(model, "branch_tokens", 0)
    for ours, wanted in zip(by_tree, make_scorer(model, "context_tower").score(MANY), strict=True):
        assert ours.logprob_nats == pytest.approx(wanted.logprob_nats, abs=ATOL)
        assert ours.is_greedy == wanted.is_greedy


def test_pieces_may_be_called_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes a middle one first, for its estimate; a resumed one leaves some out."""
    model = tiny_pair()
    monkeypatch.setattr(model, "branch_tokens", 12)
    scorer = make_scorer(model, "context_tower")
    wanted = scorer.score(MANY)
    pieces = scorer.plan(MANY, 1)
    assert len(pieces) > 3
    for piece in [pieces[3], pieces[0], *pieces[:0:-1]]:
        for index, found in zip(piece.requests, piece.score(), strict=True):
            assert found.logprob_nats == pytest.approx(wanted[index].logprob_nats, abs=ATOL)


def test_of_equal_logits_the_first_is_the_greedy_one() -> None:
    """As argmax has it, in lm-eval too; in bfloat16 equal logits are common."""
    logits = torch.tensor([[0.0, 1.0, 1.0, -1.0]])
    found = list(target_logprobs(logits, [0, 0, 0], [1, 2, 0]))
    assert [greedy for _, greedy in found] == [True, False, False]
    assert [logprob for logprob, _ in found] == pytest.approx(logits.log_softmax(-1)[0, [1, 2, 0]].tolist())


@EVERY_MODEL
def test_left_to_right(name: str) -> None:
    """Contexts may be empty here."""
    model = tiny_pair(name)
    requests = [*REQUESTS, ScoreRequest(context_ids=(), continuation_ids=(5, 6, 7, 8))]
    for request, ours in zip(
        requests, make_scorer(model, "denoiser_left_to_right", block_size=K).score(requests), strict=True
    ):
        total, greedy = left_to_right_by_hand(model, request)
        assert ours.logprob_nats == pytest.approx(total, abs=ATOL)
        assert (ours.is_greedy, ours.kind, ours.stderr_nats) == (greedy, "denoiser_left_to_right", None)


def greedy_continuation(model: Any, kind: str, length: int) -> tuple[int, ...]:
    """What the kind finds likeliest, token by token."""
    tokens: tuple[int, ...] = ()
    for _ in range(length):
        if kind == "context_tower":
            logits = model.context_logits(torch.tensor([[5, 6, *tokens]]))[0, -1]
        else:
            start = len(tokens) // K * K
            block = [*tokens[start:], *[model.mask_token_id] * (K - len(tokens) + start)]
            logits = denoised(model, (5, 6, *tokens[:start]), block)[len(tokens) - start]
        tokens = (*tokens, int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("kind", ["context_tower", "denoiser_left_to_right"])
def test_greedy_is_true_for_the_likeliest_and_only_for_it(kind: Any) -> None:
    model = tiny_pair()
    likeliest = greedy_continuation(model, kind, 5)
    other = (*likeliest[:3], (likeliest[3] + 1) % VOCAB, likeliest[4])
    requests = [ScoreRequest(context_ids=(5, 6), continuation_ids=c) for c in (likeliest, other)]
    assert [r.is_greedy for r in make_scorer(model, kind, block_size=K).score(requests)] == [True, False]


@EVERY_MODEL
def test_left_to_right_is_a_distribution(name: str) -> None:
    """Probabilities of all continuations of two tokens add up to one, the mask token's being 0."""
    model = tiny_pair(name)
    allowed = [token for token in range(VOCAB) if token != model.mask_token_id]
    requests = [ScoreRequest(context_ids=(5,), continuation_ids=pair) for pair in itertools.product(allowed, repeat=2)]
    results = make_scorer(model, "denoiser_left_to_right", block_size=K).score(requests)
    assert sum(math.exp(r.logprob_nats) for r in results) == pytest.approx(1.0, abs=1e-4)


@EVERY_MODEL
def test_bound_converges_to_its_expectation(name: str) -> None:
    """Within four standard errors, which are themselves as small as the draws promise."""
    model, draws = tiny_pair(name), 600
    request = ScoreRequest(context_ids=(5, 6), continuation_ids=(8, 9, 10, 11, 12), seed=7)
    [ours] = make_scorer(model, "bound", block_size=K, num_draws=draws).score([request])
    assert (ours.kind, ours.num_draws) == ("bound", draws)
    assert ours.stderr_nats is not None
    assert 0 < ours.stderr_nats < 1.0
    assert abs(ours.logprob_nats - expected_bound(model, request)) < 4 * ours.stderr_nats


def test_bound_of_one_token_has_no_spread() -> None:
    """With one token there is only one thing to mask: the bound is exact, and equals the left-to-right likelihood."""
    request = ScoreRequest(context_ids=(5, 6), continuation_ids=(8,))
    [bound] = make_scorer(tiny_pair(), "bound", block_size=K, num_draws=4).score([request])
    [exact] = make_scorer(tiny_pair(), "denoiser_left_to_right", block_size=K).score([request])
    assert bound.logprob_nats == pytest.approx(exact.logprob_nats, abs=1e-5)
    assert bound.stderr_nats == pytest.approx(0.0, abs=1e-5)


@EVERY_MODEL
@pytest.mark.parametrize("kind", ["context_tower", "denoiser_left_to_right", "bound"])
def test_batches_change_nothing(name: str, kind: Any) -> None:
    """Each request alone, in any order, and in more rows than one call takes."""
    scorer = make_scorer(tiny_pair(name), kind, block_size=K, num_draws=MAX_ROWS // 8)
    together = scorer.score(REQUESTS)
    backwards = scorer.score(REQUESTS[::-1])[::-1]
    for request, ours, reversed_ours in zip(REQUESTS, together, backwards, strict=True):
        [alone] = scorer.score([request])
        for other in (alone, reversed_ours):
            assert ours.logprob_nats == pytest.approx(other.logprob_nats, abs=ATOL)
            assert ours.is_greedy == other.is_greedy
            assert (ours.stderr_nats or 0) == pytest.approx(other.stderr_nats or 0, abs=ATOL)
    assert scorer.score([]) == []


def test_the_seed_fixes_the_draws() -> None:
    scorer = make_scorer(tiny_pair(), "bound", block_size=K, num_draws=8)
    one, two, other = (
        scorer.score([ScoreRequest(context_ids=(5,), continuation_ids=(8, 9, 10), seed=seed)])[0] for seed in (1, 1, 2)
    )
    assert one == two
    assert one.logprob_nats != other.logprob_nats


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("context_tower", ScoreRequest(context_ids=(5,), continuation_ids=()), "at least one token"),
        ("context_tower", ScoreRequest(context_ids=(), continuation_ids=(5,)), "put BOS or EOS in front"),
        ("bound", ScoreRequest(context_ids=(5,), continuation_ids=(VOCAB,)), "outside the vocabulary"),
        ("denoiser_left_to_right", ScoreRequest(context_ids=(-1,), continuation_ids=(5,)), "outside the vocabulary"),
    ],
)
def test_bad_requests(kind: Any, request_: ScoreRequest, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scorer(tiny_pair(), kind, block_size=K).score([request_])


def test_kinds_that_do_not_fit_the_model() -> None:
    pair = tiny_pair()
    for model, kind, message in (
        (pair, "exact", "is a pair: take context_tower"),
        (pair, "bounds", "is unknown"),
        (pair.context_tower, "bound", "needs a denoiser"),
        (pair.context_tower, "context_tower", "is one tower: take exact"),
    ):
        with pytest.raises(ValueError, match=message):
            make_scorer(model, kind)
    for arguments in ({"block_size": 0}, {"num_draws": 1}):
        with pytest.raises(ValueError, match="at least"):
            make_scorer(pair, "bound", **arguments)


@pytest.mark.parametrize("kind", ["denoiser_left_to_right", "bound"])
def test_a_continuation_with_the_mask_token_is_one_line(kind: Any) -> None:
    """The bound's standard error over draws of minus infinity ended in an AttributeError of the statistics module."""
    model = tiny_pair("mamba only")
    scorer = make_scorer(model, kind, block_size=K)
    masked = ScoreRequest(context_ids=(5,), continuation_ids=(6, model.mask_token_id, 7), seed=0)
    with pytest.raises(ValueError, match=f"holds the mask token {model.mask_token_id}.*--likelihood context_tower"):
        scorer.score([REQUESTS[0], masked])
    inside = ScoreRequest(context_ids=(5, model.mask_token_id), continuation_ids=(6, 7), seed=0)
    [found] = scorer.score([inside])
    assert math.isfinite(found.logprob_nats)
