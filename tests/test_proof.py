"""What a Hugging Face model proves before it is measured: right in the fastest way, in a slower one, or refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import CONFIGS, GPT2, ODD, SMALL, save_tiny
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model, probes, proof
from twotower_eval.engine.models.probes import difference, named_lengths
from twotower_eval.engine.models.transformers_model import TransformersModel
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import ScoreRequest
from twotower_eval.records import Prompt, Ways
from twotower_eval.rules import handicaps, ways_text

RIGHT = [name for name in ODD if name != "bert"]
ROWS = [[5, 6, 7], [9], list(range(20, 38)), [3, 4, 5, 6, 7, 8], [11, 12, 13]]
SHARED = tuple(range(20, 34))
REQUESTS = [
    ScoreRequest(context_ids=context, continuation_ids=option)
    for context in (SHARED, (*SHARED, 7, 8), (9,))
    for option in ((5, 6, 7), (8,), (5, 6, 9, 10, 11))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp("hf") / name) for name in {**CONFIGS, **ODD}}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model(folders[name]) for name in [*CONFIGS, *RIGHT]}


def plain(native: Any, row: list[int]) -> Tensor:
    """transformers alone: one row, no cache, its own mask. A lone token stands before another, for RecurrentGemma
    keeps the states of whatever it read last."""
    with torch.no_grad():
        logits: Tensor = native(input_ids=torch.tensor([row if len(row) > 1 else row * 2]), use_cache=False).logits[0]
    return logits[: len(row)]


def greedy(native: Any, row: list[int], num: int) -> list[int]:
    known = list(row)
    for _ in range(num):
        known.append(int(plain(native, known)[-1].argmax()))
    return known[len(row) :]


@pytest.mark.parametrize("name", RIGHT)
def test_odd_models_give_what_passes_without_cache_give(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """Texts and log-likelihoods, alone and beside each other, past windows and past a switch of rotary factors."""
    native = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    wanted = [greedy(native, row, 10) for row in ROWS]
    prompts = [Prompt(id=str(i), token_ids=tuple(row)) for i, row in enumerate(ROWS)]
    decoder = make_decoder(models[name], "autoregressive")
    for width in (1, 3, 8):
        found = decoder.generate(prompts, max_new_tokens=10, max_batch_size=width)
        assert [list(g.token_ids) for g in found] == wanted
        assert [g.num_context_forwards for g in found] == [10] * len(ROWS)
    scorer = make_scorer(models[name], "exact")
    alone = [scorer.score([request])[0] for request in REQUESTS]
    for request, single, batched in zip(REQUESTS, alone, scorer.score(REQUESTS), strict=True):
        start = len(request.context_ids) - 1
        logprobs = plain(native, [*request.context_ids, *request.continuation_ids][:-1]).log_softmax(-1)
        right = sum(float(logprobs[start + i, token]) for i, token in enumerate(request.continuation_ids))
        assert single.logprob_nats == pytest.approx(right, abs=1e-4)
        assert batched.logprob_nats == pytest.approx(right, abs=1e-4)


def test_how_each_of_them_is_run(models: dict[str, Any]) -> None:
    """The facts that a manifest tells: the slowest of them that is needed, and no slower."""
    bamba, gemma, neo = (models[name].ways for name in ("bamba", "recurrent_gemma", "gpt_neo"))
    assert (bamba.positions_passed, bamba.cached, bamba.rows_together) == (True, True, True)
    assert (gemma.rows_together, gemma.cached) == (False, True)
    assert (neo.options_packed, neo.cached, neo.rows_together, neo.positions_passed) == (False, True, True, False)
    assert models["openai-gpt"].ways.cached is False
    assert models["openai-gpt"].ways.failed == ()  # it never had one
    longrope = models["longrope"]
    assert (longrope.ways.plain_beyond, longrope.ways.cached, longrope.ways.rows_together) == (14, True, True)
    assert {trial.check for trial in neo.failed} == {"options in one row"}
    (first, *_) = bamba.failed
    assert (first.check, first.error, first.positions_passed) == ("cached steps", None, False)
    assert first.difference is not None
    assert first.difference > 0.1 > first.limit
    assert "with the positions of its tokens passed" in ways_text(bamba)
    assert "one prompt after the other" in ways_text(gemma)
    assert "more than 14 tokens without a cache, one by one" in ways_text(longrope.ways)
    assert "without a cache" in ways_text(models["openai-gpt"].ways)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_right_keeps_every_fast_way(name: str, models: dict[str, Any]) -> None:
    """Nothing gets slower silently."""
    ways = models[name].ways
    assert ways.failed == ()
    assert (ways.cached, ways.rows_together, ways.passes_together, ways.positions_passed) == (True, True, True, False)
    assert ways.plain_beyond is None
    assert ways.options_packed is (name in ("llama", "gpt2"))
    assert proof.prove_up_to(models[name], 100).checkpoint == models[name].checkpoint.identity


@pytest.mark.parametrize(("name", "most"), [("llama", 30), ("gpt2", 30), ("mamba2", 75), ("mistral", 60)])
def test_the_proof_is_cheap(name: str, most: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed number of forwards of a few tokens, whatever the model's size."""
    tokens: list[int] = []
    forward = TransformersModel._logits

    def counted(self: TransformersModel, **arguments: Any) -> Tensor:
        tokens.append(arguments["input_ids"].numel())
        return forward(self, **arguments)

    monkeypatch.setattr(TransformersModel, "_logits", counted)
    load_model(folders[name])
    assert 0 < len(tokens) <= most
    assert max(tokens) <= 80


