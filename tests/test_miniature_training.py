"""Training of the miniature: its views of the towers equal inference, it resumes, and what it writes is loaded."""

import dataclasses
import json
import tomllib

import pytest
import torch

import twotower_eval as tt
from twotower_eval.errors import UserError
from twotower_eval.miniature import evaluate, stages, train
from twotower_eval.miniature.blocks import (
    Noise,
    autoregressive_loss,
    chained_loss,
    denoise_blocks,
    denoiser_loss,
    draw_noise,
    make_batch,
    masked_loss,
    reveal,
    run_clean,
    teacher_probabilities,
    training_batches,
)
from twotower_eval.miniature.export import EOS_ID, MASK_ID, export_pair
from twotower_eval.miniature.long_answers import LONG
from twotower_eval.miniature.recipes import RECIPE_FILE

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


def noise_of(batch, *masked_rows):
    """One draw: the columns of each document's answer that are masked."""
    answers = batch.ids_NS[:, batch.num_prompt_columns :].unflatten(1, (-1, BLOCK))[None]
    masked = torch.zeros(answers.shape[1], answers.shape[2] * BLOCK, dtype=torch.bool)
    for row, columns in enumerate(masked_rows):
        masked[row, list(columns)] = True
    masked = masked.view(answers.shape)
    return Noise(torch.where(masked, MASK_ID, answers), masked, masked.float().mean(-1))


def logits_for(noise, confidences):
    """Logits that are as sure as told of token 7, in the order of columns of the first document; others are flat."""
    logits = torch.zeros(noise.ids.numel(), 96)
    for column, confidence in confidences.items():
        logits[column, 7] = torch.tensor(confidence * 94 / (1 - confidence)).log()  # the mask token has no part
    return logits.view(-1, BLOCK, 96)


def test_next_pass_of_a_chain_sees_the_right_tokens_where_the_last_was_surest(batch):
    noise = noise_of(batch, range(8), ())
    surest_first = {0: 0.3, 1: 0.999, 2: 0.2, 3: 0.998, 4: 0.4, 5: 0.997, 6: 0.45, 7: 0.1}
    logits = logits_for(noise, surest_first)
    logits[..., MASK_ID] = 50.0  # never predicted, however likely
    after = reveal(noise, logits, batch, MASK_ID, torch.Generator().manual_seed(0))
    assert after.masked[0, 0, 0].tolist() == [True, False, True, False, True, False, True, True]
    assert after.ids[0, 0, 0].tolist() == [MASK_ID, 21, MASK_ID, 23, MASK_ID, 25, MASK_ID, MASK_ID]
    assert float(after.t[0, 0, 0]) == 5 / 8
    assert not after.masked[0, 0, 1].any()


def test_chain_reveals_one_token_of_an_unsure_block_and_never_its_last(batch):
    noise = noise_of(batch, range(8), (3,))
    unsure = reveal(noise, logits_for(noise, {4: 0.2}), batch, MASK_ID, torch.Generator().manual_seed(0))
    assert unsure.masked[0, 0, 0].tolist() == [True] * 4 + [False] + [True] * 3
    assert unsure.masked[0, 1].sum() == 1, "the last masked token stays"
    sure = reveal(noise, logits_for(noise, dict.fromkeys(range(7), 0.9999)), batch, MASK_ID, torch.Generator())
    assert sure.masked[0, 0, 0].tolist() == [False] * 7 + [True]


def test_thresholds_of_a_chain_spread_from_a_half_to_almost_one(batch):
    many = noise_of(batch, (0, 1, 2), ())
    many = Noise(*(t.expand(2000, *t.shape[1:]).contiguous() for t in (many.ids, many.masked, many.t)))
    for confidence, share in ((0.499, 0.0), (0.9, 0.412), (0.9905, 1.0)):  # (log10(0.1) + 0.3) / -1.7 = 0.412
        logits = torch.zeros(2000, 4 * BLOCK, 96)
        logits[:, 1, 7] = 20.0  # the surest, revealed anyway; column 2 is the least sure
        logits[:, 0, 7] = torch.tensor(confidence * 94 / (1 - confidence)).log()
        after = reveal(many, logits.view(-1, BLOCK, 96), batch, MASK_ID, torch.Generator().manual_seed(1))
        assert not after.masked[:, 0, 0, 1].any()
        assert after.masked[:, 0, 0, 2].all()
        assert float((~after.masked[:, 0, 0, 0]).float().mean()) == pytest.approx(share, abs=0.04)


