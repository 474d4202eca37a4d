"""Our numbers and tokens against the reference's, for every checkpoint with golden data that can be found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import Golden, Spy, checkpoint_folders, described, golden, key_cases, worst
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.nemotron_h import Tower
from twotower_eval.engine.models.twotower import sinusoid
from twotower_eval.engine.ops import moe
from twotower_eval.measure.verify.golden import LIMITS

CONTEXT_ATOL, DENOISER_ATOL, STATE_ATOL = LIMITS["golden_context"], LIMITS["golden_denoiser"], LIMITS["golden_states"]
EXACT_ATOL = 2e-4  # what a float32 reference may round away by itself
ROUTER_ATOL = 1e-6
FOLDERS = [pytest.param(folder, id=folder.name) for folder in checkpoint_folders()]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("folder", FOLDERS)
def test_mask_token_id_is_the_references(folder: Path) -> None:
    gold = golden(folder)
    assert gold.model.mask_token_id == gold.meta["mask_token_id"]


@pytest.mark.parametrize(("folder", "name"), key_cases(".context_logits"))
def test_context_logits(folder: Path, name: str) -> None:
    gold = golden(folder)
    assert worst(gold.model.context_logits(gold[f"{name}.ids"]), gold[f"{name}.context_logits"]) < CONTEXT_ATOL


@pytest.mark.parametrize(("folder", "name"), key_cases(".prefill_last_logits"))
def test_prefill(folder: Path, name: str) -> None:
    gold = golden(folder)
    context = gold.model.prefill(gold[f"{name}.ids"])
    assert worst(gold.model.next_logits(context), gold[f"{name}.prefill_last_logits"]) < CONTEXT_ATOL


@pytest.mark.parametrize(("folder", "name"), key_cases(".prefill_last_logits"))
def test_denoiser(folder: Path, name: str) -> None:
    """All block sizes and mask patterns, another t, a t per row, and none at all."""
    gold = golden(folder)
    context = gold.model.prefill(gold[f"{name}.ids"])
    cases = gold.parents(f"{name}.den.", ".block_ids")
    assert cases
    for case in cases:
        logits = gold.model.denoise(gold[f"{case}.block_ids"], context, gold.tensors.get(f"{case}.t"))
        assert worst(logits, gold[f"{case}.logits"]) < DENOISER_ATOL, case


@pytest.mark.parametrize("folder", FOLDERS)
def test_denoiser_without_rounding(folder: Path) -> None:
    """In float64, where no order of sums matters, nothing is left but the reference's own rounding."""
    gold = golden(folder)
    exact = load_model(folder, dtype="float64")
    for name in gold.parents("", ".prefill_last_logits"):
        context = exact.prefill(gold[f"{name}.ids"])
        for case in gold.parents(f"{name}.den.", ".block_ids"):
            logits = exact.denoise(gold[f"{case}.block_ids"], context, gold.tensors.get(f"{case}.t"))
            assert worst(logits, gold[f"{case}.logits"]) < EXACT_ATOL, case


@pytest.mark.parametrize(("folder", "name"), key_cases(".den_block_ids"))
def test_denoiser_on_an_extended_context(folder: Path, name: str) -> None:
    gold = golden(folder)
    context = gold.model.extend(gold.model.prefill(gold[name.split(".")[0] + ".ids"]), gold[f"{name}.block_ids"])
    logits = gold.model.denoise(gold[f"{name}.den_block_ids"], context, gold.tensors.get(f"{name}.den_t"))
    assert worst(logits, gold[f"{name}.den_logits"]) < DENOISER_ATOL