def test_an_encoder_that_sees_later_tokens_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"bert is not causal as its config\.json has it: a later token changes"):
        load_model(folders["bert"])


def spoiled(model: TransformersModel, change: Any) -> TransformersModel:
    """A copy whose forward is tampered with, proved anew."""
    wrong = TransformersModel(copy.deepcopy(model.inner))
    for name in ("checkpoint", "vocab_size", "max_length"):
        setattr(wrong, name, getattr(model, name))
    right = wrong.inner.forward
    wrong.inner.forward = lambda **arguments: change(right, arguments)
    return wrong


def nudged(output: Any) -> Any:
    output.logits = output.logits + torch.linspace(0, 0.1, output.logits.shape[-1]) * output.logits.std()
    return output


def is_step(arguments: dict[str, Any]) -> bool:
    return bool(arguments["use_cache"]) and arguments["input_ids"].shape[1] == 1


def test_cached_steps_that_are_off_are_found_out(models: dict[str, Any]) -> None:
    wrong = spoiled(models["llama"], lambda f, a: nudged(f(**a)) if is_step(a) else f(**a))
    proof.prove(wrong)
    assert wrong.ways.cached is False
    assert [trial.check for trial in wrong.ways.failed] == ["cached steps"] * 4
    ids = torch.tensor([[5, 6, 7, 8]])
    context = wrong.extend(wrong.prefill(ids[:, :3]), ids[:, 3:])
    assert torch.allclose(wrong.next_logits(context), models["llama"].context_logits(ids)[:, -1], atol=1e-5)


def test_a_row_that_its_neighbours_change_is_run_alone(models: dict[str, Any]) -> None:
    def change(forward: Any, arguments: dict[str, Any]) -> Any:
        output = forward(**arguments)
        return nudged(output) if arguments["input_ids"].shape[0] > 1 else output

    wrong = spoiled(models["llama"], change)
    proof.prove(wrong)
    assert (wrong.ways.cached, wrong.ways.rows_together, wrong.ways.passes_together) == (True, False, False)
    assert (wrong.joins_contexts, wrong.branch_tokens) == (False, 0)


def test_a_tree_that_is_misread_is_not_packed(models: dict[str, Any]) -> None:
    """Attention that takes no mask of ours, or makes its own of it."""

    def blind(forward: Any, arguments: dict[str, Any]) -> Any:
        if getattr(arguments.get("attention_mask"), "ndim", 2) == 4:
            arguments = {**arguments, "attention_mask": torch.zeros_like(arguments["attention_mask"])}
        return forward(**arguments)

    def refusing(forward: Any, arguments: dict[str, Any]) -> Any:
        if getattr(arguments.get("attention_mask"), "ndim", 2) == 4:
            raise ValueError("attention masks have two dimensions here")
        return forward(**arguments)

    errors = []
    for change in (blind, refusing):
        wrong = spoiled(models["llama"], change)
        proof.prove(wrong)
        assert wrong.ways == Ways(precision="float32", proved_tokens=wrong.ways.proved_tokens, failed=wrong.ways.failed)
        errors += [trial.error for trial in wrong.ways.failed]
    assert errors == [None, "its forward raised ValueError: attention masks have two dimensions here"]


