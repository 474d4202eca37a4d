"""The contract of each seam, over every shipped entry and the examples of docs/: what a family, a decoder and a section
have to do, whoever wrote them."""

import copy
import random
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
import torch
import transformers
from family_models import FAMILIES as MASKED
from family_models import family_model, write_family
from golden_files import SHIPPED
from hf_models import SMALL, save_tiny
from pages import write_files
from test_decoders import TOKENIZER, assert_same, cut_by_hand, model_with_text
from tiny_models import VOCAB
from tiny_pair import write_pair

from twotower_eval.analyse import report
from twotower_eval.engine.decoders import DECODERS, decoder_class, make_decoder
from twotower_eval.engine.decoders.reported import call_request, check_answers, check_forwards, finished
from twotower_eval.engine.models import FAMILIES, contract, family_of, load_model
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.errors import UserError
from twotower_eval.records import Generation, Prompt

# Decoder and its parameters on the tiny pair; the last two are those of docs/trust.md and docs/decoder.md.
ON_PAIR: list[tuple[str, dict[str, Any]]] = [
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
# And on a diffusion family; tests/test_family_rows.py has every family with every decoder that fits it.
ON_FAMILY: list[tuple[str, dict[str, Any], str]] = [
    ("low_confidence", {"block_length": 4, "threshold": 0.3}, "llada"),
    ("fast_dllm_v1", {"block_length": 4, "cache": "dual", "factor": 1.0}, "llada"),
    ("dream", {"alg": "topk_margin", "steps": 5, "temperature": 0.8}, "dream"),
    ("sdar", {"threshold": 0.3}, "sdar"),
    ("fast_dllm_v2", {"small_block_size": 4, "threshold": 0.3, "use_block_cache": True}, "fast_dllm_v2"),
    ("llada2", {"threshold": 0.3, "eos_early_stop": True}, "llada2_moe"),
    ("ancestral", {"steps": 6}, "mdlm"),
    ("bd3lm", {}, "bd3lm"),
    ("radd", {"top_p": 0.8}, "radd"),
    ("e2d2", {"threshold": 0.3}, "e2d2"),
]
OF_WHOLE_CANVASES = ("low_confidence", "fast_dllm_v1", "dream", "ancestral", "radd")  # every mask of it matters
ON_TRANSFORMERS: list[tuple[str, dict[str, Any], str]] = [
    ("static_cache", {}, "transformers"),
    ("static_cache", {"max_cache_len": 40, "temperature": 0.8}, "transformers"),
]
DECODER_ENTRIES = [*((kind, params, "") for kind, params in ON_PAIR), *ON_FAMILY, *ON_TRANSFORMERS]
EVERY_DECODER = pytest.mark.parametrize(
    ("kind", "params", "family"),
    DECODER_ENTRIES,
    ids=[f"{kind} {params} {family}".rstrip() for kind, params, family in DECODER_ENTRIES],
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
    """But for models behind a server, which compute nothing here (tests/test_endpoints.py), and for DiffusionGemma,
    whose canvases are no masks (tests/test_diffusion_gemma.py)."""
    assert set(DECODERS) <= {"endpoint", "entropy_bound", *(kind for kind, _, _ in DECODER_ENTRIES)}
    assert set(FAMILIES) <= {
        "openai",
        "diffusion_gemma",
        *MASKED,
        *(model.checkpoint.family for model in models.values()),
    }


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


@pytest.mark.parametrize("name", MASKED)
def test_a_diffusion_family_is_known_by_its_config_and_its_weights(name: str, tmp_path: Path) -> None:
    """Its layout is the published one, as written down in tests/family_models.py."""
    folder = write_family(name, tmp_path / name)
    model = load_model(folder, family=name)
    assert family_of(folder) == {"a2d_bd3lm": "a2d_mdlm"}.get(name, name)
    assert (model.checkpoint.family, model.vocab_size, model.mask_token_id) == (name, VOCAB, VOCAB - 1)
    assert re.fullmatch("[0-9a-f]{64}", model.checkpoint.digest)
    assert model.has_denoiser
    with pytest.raises(UserError, match="has no causal log-likelihoods"):
        model.context_logits(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("name", MASKED)
@torch.inference_mode()
def test_a_diffusion_family_reads_a_block_behind_any_context_alike(name: str) -> None:
    """However the context came about: read at once, extended by a block, chosen from, joined; and it is a value."""
    model = family_model(name)
    size = getattr(model, "block_size", 4)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 38, (length,), generator=draw) for length in (2 * size, size, 3 * size)]
    block_BK = torch.randint(5, 38, (3, size), generator=draw)
    block_BK[:, 1:] = model.mask_token_id

    def denoised(context: Any, order: Sequence[int]) -> Any:
        assert context.lengths == tuple(len(rows[row]) for row in order)
        return model.denoise(block_BK[list(order)], context, [0.5] * len(order))

    alone = [denoised(model.prefill(row[None]), [number])[0] for number, row in enumerate(rows)]
    assert all(logits_KV.shape == (size, VOCAB) and logits_KV.isfinite().all() for logits_KV in alone)

    def check(context: Any, order: Sequence[int]) -> None:
        for logits_KV, row in zip(denoised(context, order), order, strict=True):
            assert torch.allclose(logits_KV, alone[row], atol=1e-4)

    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    together = model.prefill(padded, [len(row) for row in rows])
    check(together, [0, 1, 2])
    check(together.select([2, 0]), [2, 0])
    check(together.select([1]).join(together.select([0])), [1, 0])
    shorter = model.prefill(padded[:, :size], [size] * 3)
    longer = model.extend(shorter.select([2, 0]), padded[[2, 0], size : 2 * size])
    if not MASKED[name].prompt_is_one:
        check(longer.select([1]), [0])
    check(shorter.select([1]), [1])


# --- decoders ------------------------------------------------------------------------------------------------------


@cache
def _llama() -> Any:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**SMALL, "vocab_size": VOCAB}))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        model: Any = load_model(folder)
    model.tokenizer = TOKENIZER
    return model


