"""Families of diffusion language models in `run`: their own decoders by default, and what does not fit them."""

from pathlib import Path

import pytest
from hf_models import save_reading
from tiny_families import CONFIGS, save_family

import twotower_eval as tt
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.errors import UserError
from twotower_eval.usual import relation, usual_of


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
