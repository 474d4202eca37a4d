"""E2D2 in all its forms by what must hold of them, on small networks whose answers vary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import twotower_eval as tt
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.rows import RowNoise
from twotower_eval.engine.decoders.sampled import Draft
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.bounds import e2d2_noised
from twotower_eval.engine.scorers.pieces import ScoreRequest
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay import Recorded
from twotower_eval.miniature.corpus import write_tokenizer
from twotower_eval.records import Prompt

VOCAB, MASK, SIZE, HIDDEN, HEAD_DIM = 112, 111, 4, 24, 8
BASE = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "head_dim": HEAD_DIM,
}
BASE |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
BASE |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
OWN, SHARED = "x.LLMasEncoderDecoder", "x.LLMasEncoderDecoderShareKV"
FORMS: dict[str, dict[str, Any]] = {
    "own keys": {"_target_": OWN, "num_encoder_layers": 3, "num_decoder_layers": 2},
    "own keys, causal": {"_target_": OWN, "num_encoder_layers": 2, "use_encoder_causal_mask": True},
    "own keys, tied": {"_target_": OWN, "num_decoder_layers": 2, "tie_encoder_decoder_weights": True},
    "shared keys, tied": {"_target_": SHARED, "num_decoder_layers": 2, "tie_encoder_decoder_weights": True},
    "shared keys": {"_target_": SHARED, "num_encoder_layers": 3, "num_decoder_layers": 3},
    "shared keys of the top": {"_target_": SHARED, "num_decoder_layers": 2, "keep_top_decoder_layers": True},
}
PROMPTS = [Prompt(id=str(n), token_ids=tuple(range(20, 20 + n)), seed=n) for n in (3, 1, 8, 5)]


def _layers(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    heads, keys, inner = 4 * HEAD_DIM, 2 * HEAD_DIM, 32
    shapes = {
        "self_attn.q_proj": (heads, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
    }
    shapes |= {"self_attn.o_proj": (HIDDEN, heads), "mlp.gate_proj": (inner, HIDDEN), "mlp.up_proj": (inner, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, inner)}
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN, "self_attn.q_norm": HEAD_DIM}
    norms |= {"self_attn.k_norm": HEAD_DIM}
    found = {"model.norm.weight": 1 + 0.3 * drawn(HIDDEN)}
    for layer in range(num):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        found |= {f"{at}.{name}.weight": 1 + 0.3 * drawn(size) for name, size in norms.items()}
    return found


def write(folder: Path, form: str, **changes: object) -> Path:
    """A checkpoint in the public layout."""
    folder.mkdir(exist_ok=True, parents=True)
    backbone = {"pretrained_model_name_or_path": "base", **FORMS[form]}
    config = {"model_type": "e2d2", "mask_token_id": MASK, "block_size": SIZE, "eval_block_size": SIZE}
    config |= {"backbone_config": backbone, "vocab_size": VOCAB - 5, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(BASE))
    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    both = {"lm_head.weight": embedding}
    encoder = _layers(backbone.get("num_encoder_layers", 4), generator)
    encoder |= {"model.embed_tokens.weight": embedding, **both}
    tied = backbone.get("tie_encoder_decoder_weights")
    decoder = encoder if tied else _layers(backbone.get("num_decoder_layers", 4), generator) | both
    tensors = {f"backbone.encoder.{name}": tensor.clone() for name, tensor in encoder.items()}
    tensors |= {f"backbone.decoder.{name}": tensor.clone() for name, tensor in decoder.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("e2d2")
    return {form: tt.load_model(write(folder / form.replace(" ", "_"), form)) for form in FORMS}


@pytest.fixture(params=list(FORMS))
def model(models: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return models[request.param]


@torch.inference_mode()
def test_block_after_block_is_as_whole_rows(model: Any) -> None:
    """A prompt that all tokens see, then blocks: what the cache holds is what training's pass over whole rows reads."""
    clean = torch.randint(0, VOCAB - 1, (2, 16), generator=torch.Generator().manual_seed(1))
    noisy = torch.where(torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.6, MASK, clean)
    prompt = torch.arange(16).expand(2, -1) < 2 * SIZE
    # A prompt in one direction sees no token behind it; blocks behind the cache see themselves in both.
    whole = model.doubled_logits(noisy, clean, given_BS=prompt)
    assert len(set(whole.argmax(-1).flatten().tolist())) > 6
    context = model.prefill(clean[:, : 2 * SIZE])
    for start in range(2 * SIZE, 16, SIZE):
        piece = slice(start, start + SIZE)
        assert torch.allclose(model.denoise(noisy[:, piece], context), whole[:, piece], atol=2e-4)
        context = model.extend(context, clean[:, piece])
    assert context.lengths == (16, 16)


