"""Drafts are right where a text repeats itself: a decoder that drafts is not one that remembers, unless it does."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.drafting_decoders import KNOWING, OWN, Knowing
from tests.planted_decoders import Forwards
from tests.test_unseen import Shot
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.compare import Runs, SpeedPoint
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.gate_facts import Probes
from twotower_eval.analyse.compare.unseen import FAR, Memory
from twotower_eval.analyse.words import fact_text
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.speculative import LookupParams, lookup_passes
from twotower_eval.engine.models import load_model
from twotower_eval.measure import speed
from twotower_eval.measure.speed import probes
from twotower_eval.measure.speed.workloads import make_calls
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Estimate, Prompt

NEW, LIMIT = 24, 1.25


@pytest.fixture(scope="module")
def clock() -> Any:
    forwards = Forwards()
    with pytest.MonkeyPatch.context() as patch:
        forwards.watch(patch)
        yield forwards


@pytest.fixture(autouse=True)
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """New prompts are drawn anew in every launch: here always the same, so that what is found does not hang on luck."""
    drawn = probes.derive_seed
    monkeypatch.setattr(probes, "derive_seed", lambda *parts: drawn(*parts[:-1], "a launch"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


TEXTS = tuple("".join(random.Random(at).choices("abcdefgh", k=5)) for at in range(60))


def plan(pair: Path, decoder: str) -> SpeedPlan:
    return SpeedPlan(
        model=str(pair), tasks=("copy",), decoder=decoder, num_prompts=6, new_tokens=NEW, min_rounds=6, costs=False,
        threads=1, probes=2,
    )  # fmt: skip


def shots(words: Any) -> list[Any]:
    return [
        Shot(task="copy", doc_id=at, text=f"{word} " * 12, prompt_sha256=str(at), max_new_tokens=NEW)
        for at, word in enumerate(words)
    ]


@pytest.fixture(scope="module")
def answers(pair: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """By word, its prompt's tokens and the greedy answer."""
    model = load_model(pair)
    assert model.tokenizer is not None
    prompts = [Prompt(id=one.text, token_ids=tuple(model.tokenizer.encode(one.text))) for one in shots(TEXTS)]
    made = make_decoder(model, "autoregressive").generate(prompts, max_new_tokens=NEW)
    return {word: (row.token_ids, one.token_ids) for word, row, one in zip(TEXTS, prompts, made, strict=True)}


def timed_on(pair: Path, answers: Any, clock: Forwards, root: Path, decoder: str, *, repeating: bool) -> SpeedPoint:
    """A decoder on prompts whose answers repeat themselves more than all others do, or less."""
    words = sorted(TEXTS, key=lambda word: lookup_passes(*answers[word]), reverse=not repeating)
    places = [request.doc_id for call in make_calls(plan(pair, decoder), shots(TEXTS))[1] for request in call.requests]
    chosen: list[str] = [""] * len(TEXTS)  # all of one length, so that the same places are timed whatever they hold
    for place, word in zip([*places, *(at for at in range(len(TEXTS)) if at not in places)], words, strict=True):
        chosen[place] = word
    (point,) = Runs([store.load(speed.run(plan(pair, decoder), shots(chosen), root=root, now=clock))]).speed
    return point


@pytest.mark.parametrize("decoder", ["prompt_lookup", OWN])
def test_a_lookup_on_prompts_that_repeat_themselves_remembers_nothing(
    decoder: str, pair: Path, answers: Any, clock: Forwards, tmp_path: Path
) -> None:
    unseen = timed_on(pair, answers, clock, tmp_path, decoder, repeating=True).unseen
    own = unseen.candidate
    assert own.documents.estimate is not None
    assert own.documents.estimate.low > LIMIT
    for beyond in (own.documents_beyond, own.made_up_beyond):
        assert beyond.estimate is not None
        assert beyond.estimate.value == pytest.approx(1, abs=0.05)
    assert unseen.remembered(LIMIT) == ()
    assert unseen.checked(LIMIT)
    assert own.made_up_beyond.estimate is not None
    said = f"{own.made_up_beyond.estimate.value:.2f}x ["
    assert said in fact_text(Probes(unseen=unseen, limit=LIMIT)).split("made-up prompts")[1]


@pytest.mark.parametrize("known", ["timed", "all"])
def test_who_drafts_by_heart_is_found_out(
    known: str, pair: Path, answers: Any, clock: Forwards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it knows the timed documents, or every document of the task."""
    words = sorted(TEXTS, key=lambda word: lookup_passes(*answers[word]), reverse=True)
    monkeypatch.setattr(Knowing, "taught", dict(answers[word] for word in (words[:6] if known == "timed" else words)))
    unseen = timed_on(pair, answers, clock, tmp_path, KNOWING, repeating=False).unseen
    assert unseen.remembered(LIMIT) == ("candidate",)


def shown(value: float) -> Measured:
    method = "t"
    return Measured(estimate=Estimate(value=value, low=value - 0.1, high=value + 0.1, level=0.99, n=9, method=method))


@pytest.mark.parametrize(
    ("plain", "beyond", "exceeds"), [(5.0, 1.0, False), (5.0, 3.5, True), (2.0, 4.0, False), (5.0, 6.0, True)]
)
def test_made_up_prompts_may_repeat_themselves_less_and_no_more_than_that(
    plain: float, beyond: float, exceeds: bool
) -> None:
    assert Memory(made_up=shown(plain), made_up_beyond=shown(beyond)).exceeds(LIMIT) == exceeds
    assert Memory(made_up=shown(plain)).exceeds(LIMIT) == (plain > FAR)


def test_the_passes_of_a_lookup_are_those_that_it_takes(pair: Path, answers: Any) -> None:
    model = load_model(pair)
    for params in ({}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 4}):
        decoder = make_decoder(model, "prompt_lookup", **params)
        for prompt, answer in answers.values():
            (made,) = decoder.generate([Prompt(id="", token_ids=prompt)], max_new_tokens=NEW)
            assert made.token_ids == answer
            assert made.num_context_forwards == lookup_passes(prompt, answer, LookupParams(**params))
    assert lookup_passes([1, 2], []) == 0
