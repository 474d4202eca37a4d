"""What prompts share at their beginning is read once, and their answers are those of prompts that are read alone."""

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import bench
import pytest
import torch
import transformers
from hf_models import CONFIGS, SMALL, save_reading
from hf_oracle import continued, lm_evals_hf
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_eval.engine.decoders import beginnings, make_decoder
from twotower_eval.engine.decoders.beginnings import families
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.proof import prove_up_to
from twotower_eval.engine.models.transformers_cache import CacheContext
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.records import Generation, Prompt
from twotower_eval.resources import data_path

MORE = {
    "qwen2": transformers.Qwen2Config(**SMALL),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
}
JOINED = ["llama", "qwen2", "gpt2", "mistral", "gemma3"]  # attention, with windows too: a beginning is read once
STATES = ["mamba2", "bamba", "lfm2"]  # these go on token by token
ODDS = ["longrope", "gpt_neo", "bert_decoder"]  # a factor that switches, a window inside modules, positions that end
BUDGET = 8
SHARED = 24  # tokens, over the windows of these models and over those of the trial


@pytest.fixture(scope="module", autouse=True)
def known_kinds() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for kind, config in MORE.items():
            patch.setitem(CONFIGS, kind, config)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        return root / kind if (root / kind).is_dir() else save_reading(kind, root / kind)

    return folder


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "LEAST_SHARED", 8)


def prompts_of(seed: int = 0) -> list[Prompt]:
    """Two beginnings with rests of unlike lengths, one prompt that is the beginning of others, one given twice, and two
    that share nothing."""
    chance = random.Random(seed)

    def drawn(num: int) -> tuple[int, ...]:
        return tuple(chance.randrange(8, 64) for _ in range(num))

    one, other = drawn(SHARED), drawn(SHARED // 2)
    ids = [one + drawn(num) for num in (3, 9, 1, 4, 4)] + [other + drawn(num) for num in (5, 2)]
    ids += [one, ids[1], drawn(6), drawn(15)]
    chance.shuffle(ids)
    return [Prompt(id=str(number), token_ids=own, seed=number) for number, own in enumerate(ids)]


def said(made: Sequence[Generation]) -> list[Any]:
    return [(one.token_ids, one.text, one.finish, one.num_discarded_tokens) for one in made]


def decoded(model: Any, prompts: Sequence[Prompt], kind: str = "autoregressive", **asked: Any) -> list[Generation]:
    params = {"temperature": asked.pop("temperature")} if "temperature" in asked else {}
    asked = {"max_new_tokens": BUDGET, "eos_token_ids": model.eos_token_ids, **asked}
    made: list[Generation] = make_decoder(model, kind, **params).generate(prompts, **asked)
    return made


def num_read(model: WatchedModel) -> int:
    """Tokens of prompts that were read: those of passes over several tokens, and over whole prompts."""
    passes = [one for one in model.passes if one.kind == "prefill" or one.tokens > 1]
    return sum(one.num * one.rows * one.tokens for one in passes)


@pytest.mark.parametrize("kind", JOINED + STATES + ODDS)
def test_answers_are_those_of_prompts_read_alone(folders: Any, kind: str) -> None:
    model: Any = load_model(folders(kind))
    prove_up_to(model, SHARED + 15 + BUDGET)
    prompts = prompts_of()
    plain = said(decoded(model, prompts, max_batch_size=1))
    for size in (1, 3, 8) if kind in JOINED else (3,):
        watched = WatchedModel(model)
        made = decoded(watched, prompts, max_batch_size=size, share_beginnings=True)
        assert said(made) == plain
        forwards = sum(watched.prefills.rows) + sum(watched.extensions.rows)
        assert sum(one.num_context_forwards for one in made) == forwards
        assert kind in ODDS or model.shares_beginnings == (kind in JOINED)
        if kind in JOINED:
            own = [one.num_tokens + one.num_discarded_tokens for one in made]
            assert forwards - sum(own) == 2  # the beginnings, each counted for the first prompt that goes on from it
            assert num_read(watched) < 0.75 * sum(len(prompt.token_ids) for prompt in prompts)


def test_nothing_is_shared_unless_it_is_asked_for(folders: Any) -> None:
    model = WatchedModel(load_model(folders("llama")))
    made = decoded(model, prompts_of(), max_batch_size=3)
    assert num_read(model) >= sum(len(prompt.token_ids) for prompt in prompts_of())
    assert all(one.num_context_forwards == one.num_tokens + one.num_discarded_tokens for one in made)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "ends", [{"temperature": 1.0}, {"stop": ["e", "12"]}, {"eos_token_ids": tuple(range(8, 30))}], ids=str
)
def test_samples_ends_and_freed_places_are_the_same(folders: Any, kind: str, ends: dict[str, Any]) -> None:
    """Rows that end early, by tokens or by texts, leave their places to others."""
    model: Any = load_model(folders(kind))
    asked: dict[str, Any] = {"max_new_tokens": 20, **ends}
    plain = decoded(model, prompts_of(1), max_batch_size=8, **dict(asked))
    assert len({one.num_tokens for one in plain}) > 1 or "temperature" in ends
    assert said(decoded(model, prompts_of(1), max_batch_size=3, share_beginnings=True, **asked)) == said(plain)


