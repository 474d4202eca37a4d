"""Property tests of all decoders on tiny random models: batches, budgets, stops, counts; the slow decoder as oracle."""

import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from golden_files import Spy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCAB, Pieces, tiny_pair

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.records import Generation, Prompt

EVERY_MODEL = pytest.mark.parametrize("name", ARCHITECTURES)
KINDS = ("autoregressive", "mock_ar", "block_diffusion")
FEW = settings(max_examples=12, deadline=None, derandomize=True)

# Pieces overlap each other's borders, so that stop strings lie across tokens; an empty piece is a special token.
PIECES = ["a", "b", "ab", "ba", "aab", "\n", "", "c", "bc", "abc"]
TOKENIZER = Pieces([PIECES[token % len(PIECES)] for token in range(VOCAB)])

token_ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12).map(tuple)
prompt_lists = st.lists(st.tuples(token_ids, st.integers(0, 9)), min_size=1, max_size=5).map(
    lambda rows: [Prompt(id=str(i), token_ids=ids, seed=seed) for i, (ids, seed) in enumerate(rows)]
)
budgets = st.integers(1, 20)
eos_sets = st.sets(st.integers(0, VOCAB - 1), max_size=4).map(tuple)
stop_lists = st.lists(st.sampled_from(["a", "bb", "ab\n", "abab", "\n", "cabc", "aaaab"]), max_size=2).map(tuple)
temperatures = st.sampled_from([0.0, 0.8])
block_params = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 7),
        "steps_per_block": st.none() | st.integers(1, 9),
        "threshold": st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
    }
)
ANY_CALL: dict[str, st.SearchStrategy[Any]] = {
    "prompts": prompt_lists,
    "budget": budgets,
    "params": block_params,
    "temperature": temperatures,
    "eos": eos_sets,
    "stop": stop_lists,
    "kind": st.sampled_from(KINDS),
}


def model_with_text(name: str) -> Any:
    """The tiny pair with a tokenizer; the shared one is left as it is."""
    model = copy.copy(tiny_pair(name))
    model.tokenizer = TOKENIZER
    return model


def rounded(g: Generation) -> Generation:
    """Confidences to 4 digits: batched sums may differ in the last bits."""
    if g.trace is None:
        return g
    steps = [dataclasses.replace(s, confidences=tuple(round(c, 4) for c in s.confidences)) for s in g.trace]
    return dataclasses.replace(g, trace=tuple(steps))


def assert_same(ours: Generation, other: Generation) -> None:
    """All fields equal, confidences nearly."""
    for one, two in zip(ours.trace or (), other.trace or (), strict=True):
        assert one.confidences == pytest.approx(two.confidences, abs=1e-4)
    bare = [dataclasses.replace(rounded(g), trace=None) for g in (ours, other)]
    assert bare[0] == bare[1]
    steps = [[(s.block, s.step, s.positions, s.token_ids, s.num_forced) for s in g.trace or ()] for g in (ours, other)]
    assert steps[0] == steps[1]


@EVERY_MODEL
@FEW
@given(**ANY_CALL)
def test_a_row_gives_in_a_batch_what_it_gives_alone(
    name: str,
    prompts: list[Prompt],
    budget: int,
    params: dict[str, Any],
    temperature: float,
    eos: Sequence[int],
    stop: Sequence[str],
    kind: str,
) -> None:
    """Tokens, text, finish, counts, forced commits and trace; unequal prompts, greedy and sampled."""
    more = {**params, "trace": True} if kind == "block_diffusion" else {}
    decoder = make_decoder(model_with_text(name), kind, temperature=temperature, **more)
    together = decoder.generate(prompts, max_new_tokens=budget, eos_token_ids=eos, stop=stop)
    assert [g.prompt_id for g in together] == [prompt.id for prompt in prompts]
    for prompt, ours in zip(prompts, together, strict=True):
        [alone] = decoder.generate([prompt], max_new_tokens=budget, eos_token_ids=eos, stop=stop)
        assert_same(ours, alone)


