"""The contract of each seam, over every shipped entry and the examples of docs/: what a family, a decoder and a section
have to do, whoever wrote them."""

import random
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
import torch
from golden_files import SHIPPED
from hf_models import save_tiny
from pages import write_files
from test_decoders import assert_same, cut_by_hand, model_with_text
from tiny_models import VOCAB, tiny_pair
from tiny_pair import write_pair

from twotower_eval.analyse import report
from twotower_eval.engine.decoders import DECODERS, make_decoder
from twotower_eval.engine.decoders.reported import call_request, check_answers, check_forwards, finished
from twotower_eval.engine.models import FAMILIES, contract, load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.records import Generation, Prompt

# Decoder and its parameters; the last two are those of docs/trust.md and docs/decoder.md.
DECODER_ENTRIES: list[tuple[str, dict[str, Any]]] = [
    ("autoregressive", {}),
    ("autoregressive", {"temperature": 0.8}),
    ("prompt_lookup", {"prompt_lookup_num_tokens": 4}),
    ("draft", {"draft": str(SHIPPED / "public"), "num_assistant_tokens": 3}),
    ("mock_ar", {"temperature": 0.8}),
    ("block_diffusion", {"block_size": 5, "threshold": 0.1}),
    ("block_diffusion", {"block_size": 4, "steps_per_block": 2, "temperature": 0.8}),
    ("reference", {"mode": "block_diffusion", "block_size": 5, "threshold": 0.1}),
    ("tests.example_decoder:Greedy", {}),
    ("varied:Varied", {"penalty": 2.0, "window": 3}),
]
EVERY_DECODER = pytest.mark.parametrize(
    ("kind", "params"), DECODER_ENTRIES, ids=[f"{kind} {params}" for kind, params in DECODER_ENTRIES]
)
FAMILY_ENTRIES = ("pair", "context tower", "transformers", "bigram:load")
PROMPTS = [Prompt(id=str(i), token_ids=tuple(range(1 + i, 3 + 3 * i)), seed=i) for i in range(5)]


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The examples of docs/ as modules, and the bigram's checkpoint."""
    folder = tmp_path_factory.mktemp("examples")
    for page in ("family.md", "decoder.md", "section.md"):
        write_files(page, folder)
    sys.path.insert(0, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path("make_bigram.py")
    yield folder
    sys.path.remove(str(folder))


def test_every_shipped_entry_is_held_to_it(models: dict[str, Any]) -> None:
    """But for models behind a server, which compute nothing here: tests/test_endpoints.py."""
    assert set(DECODERS) <= {"endpoint", *(kind for kind, _ in DECODER_ENTRIES)}
    assert set(FAMILIES) <= {"openai", *(model.checkpoint.family for model in models.values())}


# --- families ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(examples: Path) -> dict[str, Any]:
    pair = write_pair(examples / "pair")
    return {
        "pair": load_model(pair),
        "context tower": load_model(pair, tower="context"),
        "transformers": load_model(save_tiny("llama", examples / "llama")),
        "bigram:load": load_model(examples / "bigram", family="bigram:load"),
    }


@pytest.mark.parametrize("name", FAMILY_ENTRIES)
def test_a_model_has_what_is_asked_of_a_users_own(models: dict[str, Any], name: str) -> None:
    """What is told to the author of a family in one line holds for ours, too."""
    assert contract._missing(models[name]) is None
    assert contract._found_wrong(models[name], torch.float32) is None
    assert re.fullmatch("[0-9a-f]{64}", models[name].checkpoint.digest)


@pytest.mark.parametrize("name", FAMILY_ENTRIES)
@torch.inference_mode()
def test_steps_give_the_logits_of_whole_rows(models: dict[str, Any], name: str) -> None:
    """However a context came about: read at once, extended, chosen from, joined; and it is a value."""
    model, lengths = models[name], [6, 2, 4]
    ids_BS = torch.randint(5, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    more_BK = torch.randint(5, 60, (3, 3), generator=torch.Generator().manual_seed(1))
    rows = [torch.cat([ids_BS[row, :length], more_BK[row]]) for row, length in enumerate(lengths)]
    whole = [model.context_logits(row[None])[0] for row in rows]

    def check(context: Any, expected: Sequence[tuple[int, int]]) -> None:
        """Each row's next logits are those behind so many tokens of a whole row."""
        for logits_V, (row, num) in zip(model.next_logits(context), expected, strict=True):
            assert torch.allclose(logits_V, whole[row][num - 1], atol=1e-4)
        assert context.lengths == tuple(num for _, num in expected)

    context = model.prefill(ids_BS, lengths)
    longer = model.extend(model.extend(context, more_BK[:, :1]), more_BK[:, 1:])
    check(longer, [(0, 9), (1, 5), (2, 7)])
    check(context, [(0, 6), (1, 2), (2, 4)])
    check(model.extend(context.select([2, 0]), more_BK[[2, 0], :1]), [(2, 5), (0, 7)])
    if model.joins_contexts:
        check(context.select([1]).join(longer.select([0, 2])), [(1, 2), (0, 9), (2, 7)])
    padded = model.context_logits(ids_BS, lengths)
    for row, length in enumerate(lengths):
        assert torch.allclose(padded[row, :length], whole[row][:length], atol=1e-4)
    last_BLV = model.context_logits(ids_BS, lengths, last=3)
    for row, places in enumerate([(3, 4, 5), (0, 0, 1), (1, 2, 3)]):
        assert torch.allclose(last_BLV[row], whole[row][list(places)], atol=1e-4)


@pytest.mark.parametrize("name", FAMILY_ENTRIES)
@torch.inference_mode()
def test_a_model_decodes_and_is_counted(models: dict[str, Any], name: str) -> None:
    """Token by token what whole rows say; n tokens are n forwards of each row, as the harness counts them."""
    model = WatchedModel(models[name])
    prompts = [Prompt(id=str(n), token_ids=tuple(range(5, 5 + n))) for n in (1, 4, 2)]
    generations = make_decoder(model, "autoregressive").generate(prompts, max_new_tokens=5, max_batch_size=2)
    check_forwards(generations, model, name)
    assert [g.num_context_forwards for g in generations] == [5, 5, 5]
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = list(prompt.token_ids)
        for token in generation.token_ids:
            assert token == int(models[name].context_logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)


# --- decoders ------------------------------------------------------------------------------------------------------


def generate(kind: str, params: dict[str, Any], prompts: Sequence[Prompt], budget: int = 9, **asked: Any) -> Any:
    """Answers on the tiny pair; they are held to all that the harness holds answers to."""
    model = WatchedModel(model_with_text("all kinds"))
    decoder = make_decoder(model, kind, **params)
    generations = decoder.generate(prompts, max_new_tokens=budget, **asked)
    assert type(generations) is list
    held = call_request(model, kind, budget, asked.get("eos_token_ids", ()), asked.get("stop", ()))
    check_answers([g for g in finished(generations, kind) if g.text is not None], prompts, held)
    if kind != "reference":  # which computes everything anew, and says what a decoder would have needed
        check_forwards(generations, model, kind)
    return generations


@EVERY_DECODER
def test_neither_neighbours_nor_width_nor_order_change_an_answer(kind: str, params: dict[str, Any]) -> None:
    alone = {prompt.id: generate(kind, params, [prompt])[0] for prompt in PROMPTS}
    for width, seed in ((None, 0), (2, 1), (1, 2)):
        mixed = random.Random(seed).sample(PROMPTS, len(PROMPTS))
        heard: list[Generation] = []
        together = generate(kind, params, mixed, max_batch_size=width, on_finish=heard.append)
        assert [g.prompt_id for g in together] == [prompt.id for prompt in mixed]
        assert sorted(map(id, heard)) == sorted(map(id, together)), "each is heard of once, as it finishes"
        for ours in together:
            assert_same(ours, alone[ours.prompt_id])


@EVERY_DECODER
def test_an_end_cuts_an_answer_and_changes_nothing_before_it(kind: str, params: dict[str, Any]) -> None:
    """End tokens and stop strings, cut by hand from the whole; the budget holds."""
    free = generate(kind, params, PROMPTS)
    assert all(g.finish == "length" and g.num_tokens == 9 for g in free)
    for eos, stop in (((free[0].token_ids[3],), ()), ((), ("ab", "c")), ((free[1].token_ids[5], 7), ("b",))):
        ended = generate(kind, params, PROMPTS, eos_token_ids=eos, stop=stop)
        for whole, ours in zip(free, ended, strict=True):
            assert (list(ours.token_ids), ours.text, ours.finish) == cut_by_hand(whole.token_ids, eos, stop)
            assert ours.num_tokens == len(ours.token_ids)
    [short] = generate(kind, params, PROMPTS[:1], budget=2)
    assert short.token_ids == free[0].token_ids[:2]


@EVERY_DECODER
def test_what_is_asked_wrongly_is_one_line(kind: str, params: dict[str, Any]) -> None:
    decoder, mute = (make_decoder(model, kind, **params) for model in (model_with_text("all kinds"), tiny_pair()))
    for width in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="max_batch_size must be a whole number of at least 1"):
            decoder.generate(PROMPTS, max_new_tokens=4, max_batch_size=width)  # type: ignore[arg-type]
    for budget in (0, 2.5):
        with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1"):
            decoder.generate(PROMPTS, max_new_tokens=budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        mute.generate(PROMPTS, max_new_tokens=4, stop=["\n"])
    with pytest.raises(ValueError, match="not one string"):
        decoder.generate(PROMPTS, max_new_tokens=4, stop="ab")
    assert decoder.generate([], max_new_tokens=4) == []


@EVERY_DECODER
@pytest.mark.parametrize(
    ("ids", "words"), [((), "is empty"), ((1, VOCAB), "outside the vocabulary"), ((-1,), "is below 0")]
)
def test_a_prompt_that_no_model_reads_is_one_line(
    kind: str, params: dict[str, Any], ids: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        generate(kind, params, [Prompt(id="bad", token_ids=ids)])


# --- sections ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [made.quality_run(root, num_docs=20), made.speed_run(root, num_rounds=3, num_calls=3)]


@pytest.mark.parametrize("name", [*report.SECTIONS, "lengths:render"])
def test_a_section_renders_of_any_runs_and_twice_the_same(runs: list[Path], tmp_path: Path, name: str) -> None:
    """Of a run, of a timing, and of both; what it links to is there."""
    sections = ["headline", name] if ":" in name else [name]
    found = []
    for number, paths in enumerate((runs, runs, runs[:1], runs[1:])):
        folder = report.write(paths, tmp_path / str(number), sections=sections)
        markdown = (folder / "report.md").read_text(encoding="utf-8")
        assert len(markdown.splitlines()) > 4
        found.append([markdown, *((folder / link).read_bytes() for link in re.findall(r"\]\(([\w.]+)\)", markdown))])
    assert found[0] == found[1]
