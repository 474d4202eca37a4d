"""Families of diffusion language models in `run`: their own decoders by default, and what does not fit them."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hf_models import save_reading
from tiny_families import CONFIGS, save_family

import twotower_eval as tt
from twotower_eval.analyse.compare.points import long_name, short_name
from twotower_eval.engine.decoders import decoder_spec, make_decoder
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Model
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import ScoreRequest
from twotower_eval.errors import UserError
from twotower_eval.records import Prompt, draws_at_random
from twotower_eval.usual import MASKED, relation, usual_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reading("llama", tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_family_runs_with_its_own_decoder_by_default(family: str, base: Path, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path / family)
    given = {"tasks": "miniature_sort", "limit": 2, "max_new_tokens": 8, "out": tmp_path, "progress": False}
    run = tt.evaluate(model=str(folder), baseline=str(base), **given)  # type: ignore[arg-type]
    rows = run.generations
    [kind] = {cell.decoder.kind for cell in run.manifest.cells if cell.arm == "candidate"}
    assert kind == usual_of(family).decoder
    assert len(rows) == 4
    assert run.manifest.plan["likelihood"] == "bound"


def test_a_candidate_without_a_causal_form_asks_for_a_baseline(tmp_path: Path) -> None:
    for family, said in (("sdar", "Qwen/Qwen3 of its size, from which"), ("radd", "name a causal language model")):
        folder = save_family(family, tmp_path / family)
        with pytest.raises(UserError, match=f"is of family {family}, which has no autoregressive form.*{said}"):
            tt.evaluate(model=str(folder), tasks="miniature_sort", limit=1, out=tmp_path)


def test_a_decoder_names_those_that_would_work(tmp_path: Path) -> None:
    llada, sdar = (tt.load_model(save_family(family, tmp_path / family)) for family in ("llada", "sdar"))
    with pytest.raises(
        UserError, match=r"needs a two-tower checkpoint, and llada is of .* --decoder low_confidence or"
    ):
        make_decoder(llada, "block_diffusion")
    with pytest.raises(UserError, match=r"predicts the next token, and sdar is of family sdar: give --decoder sdar or"):
        make_decoder(sdar, "autoregressive")
    for kind in ("fast_dllm_v2", "llada2", "bd3lm", "sdar"):
        with pytest.raises(UserError, match="block"):
            make_decoder(llada, kind)


def test_a_model_without_a_mask_token_says_how_to_name_it(tmp_path: Path) -> None:
    folder = save_family("a2d_mdlm", tmp_path / "a2d", tokenizer=False)
    with pytest.raises(UserError, match=r"\(a2d_mdlm\) has no mask token: add mask_token_id to its config"):
        make_decoder(tt.load_model(folder), "low_confidence")


def test_what_a_baseline_is_to_a_family_follows_from_names() -> None:
    assert relation("sdar", "Qwen/Qwen3-8B@main") == "own backbone"
    assert relation("llada", "meta-llama/Meta-Llama-3-8B") == "usual"
    assert relation("dream", "Qwen/Qwen3-8B") == relation("radd", "gpt2") == "other"


@pytest.mark.parametrize(("family", "kind"), [("llada", "low_confidence"), ("sdar", "sdar"), ("dream", "dream")])
def test_a_witness_knows_a_familys_passes_and_other_tokens(family: str, kind: str, tmp_path: Path) -> None:
    """Every token of a greedy answer comes from logits of its call; tokens that do not are told."""
    model = tt.load_model(save_family(family, tmp_path / family))
    watched = WatchedModel(model)
    prompt = Prompt(id="one", token_ids=(40, 41, 42, 43, 44, 45))
    with watched.witnessed(prompt.token_ids) as witness:
        [made] = make_decoder(cast(Model, watched), kind).generate([prompt], max_new_tokens=12)
    tally = witness.tally(made.token_ids)
    assert (tally.num_witnessed, tally.num_drafted) == (tally.num_tokens, 0)
    others = [(token + 7) % 100 + 4 for token in made.token_ids]
    assert witness.tally(others).num_witnessed < 0.5 * len(others)


def test_passes_over_a_canvas_are_all_counted_as_denoising(tmp_path: Path) -> None:
    model = tt.load_model(save_family("llada", tmp_path / "llada"))
    watched = WatchedModel(model)
    params = {"cache": "dual", "block_length": 4}
    prompt = Prompt(id="one", token_ids=(40, 41, 42))
    [made] = make_decoder(cast(Model, watched), "fast_dllm_v1", **params).generate([prompt], max_new_tokens=8)
    assert {one.kind for one in watched.passes} == {"denoise"}
    assert sum(one.num for one in watched.passes) == made.num_denoiser_forwards
    assert made.num_context_forwards == 0


def test_samplers_draw_also_at_temperature_0_and_say_so() -> None:
    """Else their answers, which differ from seed to seed, would be taken for those of a decoder that is not itself."""
    assert draws_at_random(decoder_spec("bd3lm"))
    assert draws_at_random(decoder_spec("dream", alg="origin"))
    assert not draws_at_random(decoder_spec("dream"))
    assert not draws_at_random(decoder_spec("sdar"))
    claimed = dataclasses.replace(decoder_spec("sdar"), kind="other.module:Decoder", sampled=True)
    assert not draws_at_random(claimed)


def test_an_approximate_cache_is_named_wherever_a_point_is() -> None:
    spec = decoder_spec("fast_dllm_v1", cache="dual")
    assert long_name(spec).endswith("approximate cache")
    assert short_name(spec).endswith("approximate cache")
    assert "approximate" not in long_name(decoder_spec("fast_dllm_v1"))


def test_a_familys_decoder_is_named_by_what_is_on() -> None:
    assert long_name(decoder_spec("bd3lm")) == "bd3lm, first hitting true"
    assert "None" not in long_name(decoder_spec("sdar"))


@pytest.mark.parametrize("family", ["llada", "sdar", "bd3lm"])
def test_a_family_is_timed_and_reported(family: str, base: Path, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path / family)
    given: dict[str, Any] = {"tasks": "miniature_sort", "num_prompts": 1, "new_tokens": 4, "min_rounds": 2, "probes": 2}
    run = tt.time(model=str(folder), baseline=str(base), out=tmp_path, progress=False, **given)
    assert {"prefill", "denoise"} <= set(run.costs["part"])
    page = (tt.report(run, out=tmp_path / "pages").path).read_text()
    assert "logits of these calls explain the others" not in page
    assert "| same rounds |" in page


REQUEST = ScoreRequest(context_ids=(40, 41, 42, 43, 44), continuation_ids=(45, 46, 47, 48, 49, 50, 51), seed=3)


def _without_mask(logits: torch.Tensor, mask: int) -> torch.Tensor:
    logits[..., mask] = -torch.inf
    return logits.double().log_softmax(-1)


def test_a_canvas_is_scored_from_left_to_right_with_the_whole_answer_in_view(tmp_path: Path) -> None:
    """By hand, from whole canvases of prompt and answer."""
    model = cast(Any, tt.load_model(save_family("llada", tmp_path / "llada")))
    prompt, answer, mask = REQUEST.context_ids, REQUEST.continuation_ids, model.mask_token_id
    total = 0.0
    for place, token in enumerate(answer):
        ids = [*prompt, *answer[:place], *[mask] * (len(answer) - place)]
        total += float(
            _without_mask(model.canvas_logits(torch.tensor([ids]), [len(ids)])[0, len(prompt) + place], mask)[token]
        )
    [found] = make_scorer(model, "denoiser_left_to_right").score([REQUEST])
    assert found.logprob_nats == pytest.approx(total, abs=1e-4)


def test_blocks_are_scored_where_they_are_decoded(tmp_path: Path) -> None:
    """SDAR's blocks count from the first token: 5 tokens of context leave 3 places of the second block of 4."""
    model = cast(Any, tt.load_model(save_family("sdar", tmp_path / "sdar")))
    row, mask, total = (*REQUEST.context_ids, *REQUEST.continuation_ids), model.mask_token_id, 0.0
    for place in range(5, 12):
        start = place - place % 4
        context = model.prefill(torch.tensor([row[:start]]))
        block = torch.tensor([[*row[start:place], *[mask] * (start + 4 - place)]])
        total += float(_without_mask(model.denoise(block, context)[0, place - start], mask)[row[place]])
    [found] = make_scorer(model, "denoiser_left_to_right").score([REQUEST])
    assert found.logprob_nats == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_bound_follows_from_the_requests_seed_alone(family: str, tmp_path: Path) -> None:
    """Neither the requests beside it nor their order change it, and on average it lies below the exact chain rule
    where both see the same."""
    model = tt.load_model(save_family(family, tmp_path / family))
    other = dataclasses.replace(REQUEST, context_ids=(60, 61), seed=4)
    scorer = make_scorer(model, "bound", num_draws=4)
    [alone] = scorer.score([REQUEST])
    assert scorer.score([other, REQUEST])[1] == alone
    assert (alone.kind, alone.num_draws) == ("bound", 4)
    assert scorer.score([dataclasses.replace(REQUEST, seed=5)]) != [alone]