@pytest.mark.parametrize(("folder", "key"), key_cases("", containing=".state.layers."))
def test_states(folder: Path, key: str) -> None:
    """Convolution and SSM states, keys and values, after prompts and extensions."""
    gold = golden(folder)
    origin, _, rest = key.partition(".state.layers.")
    context = gold.model.prefill(gold[origin.split(".")[0] + ".ids"])
    if "." in origin:
        context = gold.model.extend(context, gold[f"{origin}.block_ids"])
    layer, what = int(rest.split(".")[0]), rest.split(".")[1]
    length = context.max_length
    ours = {
        "conv": lambda: context.mamba[layer].conv_BCW,
        "ssm": lambda: context.mamba[layer].ssm_BhPN,
        "key": lambda: context.buffer.keys[layer][:, :, :length],
        "value": lambda: context.buffer.values[layer][:, :, :length],
    }[what]()
    assert worst(ours, gold[key]) < STATE_ATOL


@pytest.mark.parametrize(("folder", "name"), key_cases(".context_hidden"))
def test_residual_entering_each_layer(folder: Path, name: str) -> None:
    gold = golden(folder)
    tower: Tower = gold.model.context_tower.tower
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, made: seen.append(made[0][0])) for layer in tower.layers]
    gold.model.prefill(gold[f"{name}.ids"])
    for hook in hooks:
        hook.remove()
    assert worst(torch.stack(seen), gold[f"{name}.context_hidden"]) < STATE_ATOL


@pytest.mark.parametrize(("folder", "key"), key_cases(".mixer_in"))
def test_inside_the_denoisers_layers(folder: Path, key: str) -> None:
    """What E and - mixers are given (after norm and modulation) and what they answer (before the gate)."""
    gold = golden(folder)
    case, _, layer = key.rpartition(".layers.")
    mixer = gold.model.denoiser.tower.layers[int(layer)].mixer
    seen: dict[str, Tensor] = {}
    hook = mixer.register_forward_hook(lambda _, args, out: seen.update(mixer_in=args[0], mixer_out=out))
    context = gold.model.prefill(gold[case.split(".")[0] + ".ids"])
    gold.model.denoise(gold[f"{case}.block_ids"], context, gold.tensors.get(f"{case}.t"))
    hook.remove()
    for what, ours in seen.items():
        assert worst(ours, gold[f"{key}.{what}"]) < DENOISER_ATOL, what


@pytest.mark.parametrize(("folder", "key"), key_cases(".sinusoid"))
def test_time_modules(folder: Path, key: str) -> None:
    gold = golden(folder)
    t_B, denoiser = gold[f"{key}.t"], gold.model.denoiser
    # angles reach 1000, where the last bit of a float32 frequency is worth 3e-5
    assert worst(sinusoid(t_B, torch.float32), gold[f"{key}.sinusoid"]) < 1e-4
    embedded = denoiser.t_embedder(t_B)
    assert worst(embedded, gold[f"{key}.t_embedder"]) < DENOISER_ATOL
    assert worst(denoiser.t_block(embedded), gold[f"{key}.t_block"]) < DENOISER_ATOL


@pytest.mark.parametrize(("folder", "key"), key_cases(".indices_sorted"))
def test_router(folder: Path, key: str) -> None:
    gold = golden(folder)
    mixer = gold.model.context_tower.tower.layers[gold.meta[key]["layer"]].mixer
    gate = mixer.gate
    chosen_RA, weights_RA = moe.route(gold[f"{key}.x"], gate.weight, gate.e_score_correction_bias, mixer.routing)
    chosen_RA, order_RA = chosen_RA.sort(dim=1)
    assert chosen_RA.tolist() == gold[f"{key}.indices_sorted"].tolist()
    assert worst(weights_RA.gather(1, order_RA), gold[f"{key}.weights"]) < ROUTER_ATOL


@pytest.mark.parametrize(("folder", "name"), key_cases(".ar.tokens"))
@pytest.mark.parametrize("kind", ["autoregressive", "reference"])
def test_autoregressive_tokens(folder: Path, name: str, kind: str) -> None:
    gold = golden(folder)
    check_one_by_one(gold, name, kind, "autoregressive", gold[f"{name}.ar.tokens"])