@EVERY_MODEL
@FEW
@given(**ANY_CALL, width=st.integers(1, 4), order=st.randoms(use_true_random=False))
def test_neither_width_nor_order_changes_a_row(
    name: str,
    prompts: list[Prompt],
    budget: int,
    params: dict[str, Any],
    temperature: float,
    eos: Sequence[int],
    stop: Sequence[str],
    kind: str,
    width: int,
    order: random.Random,
) -> None:
    """Prompts that take the places of finished ones give what they give alone, in every field; each is heard of once,
    when it finishes; and every row that a forward serves is one of some generation's forwards."""
    more = {**params, "trace": True} if kind == "block_diffusion" else {}
    model = WatchedModel(model_with_text(name))
    decoder = make_decoder(model, kind, temperature=temperature, **more)
    arguments: dict[str, Any] = {"max_new_tokens": budget, "eos_token_ids": eos, "stop": stop}
    alone = {prompt.id: decoder.generate([prompt], **arguments)[0] for prompt in prompts}
    order.shuffle(prompts)
    for forwards in (model.prefills, model.extensions, model.denoisings):
        forwards.rows.clear()
    heard: list[Generation] = []
    together = decoder.generate(prompts, max_batch_size=width, on_finish=heard.append, **arguments)
    assert [g.prompt_id for g in together] == [prompt.id for prompt in prompts]
    assert sorted(map(id, heard)) == sorted(map(id, together))
    for ours in together:
        assert_same(ours, alone[ours.prompt_id])
    assert max(model.prefills.rows + model.extensions.rows + model.denoisings.rows) <= width
    assert sum(model.denoisings.rows) == sum(g.num_denoiser_forwards for g in together)
    context_rows = sum(model.prefills.rows + model.extensions.rows)
    assert context_rows == sum(g.num_context_forwards for g in together)