def test_chain_of_one_pass_is_the_plain_loss_and_of_two_the_mean_of_both(pair, batch):
    _, states = run_clean(pair.context_tower, batch, BLOCK)
    noise = draw_noise(batch, BLOCK, 2, MASK_ID, torch.Generator().manual_seed(0), full_share=1.0, suffix_share=0.0)
    plain, _ = denoiser_loss(pair, batch, states, noise)
    one, _ = chained_loss(pair, batch, states, noise, torch.Generator().manual_seed(1), num_passes=1)
    assert torch.equal(one, plain)
    logits = denoise_blocks(pair.denoiser, batch, states, noise)
    second = reveal(noise, logits, batch, MASK_ID, torch.Generator().manual_seed(1))
    assert int(second.masked.sum()) < int(noise.masked.sum())
    after, _ = denoiser_loss(pair, batch, states, second)
    two, _ = chained_loss(pair, batch, states, noise, torch.Generator().manual_seed(1), num_passes=2)
    torch.testing.assert_close(two, (plain + after) / 2)


@torch.no_grad()
def test_teacher_of_soft_targets_is_the_context_tower_behind_the_right_tokens(pair, batch):
    hidden, _ = run_clean(pair.context_tower, batch, BLOCK)
    teacher = teacher_probabilities(pair.context_tower, batch, hidden)
    real = batch.ids_NS[0][batch.valid_NS[0]]
    alone = pair.context_logits(real[None])[0].softmax(-1)
    torch.testing.assert_close(teacher[0], alone[4:-1], rtol=1e-4, atol=1e-5)  # the prompt has 5 tokens


def test_soft_share_mixes_the_teacher_into_the_target_but_not_behind_the_end(batch):
    noise = noise_of(batch, (0,), (5,))  # the second answer has three tokens: its masked one is filler
    logits = torch.randn(4, BLOCK, 96, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(1)).softmax(-1)
    loss, _ = masked_loss(logits, batch, noise, teacher, 0.25)
    log_p = logits.log_softmax(-1)
    hard = -log_p[0, 0, 20]
    soft = -(teacher[0, 0] * log_p[0, 0]).sum()
    filler = -log_p[2, 5, EOS_ID]
    torch.testing.assert_close(loss, (0.75 * hard + 0.25 * soft + 0.1 * filler) / 1.1)


def test_greedy_targets_are_what_the_context_tower_answers(pair, batch):
    with torch.no_grad():
        pair.context_tower.head.weight[EOS_ID] *= 3  # so that something ends
    loosely = evaluate.with_greedy_answers(pair, batch, BLOCK, 200)
    ended = 0
    for row in range(loosely.ids_NS.shape[0]):
        real = loosely.ids_NS[row][loosely.valid_NS[row]].tolist()
        prompt = int(loosely.valid_NS[row, : loosely.num_prompt_columns].sum())
        length = int(loosely.answer_lengths_N[row])
        for end in range(prompt, prompt + length):
            assert int(pair.context_logits(torch.tensor([real[:end]]))[0, -1].argmax()) == real[end]
        ended += real[prompt + length - 1] == EOS_ID
    assert ended == loosely.ids_NS.shape[0] > 0
    with torch.no_grad():
        pair.context_tower.head.weight[EOS_ID] = 0  # never the likeliest
    assert evaluate.with_greedy_answers(pair, batch, BLOCK, 5) is batch, "where nothing ends"