@pytest.mark.parametrize(("folder", "name"), key_cases(".mock_ar.tokens"))
@pytest.mark.parametrize("kind", ["mock_ar", "reference"])
def test_mock_ar_tokens(folder: Path, name: str, kind: str) -> None:
    gold = golden(folder)
    check_one_by_one(gold, name, kind, "mock_ar", gold[f"{name}.mock_ar.tokens"])


def check_one_by_one(gold: Golden, name: str, kind: str, mode: str, tokens_BS: Tensor) -> None:
    """Tokens of a decoder that makes one a time, and its forwards: one of the denoiser for each if it is mock-AR."""
    decoder = make_decoder(gold.model, kind, **({"mode": mode} if kind == "reference" else {}))
    num_new = tokens_BS.shape[1]
    generations = decoder.generate(gold.prompts(name), max_new_tokens=num_new)
    assert [list(g.token_ids) for g in generations] == tokens_BS.tolist()
    for g in generations:
        assert (g.num_context_forwards, g.num_denoiser_forwards) == (num_new, num_new if mode == "mock_ar" else 0)
        assert (g.finish, g.num_discarded_tokens) == ("length", 0)


@pytest.mark.parametrize(("folder", "name"), key_cases(".step_logits"))
def test_step_logits(folder: Path, name: str) -> None:
    """Row j gives token j, the earlier tokens being the reference's."""
    gold = golden(folder)
    prompt, mode = name.split(".")
    ids, tokens = gold[f"{prompt}.ids"], gold[f"{name}.tokens"]
    model, wanted = gold.model, gold[f"{name}.step_logits"]
    if mode == "ar":
        context = model.prefill(ids)
        for j in range(tokens.shape[1]):
            assert worst(model.next_logits(context), wanted[:, j]) < CONTEXT_ATOL, j
            context = model.extend(context, tokens[:, j : j + 1])
        return
    context, last = model.prefill(ids[:, :-1]), ids[:, -1:]
    for j in range(tokens.shape[1]):
        assert worst(model.denoise(last, context, None)[:, 0], wanted[:, j]) < DENOISER_ATOL, j
        context, last = model.extend(context, last), tokens[:, j : j + 1]


@pytest.mark.parametrize(("folder", "key"), key_cases(".trace.xt_before"))
def test_block_diffusion(folder: Path, key: str) -> None:
    """Tokens, every denoiser call's block and t, every commit, and the number of calls."""
    gold = golden(folder)
    name = key.split(".")[0]
    case = gold.meta["prompts"][name]["diffusion"][key.partition(".diff.")[2]]
    prompts, spy, mask = gold.prompts(name), Spy(gold.model), gold.meta["mask_token_id"]
    decoder = make_decoder(
        spy,
        "block_diffusion",
        block_size=case["block_size"],
        steps_per_block=case["steps_per_block"],
        threshold=case["confidence_threshold"],
        batch_mean_t=len(prompts) > 1,
        trace=True,
    )
    generations = decoder.generate(prompts, max_new_tokens=case["max_new_tokens"])
    assert [list(g.token_ids) for g in generations] == case["tokens"] == gold[f"{key}.tokens"].tolist()
    before_JBK, after_JBK = gold[f"{key}.trace.xt_before"], gold[f"{key}.trace.xt_after"]
    assert len(spy.blocks) == case["nfe"] == len(before_JBK)
    num_blocks = int(gold[f"{key}.trace.block"].max()) + 1
    for row, g in enumerate(generations):
        busy = [j for j in range(len(before_JBK)) if (before_JBK[j, row] == mask).any()]
        assert (g.num_denoiser_forwards, g.num_context_forwards) == (len(busy), num_blocks)
        assert g.trace is not None
        for step, j in zip(g.trace, busy, strict=True):
            assert (step.block, step.step) == (int(gold[f"{key}.trace.block"][j]), int(gold[f"{key}.trace.step"][j]))
            block = before_JBK[j, row].clone()
            block[list(step.positions)] = torch.tensor(step.token_ids, dtype=block.dtype)
            assert block.tolist() == after_JBK[j, row].tolist()
            wanted = gold[f"{key}.trace.confidence"][j, row][list(step.positions)]
            assert worst(torch.tensor(step.confidences), wanted) < DENOISER_ATOL
    for j, block_BK in enumerate(spy.blocks):
        active = [row for row in range(len(prompts)) if (before_JBK[j, row] == mask).any()]
        assert block_BK.tolist() == before_JBK[j, active].tolist()
        assert spy.fractions[j] == pytest.approx([float(gold[f"{key}.trace.t"][j])] * len(active), abs=1e-6)
        check_confidence(spy.logits[j], block_BK == mask, gold[f"{key}.trace.confidence"][j, active], mask)