@torch.inference_mode()
def test_padding_is_seen_by_nothing(model: Any) -> None:
    ids = torch.randint(0, VOCAB - 1, (2, 12), generator=torch.Generator().manual_seed(1))
    block = torch.tensor([[5, MASK, 7, MASK]] * 2)
    uneven = model.extend(model.prefill(ids[:, :8], [8, 3]), ids[:, 8:], [2, 4])
    for row, kept in enumerate((8, 3)):
        new = (2, 4)[row]
        alone = model.extend(model.prefill(ids[row : row + 1, :kept]), ids[row : row + 1, 8 : 8 + new])
        ours = model.denoise(block, uneven)[row]
        assert torch.allclose(ours, model.denoise(block[:1], alone)[0], atol=2e-4)
        assert torch.allclose(model.denoise(block[:1], uneven.select([row]))[0], ours, atol=2e-4)
    other = ids.clone()
    other[1, 3:8] = 9
    given = torch.ones_like(ids, dtype=torch.bool)
    given[1, 3:8] = False
    both = [model.doubled_logits(each, each, real_BS=given)[given] for each in (ids, other)]
    assert torch.equal(*both)


def test_what_both_parts_share_is_held_once(models: dict[str, Any]) -> None:
    for form, own in models.items():
        encoder, decoder = own.encoder.inner, own.decoder.inner
        assert decoder.model.embed_tokens is encoder.model.embed_tokens
        assert decoder.lm_head.weight is encoder.model.embed_tokens.weight
        tied = "tied" in form
        assert (decoder.model.norm is encoder.model.norm) == tied
        pairs = zip(decoder.model.layers[-1].parameters(), encoder.model.layers[-1].parameters(), strict=True)
        assert all((ours is theirs) == tied for ours, theirs in pairs)
    assert models["shared keys, tied"].places == (2, 3)
    assert models["shared keys"].places == (0, 1, 2)
    assert models["shared keys of the top"].places == (2, 3)