def test_muon_takes_the_layers_matrices_and_adamw_the_rest(pair):
    named = dict(pair.denoiser.named_parameters())
    adamw, muon = stages.make_optimizers(named, {"optimizer": "muon"})
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not taken & rest
    assert taken | rest == {id(p) for p in named.values()}
    names = {name for name, p in named.items() if id(p) in taken}
    assert {name.rsplit(".", 2)[1] for name in names} == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"
    }  # fmt: skip
    [only] = stages.make_optimizers(named, {})
    assert sum(len(group["params"]) for group in only.param_groups) == len(named)


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


def long_recipe():
    """Every lever at once, on the long corpus, the denoiser in two stages."""
    recipe = tiny_recipe(passes=2, soft_share=0.2, targets="greedy", optimizer="muon")
    recipe["context"] |= {"optimizer": "muon"}
    recipe |= {"corpus": "long", "stages": ["context", "denoiser", "longer"]}
    for stage in ("context", "denoiser"):
        recipe[stage] |= {"steps": 2, "batches_per_step": 1, "columns_per_batch": 200}
    recipe["longer"] = recipe["denoiser"] | {"trains": "denoiser", "steps": 3}
    return recipe


def test_training_by_stages_goes_on_to_the_same_weights_and_keeps_count(quick, tmp_path):
    quick.setattr(train, "read_recipe", lambda file: long_recipe())
    quick.setitem(
        train.CORPORA, "long", dataclasses.replace(LONG, max_new_tokens=4, held_out_per_kind=3, first_watched=2)
    )
    whole = train.train_pair(tmp_path / "whole", device="cpu")
    real_step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:  # the second step of the last stage
            raise KeyboardInterrupt
        return real_step(*args)

    quick.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train_pair(tmp_path / "parts", device="cpu")
    assert (tmp_path / "parts" / "pair" / "model.safetensors").exists(), "the first denoiser stage left a pair"
    parts = train.train_pair(tmp_path / "parts", device="cpu")
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    log = [json.loads(line) for line in (whole / "training_log.jsonl").read_text().splitlines()]
    ends = [row for row in log if "loss_nats" in row]
    assert [(row["stage"], row["step"]) for row in ends] == [("context", 2), ("denoiser", 2), ("denoiser", 3)]
    assert ends[2]["num_tokens"] > ends[1]["num_tokens"], "tokens count over the stages of a tower"
    assert train.train_pair(tmp_path / "parts", device="cpu") == parts, "a finished training is exported again"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"corpus": "verse"}, "corpus is 'verse'; choose from short, long"),
        ({"stages": ["context", "more"]}, "stage 'more', but has no table"),
        ({"stages": ["context", "model"]}, "trains 'model', not context or denoiser"),
        ({"context": {"optimizer": "sgd"}}, "optimizer is 'sgd'; choose from adamw, muon"),
        ({"denoiser": {"targets": "dreams"}}, "targets are 'dreams'; choose from corpus, greedy"),
        ({"stages": ["context"]}, "last stage must train the denoiser"),
    ],
)
def test_recipe_that_asks_for_something_unknown_is_one_clear_error(quick, tmp_path, changes, told):
    recipe = tiny_recipe()
    for key, value in changes.items():
        recipe[key] = recipe[key] | value if isinstance(value, dict) else value
    recipe["context"]["steps"] = recipe["denoiser"]["steps"] = 1
    quick.setattr(train, "read_recipe", lambda file: recipe)
    with pytest.raises(UserError, match=told):
        train.train_pair(tmp_path, device="cpu")


def test_exported_pair_is_a_checkpoint_in_the_released_layout(pair, tmp_path):
    folder = export_pair(pair, tiny_recipe(), tmp_path)
    loaded = tt.load_model(folder)
    assert loaded.tokenizer.encode("add 1=") == [17, 20, 20, 6, 8, 87]
    assert loaded.mask_token_id == MASK_ID
    assert loaded.eos_token_ids == (EOS_ID,)
    rounded = pair.denoiser.head.weight.to(torch.bfloat16).float()
    assert torch.equal(loaded.denoiser.head.weight, rounded)


def test_unreadable_recipe_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="not a readable recipe"):
        train.read_recipe(tmp_path / "none.toml")