def model_of(family: str) -> Any:
    """The tiny pair, or a tiny model of a family; with a tokenizer."""
    if family == "transformers":
        return _llama()
    return family_model(family) if family else model_with_text("all kinds")


def generate(
    kind: str, params: dict[str, Any], family: str, prompts: Sequence[Prompt], budget: int = 9, **asked: Any
) -> Any:
    """Answers on a tiny model; they are held to all that the harness holds answers to."""
    model = WatchedModel(model_of(family))
    decoder = make_decoder(model, kind, **params)
    generations = decoder.generate(prompts, max_new_tokens=budget, **asked)
    assert type(generations) is list
    held = call_request(model, kind, budget, asked.get("eos_token_ids", ()), asked.get("stop", ()))
    check_answers([g for g in finished(generations, kind) if g.text is not None], prompts, held)
    if kind != "reference":  # which computes everything anew, and says what a decoder would have needed
        check_forwards(generations, model, kind)
    return generations


@EVERY_DECODER
def test_neither_neighbours_nor_width_nor_order_change_an_answer(
    kind: str, params: dict[str, Any], family: str
) -> None:
    alone = {prompt.id: generate(kind, params, family, [prompt])[0] for prompt in PROMPTS}
    for width, seed in ((None, 0), (2, 1), (1, 2)):
        mixed = random.Random(seed).sample(PROMPTS, len(PROMPTS))
        heard: list[Generation] = []
        together = generate(kind, params, family, mixed, max_batch_size=width, on_finish=heard.append)
        assert [g.prompt_id for g in together] == [prompt.id for prompt in mixed]
        assert sorted(map(id, heard)) == sorted(map(id, together)), "each is heard of once, as it finishes"
        for ours in together:
            assert_same(ours, alone[ours.prompt_id])


@EVERY_DECODER
def test_an_end_cuts_an_answer_and_changes_nothing_before_it(kind: str, params: dict[str, Any], family: str) -> None:
    """End tokens and stop strings, cut by hand from the whole; the budget holds."""
    free = generate(kind, params, family, PROMPTS)
    assert all(g.finish == "length" and g.num_tokens == 9 for g in free)
    for eos, stop in (((free[0].token_ids[3],), ()), ((), ("ab", "c")), ((free[1].token_ids[5], 7), ("b",))):
        ended = generate(kind, params, family, PROMPTS, eos_token_ids=eos, stop=stop)
        for whole, ours in zip(free, ended, strict=True):
            assert (list(ours.token_ids), ours.text, ours.finish) == cut_by_hand(whole.token_ids, eos, stop)
            assert ours.num_tokens == len(ours.token_ids)
    [short] = generate(kind, params, family, PROMPTS[:1], budget=2)
    assert short.num_tokens == 2
    assert short.token_ids == free[0].token_ids[:2] or kind in OF_WHOLE_CANVASES


@EVERY_DECODER
def test_what_is_asked_wrongly_is_one_line(kind: str, params: dict[str, Any], family: str) -> None:
    silent = copy.copy(model_of(family))
    silent.tokenizer = None
    decoder, mute = (make_decoder(model, kind, **params) for model in (model_of(family), silent))
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
    kind: str, params: dict[str, Any], family: str, ids: tuple[int, ...], words: str
) -> None:
    if not ids and not getattr(decoder_class(kind), "NEEDS_PROMPT", True):
        pytest.skip("it answers an empty prompt")
    with pytest.raises(ValueError, match=words):
        generate(kind, params, family, [Prompt(id="bad", token_ids=ids)])


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