@pytest.mark.parametrize("kind", ["prompt_lookup"])
def test_decoders_that_verify_drafts_share_them_too(folders: Any, kind: str) -> None:
    model: Any = load_model(folders("llama"))
    plain = said(decoded(model, prompts_of()))
    assert said(decoded(model, prompts_of(), kind, max_batch_size=3, share_beginnings=True)) == plain


@pytest.mark.parametrize("kind", ["autoregressive", "block_diffusion"])
def test_our_own_towers_read_prompts_as_before(kind: str) -> None:
    model = load_model(data_path("miniature", "pair"))
    prompts = prompts_of()
    asked: dict[str, Any] = {"max_batch_size": 3, "max_new_tokens": 16}
    assert decoded(model, prompts, kind, share_beginnings=True, **asked) == decoded(model, prompts, kind, **asked)


def test_a_model_that_misreads_rows_behind_a_beginning_reads_them_whole(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(folders("llama"))
    own = CacheContext.select

    def misread(context: CacheContext, rows: Sequence[int]) -> CacheContext:
        found = own(context, rows)
        if len(rows) == len(set(rows)):
            return found
        for layer in (layer for part in found.parts if part.cache for layer in part.cache.layers):
            layer.keys = layer.keys + 0.5
        return found

    monkeypatch.setattr(CacheContext, "select", misread)
    plain = said(decoded(model, prompts_of(), max_batch_size=1))
    assert not model.shares_beginnings
    assert said(decoded(model, prompts_of(), max_batch_size=3, share_beginnings=True)) == plain


def test_rows_too_long_to_have_a_cache_are_read_whole(folders: Any) -> None:
    model: Any = load_model(folders("llama"))
    assert model.shares_beginnings
    plain = said(decoded(model, prompts_of(), max_batch_size=1))
    for limit in (SHARED - 4, SHARED + 3):
        model.run_by(model.ways, [limit + 2])
        assert said(decoded(model, prompts_of(), max_batch_size=3, share_beginnings=True)) == plain


def test_the_harness_shares_examples_and_gives_lm_evals_texts(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = "".join(f"{a}+{b}={a + b}\n" for a, b in combinations(range(1, 5), 2))
    prompts = [f"{examples}{a}+{b}=" for a, b in ((3, 9), (11, 2), (7, 7), (120, 11), (5, 14))]
    requests = continued(prompts, ["\n"], budget=10)
    folder = folders("llama")
    model = load_model(folder)
    ours = HarnessLM(model, decoder=make_decoder(model, "autoregressive"), batch_size=2)
    read: list[int] = []
    own = model.prefill

    def prefill(ids_BS: torch.Tensor, *more: Any) -> Any:
        read.append(ids_BS.numel())
        return own(ids_BS, *more)

    monkeypatch.setattr(model, "prefill", prefill)
    assert ours.generate_until(requests) == lm_evals_hf(folder).generate_until(requests, disable_tqdm=True)
    assert len(read) == 1  # the examples
    assert read[0] >= len(ours.tok_encode(examples)) - 1


tokens = st.lists(st.integers(0, 1), max_size=8).map(tuple)


def num_left(sequences: Sequence[tuple[int, ...]], found: Sequence[Any]) -> int:
    return sum(map(len, sequences)) - sum(family.length * (len(family.members) - 1) for family in found)


@given(st.lists(tokens, max_size=5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_families_share_what_they_say_and_no_small_case_would_save_more(
    sequences: list[tuple[int, ...]], least: int
) -> None:
    found = families(sequences, least)
    members = [member for family in found for member in family.members]
    assert len(members) == len(set(members))
    for family in found:
        own = [sequences[member] for member in family.members]
        assert len(own) > 1
        assert family.length >= least
        assert len({one[: family.length] for one in own}) == 1
        assert min(map(len, own)) > family.length
    assert num_left(sequences, found) == sum(map(len, sequences)) - max_saved(sequences, least)


def max_saved(sequences: Sequence[tuple[int, ...]], least: int) -> int:
    """Of all ways to split sequences into families."""
    if not sequences:
        return 0
    first, rest = sequences[0], list(sequences[1:])
    most = max_saved(rest, least)
    for size in range(1, len(rest) + 1):
        for chosen in combinations(range(len(rest)), size):
            own = [first, *(rest[at] for at in chosen)]
            limit = min(map(len, own)) - 1
            length = next((n for n in range(limit, 0, -1) if len({one[:n] for one in own}) == 1), 0)
            if length >= least:
                left = [one for at, one in enumerate(rest) if at not in chosen]
                most = max(most, length * size + max_saved(left, least))
    return most


def test_the_bench_runs(folders: Any, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{a}+{a}?", "answer": f"{a}+{a}\n#### {a + a}"} for a in range(1, 7)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    heard: list[str] = []
    bench.run(
        ["generation"],
        threads=torch.get_num_threads(),
        rounds=1,
        say=heard.append,
        model=folders("llama"),
        data_dir=tmp_path,
        limit=3,
    )
    found = json.loads(heard[-1])
    assert found["num_texts_changed"] == 0
    assert found["num_tokens"]["ours"] < found["num_tokens"]["hf"]