def test_logits_that_are_not_finite_and_passes_that_do_not_repeat_are_refused(models: dict[str, Any]) -> None:
    def infinite(forward: Any, arguments: dict[str, Any]) -> Any:
        output = forward(**arguments)
        output.logits[:, -1, 3] = float("nan")
        return output

    calls: list[int] = []

    def drifting(forward: Any, arguments: dict[str, Any]) -> Any:
        output = forward(**arguments)
        calls.append(1)
        output.logits = output.logits + len(calls) * torch.linspace(0, 1, output.logits.shape[-1])
        return output

    def raising(forward: Any, arguments: dict[str, Any]) -> Any:
        raise RuntimeError("no kernel image\nis available")

    for change, words in (
        (infinite, "logits that are not finite"),
        (drifting, "other logits for the same row when it reads it again"),
        (raising, "cannot be run, not even without a cache: its forward raised RuntimeError: no kernel image is avail"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            proof.prove(spoiled(models["llama"], change))
        assert "\n" not in str(caught.value)


def test_lengths_that_cost_too_much_wait_until_they_are_reached(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading alone tries nothing dear: beyond it, contexts are read plainly, until a run says how long they get."""
    monkeypatch.setattr(proof, "CHEAP_PASS", 0.0)
    model = load_model(folders["longrope"])
    assert (model.unproved, model.plain_beyond) == ((16,), 14)
    assert proof.prove_up_to(model, 14).plain_beyond is None  # no context of that run gets there
    assert model.unproved == (16,)
    assert proof.prove_up_to(model, 30).plain_beyond == 14
    assert (model.unproved, model.ways.proved_tokens) == ((), 26)
    windowed = load_model(folders["gpt_neo"])
    assert (windowed.unproved, windowed.plain_beyond) == ((8,), 6)
    assert proof.prove_up_to(windowed, 30).plain_beyond is None
    assert (windowed.unproved, windowed.plain_beyond, windowed.ways.proved_tokens) == ((), None, 17)


@pytest.mark.parametrize("window", [8, 12, 20])
def test_a_length_that_nothing_mends_is_read_plainly_beyond(window: int, models: dict[str, Any]) -> None:
    """Steps that go wrong from some token on, which a window in the config makes one look for."""

    def change(forward: Any, arguments: dict[str, Any]) -> Any:
        output = forward(**arguments)
        known = arguments["past_key_values"].get_seq_length() if arguments["use_cache"] else 0
        return nudged(output) if known >= window else output

    wrong = spoiled(models["llama"], change)
    wrong.inner.config.attention_window = window
    proof.prove(wrong)
    if window == 8:  # rows of the first trials are as long: what is wrong there is wrong everywhere
        assert (wrong.ways.cached, wrong.ways.plain_beyond) == (False, None)
        return
    assert (wrong.ways.cached, wrong.ways.plain_beyond, wrong.ways.rows_together) == (True, window - 2, True)
    ids = torch.arange(3, 33)[None]
    context = wrong.extend(wrong.prefill(torch.stack([ids[0], ids[0]]), [17, 30]), torch.tensor([[20, 21], [6, 7]]))
    assert context.lengths == (19, 32)
    right = models["llama"].context_logits(torch.tensor([[*range(3, 20), 20, 21]]))[:, -1]
    assert torch.allclose(wrong.next_logits(context)[:1], right, atol=1e-5)


def test_an_encoder_whose_buffers_end_with_its_positions_still_shares_beginnings(models: dict[str, Any]) -> None:
    """Options beside each other filled more columns than a BERT has token types for: an error amid a run."""
    model = models["bert_decoder"]
    assert model.branch_tokens > model.max_length
    options = [ScoreRequest(context_ids=SHARED, continuation_ids=(first, *range(5, 15))) for first in range(3, 10)]
    found = make_scorer(model, "exact").score(options)
    for request, ours in zip(options, found, strict=True):
        [alone] = make_scorer(model, "exact").score([request])
        assert ours.logprob_nats == pytest.approx(alone.logprob_nats, abs=1e-4)


def test_rows_that_changed_what_follows_are_undone_by_a_short_one(tmp_path: Path) -> None:
    """Dynamic factors stay as long as the longest row so far, beyond the original length."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 24, "rope_parameters": rope})
    config.attention_window = 24  # a name to look for: by itself the model ends there
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dynamic")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dynamic").eval()
    model = load_model(tmp_path / "dynamic")
    model.max_length = 64
    proof.prove(model)
    assert (model.ways.resets_first, model.ways.plain_beyond) == (True, 22)
    rows = [list(range(3, 43)), list(range(5, 35)), list(range(4, 32))]
    lengths = [40, 30, 28]
    ids = torch.tensor([row + [0] * (40 - len(row)) for row in rows])
    for i, logits in enumerate(model.context_logits(ids, lengths, last=1)):
        plain(native, [3, 4])
        assert torch.allclose(logits[0], plain(native, rows[i])[-1], atol=1e-4)


def test_lengths_are_named_at_any_depth() -> None:
    neo = transformers.GPTNeoConfig(attention_types=[[["global", "local"], 1]], num_layers=2, window_size=9)
    assert named_lengths(neo.to_dict()) == (9,)
    assert 16 in named_lengths(ODD["longrope"].to_dict())
    assert named_lengths(transformers.GPT2Config(**GPT2).to_dict()) == ()
    nested = {"text": {"sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": True}}
    assert named_lengths(nested) == (4096,)
    llama4 = {
        "attention_chunk_size": 8192,
        "floor_scale": 8192.0,
        "sliding_window_pattern": 6,
        "log_scaling_n_floor": 9,
    }
    assert named_lengths(llama4) == (9, 8192)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_fault_and_hides_none(dtype: str, folders: dict[str, Path]) -> None:
    assert load_model(folders["llama"], dtype=dtype).ways.failed == ()
    assert load_model(folders["bamba"], dtype=dtype).ways.positions_passed
    with pytest.raises(ValueError, match="is not causal"):
        load_model(folders["bert"], dtype=dtype)


@pytest.mark.parametrize("name", ["bamba", "gpt_neo"])
def test_without_memory_for_float32_no_fast_way_is_taken_on_trust(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 both passed trials that they fail by far in float32."""
    monkeypatch.setattr(probes, "free_bytes", lambda _: 0)
    model = load_model(folders[name], dtype="bfloat16")
    ways = model.ways
    assert (ways.cached, ways.passes_together, ways.options_packed) == (False, False, False)
    assert (ways.precision, ways.failed, model.branch_tokens, model.unproved) == ("bfloat16", (), 0, ())
    native = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16).eval()
    found = make_decoder(model, "autoregressive").generate(
        [Prompt(id=str(i), token_ids=tuple(row)) for i, row in enumerate(ROWS[:3])], max_new_tokens=4
    )
    assert [list(one.token_ids) for one in found] == [greedy(native, row, 4) for row in ROWS[:3]]


@pytest.mark.parametrize("name", ["llama", "bamba", "recurrent_gemma"])
def test_float32_fits_where_there_is_memory_for_its_surplus_or_for_one_layer(
    name: str, folders: dict[str, Path], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is the same then, and the weights are what they were."""
    model = load_model(folders[name], dtype="bfloat16")
    tensors = [*model.inner.parameters(), *model.inner.buffers()]
    sizes = [tensor.numel() * 2 for tensor in tensors if tensor.dtype == torch.bfloat16]
    outside = model.inner.get_input_embeddings().weight.numel() * 2
    hows = []
    for free in (1.1 * (sum(sizes) + max(sizes)) + 1, sum(sizes), outside):
        monkeypatch.setattr(probes, "free_bytes", lambda _, free=free: free)
        hows.append(probes.widening(model.inner, model.device))
    assert hows == ["at once", "by layer", None]
    monkeypatch.setattr(probes, "free_bytes", lambda _: sum(sizes))
    again = load_model(folders[name], dtype="bfloat16")
    for ways in (model.ways, again.ways):
        for fact in ("cached", "rows_together", "passes_together", "options_packed", "positions_passed"):
            assert getattr(ways, fact) == getattr(models[name].ways, fact)
        assert (ways.precision, ways.proved_tokens) == ("float32", models[name].ways.proved_tokens)
    one, other = model.inner.state_dict(), again.inner.state_dict()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    assert not any(module._forward_pre_hooks for module in again.inner.modules())


def test_layers_that_cannot_be_widened_alone_are_told_from_others(models: dict[str, Any]) -> None:
    """One who reads a layer's weights from outside gets them in half precision: then no fast way is taken."""
    half = copy.deepcopy(models["llama"].inner).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"), probes.widened(half, "by layer"):
        half.model.layers[0].mlp(torch.zeros(1, half.config.hidden_size))
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}


def test_what_fails_in_the_measured_dtype_alone_is_found(folders: dict[str, Path], models: dict[str, Any]) -> None:
    """In float32 padding on the left is right; in float16 its masked scores run over."""

    def change(forward: Any, arguments: dict[str, Any]) -> Any:
        output = forward(**arguments)
        mask = arguments.get("attention_mask")
        if mask is not None and mask.ndim == 2 and output.logits.dtype == torch.float16:
            output.logits = output.logits * float("nan")
        return output

    right = spoiled(models["llama"], change)
    proof.prove(right)
    assert right.ways.failed == ()
    wrong = spoiled(load_model(folders["llama"], dtype="float16"), change)
    proof.prove(wrong)
    assert (wrong.ways.cached, wrong.ways.rows_together, wrong.ways.options_packed) == (True, False, False)
    assert wrong.ways.precision == "float32"
    first = wrong.ways.failed[0]
    assert (first.check, first.precision) == ("rows beside each other", "float16")
    assert first.error == "its logits are not finite"
    context = wrong.prefill(torch.tensor([[5, 6, 7], [8, 0, 0]]), [3, 1])
    assert torch.isfinite(wrong.next_logits(context)).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "bamba", "mamba2", "lfm2"])
