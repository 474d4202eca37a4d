"""Hugging Face models as baselines: tokens as transformers' own generate makes them, rows as if alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hf_models import CONFIGS, GPT2, MAMBA2, SMALL, VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.proof import prove_up_to
from twotower_eval.engine.models.transformers_cache import growing
from twotower_eval.engine.models.transformers_model import ForwardError, keeps_all_keys
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import ScoreRequest
from twotower_eval.records import Prompt

ATOL = 2e-5
EVERY_MODEL = pytest.mark.parametrize("name", CONFIGS)
ROWS = [[5, 6, 7], [9], list(range(20, 38)), [3, 4, 5, 6, 7, 8], [11, 12, 13]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model(folder) for name, folder in folders.items()}


def padded(rows: list[list[int]]) -> tuple[Tensor, list[int]]:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), [len(row) for row in rows]


@EVERY_MODEL
def test_tokens_are_those_of_generate(name: str, folders: dict[str, Path], models: dict[str, Any]) -> None:
    """Greedy, one prompt at a time, past the sliding window."""
    native = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    decoder = make_decoder(models[name], "autoregressive")
    for i, row in enumerate(ROWS):
        out = native.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        [g] = decoder.generate([Prompt(id=str(i), token_ids=tuple(row))], max_new_tokens=12)
        assert list(g.token_ids) == out[0, len(row) :].tolist()
        assert (g.num_context_forwards, g.num_denoiser_forwards, g.finish) == (12, 0, "length")


@EVERY_MODEL
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_gives_in_a_batch_what_it_gives_alone(name: str, temperature: float, models: dict[str, Any]) -> None:
    """Unequal prompts, rows that stop early and leave the batch."""
    decoder = make_decoder(models[name], "autoregressive", temperature=temperature)
    prompts = [Prompt(id=str(i), token_ids=tuple(row), seed=i) for i, row in enumerate(ROWS)]
    free = decoder.generate(prompts, max_new_tokens=10)
    eos = [free[0].token_ids[3], free[2].token_ids[1]]
    together = decoder.generate(prompts, max_new_tokens=10, eos_token_ids=eos)
    assert {g.finish for g in together} >= {"eos"}
    for prompt, ours in zip(prompts, together, strict=True):
        assert ours == decoder.generate([prompt], max_new_tokens=10, eos_token_ids=eos)[0]


@EVERY_MODEL
@pytest.mark.parametrize("width", [1, 2, 3])
def test_neither_width_nor_order_changes_a_row(name: str, width: int, models: dict[str, Any]) -> None:
    """Attention caches are joined as rows finish; states cannot be, so there each batch ends before the next begins."""
    model = WatchedModel(models[name])
    decoder = make_decoder(model, "autoregressive", temperature=0.9)
    prompts = [Prompt(id=str(i), token_ids=tuple(row), seed=i) for i, row in enumerate([*ROWS, *ROWS])]
    arguments: dict[str, Any] = {"max_new_tokens": 14, "eos_token_ids": range(2, 12)}
    alone = {prompt.id: decoder.generate([prompt], **arguments)[0] for prompt in prompts}
    assert len({g.num_tokens for g in alone.values()}) > 3
    for order in (prompts, prompts[::-1]):
        model.extensions.rows.clear()
        together = decoder.generate(order, max_batch_size=width, **arguments)
        assert together == [alone[prompt.id] for prompt in order]
        assert model.joins_contexts is (name in {"llama", "gpt2", "mistral"})
        waiting = sorted(order, key=lambda prompt: -len(prompt.token_ids))
        batches = [waiting[start : start + width] for start in range(0, len(waiting), width)]
        steps_in_turn = sum(max(alone[p.id].num_context_forwards for p in batch) - 1 for batch in batches)
        if width > 1 and model.joins_contexts:
            assert len(model.extensions.rows) < steps_in_turn
        else:
            assert len(model.extensions.rows) == steps_in_turn


@EVERY_MODEL
def test_extending_is_prefilling_more(name: str, models: dict[str, Any]) -> None:
    model = models[name]
    context = model.prefill(*padded(ROWS))
    new = torch.arange(4 * len(ROWS)).view(len(ROWS), 4) + 7
    context = model.extend(model.extend(context, new[:, :3]), new[:, 3:])
    assert context.lengths == tuple(len(row) + 4 for row in ROWS)
    for i, row in enumerate(ROWS):
        whole = model.prefill(torch.tensor([row + new[i].tolist()]))
        assert torch.allclose(model.next_logits(context)[i], model.next_logits(whole)[0], atol=ATOL)


@EVERY_MODEL
def test_contexts_are_values(name: str, models: dict[str, Any]) -> None:
    """Extending one context twice, and a selection of it, changes none of them."""
    model = models[name]
    old = model.prefill(*padded(ROWS))
    before = model.next_logits(old).clone()
    chosen = old.select([4, 1, 1])
    assert (chosen.lengths, chosen.batch_size) == ((3, 1, 1), 3)
    assert torch.equal(model.next_logits(chosen), before[[4, 1, 1]])
    tokens = [torch.full((len(ROWS), 1), token) for token in (7, 8)]
    first = model.extend(old, tokens[0])
    first_logits = model.next_logits(first).clone()
    second = model.extend(old, tokens[1])
    model.extend(chosen, tokens[0][:3])
    assert torch.equal(model.next_logits(old), before)
    assert torch.equal(model.next_logits(first), first_logits)
    for context, token in ((first, 7), (second, 8)):
        after = model.next_logits(model.extend(context, torch.full((len(ROWS), 1), 9)))
        for i, row in enumerate(ROWS):
            alone = model.next_logits(model.prefill(torch.tensor([[*row, token, 9]])))
            assert torch.allclose(after[i], alone[0], atol=ATOL)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_joined_contexts_go_on_as_apart(name: str, models: dict[str, Any]) -> None:
    """Long before short and short before long, past a sliding window; padding that no row needs any more goes."""
    model = models[name]
    long, short = (model.prefill(*padded(rows)) for rows in (ROWS[:3], [ROWS[4], ROWS[1]]))
    for first, second in ((long, short), (short, long), (long.select([1]), short), (short, long.select([0, 1]))):
        joined = first.join(second)
        assert joined.lengths == first.lengths + second.lengths
        assert min(joined.parts[0].padding) == 0
        apart = torch.cat([model.next_logits(context) for context in (first, second)])
        assert torch.equal(model.next_logits(joined), apart)
        new = torch.arange(3 * joined.batch_size).view(-1, 3) + 9
        n = first.batch_size
        apart = torch.cat([model.next_logits(model.extend(c, ids)) for c, ids in ((first, new[:n]), (second, new[n:]))])
        assert torch.allclose(model.next_logits(model.extend(joined, new)), apart, atol=ATOL)


@EVERY_MODEL
def test_context_logits(name: str, models: dict[str, Any]) -> None:
    """All positions, and each row's last n; nothing is seen of the padding."""
    model = models[name]
    every, last = model.context_logits(*padded(ROWS)), model.context_logits(*padded(ROWS), last=4)
    assert (every.shape, last.shape) == ((5, 18, VOCAB), (5, 4, VOCAB))
    for i, row in enumerate(ROWS):
        alone = model.context_logits(torch.tensor([row]))[0]
        assert torch.allclose(every[i, : len(row)], alone, atol=ATOL)
        columns = [max(0, len(row) - 4 + k) for k in range(4)]
        assert torch.allclose(last[i], alone[columns], atol=ATOL)
        assert torch.allclose(model.next_logits(model.prefill(torch.tensor([row])))[0], alone[-1], atol=ATOL)


