"""DiffusionGemma: its rules by their formulas, its rows, and transformers' own ``generate`` beside our decoder."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.commits import within_entropy
from twotower_eval.engine.decoders.entropy_bound import EntropyBound, Params
from twotower_eval.engine.decoders.rows import RowNoise, quantile
from twotower_eval.engine.families.diffusion_gemma import DiffusionGemma
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.engine.scorers.likelihood import make as make_scorer
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay_gemma import Draws, num_steps
from twotower_eval.records import Prompt

GOLDEN = os.environ.get("TWOTOWER_EVAL_GOLDEN")
needs_model = pytest.mark.skipif(not GOLDEN, reason="needs the family's checkpoint (TWOTOWER_EVAL_GOLDEN)")
SETTINGS: dict[str, Any] = {"max_denoising_steps": 4, "entropy_bound": 1.0, "confidence_threshold": 2.0}


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return cast(DiffusionGemma, load_model(Path(GOLDEN or "", "families", "diffusion_gemma")))


def _prompts(lengths: Sequence[int]) -> list[Prompt]:
    draws = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 130, (length,), generator=draws).tolist() for length in lengths]
    return [Prompt(id=str(number), token_ids=tuple(row), seed=number) for number, row in enumerate(rows)]


class Letters:
    """A tokenizer of one character for each token."""

    bos_token_id = eos_token_id = None
    special_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special_tokens: bool = False, /) -> list[int]:
        return [ord(letter) - 0x4E00 for letter in text]

    def decode(self, token_ids: Sequence[int], /) -> str:
        return "".join(chr(0x4E00 + token) for token in token_ids)

    decode_with_special = decode


@pytest.mark.parametrize("bound", [0.0, 0.4, 1.5, 100.0])
def test_tokens_are_kept_while_the_entropies_before_them_sum_up_to_the_bound(bound: float) -> None:
    entropy_BK = torch.rand(20, 7, generator=torch.Generator().manual_seed(3))
    for kept_K, entropy_K in zip(within_entropy(entropy_BK, bound).tolist(), entropy_BK.tolist(), strict=True):
        before = [sum(other for other in entropy_K if other < own) for own in entropy_K]
        assert kept_K == [least <= bound or own == min(entropy_K) for least, own in zip(before, entropy_K, strict=True)]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probability_KV = torch.tensor([[0.1, 0.0, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0]])
    grid = (torch.arange(1000) + 0.5) / 1000
    found = torch.stack([quantile(probability_KV, torch.stack([one, one])) for one in grid])
    assert torch.bincount(found[:, 0], minlength=4).tolist() == [100, 0, 600, 300]
    assert set(found[:, 1].tolist()) == {0}
    assert quantile(probability_KV, torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 0]


def test_what_a_run_drew_says_how_many_steps_its_canvases_had() -> None:
    canvas: Callable[[int], list[str]] = lambda steps: ["randint", *["multinomial", "randint"] * steps]  # noqa: E731
    assert num_steps([*canvas(3), *canvas(1), *canvas(2)]) == [3, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_denoising_steps": 0},
        {"entropy_bound": -0.1},
        {"t_min": 0.9},
        {"t_min": 0.0, "t_max": 0.0},
        {"stability_threshold": -1},
        {"confidence_threshold": -1.0},
        {"confidence_threshold": float("nan")},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).partition("_")[2] if "t_" not in str(wrong) else "t_max"):
        Params(**wrong)


@needs_model
@pytest.mark.parametrize(
    "params",
    [SETTINGS, {**SETTINGS, "sample": False, "renoise": False}, {**SETTINGS, "t_min": 0.1, "t_max": 0.2}],
)
def test_rows_of_a_batch_are_single_rows(model: DiffusionGemma, params: dict[str, Any]) -> None:
    """Uneven prompts, longer and shorter than the window; rows end by a token, by a text, and by their budget."""
    decoder, prompts = make_decoder(as_masked(model), "entropy_bound", **params), _prompts((5, 14, 1, 9, 20, 3))
    bare = [decoder.generate([prompt], max_new_tokens=15)[0] for prompt in prompts]
    ends: dict[str, Any] = {"max_new_tokens": 15, "eos_token_ids": [bare[1].token_ids[4]]}
    model.tokenizer = cast(Any, Letters())
    try:
        other = next(one for one in bare if ends["eos_token_ids"][0] not in one.token_ids[:9])
        ends["stop"] = [Letters().decode(other.token_ids[7:9])]
        alone = [decoder.generate([prompt], **ends)[0] for prompt in prompts]
        batches = [decoder.generate(prompts, max_batch_size=width, **ends) for width in (2, None)]
    finally:
        model.tokenizer = None
    assert {"eos", "stop", "length"} == {one.finish for one in alone}
    assert alone[1].token_ids == bare[1].token_ids[: alone[1].num_tokens]
    assert alone[1].num_tokens <= 4
    for together in batches:
        assert together == alone


@needs_model
def test_a_canvas_that_is_stable_and_sure_ends_early(model: DiffusionGemma) -> None:
    [prompt] = _prompts((9,))
    ends = {0.0: 6, 100.0: 2}  # confidence_threshold -> steps, if each canvas is stable as soon as it can be
    for threshold, num in ends.items():
        decoder = make_decoder(
            as_masked(model),
            "entropy_bound",
            max_denoising_steps=6,
            entropy_bound=100.0,
            sample=False,
            confidence_threshold=threshold,
            stability_threshold=0 if threshold else 1,
        )
        [made] = decoder.generate([prompt], max_new_tokens=7)
        assert made.num_context_forwards == 2
        assert made.num_denoiser_forwards == (2 if threshold else 2 * num)
        assert (made.num_tokens, made.num_discarded_tokens) == (7, 5)


@needs_model
def test_contexts_are_values_and_tokens_read_in_pieces_are_tokens_read_at_once(model: DiffusionGemma) -> None:
    ids_BS = torch.randint(3, 130, (3, 19), generator=torch.Generator().manual_seed(1))
    canvas_BK = torch.randint(3, 130, (3, 6), generator=torch.Generator().manual_seed(2))
    lengths = [19, 11, 4]
    alone = [
        model.denoise(canvas_BK[row : row + 1], model.prefill(ids_BS[row : row + 1, :length]))
        for row, length in enumerate(lengths)
    ]
    first = model.prefill(ids_BS, [9, 8, 0])
    before = model.denoise(canvas_BK, first)
    rest_BS = torch.stack([ids_BS[row, start : start + 10] for row, start in enumerate((9, 8, 0))])
    whole = model.extend(first, rest_BS, [10, 3, 4])
    assert whole.lengths == tuple(lengths)
    torch.testing.assert_close(model.denoise(canvas_BK, whole), torch.cat(alone), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(model.denoise(canvas_BK, first), before, atol=0, rtol=0)
    joined = whole.select([2]).join(model.prefill(ids_BS[:1, :19]))
    torch.testing.assert_close(
        model.denoise(canvas_BK[[2, 0]], joined), torch.cat([alone[2], alone[0]]), atol=2e-4, rtol=1e-4
    )


@needs_model
def test_rows_with_and_without_earlier_logits_share_a_call(model: DiffusionGemma) -> None:
    ids_BS = torch.randint(3, 130, (2, 7), generator=torch.Generator().manual_seed(1))
    canvas_BK = torch.randint(3, 130, (2, 6), generator=torch.Generator().manual_seed(2))
    context = model.prefill(ids_BS)
    fresh = model.denoise(canvas_BK, context)
    both = model.denoise_after(canvas_BK, context, [None, fresh[1]])
    told = model.denoise_after(canvas_BK, context, list(fresh))
    torch.testing.assert_close(both, torch.stack([fresh[0], told[1]]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(told[1], fresh[1], atol=0.1)


def _drawn_by(call: Callable[[], Any], patch: pytest.MonkeyPatch) -> tuple[Any, list[str], list[Tensor], list[Tensor]]:
    """What a call gives, and what it draws: the kinds in order, random canvases and drawn tokens."""
    order: list[str] = []
    random: list[Tensor] = []
    drawn: list[Tensor] = []

    def noting(name: str, found: list[Tensor]) -> Callable[..., Tensor]:
        own: Callable[..., Tensor] = getattr(torch, name)

        def draw(*given: object, **more: object) -> Tensor:
            made = own(*given, **more)
            order.append(name)
            found.append(made.clone())
            return made

        return draw

    with patch.context() as inside:
        inside.setattr(torch, "randint", noting("randint", random))
        inside.setattr(torch, "multinomial", noting("multinomial", drawn))
        made = call()
    return made, order, random, drawn


@needs_model
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (1, {"entropy_bound": 2.0, "max_denoising_steps": 3, "max_new_tokens": 12}),
        (
            2,
            {
                "entropy_bound": 0.6,
                "max_denoising_steps": 4,
                "confidence_threshold": 2.5,
                "stability_threshold": 0,
                "max_new_tokens": 18,
            },
        ),
        (
            3,
            {
                "entropy_bound": 50.0,
                "max_denoising_steps": 4,
                "t_min": 0.1,
                "t_max": 0.3,
                "confidence_threshold": 3.0,
                "max_new_tokens": 6,
            },
        ),
    ],
)
def test_tokens_are_those_of_transformers_own_generate(
    model: DiffusionGemma, seed: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws; rows of unequal length stand side by side there, padded on the left."""
    prompts = [prompt.token_ids for prompt in _prompts((10, 4, 7))]
    width = max(map(len, prompts))
    padding = [[0] * (width - len(prompt)) for prompt in prompts]
    given = {
        "input_ids": torch.tensor([[*before, *prompt] for before, prompt in zip(padding, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * len(row) + [1] * (width - len(row)) for row in padding]),
    }
    torch.manual_seed(seed)
    theirs_own = {name: value for name, value in settings.items() if name != "entropy_bound"}
    theirs_own["sampler_config"] = EntropyBoundSamplerConfig(entropy_bound=settings["entropy_bound"])
    call = lambda: cast(Any, model.inner).generate(**given, **theirs_own, eos_token_id=None)  # noqa: E731
    theirs, order, random, drawn = _drawn_by(call, monkeypatch)
    shape = (-1, len(prompts), model.block_size)
    draws = Draws(torch.stack(random).view(shape), torch.stack(drawn).view(shape), num_steps(order), model.vocab_size)
    own = {name: value for name, value in settings.items() if name != "max_new_tokens"}
    decoder = cast(EntropyBound, make_decoder(as_masked(model), "entropy_bound", **own))
    decoder.make_noise = lambda prompts: draws
    asked = [Prompt(id=str(row), token_ids=ids) for row, ids in enumerate(prompts)]
    made = decoder.generate(asked, max_new_tokens=settings["max_new_tokens"])
    assert [list(one.token_ids) for one in made] == theirs.sequences[:, width:].tolist()
    rates = [one.num_tokens / one.num_denoiser_forwards for one in made if 0 not in one.token_ids]
    reported = [
        rate for rate, one in zip(theirs.tokens_per_forward.tolist(), made, strict=True) if 0 not in one.token_ids
    ]
    assert rates == pytest.approx(reported)


@needs_model
def test_forwards_are_counted_by_kind_and_every_token_has_its_row_of_logits(model: DiffusionGemma) -> None:
    watched = WatchedModel(model)
    [prompt] = _prompts((9,))
    decoder = make_decoder(cast(Model, watched), "entropy_bound", **SETTINGS)
    with watched.witnessed(prompt.token_ids) as witness:
        [made] = decoder.generate([prompt], max_new_tokens=16)
    assert made.num_context_forwards == len(watched.prefills.rows) + len(watched.extensions.rows) == 3
    assert made.num_denoiser_forwards == len(watched.denoisings.rows)
    tally = witness.tally(made.token_ids)
    assert (tally.num_witnessed, tally.num_tokens) == (16, 16)


@needs_model
def test_the_trace_commits_each_place_once(model: DiffusionGemma) -> None:
    [prompt] = _prompts((9,))
    [made] = make_decoder(as_masked(model), "entropy_bound", **SETTINGS, trace=True).generate(
        [prompt], max_new_tokens=12
    )
    assert made.trace is not None
    assert len(made.trace) == made.num_denoiser_forwards
    for block, steps in itertools.groupby(made.trace, lambda step: step.block):
        placed = sorted(pair for step in steps for pair in zip(step.positions, step.token_ids, strict=True))
        assert placed == list(enumerate(made.token_ids[block * 6 : block * 6 + 6]))


@needs_model
def test_a_seed_fixes_an_answer_and_another_changes_it(model: DiffusionGemma) -> None:
    [prompt] = _prompts((9,))
    decoder = make_decoder(as_masked(model), "entropy_bound", **SETTINGS)
    asked = [Prompt(id=str(number), token_ids=prompt.token_ids, seed=seed) for number, seed in enumerate((1, 1, 2))]
    made = [one.token_ids for one in decoder.generate(asked, max_new_tokens=12)]
    assert made[0] == made[1] != made[2]


@needs_model
@pytest.mark.parametrize("kind", ["sdar", "low_confidence", "block_diffusion", "ancestral", "mock_ar", "reference"])
def test_decoders_that_fill_masks_refuse_it(model: DiffusionGemma, kind: str) -> None:
    words = "has no mask token: give --decoder entropy_bound|needs a two-tower checkpoint, and .* is of family"
    with pytest.raises(UserError, match=words):
        make_decoder(as_masked(model), kind)


@needs_model
def test_what_it_does_not_have_is_refused_in_one_line(model: DiffusionGemma) -> None:
    with pytest.raises(UserError, match=r"needs a model that predicts the next token.*give --decoder entropy_bound"):
        make_decoder(as_masked(model), "autoregressive").generate(_prompts((4,)), max_new_tokens=2)
    for kind in ("denoiser_left_to_right", "bound"):
        with pytest.raises(UserError, match="has no mask token"):
            make_scorer(as_masked(model), cast(Any, kind), block_size=4, num_draws=2)
    with pytest.raises(UserError, match="has no log-likelihoods"):
        model.context_logits(torch.tensor([[3, 4]]))
    other = load_model(Path(GOLDEN or "", "families", "llada"))
    with pytest.raises(UserError, match="is for models that denoise random tokens"):
        make_decoder(other, "entropy_bound")


def test_rows_have_streams_of_their_own() -> None:
    probability_BKV = torch.full((2, 5, 9), 1 / 9)
    asked = [Prompt(id=str(seed), token_ids=(1,), seed=seed) for seed in (3, 4)]
    together = RowNoise(asked).drawn([0, 1], probability_BKV)
    assert torch.equal(together[1:], RowNoise(asked).drawn([1], probability_BKV[:1]))
