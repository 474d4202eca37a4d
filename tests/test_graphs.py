"""Steps from fixed buffers, as a GPU captures them: they give what the plain steps give, and contexts stay values."""

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, tiny_config, tiny_pair

from twotower_eval import make_decoder
from twotower_eval.engine.models import graphs
from twotower_eval.engine.models.checkpoint import build
from twotower_eval.engine.models.graphs import DenoiseStep, ExtendStep, StaticContext, StepGraphs, use_graphs
from twotower_eval.records import Prompt


@pytest.fixture(params=ARCHITECTURES)
def arms(request, monkeypatch):
    """A plain pair, and one on the same weights with steps from fixed buffers, few slots at a time."""
    monkeypatch.setattr(graphs, "MIN_SLOTS", 8)
    plain = tiny_pair(request.param)
    stepped = type(plain)(plain.config).eval()
    stepped.load_state_dict(plain.state_dict())
    for name in ("vocab_size", "mask_token_id", "has_denoiser", "tokenizer", "max_length", "eos_token_ids"):
        setattr(stepped, name, getattr(plain, name))
    stepped.graphs = stepped.context_tower.graphs = StepGraphs()
    return plain, stepped


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
def test_a_line_of_steps_equals_the_plain_one(arms):
    ids, lengths = torch.arange(14).view(2, 7) % 30 + 4, [7, 4]
    contexts = [model.prefill(ids, lengths) for model in arms]
    for number in range(4):
        width = (1, 1, 4, 1)[number]
        new = torch.full((2, width), 5 + number)
        logits = [model.next_logits(context) for model, context in zip(arms, contexts, strict=True)]
        same(*reversed(logits))
        block = torch.full((2, 4), 3)
        for t in ([1.0, 0.5], None):
            denoised = [model.denoise(block, context, t) for model, context in zip(arms, contexts, strict=True)]
            same(*reversed(denoised))
        contexts = [model.extend(context, new) for model, context in zip(arms, contexts, strict=True)]
        assert contexts[0].lengths == contexts[1].lengths


@torch.inference_mode()
def test_an_older_context_may_be_extended_again(arms):
    plain, stepped = arms
    ids = torch.arange(6)[None] + 4
    root = stepped.prefill(ids)
    first = stepped.extend(root, torch.tensor([[7]]))
    stepped.extend(first, torch.tensor([[8]]))
    again = stepped.extend(root, torch.tensor([[9]]))
    expected = plain.extend(plain.prefill(ids), torch.tensor([[9]]))
    same(stepped.next_logits(again), plain.next_logits(expected))
    twice = plain.extend(plain.extend(plain.prefill(ids), torch.tensor([[7]])), torch.tensor([[8]]))
    same(stepped.next_logits(stepped.extend(first, torch.tensor([[8]]))), plain.next_logits(twice))


def test_decoders_give_the_same_tokens(arms):
    prompts = [Prompt(id=str(n), token_ids=tuple(range(4, 4 + n))) for n in (3, 6)]
    for kind, params in (("autoregressive", {}), ("block_diffusion", {"block_size": 4, "threshold": 0.3})):
        answers = [make_decoder(model, kind, **params).generate(prompts, max_new_tokens=9) for model in arms]
        assert [g.token_ids for g in answers[0]] == [g.token_ids for g in answers[1]]
        assert [g.num_denoiser_forwards for g in answers[0]] == [g.num_denoiser_forwards for g in answers[1]]


@torch.inference_mode()
def test_few_graphs_are_kept_and_large_steps_are_plain(arms):
    _, stepped = arms
    stepped.graphs.max_graphs = 2
    context = stepped.prefill(torch.full((1, 3), 5))
    for width in (1, 2, 3, 257):
        stepped.extend(context, torch.full((1, width), 5))
    assert [key[3] for key in stepped.graphs._steps] == [2, 3]
    stepped.graphs.widths = {1, 4}  # what is no step of a decoder is a piece of a prompt, as long as it comes
    stepped.extend(context, torch.full((1, 5), 5))
    assert [key[3] for key in stepped.graphs._steps] == [2, 3]


def test_steps_with_gradients_or_without_a_variant_are_plain(arms):
    _, stepped = arms
    stepped.extend(stepped.prefill(torch.full((1, 3), 5)), torch.full((1, 1), 5))
    assert not stepped.graphs._steps
    with torch.inference_mode():
        assert stepped.graphs.serves(1, 1)
        stepped.graphs.variant = lambda: None
        assert not stepped.graphs.serves(1, 1)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="CUDA graphs need CUDA devices, a tower is on cpu"):
        use_graphs(tiny_pair())
    assert tiny_pair().graphs is None


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("num_new", [1, 8, 100])
@torch.inference_mode()
def test_no_step_asks_the_device_anything(name, num_new, monkeypatch):
    """On the meta device nothing has a value: whatever would wait for one fails there, as it would in a capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pair = build(tiny_config(name), "pair", torch.bfloat16, ("meta",))
    past = StaticContext(pair.config, 2, 256, pair.context_tower.head.weight)
    extend = ExtendStep(pair.context_tower, past, num_new, None)
    hidden_BH, new_keys, _ = extend.launch()
    assert hidden_BH.shape == (2, 32)
    assert sorted(new_keys) == [i for i, kind in enumerate(pair.config.pattern) if kind == "*"]
    for timed in (True, False):
        denoise = DenoiseStep(pair.denoiser, past, num_new, timed, None)
        assert denoise.launch().shape == (2, num_new, VOCAB)