def test_a_single_token_is_scored_alike_by_both_kinds(tmp_path: Path) -> None:
    """One token has one set of masks, so that the bound is exact."""
    single = dataclasses.replace(REQUEST, continuation_ids=(45,))
    for family in ("llada", "sdar", "bd3lm", "mdlm"):
        model = tt.load_model(save_family(family, tmp_path / family))
        [bound], [exact] = (make_scorer(model, kind).score([single]) for kind in MASKED)
        assert bound.logprob_nats == pytest.approx(exact.logprob_nats, abs=1e-5)
        assert bound.is_greedy == exact.is_greedy


@pytest.mark.parametrize("family", ["llada", "bd3lm"])
def test_options_are_scored_by_a_kind_that_both_arms_have_and_name(family: str, base: Path, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path / family)
    run = tt.evaluate(model=str(folder), baseline=str(base), tasks="miniature_choice", limit=1, out=tmp_path)
    assert sorted(set(run.likelihoods["kind"])) == ["bound", "exact"]
    with pytest.raises(UserError, match="take bound or denoiser_left_to_right"):
        make_scorer(tt.load_model(folder), "context_tower")


def test_a_family_as_a_baseline_is_scored_as_the_candidate_is(tmp_path: Path) -> None:
    folders = [str(save_family(family, tmp_path / family)) for family in ("llada", "dream")]
    given: dict[str, Any] = {"tasks": "miniature_choice", "limit": 1, "out": tmp_path}
    run = tt.evaluate(model=folders[0], baseline=folders[1], baseline_decoder="dream", **given)
    assert set(run.likelihoods["kind"]) == {"bound"}


