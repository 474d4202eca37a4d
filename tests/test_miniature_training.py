"""Training of the miniature: its views of the towers equal inference, it resumes, and what it writes is loaded."""

import json
import tomllib

import pytest
import torch

import twotower_eval as tt
from twotower_eval.miniature import evaluate, train
from twotower_eval.miniature.batches import make_batch, training_batches
from twotower_eval.miniature.blocks import (
    Noise,
    autoregressive_loss,
    denoise_blocks,
    denoiser_loss,
    draw_noise,
    run_clean,
)
from twotower_eval.miniature.export import RECIPE_FILE, export_pair
from twotower_eval.miniature.tokenizer import EOS_ID, MASK_ID

BLOCK = 8


def tiny_recipe(**denoiser):
    recipe = tomllib.loads(RECIPE_FILE.read_text(encoding="utf-8"))
    recipe["model"] |= {"hybrid_override_pattern": "M*E", "hidden_size": 32, "mamba_num_heads": 2}
    recipe["model"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "mamba_head_dim": 16}
    recipe["model"] |= {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "n_routed_experts": 4}
    for stage in ("context", "denoiser"):
        recipe[stage] |= {"steps": 4, "columns_per_batch": 300, "warmup_steps": 1, "evaluate_every": 1000}
    recipe["denoiser"] |= {"draws": 2, "curriculum": [[16, 0.5], [8, 0.5]], **denoiser}
    return recipe


@pytest.fixture
def pair():
    model = train.new_pair(tiny_recipe())
    train.start_denoiser(model, seed=1)
    evaluate.attach_facts(model)
    with torch.no_grad():
        for table in model.denoiser.scale_shift_tables:
            table.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return model.eval()


@pytest.fixture
def batch():
    documents = [([9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27, 28, EOS_ID]), ([40, 41], [50, 51, EOS_ID])]
    return make_batch(documents, BLOCK)


def test_batch_starts_all_answers_at_one_column_and_fills_with_eos(batch):
    assert batch.num_prompt_columns == 8
    assert batch.ids_NS.shape == (2, 24)
    assert batch.ids_NS[1].tolist() == [0] * 6 + [40, 41, 50, 51] + [EOS_ID] * 14
    assert batch.valid_NS.sum(1).tolist() == [21, 18]
    assert batch.num_tokens == 5 + 10 + 2 + 3