def test_blocks_of_rows_that_began_together_are_absorbed_together() -> None:
    """Where no prompt waited, each finished block was absorbed by itself: three times the passes that are needed."""
    model = WatchedModel(tiny_pair())
    prompts = [Prompt(id=str(i), token_ids=tuple(range(1, 4 + i)), seed=i) for i in range(8)]
    decoder = make_decoder(model, "block_diffusion", block_size=8, threshold=0.3, temperature=0.9)
    extensions_before_an_end: list[int] = []

    def on_finish(_: Generation) -> None:
        extensions_before_an_end.append(len(model.extensions.rows))

    together = decoder.generate(prompts, max_new_tokens=48, on_finish=on_finish)
    rows = model.extensions.rows[: extensions_before_an_end[0]]
    assert len(rows) >= 5
    assert min(rows) >= 4
    for prompt, ours in zip(prompts, together, strict=True):
        assert_same(ours, decoder.generate([prompt], max_new_tokens=48)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_free_place_is_taken_at_once(kind: str) -> None:
    """As long as prompts wait, every step serves as many rows as there is room for, whenever its rows began."""
    model = WatchedModel(tiny_pair())
    prompts = [Prompt(id=str(i), token_ids=tuple(range(1, 2 + i % 9)), seed=i) for i in range(40)]
    more = {"block_size": 4, "threshold": 0.3} if kind == "block_diffusion" else {}
    decoder = make_decoder(model, kind, temperature=0.9, **more)
    finished = 0
    full_until: list[int] = []
    steps = model.extensions if kind == "autoregressive" else model.denoisings

    def on_finish(_: Generation) -> None:
        nonlocal finished
        finished += 1
        if finished == len(prompts) - 4:  # the rows that are left have places, and wait for each other
            full_until.append(len(steps.rows))

    generations = decoder.generate(
        prompts, max_new_tokens=40, eos_token_ids=(1, 2), max_batch_size=4, on_finish=on_finish
    )
    assert len({g.num_tokens for g in generations}) > 3
    if kind != "autoregressive":  # there the first token comes with the prompt: new rows may finish without a step
        assert set(steps.rows[: full_until[0]]) == {4}
    share = steps.share(4)
    assert share is not None
    assert 0.8 < share <= 1


def test_rows_that_depend_on_their_neighbours_keep_them() -> None:
    """With the batch's mean mask fraction, batches run one after the other: each as if it were alone."""
    prompts = [Prompt(id=str(i), token_ids=(5 + i, 6, 7 + 3 * i)) for i in range(5)]
    decoder = make_decoder(tiny_pair(), "block_diffusion", batch_mean_t=True, block_size=6, threshold=0.4)
    together = decoder.generate(prompts, max_new_tokens=24, max_batch_size=2)
    apart = [g for i in (0, 2, 4) for g in decoder.generate(prompts[i : i + 2], max_new_tokens=24)]
    assert together == apart
    assert together != decoder.generate(prompts, max_new_tokens=24)


@EVERY_MODEL
@FEW
@given(**ANY_CALL)
def test_the_slow_decoder_agrees(
    name: str,
    prompts: list[Prompt],
    budget: int,
    params: dict[str, Any],
    temperature: float,
    eos: Sequence[int],
    stop: Sequence[str],
    kind: str,
) -> None:
    """The reference decoder recomputes everything at every step and counts by itself."""
    model = model_with_text(name)
    fast = make_decoder(model, kind, temperature=temperature, **(params if kind == "block_diffusion" else {}))
    slow = make_decoder(model, "reference", mode=kind, temperature=temperature, **params)
    arguments: dict[str, Any] = {"max_new_tokens": budget, "eos_token_ids": eos, "stop": stop}
    for ours, wanted in zip(fast.generate(prompts, **arguments), slow.generate(prompts, **arguments), strict=True):
        assert_same(ours, wanted)


def cut_by_hand(tokens: Sequence[int], eos: Sequence[int], stop: Sequence[str]) -> tuple[list[int], str, str]:
    """Useful tokens, text and finish of an unstopped run, by looking at the whole."""
    ended = [i for i, token in enumerate(tokens) if token in eos]
    kept = list(tokens[: ended[0]] if ended else tokens)
    texts = [TOKENIZER.decode(kept[:n]) for n in range(len(kept) + 1)]
    stopped = [n for n, text in enumerate(texts) if any(s in text for s in stop)]
    if not stopped:
        return kept, texts[-1], "eos" if ended else "length"
    text = texts[stopped[0]]
    for s in stop:
        text = text.split(s)[0]
    num_useful = max(n for n in range(len(kept) + 1) if len(texts[n]) <= len(text))
    return kept[:num_useful], text, "stop"


@settings(FEW, max_examples=40)
@given(prompts=prompt_lists, budget=st.integers(1, 40), params=block_params, eos=eos_sets, stop=stop_lists)
def test_stopping_changes_nothing_but_the_end(
    prompts: list[Prompt], budget: int, params: dict[str, Any], eos: Sequence[int], stop: Sequence[str]
) -> None:
    """A stopped run is the unstopped one, cut: by hand, over the whole text. No block is made beyond the one needed."""
    block_size = params["block_size"]
    for kind, size, more in (("autoregressive", 1, {}), ("block_diffusion", block_size, params)):
        decoder = make_decoder(model_with_text("all kinds"), kind, **more)
        free = decoder.generate(prompts, max_new_tokens=budget)
        stopped = decoder.generate(prompts, max_new_tokens=budget, eos_token_ids=eos, stop=stop)
        for whole, ours in zip(free, stopped, strict=True):
            assert whole.num_tokens == budget
            wanted = cut_by_hand(whole.token_ids, eos, stop)
            assert (list(ours.token_ids), ours.text, ours.finish) == wanted
            ends = [cut_by_hand(whole.token_ids[:n], eos, stop)[2] for n in range(size, budget, size)]
            num_blocks = 1 + next((i for i, finish in enumerate(ends) if finish != "length"), len(ends))
            assert ours.num_context_forwards == num_blocks
            assert ours.num_tokens == len(ours.token_ids)
            assert ours.num_tokens + ours.num_discarded_tokens == num_blocks * size


@FEW
@given(prompts=prompt_lists, budget=budgets, params=block_params)
def test_counts_agree_with_the_trace(prompts: list[Prompt], budget: int, params: dict[str, Any]) -> None:
    """One step a denoiser forward; every block committed whole, each position once; the mask token never."""
    model, block_size = tiny_pair(), params["block_size"]
    num_steps, threshold = params["steps_per_block"] or block_size, params["threshold"]
    generations = make_decoder(model, "block_diffusion", trace=True, **params).generate(prompts, max_new_tokens=budget)
    num_blocks = -(-budget // block_size)
    for g in generations:
        assert g.trace is not None
        assert g.num_denoiser_forwards == len(g.trace)
        assert g.num_context_forwards == num_blocks
        assert g.num_forced_commits == sum(s.num_forced for s in g.trace)
        assert sum(sum(c <= threshold for c in s.confidences) for s in g.trace) == g.num_forced_commits
        produced = []
        for block in range(num_blocks):
            steps = [s for s in g.trace if s.block == block]
            assert [s.step for s in steps] == list(range(len(steps)))
            assert len(steps) <= min(num_steps, block_size)
            placed = {p: t for s in steps for p, t in zip(s.positions, s.token_ids, strict=True)}
            assert sorted(p for s in steps for p in s.positions) == list(range(block_size))
            produced.extend(placed[p] for p in range(block_size))
        assert tuple(produced[:budget]) == g.token_ids
        assert model.mask_token_id not in produced
        assert g.num_discarded_tokens == len(produced) - budget


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_depends_on_the_prompts_seed(kind: str) -> None:
    decoder = make_decoder(tiny_pair(), kind, temperature=1.5)
    prompts = [Prompt(id=str(i), token_ids=(5, 6), seed=seed) for i, seed in enumerate((0, 1, 0))]
    first, other, again = decoder.generate(prompts, max_new_tokens=20)
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


def test_a_prompts_tokens_may_be_a_list_or_a_tensor() -> None:
    wanted = Prompt(id="p", token_ids=(5, 6, 7))
    for ids in ([5, 6, 7], torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([5, 6, 7]).numpy()):
        given_otherwise: Any = ids
        assert Prompt(id="p", token_ids=given_otherwise) == wanted


def test_batch_mean_t_must_be_asked_for() -> None:
    """By default each row is fed its own mask fraction; with it the batch's mean, so rows depend on neighbours."""
    prompts = [Prompt(id=str(i), token_ids=(5 + i, 6, 7 + 3 * i)) for i in range(4)]
    runs = {}
    for mean in (False, True):
        spy = Spy(tiny_pair())
        decoder = make_decoder(spy, "block_diffusion", batch_mean_t=mean, block_size=6, threshold=0.4)
        runs[mean] = decoder.generate(prompts, max_new_tokens=24)
        for block_BK, fractions in zip(spy.blocks, spy.fractions, strict=True):
            own = (block_BK == spy.mask_token_id).float().mean(1).tolist()
            assert fractions is not None
            assert fractions == pytest.approx(own) or mean
            assert len(set(fractions)) == 1 or not mean
    assert [g.token_ids for g in runs[False]] != [g.token_ids for g in runs[True]]


class _NoParams:
    VERSION = 1

    def __init__(self, model: Any, params: Any, *, clock: Any = None) -> None: ...
    def generate(self, prompts: Any, **asked: Any) -> list[Any]: ...


class _OddParams(_NoParams):
    class Params: ...


class _NoClock(_NoParams):
    @dataclasses.dataclass(frozen=True)
    class Params: ...

    def __init__(self, model: Any, params: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tests.test_decoders:_NoParams", "lacks Params: docs/decoder.md has a whole example"),
        ("tests.test_decoders:_OddParams", "Params must be a dataclass"),
        ("tests.test_decoders:_NoClock", "is made as _NoClock\\(model, params, clock=clock\\)"),
        ("tests.test_decoders._NoClock", "name your own as package.module:Class"),
    ],
)
def test_a_class_that_is_no_decoder_is_one_line(kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_decoder(None, kind)