@EVERY_MODEL
def test_likelihoods(name: str, models: dict[str, Any]) -> None:
    requests = [ScoreRequest(context_ids=tuple(row), continuation_ids=(8, 9, 10)) for row in ROWS]
    for request, ours in zip(requests, make_scorer(models[name], "exact").score(requests), strict=True):
        ids = torch.tensor([request.context_ids + request.continuation_ids])
        logprobs = models[name].context_logits(ids)[0].log_softmax(-1)
        start = len(request.context_ids) - 1
        wanted = sum(float(logprobs[start + i, token]) for i, token in enumerate(request.continuation_ids))
        assert ours.logprob_nats == pytest.approx(wanted, abs=1e-4)
        assert ours.kind == "exact"


SHARED = tuple(range(20, 45))
MANY = [
    ScoreRequest(context_ids=SHARED[:cut] + question, continuation_ids=option)
    for cut in (25, 9)
    for question in ((), (5, 6, 7), tuple(range(3, 20)))
    for option in ((8,), (9,), (8, 9, 10), (8, 9, 11, 12))
]


@EVERY_MODEL
@pytest.mark.parametrize("max_tokens", [6, 30, 512])
def test_shared_beginnings_change_no_likelihood(
    name: str, max_tokens: int, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees packed into one row where attention is all there is and sees everything; rows alone elsewhere."""
    model = models[name]
    assert (model.branch_tokens > 0) == (name in ("llama", "gpt2"))
    monkeypatch.setattr(model, "branch_tokens", min(max_tokens, model.branch_tokens))
    found = make_scorer(model, "exact").score(MANY)
    monkeypatch.setattr(model, "branch_tokens", 0)
    for ours, wanted in zip(found, make_scorer(model, "exact").score(MANY), strict=True):
        assert ours.logprob_nats == pytest.approx(wanted.logprob_nats, abs=1e-4)
        assert ours.is_greedy == wanted.is_greedy


def test_positions_that_depend_on_the_length_are_not_shared() -> None:
    layers = growing(transformers.DynamicCache(config=CONFIGS["llama"])).layers
    assert keeps_all_keys(CONFIGS["llama"], layers)
    dynamic = transformers.LlamaConfig(
        **{**CONFIGS["llama"].to_dict(), "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    )
    assert not keeps_all_keys(dynamic, layers)


def test_identity(folders: dict[str, Path], models: dict[str, Any], tmp_path: Path) -> None:
    model = models["llama"]
    assert (model.checkpoint.family, model.checkpoint.devices, model.checkpoint.tower) == (
        "transformers",
        ("cpu",),
        None,
    )
    assert (model.vocab_size, model.max_length, model.eos_token_ids) == (VOCAB, 128, (2,))
    assert (model.has_denoiser, model.mask_token_id, model.tokenizer) == (False, None, None)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    copied = copy_of(folders["llama"], tmp_path / "copy")
    assert load_model(copied).checkpoint.digest == model.checkpoint.digest == model.context_digest
    assert models["gpt2"].checkpoint.digest != model.checkpoint.digest
    assert models["gpt2"].max_length == 128


def test_tied_embeddings_are_stored_once_and_loaded(folders: dict[str, Path], models: dict[str, Any]) -> None:
    assert not any("lm_head" in name for name in load_file(folders["gpt2"] / "model.safetensors"))
    inner = models["gpt2"].inner
    assert torch.equal(inner.get_output_embeddings().weight, inner.get_input_embeddings().weight)


def test_bfloat16(folders: dict[str, Path], models: dict[str, Any]) -> None:
    narrow = load_model(folders["llama"], dtype="bfloat16")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    logits, wanted = (m.context_logits(torch.tensor(ROWS[:1])) for m in (narrow, models["llama"]))
    assert logits.dtype == torch.float32
    assert float((logits - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_which_models_pad(models: dict[str, Any]) -> None:
    """Those that carry states must not."""
    assert {name for name, model in models.items() if model.pads_left} == {"llama", "gpt2", "mistral"}


def test_an_empty_prompt_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        models["llama"].prefill(torch.zeros(2, 3, dtype=torch.int64), [3, 0])


def copy_of(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def reconfigure(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda f: reconfigure(f, model_type="no_such_model"), "has no causal language model 'no_such_model'$"),
        (
            lambda f: reconfigure(f, model_type="foreign", auto_map={"AutoModelForCausalLM": "x.Y"}),
            "but one comes with it: to run its code, give --trust-remote-code",
        ),
        (lambda f: reconfigure(f, model_type="t5"), "has no causal language model 't5'"),
        (lambda f: reconfigure(f, quantization_config={"quant_method": "gptq", "bits": 4}), "pip install"),
        (lambda f: rewrite(f, {NORM: None}), f"lacks tensor {NORM}"),
        (lambda f: rewrite(f, {"extra.weight": torch.ones(2)}), "has unexpected tensor extra.weight"),
        (lambda f: rewrite(f, {NORM: torch.ones(31)}), "cannot load it"),
        (lambda f: rewrite(f, {NORM: torch.full((32,), float("nan"))}), f"{NORM} holds NaN"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"xx" * 50), "not a whole safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: reconfigure(f, num_attention_heads="x"), "cannot load it"),
    ],
)
def test_wrong_folders_get_one_line(spoil: Any, pattern: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["llama"], tmp_path / "wrong")
    spoil(folder)
    with pytest.raises(ValueError, match=pattern) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_there_is_no_context_tower_in_it(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="is no two-tower checkpoint"):
        load_model(folders["llama"], tower="context")


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_model(folders["llama"])
    assert capfd.readouterr() == ("", "")


def test_the_digest_is_of_the_weights_that_are_read(tmp_path: Path) -> None:
    """Where shards lay beside a single file, the shards were hashed and the file was read: unlike models were equal."""
    folder = save_tiny("llama", tmp_path / "both")
    single = load_model(folder)
    weights = load_file(str(folder / "model.safetensors"))
    save_file({name: tensor + 1 for name, tensor in weights.items()}, str(folder / "shard.safetensors"))
    index = {"weight_map": dict.fromkeys(weights, "shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    both = load_model(folder)
    assert both.context_digest == single.context_digest
    assert torch.equal(both.inner.lm_head.weight, single.inner.lm_head.weight)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("adapter_config.json", "{}", r"adds an adapter to the weights; merge it"),
        ("config.json", "shard.safetensors", r"transformers_weights names 'shard\.safetensors'"),
    ],
)
def test_weights_that_no_digest_would_cover_are_refused(file: str, text: str, reason: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "folder")
    if file == "config.json":
        text = json.dumps({**json.loads((folder / file).read_text()), "transformers_weights": text})
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_model(folder)


def test_a_limit_under_another_name_is_the_models_limit(tmp_path: Path) -> None:
    """MPT's was not known: longer prompts were not cut but ended the run, by an error of its forward."""
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=12, expansion_ratio=2, vocab_size=64)
    transformers.MptForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.max_length == 12
    model.prefill(torch.tensor([list(range(12))]))
    with pytest.raises(ForwardError, match="its forward raised"):
        model.prefill(torch.tensor([list(range(13))]))


