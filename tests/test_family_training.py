"""Training of the other families: their passes equal those of decoding, it resumes, and what it writes is loaded."""

import json

import pytest
import torch

import twotower_eval as tt
from twotower_eval import api
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.errors import UserError
from twotower_eval.miniature import family_training as training
from twotower_eval.miniature.export import EOS_ID, PAD_ID, VOCABULARY
from twotower_eval.miniature.networks import DIT_MASK_ID, TRAINABLE, mask_answers, rows_of, weighted_loss
from twotower_eval.records import Prompt

BLOCK = 4
DECODERS = {"ar": "autoregressive", "sdar": "sdar", "mdlm": "ancestral", "bd3lm": "bd3lm", "e2d2": "e2d2"}
DOCUMENTS = [([9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25, EOS_ID]), ([40, 41], [50, 51, EOS_ID])]


def write_recipe(path, steps):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": BLOCK}
    settings = {"steps": steps, "batches_per_step": 1, "columns_per_batch": 300, "learning_rate": 1e-3}
    settings |= {"final_learning_rate": 1e-5, "warmup_steps": 1, "decay_share": 0.0}
    tables = {"model": sizes, "training": settings}
    lines = [f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in table.items()) for name, table in tables.items()]
    path.write_text("seed = 3\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path):
    return training.read_recipe(write_recipe(tmp_path / "recipe.toml", 4))


def test_rows_stand_as_their_family_reads_them():
    rows = rows_of(DOCUMENTS, multiple=BLOCK, canvas=None, aligned=False)
    assert rows.ids_NS.tolist() == [
        [9, 10, 11, 12, 13, 20, 21, 22, 23, 24, 25, EOS_ID],
        [40, 41, 50, 51, EOS_ID, EOS_ID, EOS_ID, EOS_ID] + [PAD_ID] * 4,
    ]
    assert rows.weight_NS[1].tolist() == pytest.approx([0, 0, 1, 1, 1, 0.1, 0.1, 0.1, 0, 0, 0, 0])
    assert rows.num_answer_tokens == 7 + 3
    aligned = rows_of(DOCUMENTS, multiple=BLOCK, canvas=None, aligned=True)
    assert aligned.ids_NS[0].tolist()[:9] == [PAD_ID] * 3 + [9, 10, 11, 12, 13, 20]
    assert aligned.prompt_N.tolist() == [8, 4]
    canvas = rows_of(DOCUMENTS, multiple=BLOCK, canvas=10, aligned=False)
    assert canvas.answer_NS.sum(1).tolist() == [10, 10]


def test_noise_leaves_prompts_and_padding_and_draws_a_rate_for_each_block():
    rows = rows_of([([9] * 8, [20] * 400)], multiple=BLOCK, canvas=None, aligned=False)
    noisy, masked = mask_answers(rows, 7, torch.Generator().manual_seed(0), block_size=100)
    assert not masked[0, :8].any()
    assert (noisy[masked] == 7).all()
    assert torch.equal(noisy[~masked], rows.ids_NS[~masked])
    shares = masked[0, 8:].float().unflatten(0, (4, 100)).mean(1)
    assert shares.max() - shares.min() > 0.2, "one rate for the whole row would differ by chance only"


def test_loss_is_the_mean_over_weights():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
    loss, right = weighted_loss(logits, torch.tensor([[1, 1]]), torch.tensor([[1.0, 0.5]]))
    expected = (-torch.log(torch.tensor(0.25)) - 0.5 * torch.log(torch.tensor(0.8))) / 1.5
    assert float(loss) == pytest.approx(float(expected))
    assert right == pytest.approx(0.5 / 1.5)


@pytest.mark.parametrize("family", TRAINABLE)
def test_loss_falls_on_one_batch(family, recipe, tmp_path):
    progress = training.begin_training(tmp_path, family, recipe, torch.device("cpu"))
    rows = next(training.batches(recipe, TRAINABLE[family]))
    for group in (group for optimizer in progress.optimizers for group in optimizer.param_groups):
        group["lr"] = 1e-2

    def loss():
        return TRAINABLE[family].loss(progress.network, rows, torch.Generator().manual_seed(1), recipe["model"])[0]

    first = loss().item()
    for _ in range(30):
        loss().backward()
        for optimizer in progress.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss().item() < 0.8 * first


@pytest.mark.parametrize("family", TRAINABLE)
def test_interrupted_training_goes_on_to_the_same_checkpoint(family, tmp_path):
    whole = api.train(tmp_path / "whole", family=family, recipe=write_recipe(tmp_path / "four.toml", 4), threads=1)
    folder = tmp_path / "parts"
    api.train(folder, family=family, recipe=write_recipe(tmp_path / "two.toml", 2), threads=1)
    parts = api.train(folder, family=family, recipe=tmp_path / "four.toml", threads=1)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (parts / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [2, 4]


@pytest.mark.parametrize("family", TRAINABLE)
def test_exported_checkpoint_is_loaded_and_decodes_as_it_was_trained(family, recipe, tmp_path):
    """The pass of training and those of decoding give the same logits of a masked block."""
    checkpoint = api.train(tmp_path, family=family, recipe=tmp_path / "recipe.toml", threads=1)
    model = tt.load_model(checkpoint, device="cpu", dtype="float32")
    prompt, answer = [9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26, 27]
    if family in ("sdar", "bd3lm", "e2d2"):
        network = training.begin_training(tmp_path, family, recipe, torch.device("cpu")).network.eval()
        masked = torch.tensor([prompt + answer[:BLOCK] + [model.mask_token_id] * BLOCK])
        clean = torch.tensor([prompt + answer])
        context = model.extend(model.prefill(torch.tensor([prompt])), torch.tensor([answer[:BLOCK]]))
        decoded = model.denoise(masked[:, -BLOCK:], context, None)
        torch.testing.assert_close(trained_logits(family, network, masked, clean)[:, -BLOCK:], decoded)
    asked = [Prompt(id="0", token_ids=tuple(prompt))]
    generations = make_decoder(model, DECODERS[family]).generate(asked, max_new_tokens=8)
    assert 0 < len(generations[0].token_ids) <= 8
    assert all(token < len(VOCABULARY) for token in generations[0].token_ids)


@torch.no_grad()
def trained_logits(family, network, noisy, clean):
    """Logits as the loss sees them, caught where it hands them on."""
    if family == "e2d2":
        given = torch.arange(clean.shape[1])[None] < 8
        return network.doubled_logits(noisy, clean, given_BS=given)
    from twotower_eval.engine.families.bd3lm import doubled_mask
    from twotower_eval.engine.families.dit import View

    both, width = torch.cat([noisy, clean], dim=1), noisy.shape[1]
    positions, visible = torch.arange(width).repeat(2)[None], doubled_mask(width, BLOCK)[None]
    if family == "sdar":
        return network.read(both, positions, visible)[0][:, :width]
    return network.read(both, View(positions, positions, visible))[0][:, :width]


def test_masks_of_the_diffusion_transformers_are_behind_the_tokenizer(recipe, tmp_path):
    model = tt.load_model(
        api.train(tmp_path, family="mdlm", recipe=tmp_path / "recipe.toml", threads=1), device="cpu", dtype="float32"
    )
    assert model.mask_token_id == DIT_MASK_ID == len(VOCABULARY)
    assert model.tokenizer.encode("a1") == [VOCABULARY.index("a"), VOCABULARY.index("1")]


def test_what_cannot_be_trained_is_one_clear_error(recipe, tmp_path):
    api.train(tmp_path, family="ar", recipe=tmp_path / "recipe.toml", threads=1)
    with pytest.raises(UserError, match=r"holds a training of ar; give another --out"):
        api.train(tmp_path, family="sdar", recipe=tmp_path / "recipe.toml", threads=1)
    with pytest.raises(UserError, match="choose from twotower, ar, sdar, mdlm, bd3lm, e2d2"):
        api.train(tmp_path, family="gpt")
    (tmp_path / "pair.toml").write_text("seed = 0\n[model]\n", encoding="utf-8")
    with pytest.raises(UserError, match="a recipe of one model needs training"):
        api.train(tmp_path / "new", family="ar", recipe=tmp_path / "pair.toml")
