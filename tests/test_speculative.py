"""Speculative decoding: drafts from the prompt or a smaller model, verified in one pass, give the greedy tokens."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
import pytest
import torch
import transformers
from bench import drafts as bench_of_drafts
from golden_files import checkpoint_folders, golden
from hf_models import CONFIGS, ODD, SMALL, save_reading, save_tiny
from pages import commands
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from twotower_eval import cli, store
from twotower_eval.engine.decoders import decoder_spec, make_decoder
from twotower_eval.engine.decoders.speculative import Lookup
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.checks import drafts_verified
from twotower_eval.records import Generation, Prompt

LLAMA_FAMILY = {"qwen2": transformers.Qwen2Config(**SMALL)}
# Attention that is cut back, with a window that is not, states that read several tokens at once, states beside
# attention, no cache at all, a window inside the modules, positions that end, rotary factors that switch.
KINDS = ["llama", "qwen2", "gpt2", "mistral", "mamba2", "lfm2", "openai-gpt", "gpt_neo", "bert_decoder", "longrope"]
BUDGET = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a kind of model to the folder of a tiny one, and of one that is nearly the same."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str, noise: float = 0.0) -> Path:
        made = root / f"{kind}-{noise}"
        if made.is_dir():
            return made
        if kind in LLAMA_FAMILY:
            CONFIGS.setdefault(kind, LLAMA_FAMILY[kind])
        if not noise:
            return save_tiny(kind, made)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder(kind))
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.add_(torch.randn_like(parameter) * noise * parameter.std())
        model.save_pretrained(made)
        return made

    yield folder
    for kind in LLAMA_FAMILY:
        CONFIGS.pop(kind, None)


def prompts_that_repeat(num: int = 5, vocab: int = 60) -> list[Prompt]:
    """Prompts of unlike lengths, some of whose n-grams come again."""
    chance = random.Random(0)
    parts = [[chance.randrange(3, vocab) for _ in range(6)] for _ in range(num)]
    return [Prompt(id=str(i), token_ids=tuple((part * 3)[: 4 + 2 * i])) for i, part in enumerate(parts)]


def said(made: Sequence[Generation]) -> list[Any]:
    """All of an answer that a reader sees; how many forwards it took is none of it."""
    return [(one.token_ids, one.text, one.finish, one.num_tokens, one.num_discarded_tokens) for one in made]


def decoded(model: Model, kind: str, prompts: Sequence[Prompt], params: Any = {}, **asked: Any) -> list[Generation]:  # noqa: B006
    asked = {"max_new_tokens": BUDGET, "eos_token_ids": model.eos_token_ids, **asked}
    return make_decoder(model, kind, **params).generate(prompts, **asked)


def check_greedy(model: Model, kind: str, params: Any, prompts: Sequence[Prompt], **asked: Any) -> list[Generation]:
    """The answers, equal to the autoregressive decoder's in every batch size; no row depends on its neighbours."""
    plain = decoded(model, "autoregressive", prompts, **asked)
    made = decoded(model, kind, prompts, params, **asked)
    for found in (made, *(decoded(model, kind, prompts, params, max_batch_size=size, **asked) for size in (1, 2))):
        assert said(found) == said(plain)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_looked_up_gives_the_greedy_tokens(folders: Any, kind: str) -> None:
    model = load_model(folders(kind))
    params = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1 + len(kind) % 2}
    made = check_greedy(model, "prompt_lookup", params, prompts_that_repeat())
    assert all(one.num_context_forwards <= one.num_tokens + one.num_discarded_tokens for one in made)
    assert all(one.num_draft_forwards is None for one in made)


@pytest.mark.parametrize(
    ("kind", "draft"),
    [("llama", "near"), ("llama", "mamba2"), ("gpt2", "itself"), ("mistral", "near"), ("mamba2", "near")],
)
def test_what_a_model_drafts_gives_the_greedy_tokens(folders: Any, kind: str, draft: str) -> None:
    model = load_model(folders(kind))
    folder = folders(kind, 0.0 if draft == "itself" else 0.05) if draft in ("itself", "near") else folders(draft)
    params = {"draft": str(folder), "num_assistant_tokens": 4}
    made = check_greedy(model, "draft", params, prompts_that_repeat())
    alone = decoded(model, "draft", prompts_that_repeat(), params, max_batch_size=1)
    assert [one.num_draft_forwards for one in made] == [one.num_draft_forwards for one in alone]
    if draft == "itself":  # every draft is right: 5 tokens a pass, and the prefill's one
        assert {one.num_context_forwards for one in made if one.num_tokens == BUDGET} <= {4}
        assert sum(one.num_tokens for one in made) > 3 * sum(one.num_context_forwards for one in made)