PARAMS: list[dict[str, Any]] = [
    {},
    {"strategy": "margin", "steps": 2},
    {"threshold": 0.2, "do_sample": True},
    {"align": False},
    {"use_cache": False},
    {"strategy": "posterior", "do_sample": True, "steps": 6},
    {"strategy": "posterior", "do_sample": True, "drawn_times": True, "lost_cache": True, "commit_mask": True},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("form", ["own keys", "shared keys, tied"])
def test_rows_of_a_batch_are_as_alone(models: dict[str, Any], form: str, params: dict[str, Any]) -> None:
    decoder = make_decoder(models[form], "e2d2", **params)
    for ends in ({}, {"eos_token_ids": (30, 50, 70, 90)}, {"stop": ("a", "e", "1")}):
        given = {"max_new_tokens": 14, **ends}
        alone = [decoder.generate([prompt], **given)[0] for prompt in PROMPTS]
        assert decoder.generate(PROMPTS, **given) == alone
        assert decoder.generate(PROMPTS, **given, max_batch_size=2) == alone
        assert len({one.token_ids for one in alone}) > 1
        if not params.get("commit_mask"):
            assert all(MASK not in one.token_ids for one in alone)


@pytest.mark.parametrize("num", [1, 5, 14])
def test_a_budget_cuts_what_a_longer_one_gives(models: dict[str, Any], num: int) -> None:
    decoder = make_decoder(models["own keys"], "e2d2")
    longer = decoder.generate(PROMPTS, max_new_tokens=20)
    for short, whole in zip(decoder.generate(PROMPTS, max_new_tokens=num), longer, strict=True):
        assert short.token_ids == whole.token_ids[:num]


def test_forwards_are_counted_by_kind(models: dict[str, Any]) -> None:
    """One encoder pass for the prompt's whole blocks and one for each block that another follows."""
    made = make_decoder(models["own keys"], "e2d2").generate(PROMPTS, max_new_tokens=9)
    found = {one.num_prompt_tokens: (one.num_context_forwards, one.num_denoiser_forwards) for one in made}
    # Of 3 tokens: blocks with 1, 4 and 4 masks, read after 0 (no prompt), 1 and 2 of them.
    assert found == {3: (2, 9), 1: (2, 11), 8: (3, 12), 5: (3, 11)}
    anew = make_decoder(models["own keys"], "e2d2", use_cache=False).generate(PROMPTS[2:3], max_new_tokens=9)[0]
    assert (anew.num_context_forwards, anew.num_denoiser_forwards) == (12, 12)


def test_without_a_cache_all_that_stands_before_is_read_as_one(models: dict[str, Any]) -> None:
    """Equal in the first block, where only the prompt stands before it; and different later."""
    both = [
        make_decoder(models["shared keys, tied"], "e2d2", use_cache=use).generate(PROMPTS[2:3], max_new_tokens=24)[0]
        for use in (True, False)
    ]
    assert both[0].token_ids[:SIZE] == both[1].token_ids[:SIZE]
    assert both[0].token_ids != both[1].token_ids


def draft(tokens: list[int], probabilities: list[list[float]], step: int = 0) -> Draft:
    """A block in progress over a vocabulary of four, the last of which is the mask."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    return Draft(torch.tensor(tokens), 3, step=step, logits_GV=torch.nn.functional.pad(logits, (0, 1), value=9.0))


PROBABILITIES = [[0.5, 0.3, 0.2], [0.45, 0.1, 0.45], [0.4, 0.2, 0.4], [0.1, 0.1, 0.8]]


def drawn(models: dict[str, Any], block: Draft, noise: Any = None, **params: Any) -> list[int]:
    decoder: Any = make_decoder(models["own keys"], "e2d2", **params)
    noise = noise or RowNoise(PROMPTS[:1])
    return decoder.drawn(block, block.masked_G, noise, 0).tolist()  # type: ignore[no-any-return]


def test_the_least_certain_are_masked_again(models: dict[str, Any]) -> None:
    """int(s S) of them, but never all: s = 0.75 of four is three, 0.5 two."""
    assert drawn(models, draft([3, 3, 3, 3], PROBABILITIES)) == [3, 3, 3, 2]
    assert drawn(models, draft([3, 3, 3, 3], PROBABILITIES), steps=2) == [0, 3, 3, 2]
    assert drawn(models, draft([3, 3, 3, 2], PROBABILITIES, step=1)) == [0, 3, 3, 3]
    assert drawn(models, draft([3, 3, 1, 1], PROBABILITIES)) == [0, 3, 3, 3]
    assert drawn(models, draft([3, 3, 3, 3], PROBABILITIES, step=3)) == [0, 0, 0, 2]


def test_margins_and_thresholds(models: dict[str, Any]) -> None:
    close = [[0.45, 0.44, 0.11], [0.4, 0.25, 0.35], [0.44, 0.1, 0.46], [0.4, 0.3, 0.3]]
    assert drawn(models, draft([3, 3, 3, 3], close)) == [3, 3, 2, 3]
    assert drawn(models, draft([3, 3, 3, 3], close), strategy="margin") == [3, 3, 3, 0]
    assert drawn(models, draft([3, 3, 3, 3], close), threshold=0.45 - 1e-9) == [0, 3, 2, 3]
    assert drawn(models, draft([3, 3, 3, 3], close), threshold=0.45 - 1e-9, strategy="margin") == [0, 3, 2, 0]


def test_a_posterior_leaves_masks_by_the_ratio_of_times(models: dict[str, Any]) -> None:
    """Of four steps the second leaves a mask with probability 0.5 / 0.75, and the last none."""
    params = {"strategy": "posterior", "do_sample": True}
    noise = RowNoise([Prompt(id="0", token_ids=(1,), seed=0)])
    found = torch.tensor([drawn(models, draft([3] * 4, PROBABILITIES, 1), noise, **params) for _ in range(2000)])
    assert float((found == 3).float().mean()) == pytest.approx(0.5 / 0.75, abs=0.02)
    assert float((found[:, 0] == 0).float().mean()) == pytest.approx(0.5 / 3, abs=0.03)
    last = torch.tensor([drawn(models, draft([3] * 4, PROBABILITIES, 3), noise, **params) for _ in range(200)])
    assert not (last == 3).any()
    # The last mask still has the probability s / t = 1e-5 / 0.25, which only a draw close to 1 lets win.
    rare = torch.full((4, 4), 0.5, dtype=torch.float64)
    rare[:, 3] = 1 - 1e-8
    assert drawn(models, draft([3] * 4, PROBABILITIES, 3), Recorded([rare]), commit_mask=True, **params) == [3] * 4


def test_drawn_times_fall_as_the_first_of_ever_fewer(models: dict[str, Any]) -> None:
    decoder: Any = make_decoder(models["own keys"], "e2d2", strategy="posterior", drawn_times=True)
    block = draft([3] * 4, PROBABILITIES)
    decoder.opened(block, Recorded([torch.tensor([0.5, 0.25, 0.5, 0.75])]), 0)
    assert block.times is not None
    wanted = [0.5**0.25, 0.5**0.25 * 0.25 ** (1 / 3)]
    wanted += [wanted[1] * 0.5**0.5, wanted[1] * 0.5**0.5 * 0.75]
    assert block.times.tolist() == pytest.approx(wanted, rel=1e-6)
    assert decoder.num_steps(block) == SIZE
    assert decoder._times(block) == pytest.approx((wanted[0], wanted[0] - (1 - 1e-5) / 4))


def test_a_lost_cache_shows_only_after_logits_were_kept(models: dict[str, Any]) -> None:
    """Reading anew in every step keeps nothing, so that nothing is lost; and costs forwards, but changes no token."""
    params = {"strategy": "posterior", "do_sample": True, "steps": 8}
    made = {
        key: make_decoder(models["own keys"], "e2d2", **params, **more).generate(PROMPTS, max_new_tokens=24)
        for key, more in {
            "kept": {},
            "reread": {"reread": True},
            "both": {"reread": True, "lost_cache": True},
            "lost": {"lost_cache": True},
        }.items()
    }
    tokens = {key: [one.token_ids for one in rows] for key, rows in made.items()}
    assert tokens["kept"] == tokens["reread"] == tokens["both"] != tokens["lost"]
    num = {key: sum(one.num_denoiser_forwards for one in rows) for key, rows in made.items()}
    assert num["kept"] < num["reread"] == num["both"]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"strategy": "entropy"}, "strategy must be one of confidence, margin, posterior, not 'entropy'"),
        ({"min_t": 0.0}, "min_t must lie between 0 and 1, not 0.0"),
        ({"threshold": 1.5}, "threshold must lie between 0 and 1, not 1.5"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"lost_cache": True}, "lost_cache goes with strategy posterior, not with confidence"),
        ({"strategy": "posterior", "threshold": 0.5}, "threshold goes with strategy confidence or margin"),
        ({"strategy": "posterior", "lost_cache": True, "use_cache": False}, "lost_cache goes with use_cache"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(models: dict[str, Any], params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_decoder(models["own keys"], "e2d2", **params)


def _changed(folder: Path, file: str, **changes: object) -> None:
    config = json.loads((folder / file).read_text())
    for name, value in changes.items():
        (config["backbone_config"] if name in config.get("backbone_config", {}) else config)[name] = value
    (folder / file).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "changes", "said"),
    [
        ("own keys", {"_target_": "x.LLMasDecoder"}, "_target_ 'x.LLMasDecoder', not one of"),
        ("own keys", {"pretrained_model_name_or_path": None}, "names no pretrained_model_name_or_path"),
        ("own keys", {"time_conditioned_backbone": True}, "time_conditioned_backbone True"),
        ("own keys", {"noise_config": {"_target_": "x.CosineNoise"}}, "noise_config names x.CosineNoise"),
        ("own keys", {"block_size": None, "eval_block_size": None}, "eval_block_size is missing"),
        ("own keys", {"num_encoder_layers": 4}, "lacks tensor model.layers.3"),
        ("shared keys", {"num_encoder_layers": 2}, "3 layers of the decoder need as many of the encoder's 2"),
        ("own keys", {"mask_token_id": VOCAB}, "mask_token_id 112 is outside the vocabulary of 112"),
    ],
)
def test_configs_that_are_wrong_are_refused(tmp_path: Path, form: str, changes: dict[str, Any], said: str) -> None:
    _changed(write(tmp_path / "m", form), "config.json", **changes)
    with pytest.raises(UserError, match=said):
        tt.load_model(tmp_path / "m")


def test_tied_parts_that_differ_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = write(tmp_path / "m", "shared keys, tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.decoder.model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"backbone\.decoder\.model\.layers\.3\.mlp\.up_proj\.weight must repeat"):
        tt.load_model(folder)


def test_sizes_of_the_base_are_part_of_what_a_checkpoint_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "own keys")
    digests = []
    for theta in (1e6, 1e4):
        _changed(folder, "base/config.json", rope_theta=theta)
        files = {file.name: file.sha256 for file in tt.load_model(folder).checkpoint.files}
        digests.append(files["base/config.json"])
    assert len(set(digests)) == 2
    _changed(folder, "base/config.json", model_type="llama")
    with pytest.raises(UserError, match="E2D2 is known on qwen3 only, not on 'llama'"):
        tt.load_model(folder)


def test_times_of_a_bound_are_those_of_its_blocks() -> None:
    noised = e2d2_noised(torch.tensor([[0.0, 0.5]]), 2)
    assert noised.t.tolist() == [pytest.approx([0.001, 0.001, 0.5005, 0.5005])]
    assert torch.equal(noised.masked, noised.t)
    assert noised.weight.tolist() == [pytest.approx([1000, 1000, 1 / 0.5005, 1 / 0.5005])]


@pytest.mark.parametrize("kind", ["denoiser_left_to_right", "bound"])
def test_a_likelihood_does_not_hang_on_what_else_is_scored(model: Any, kind: Any) -> None:
    """Prompts with a beginning in common are read as a whole each."""
    asked = [((5, 6, 7, 8, 9), (10, 11, 12, 13, 14)), ((5, 6), (12,)), ((5, 6, 7, 8), (9,))]
    requests = [ScoreRequest(context_ids=prompt, continuation_ids=answer) for prompt, answer in asked]
    scorer = make_scorer(model, kind, block_size=SIZE, num_draws=4)
    together = scorer.score(requests)
    assert together == [scorer.score([one])[0] for one in requests]
    assert all(one.kind == kind and one.logprob_nats < 0 for one in together)


@torch.inference_mode()
def test_a_left_to_right_likelihood_is_the_sum_of_its_predictions(model: Any) -> None:
    prompt, answer = [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]
    total = 0.0
    for place, token in enumerate(answer):
        start = place - place % SIZE
        context = model.prefill(torch.tensor([prompt]))
        if start:
            context = model.extend(context, torch.tensor([answer[:start]]))
        block = [*answer[start:place], *[MASK] * (SIZE - place + start)]
        logits = model.denoise(torch.tensor([block]), context)[0, place - start]
        logits[MASK] = -torch.inf
        total += float(logits.log_softmax(-1)[token])
    request = ScoreRequest(context_ids=tuple(prompt), continuation_ids=tuple(answer))
    scorer = make_scorer(model, "denoiser_left_to_right", block_size=SIZE)
    assert scorer.score([request])[0].logprob_nats == pytest.approx(total, rel=1e-5)