def test_set_reaches_the_familys_own_decoder_without_naming_it(base: Path, tmp_path: Path) -> None:
    folder = save_family("sdar", tmp_path / "sdar")
    given: dict[str, Any] = {"tasks": "miniature_sort", "limit": 1, "max_new_tokens": 4, "out": tmp_path}
    settings = {"strategy": "low_confidence_static", "steps": "2"}
    run = tt.evaluate(model=str(folder), baseline=str(base), set=settings, **given)
    [spec] = {cell.decoder.label for cell in run.manifest.cells if cell.arm == "candidate"}
    assert "steps=2" in spec
    assert "strategy=low_confidence_static" in spec


def test_a_report_says_what_stands_against_what_and_what_the_baseline_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bound against an exact likelihood; a backbone is known by its name alone."""
    backbone = save_reading("llama", tmp_path / "Qwen3-0.6B")
    folder = save_family("sdar", tmp_path / "sdar")
    given: dict[str, Any] = {"tasks": ("miniature_choice", "miniature_sort"), "limit": 1, "max_new_tokens": 4}
    run = tt.evaluate(model=str(folder), baseline=str(backbone), out=tmp_path, **given)
    said = (
        "the candidate's denoiser bound (Monte-Carlo) stands against the baseline's autoregressive likelihood (exact)"
    )
    assert said in capsys.readouterr().err
    page = tt.report(run, out=tmp_path / "pages").path.read_text()
    assert said in page
    assert "baseline Qwen3-0.6B: by its name, the backbone that sdar was made from" in page