@pytest.mark.parametrize("params", [("prompt_lookup", {}), ("draft", {"draft": "miniature"})], ids=["lookup", "draft"])
def test_the_miniatures_answers_are_the_same_whatever_ends_them(params: tuple[str, Any]) -> None:
    """A budget of one, a stop string inside a draft, an end-of-text inside a draft; the tower alone and in its pair."""
    pair = load_model("miniature")
    texts = ["copy: banana banana banana\n", "reverse: abcabcabcabc\n", "sort: 3 1 2\n", "abababababab", "x"]
    prompts = [Prompt.from_text(text, pair) for text in texts]
    prompts = [Prompt(id=str(i), token_ids=one.token_ids) for i, one in enumerate(prompts)]
    for model in (pair, load_model("miniature", tower="context")):
        for asked in ({}, {"max_new_tokens": 1}, {"stop": ("a", "\n"), "eos_token_ids": ()}):
            check_greedy(model, *params, prompts, **asked)


@pytest.mark.parametrize("folder", checkpoint_folders(), ids=lambda folder: folder.name)
def test_golden_checkpoints_give_their_greedy_tokens(folder: Path) -> None:
    gold = golden(folder)
    for name in sorted(gold.meta["prompts"])[:4]:
        check_greedy(gold.model, "prompt_lookup", {}, gold.prompts(name), eos_token_ids=())
        check_greedy(gold.model, "draft", {"draft": str(folder)}, gold.prompts(name), eos_token_ids=())


def test_forwards_are_counted_as_the_harness_counts_them(folders: Any) -> None:
    """Every pass of the target, with the tokens that it reads; those of a draft model are no forwards of it."""
    for kind in ("llama", "mamba2"):
        watched: Any = WatchedModel(load_model(folders(kind)))
        for decoder, params in (("prompt_lookup", {}), ("draft", {"draft": str(folders(kind))})):
            watched.forget()
            made = decoded(watched, decoder, prompts_that_repeat(), params)
            counted = sum(watched.prefills.rows) + sum(watched.extensions.rows)
            assert counted == sum(one.num_context_forwards for one in made)
            assert max(watched.extensions.tokens) > 1
    assert all((one.num_draft_forwards or 0) > one.num_context_forwards for one in made)


def test_the_lookup_drafts_what_transformers_does() -> None:
    chance = random.Random(1)
    for _ in range(300):
        ids = [chance.randrange(4) for _ in range(chance.randrange(2, 24))]
        num, longest = chance.randrange(1, 6), chance.randrange(1, 4)
        theirs = PromptLookupCandidateGenerator(None, num, longest, max_length=1000)
        found, _ = theirs.get_candidates(torch.tensor([ids]))
        assert Lookup(ids, longest).draft(num) == found[0, len(ids) :].tolist()