def test_a_batch_of_unlike_lengths_is_told_from_one_of_one_length(
    name: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States cannot pass over padding: each length takes forwards of its own."""
    calls: list[int] = []
    forward = TransformersModel._logits
    monkeypatch.setattr(TransformersModel, "_logits", lambda self, **a: calls.append(1) or forward(self, **a))
    model = models[name]
    model.prefill(torch.ones(4, 6, dtype=torch.int64), [3, 4, 5, 6])
    assert len(calls) == (1 if name in ("llama", "mistral") else 4)
    assert model.ways.unlike_lengths_together is (len(calls) == 1)
    slow = handicaps("baseline", model.ways, batch_size=4, longest=9)
    assert [one.way for one in slow] == (["one length after the other"] if len(calls) == 4 else [])
    assert handicaps("baseline", model.ways, batch_size=4, longest=9, unlike_lengths=False) == ()
    assert handicaps("baseline", model.ways, batch_size=1, longest=9) == ()


def test_a_length_that_does_not_fit_into_memory_stays_untried(models: dict[str, Any]) -> None:
    """Four rows in float32 may be too many where the run's own fit: beyond that length contexts are read plainly."""
    room = [60]

    def change(forward: Any, arguments: dict[str, Any]) -> Any:
        if arguments["use_cache"] and arguments["input_ids"].numel() > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**arguments)

    small = spoiled(models["llama"], change)
    small.inner.config.attention_window = 20
    proof.prove(small)
    assert (small.ways.cached, small.ways.rows_together, small.ways.failed) == (True, True, ())
    assert (small.ways.short_of_memory_at, small.plain_beyond, small.unproved) == (20, 18, (20,))
    ways = proof.prove_up_to(small, 30)
    assert (ways.plain_beyond, ways.short_of_memory_at) == (18, 20)
    assert "where 20 tokens were too many to be tried" in ways_text(ways)
    room[0] = 1000
    ways = proof.prove_up_to(small, 30)
    assert (ways.plain_beyond, ways.short_of_memory_at, small.unproved) == (None, None, ())


def test_differences_are_in_units_of_the_spread() -> None:
    logits = torch.tensor([[-1.0, 1.0, -1.0, 1.0]]) * 3 + 100
    off = logits + torch.tensor([[0.0, 0.3, 0.0, 0.0]])
    assert difference(off, logits, "float32") == pytest.approx(0.3 / float(logits.std()), rel=1e-3)
    assert difference(off * 1e-6, logits * 1e-6, "float32") == pytest.approx(0.3 / float(logits.std()), rel=1e-3)
    assert difference(off * float("nan"), logits, "float32") == float("inf")
    assert difference(torch.zeros(1, 4), torch.zeros(1, 4), "float32") == 0