SIZES: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_id": 2, "bos_token_id": 1}
ROBERTA: dict[str, Any] = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 42, "is_decoder": True}
# Name -> config, tokenizer's limit, the longest context, and whether lm-eval's hf takes the same.
LIMITS: dict[str, tuple[Any, float | None, int | None, bool]] = {
    "positions": (transformers.GPT2Config(**GPT2), 99, 128, True),
    "default": (transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=1, n_head=4), None, 2048, True),
    "tokenizer": (transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=1, n_head=4), 40, 40, True),
    "unset": (transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=1, n_head=4), int(1e30), 2048, True),
    "own": (transformers.MptConfig(**SIZES, d_model=32, n_heads=4, n_layers=1, max_seq_len=48), None, 48, False),
    "states": (transformers.Mamba2Config(**MAMBA2), 40, None, False),
    "padded": (transformers.RobertaConfig(**ROBERTA), None, 40, False),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_longest_context_is_lm_evals_as_far_as_there_is_room(name: str, tmp_path: Path) -> None:
    """Long prompts of a Bloom or an MPT failed in the middle of a run, and a RoBERTa has two positions less."""
    from lm_eval.models.utils import resolve_max_length

    config, asked, wanted, as_theirs = LIMITS[name]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if asked is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": asked}))
    model = load_model(tmp_path)
    assert model.max_length == wanted
    if as_theirs:
        assert resolve_max_length(config, SimpleNamespace(model_max_length=asked)) == wanted
    if wanted is not None:
        ids = torch.full((1, wanted), 5)
        assert torch.isfinite(model.context_logits(ids, last=1)).all()
        prove_up_to(model, 5000)  # reads as many
        if name in ("own", "padded"):
            with pytest.raises(ForwardError, match="its forward raised"):
                model.context_logits(torch.full((1, wanted + 1), 5), last=1)


def test_a_context_that_does_not_fit_is_refused_before_a_run(folders: dict[str, Path]) -> None:
    """Settings that promise more than the model has."""
    model = load_model(folders["gpt2"])
    model.max_length = 200
    prove_up_to(model, 128)
    with pytest.raises(
        ValueError, match=r"^gpt2 cannot read 129 tokens, as its settings allow: its forward raised Ind"
    ):
        prove_up_to(model, 129)
    model.max_length = 128
    prove_up_to(model, 129)


def test_a_length_of_minus_one_is_none(tmp_path: Path) -> None:
    """An XLNet's: it was told that its tensors want another dtype."""
    config = transformers.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=1, n_head=4, d_inner=48)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="xlnet is not causal"):
        load_model(tmp_path)