def test_transformers_own_prompt_lookup_says_the_same(folders: Any) -> None:
    model: Any = load_model(folders("gpt2"))
    for prompt in prompts_that_repeat(3):
        ids_1S = torch.tensor([prompt.token_ids])
        asked = {"max_new_tokens": BUDGET, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = model.inner.generate(
            ids_1S, attention_mask=torch.ones_like(ids_1S), prompt_lookup_num_tokens=10, **asked
        )
        [made] = decoded(model, "prompt_lookup", [prompt], eos_token_ids=())
        assert list(made.token_ids) == theirs[0, len(prompt.token_ids) :].tolist()


def test_a_model_that_reads_one_token_at_a_time_is_refused_in_one_line(folders: Any) -> None:
    model = load_model(folders("recurrent_gemma"))
    with pytest.raises(UserError, match="gives logits behind one at a time only: take autoregressive") as error:
        make_decoder(model, "prompt_lookup")
    assert "\n" not in str(error.value)
    assert "recurrent_gemma" in ODD


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("prompt_lookup", {"prompt_lookup_num_tokens": 0}, "must be a whole number of at least 1"),
        ("prompt_lookup", {"max_matching_ngram_size": True}, "must be a whole number of at least 1"),
        ("prompt_lookup", {"temperature": 0.5}, "has no parameter 'temperature'"),
        ("draft", {}, "set draft to a checkpoint"),
        ("draft", {"draft": "/nowhere/at/all"}, "no such checkpoint folder"),
        ("draft", {"draft": "miniature", "num_assistant_tokens": 0}, "must be a whole number of at least 1"),
    ],
)
def test_a_slip_is_one_line(kind: str, params: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        decoder_spec(kind, **params)
    assert "\n" not in str(error.value)


def test_a_draft_model_has_the_same_tokenizer(tmp_path: Path) -> None:
    model = load_model(save_reading("llama", tmp_path / "one"))
    other = save_reading("gpt2", tmp_path / "other")
    make_decoder(model, "draft", draft=str(other))
    text = (other / "tokenizer.json").read_text().replace('"a"', '"\\u00e4"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="draft model other has another tokenizer than one"):
        make_decoder(model, "draft", draft=str(other))


def test_the_draft_models_content_is_part_of_the_operating_point(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llama"), tmp_path / "draft")
    before = decoder_spec("draft", draft=str(folder))
    assert before == decoder_spec("draft", draft=str(folder))
    shutil.copytree(folders("llama", 0.05), folder, dirs_exist_ok=True)
    after = decoder_spec("draft", draft=str(folder))
    assert before.params == after.params
    assert before.draft != after.draft
    assert decoder_spec("prompt_lookup").draft is None


def test_verify_holds_drafts_against_the_greedy_tokens(folders: Any) -> None:
    model = load_model(folders("llama"))
    prompts = prompts_that_repeat()
    same, per_pass = drafts_verified(model, prompts, "float32")
    assert (same.name, same.outcome, same.value) == ("drafts_equal_greedy", "passed", 0.0)
    assert per_pass.value is not None
    assert per_pass.value > 1
    half, _ = drafts_verified(model, prompts, "bfloat16")
    assert "answers of prompt_lookup are those of autoregressive, in bfloat16" in half.detail
    assert half.limit is None
    alone = load_model(folders("recurrent_gemma"))
    assert {one.outcome for one in drafts_verified(alone, prompts, "float32")} == {"not_checked"}


def test_verify_says_the_tokens_of_a_pass_with_a_draft_model(tmp_path: Path) -> None:
    folder = save_reading("llama", tmp_path / "llama")
    (tmp_path / "own").mkdir()
    assert cli.main(["verify", str(folder), "--draft", str(folder), "--out", str(tmp_path / "own")]) == 0
    (path,) = store.find_runs(tmp_path / "own", "verify")
    found = {check.name: check for check in store.load(path).checks}
    assert found["draft_equals_greedy"].outcome == "passed"
    assert (found["draft_tokens_per_pass"].value or 0) > 4, "a model drafts for itself what it would say"
    assert "draft: " in found["draft_tokens_per_pass"].detail
    assert (found["draft_tokens_per_pass"].value or 0) > (found["tokens_per_pass"].value or 0)


def test_verify_finds_a_slip_in_the_draft_before_it_loads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_eval.engine.models.load_model", lambda *_, **__: pytest.fail("it is loaded"))
    assert cli.main(["verify", "--draft", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_witness_finds_a_row_of_logits_for_every_token(folders: Any) -> None:
    """However much was drafted, and though states read accepted tokens again."""
    for kind in ("llama", "mamba2"):
        model: Any = WatchedModel(load_model(folders(kind)))
        for decoder, params in (("prompt_lookup", {}), ("draft", {"draft": str(folders(kind, 0.05))})):
            for prompt in prompts_that_repeat():
                with model.witnessed(prompt.token_ids) as heard:
                    [made] = decoded(model, decoder, [prompt], params)
                tally = heard.tally(made.token_ids)
                assert tally.num_witnessed == tally.num_tokens == made.num_tokens


def test_a_baseline_that_drafts_is_timed_and_reported_with_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--tasks", "miniature_sort", "--out", str(tmp_path), "--threads", "1", "--no-costs", "--probes", "0"]
    common += ["--num-prompts", "1", "--min-rounds", "2", "--warmup-rounds", "0"]
    drafts = ["--baseline-decoder", "draft", "--baseline-set", "draft=miniature"]
    assert cli.main(["speed", *common, *drafts, "--baseline-set", "num_assistant_tokens=3"]) == 0
    [path] = store.find_runs(tmp_path, "speed")
    run = store.load(path)
    [baseline] = [cell for cell in run.manifest.cells if cell.arm == "baseline"]
    assert dict(baseline.decoder.params) == {"draft": "miniature", "num_assistant_tokens": 3}
    assert baseline.decoder.draft == decoder_spec("draft", draft="miniature").draft
    prompts = [(call.cell == baseline.id, one) for call in run.speed for one in call.prompts]
    assert all((one.num_draft_forwards is not None) == is_baseline for is_baseline, one in prompts)
    assert cli.main(["report", str(path), "--out", str(tmp_path / "reports")]) == 0
    [report] = (tmp_path / "reports").glob("*/report.md")
    assert "draft model's forwards" in report.read_text(encoding="utf-8")


def test_the_bench_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_of_drafts, "SMALL", (4, 6))
    said: list[str] = []
    bench.run(["drafts"], threads=torch.get_num_threads(), rounds=1, say=said.append)
    figures = json.loads(said[-1])["figures"]
    assert figures["autoregressive"]["tokens_per_pass"] <= 1 < figures["draft"]["tokens_per_pass"]
    assert figures["autoregressive"]["ratio"]["median"] == 1


def test_the_pages_commands_on_strong_baselines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = [words for words in commands("your-model.md") if "--baseline-decoder" in words]
    own = [words for words in own if "static_cache" not in words]  # of models that are there in test_your_model
    assert len(own) == 3
    for _, *arguments in own:
        assert cli.main([*arguments, "--probes", "0", "--warmup-rounds", "0", "--threads", "1"]) == 0
    kinds = [
        {c.arm: c.decoder.kind for c in store.load(path).manifest.cells} for path in store.find_runs(Path("results"))
    ]
    assert {one["baseline"] for one in kinds} == {"prompt_lookup", "draft"}