def check_confidence(logits_BKV: Tensor, masked_BK: Tensor, wanted_BK: Tensor, mask: int) -> None:
    """Probabilities of the likeliest tokens; the reference has 0 at committed positions."""
    logits_BKV[..., mask] = -torch.inf
    confidence_BK = logits_BKV.softmax(-1).amax(-1)
    assert worst(torch.where(masked_BK, confidence_BK, 0.0), wanted_BK) < DENOISER_ATOL


@pytest.mark.parametrize(("folder", "key"), key_cases(".trace.xt_before", single=True))
def test_reference_decoder(folder: Path, key: str) -> None:
    """The slow decoder, which shares no loop and no commit rule with the fast one, agrees with the reference too."""
    gold = golden(folder)
    name = key.split(".")[0]
    case = gold.meta["prompts"][name]["diffusion"][key.partition(".diff.")[2]]
    decoder = make_decoder(
        gold.model,
        "reference",
        block_size=case["block_size"],
        steps_per_block=case["steps_per_block"],
        threshold=case["confidence_threshold"],
    )
    [g] = decoder.generate(gold.prompts(name), max_new_tokens=case["max_new_tokens"])
    assert [list(g.token_ids)] == case["tokens"]
    assert g.num_denoiser_forwards == case["nfe"]


def eos_cases() -> list[Any]:
    return [
        pytest.param(folder, key, id=f"{folder.name}-{key}")
        for folder in checkpoint_folders()
        for key in described(folder).get("eos", {})
    ]


@pytest.mark.parametrize(("folder", "key"), eos_cases())
def test_eos(folder: Path, key: str) -> None:
    """The reference stops all rows with the first and keeps what follows in the block; up to EOS we agree with it.

    A row without EOS is compared as far as the reference went.
    """
    gold = golden(folder)
    case = gold.meta["eos"][key]
    name, mode, *rest = key.split(".", 2)
    prompts, eos = gold.prompts(name), case["eos_token_id"]
    params: dict[str, Any] = {}
    if mode == "diff":
        setting = gold.meta["prompts"][name]["diffusion"][rest[0]]
        params = {
            "block_size": setting["block_size"],
            "steps_per_block": setting["steps_per_block"],
            "threshold": setting["confidence_threshold"],
            "batch_mean_t": len(prompts) > 1,
        }
    decoder = make_decoder(gold.model, {"ar": "autoregressive", "diff": "block_diffusion"}.get(mode, mode), **params)
    generations = decoder.generate(prompts, max_new_tokens=case["max_new_tokens"], eos_token_ids=[eos])
    assert any(eos in tokens for tokens in case["tokens"])
    for g, tokens in zip(generations, case["tokens"], strict=True):
        if eos in tokens:
            assert (list(g.token_ids), g.finish) == (tokens[: tokens.index(eos)], "eos")
            assert g.num_discarded_tokens == len(tokens) - g.num_tokens
            if "nfe" in case and len(prompts) == 1:
                assert g.num_denoiser_forwards == case["nfe"]
        else:
            assert list(g.token_ids[: len(tokens)]) == tokens