@torch.no_grad()
def test_clean_pass_over_padded_documents_equals_the_context_tower(pair, batch):
    hidden, _ = run_clean(pair.context_tower, batch, None)
    logits = pair.context_tower.head(pair.context_tower.tower.norm_f(hidden))
    for row in range(2):
        real = batch.valid_NS[row]
        alone = pair.context_logits(batch.ids_NS[row][real][None])[0]
        torch.testing.assert_close(logits[row][real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_blocks_at_once_equal_one_block_at_a_time(pair, batch):
    _, states = run_clean(pair.context_tower, batch, BLOCK)
    noise = draw_noise(batch, BLOCK, 2, MASK_ID, torch.Generator().manual_seed(0), full_share=0.2, suffix_share=0.5)
    logits = denoise_blocks(pair.denoiser, batch, states, noise).unflatten(0, (2, 2, 2))
    for draw in range(2):
        for row in range(2):
            real = batch.ids_NS[row][batch.valid_NS[row]]
            prompt = int(batch.valid_NS[row, : batch.num_prompt_columns].sum())
            for block in range(2):
                context = pair.prefill(real[None, : prompt + block * BLOCK])
                alone = pair.denoise(noise.ids[draw, row, block][None], context, [float(noise.t[draw, row, block])])
                torch.testing.assert_close(logits[draw, row, block], alone[0], rtol=1e-4, atol=1e-4)


def test_noise_masks_at_least_one_token_and_feeds_the_actual_fraction(batch):
    noise = draw_noise(batch, BLOCK, 500, MASK_ID, torch.Generator().manual_seed(3), full_share=0.25, suffix_share=0.5)
    num_masked = noise.masked.sum(-1)
    assert num_masked.min() >= 1
    torch.testing.assert_close(noise.t, num_masked / BLOCK)
    assert ((noise.ids == MASK_ID) == noise.masked).all()
    wholly = float((num_masked == BLOCK).float().mean())
    assert 0.25 < wholly < 0.5
    falling = (noise.masked[..., 1:] >= noise.masked[..., :-1]).all(-1)
    assert float(falling.float().mean()) > 0.55, "suffix masks are there"


def test_filler_behind_the_end_weighs_little_and_blocks_of_it_nothing(pair, batch):
    _, states = run_clean(pair.context_tower, batch, BLOCK)
    answers = batch.ids_NS[:, batch.num_prompt_columns :].unflatten(1, (-1, BLOCK))[None]
    masked = torch.zeros_like(answers, dtype=torch.bool)
    masked[0, 1, 1] = True  # row 1 ends in its first block
    noise = Noise(torch.where(masked, MASK_ID, answers), masked, masked.float().mean(-1))
    loss, _ = denoiser_loss(pair, batch, states, noise)
    assert torch.isnan(loss), "nothing that counts is masked"


def test_losses_fall_when_trained_on_one_batch(pair):
    batch = next(training_batches(0, columns_per_batch=300, multiple=BLOCK, pool_size=16))
    for name in ("context", "denoiser"):
        trained = pair.context_tower if name == "context" else pair.denoiser
        parameters = [p for p in trained.parameters() if p.dtype.is_floating_point]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for _ in range(12):
            if name == "context":
                loss = autoregressive_loss(pair.context_tower, batch)
            else:
                with torch.no_grad():
                    _, states = run_clean(pair.context_tower, batch, BLOCK)
                generator = torch.Generator().manual_seed(0)
                noise = draw_noise(batch, BLOCK, 2, MASK_ID, generator, full_share=0.2, suffix_share=0.5)
                loss, _ = denoiser_loss(pair, batch, states, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0], name


def test_schedule_warms_up_stays_and_decays():
    settings = {"learning_rate": 1.0, "final_learning_rate": 0.1, "steps": 100, "warmup_steps": 10, "decay_share": 0.2}
    rates = [train.learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:80] == [1.0] * 70
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_curriculum_changes_block_size_where_it_says():
    settings = {"steps": 10, "curriculum": [[32, 0.3], [16, 0.7]]}
    assert [train.block_size_at(settings, step) for step in (0, 2, 3, 9)] == [32, 32, 16, 16]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "DOCUMENTS_PER_KIND", 1)
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(train, "POOL_SIZE", 24)
    return monkeypatch


def test_interrupted_training_goes_on_to_the_same_weights(quick, tmp_path):
    recipe = tiny_recipe()
    quick.setattr(train, "read_recipe", lambda file: recipe)
    whole = train.train_pair(tmp_path / "whole", device="cpu")

    real_step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) in (3, 7):  # once in either stage
            raise KeyboardInterrupt
        return real_step(*args)

    quick.setattr(train, "train_step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.train_pair(tmp_path / "parts", device="cpu")
    parts = train.train_pair(tmp_path / "parts", device="cpu")
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    log = [json.loads(line) for line in (whole / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "retention" in row] == [4]


def test_exported_pair_is_a_checkpoint_in_the_released_layout(pair, tmp_path):
    folder = export_pair(pair, tiny_recipe(), tmp_path)
    loaded = tt.load_model(folder)
    assert loaded.tokenizer.encode("add 1=") == [17, 20, 20, 6, 8, 87]
    assert loaded.mask_token_id == MASK_ID
    assert loaded.eos_token_ids == (EOS_ID,)
    rounded = pair.denoiser.head.weight.to(torch.bfloat16).float()
    assert torch.equal(loaded.denoiser.head.weight, rounded)


def test_unreadable_recipe_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no readable recipe"):
        train.read_recipe(tmp_path / "none.toml")
