"""What text becomes, beside lm-eval's own hf model: tokens of prompts and documents, stops, and texts that vanish."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_oracle import continued, lm_evals_hf, our_lm, rolled, scored
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from own_tasks import task_yaml, use_tasks, write_tasks
from scripted_llama import beyond, byte_tokenizer, piece_tokenizer, save_random, save_saying, save_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from twotower_eval import store
from twotower_eval.engine.decoders.rows import cut, is_finished, make_rules
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.tokenizer import Tokenizer as OurTokenizer
from twotower_eval.engine.models.tokenizer import load_tokenizer, stops_of
from twotower_eval.measure import harness, speed
from twotower_eval.measure.suites import TimedPrompt
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import Likelihood, LikelihoodRow, to_json
from twotower_eval.strict import from_json

TEXTS = ["The quick brown fox", "a", " b ", "x" * 100]


def random_folder(tmp_path: Path, tokenizer: Tokenizer, *, rows: int | None = None, **settings: Any) -> Path:
    save_tokenizer(tokenizer, tmp_path, **settings)
    return save_random(tmp_path, rows or tokenizer.get_vocab_size())


# Tokens


def test_truncation_padding_and_dropout_from_training_are_off(tmp_path: Path) -> None:
    """A tokenizer.json of a training run cut texts to 8 tokens, silently; with dropout, their tokens were random."""
    tokenizer = byte_tokenizer(adds_bos=True)
    whole = [tokenizer.encode(text).ids for text in TEXTS]
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12, pad_token="<s>", pad_id=0)
    save_tokenizer(tokenizer, tmp_path)
    ours = load_tokenizer(tmp_path, vocab_size=400)
    assert ours is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(TEXTS, whole, strict=True):
        assert ours.encode(text, add_special_tokens=True) == ids == theirs.encode(text)
    merged = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")], dropout=0.9))
    save_tokenizer(merged, tmp_path, bos_token=None, eos_token=None, pad_token=None)
    always = load_tokenizer(tmp_path, vocab_size=2)
    assert always is not None
    assert {tuple(always.encode("a" * 12)) for _ in range(20)} == {(1,) * 6}


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("make", [byte_tokenizer, lambda **more: piece_tokenizer(["▁The", "▁quick"], **more)])
def test_a_text_that_begins_with_bos_gets_no_second(make: Any, adds_bos: bool, tmp_path: Path) -> None:
    """Prompts from chat templates begin with BOS already: it was added once more, and every log-likelihood moved."""
    folder = random_folder(tmp_path, make(adds_bos=adds_bos))
    theirs, ours = lm_evals_hf(folder), our_lm(folder)
    texts = ["<s>The quick", "The quick", "<s>", " <s>The", "<s><s>The"]
    for text in texts:
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        [prompt] = theirs.tok_batch_encode([text])[0].tolist()
        assert ours._prompt_ids(text, 4) == (prompt, False)
    pairs = [(text, " quick") for text in texts] + [("", "The quick"), ("", "<s>The")]
    for mine, wanted in zip(ours.loglikelihood(scored(pairs)), theirs.loglikelihood(scored(pairs)), strict=True):
        assert mine[0] == pytest.approx(wanted[0], abs=1e-4)
    assert ours.loglikelihood_rolling(rolled(texts)) == pytest.approx(
        theirs.loglikelihood_rolling(rolled(texts)), abs=1e-4
    )


@pytest.mark.parametrize(
    ("bos", "eos", "prefix"), [("<|x|>", "</s>", 3), (None, "</s>", 1), (None, None, 2), (None, {"content": "<s>"}, 0)]
)
def test_the_prefix_token_is_the_tokenizers(bos: Any, eos: Any, prefix: int, tmp_path: Path) -> None:
    """Without BOS it is the tokenizer's EOS, not the first of the model's; the model's only where there is no other."""
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path, bos_token=bos, eos_token=eos)
    save_random(tmp_path, tokenizer.get_vocab_size(), generation={"eos_token_id": [2, 1]})
    ours = our_lm(tmp_path)
    assert ours.prefix_token_id == prefix
    if isinstance(eos, str):
        theirs = lm_evals_hf(tmp_path)
        assert theirs.prefix_token_id == prefix
        pairs = [("", "The quick"), ("The", " quick")]
        for mine, wanted in zip(ours.loglikelihood(scored(pairs)), theirs.loglikelihood(scored(pairs)), strict=True):
            assert mine[0] == pytest.approx(wanted[0], abs=1e-4)
        wanted_nats = theirs.loglikelihood_rolling(rolled(TEXTS[:2]))
        assert ours.loglikelihood_rolling(rolled(TEXTS[:2])) == pytest.approx(wanted_nats, abs=1e-4)


def test_a_model_without_any_prefix_reads_what_has_a_context(tmp_path: Path) -> None:
    """A tokenizer without BOS, in a model without EOS, was refused for every text, for want of what none needed."""
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path, bos_token=None, eos_token=None, pad_token="<s>")
    save_random(tmp_path, tokenizer.get_vocab_size(), bos_token_id=None, eos_token_id=None)
    ours = our_lm(tmp_path)
    assert ours.tok_encode("The quick") == tokenizer.encode("The quick").ids
    pairs = [("The", " quick"), ("a b", " c")]
    for mine, wanted in zip(ours.loglikelihood(scored(pairs)), plain_nats(tmp_path, ours, pairs), strict=True):
        assert mine[0] == pytest.approx(wanted, abs=1e-4)
    needy = "names no EOS token, which empty contexts need"
    with pytest.raises(ValueError, match=needy):
        our_lm(tmp_path).loglikelihood(scored([("", "The")]))
    with pytest.raises(ValueError, match=needy):
        our_lm(tmp_path).loglikelihood_rolling(rolled(["The"]))


def plain_nats(folder: Path, lm: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """What transformers' own pass gives each continuation."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder), []
    for context, continuation in pairs:
        ids = lm.tok_encode(context + continuation)
        start = len(lm.tok_encode(context))
        logprobs_LV = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        found.append(sum(float(logprobs_LV[at - 1, ids[at]]) for at in range(start, len(ids))))
    return found


@pytest.mark.parametrize("place", ["tokenizer_config", "special_tokens_map", "declared"])
def test_tokens_that_the_settings_call_special_are_special(place: str, tmp_path: Path) -> None:
    """tokenizer.json may know them as plain text, or not at all; AutoTokenizer reads three places, and so do we."""
    tokenizer = byte_tokenizer(special=())
    save_tokenizer(tokenizer, tmp_path, bos_token=None, eos_token=None, pad_token=None)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    declared = {"300": {"content": "</s>", "special": True}, "299": {"content": "<a>", "special": False}}
    file, content = {
        "tokenizer_config": ("tokenizer_config.json", {**named, "additional_special_tokens": ["<a>"]}),
        "special_tokens_map": ("special_tokens_map.json", named),
        "declared": ("tokenizer_config.json", {**named, "added_tokens_decoder": declared}),
    }[place]
    old = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps({**old, **content}))
    ours, theirs = load_tokenizer(tmp_path, vocab_size=400), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in ("<s>ab</s>c", "<a>d", "a < s > b"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode_with_special(ids) == theirs.decode(ids) == text


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_tokens_that_a_class_has_without_being_told_are_had(named: str, tmp_path: Path) -> None:
    """The folder of GPT-2 itself names neither BOS nor EOS."""
    tokenizer = byte_tokenizer(special=("<s>", "</s>", "<|endoftext|>"))
    save_random(tmp_path, tokenizer.get_vocab_size())
    save_tokenizer(tokenizer, tmp_path, bos_token=None, eos_token=None, pad_token=None, tokenizer_class=named)
    ours, theirs = load_model(tmp_path).tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.eos_token_id == 2) is (named != "PreTrainedTokenizerFast")


@pytest.mark.parametrize("asked", [True, False])
def test_blanks_before_marks_are_cleaned_up_where_transformers_does(asked: bool, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "do": 1, "n't": 2, ".": 3, "?": 4}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for tokenizer in (words, byte_tokenizer()):
        save_tokenizer(tokenizer, tmp_path, clean_up_tokenization_spaces=asked)
        ours, theirs = load_tokenizer(tmp_path, vocab_size=400), transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours is not None
        ids = ours.encode("do n't . ?")
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert (ours.decode(ids) == "don't.?") is (asked and tokenizer is words)


def test_generation_settings_that_transformers_passes_over_are_read(tmp_path: Path) -> None:
    """It loads without a file that begins with a BOM or is torn: its EOS were lost, or a traceback came later."""
    folder = random_folder(tmp_path, byte_tokenizer())
    (folder / "generation_config.json").write_text('\ufeff{"eos_token_id": [9, 5]}', encoding="utf-8")
    assert load_model(folder).eos_token_ids == (9, 5, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ValueError, match=r"generation_config\.json: not valid JSON"):
        load_model(folder)


def test_an_added_token_beyond_the_embedding_is_refused_where_a_text_holds_it(tmp_path: Path) -> None:
    """A public model of 2025 has one token more than rows: it was refused whole."""
    tokenizer = beyond(byte_tokenizer(), "<image>")
    rows = tokenizer.get_vocab_size() - 1
    folder = random_folder(tmp_path, tokenizer, rows=rows)
    ours, theirs = our_lm(folder), lm_evals_hf(folder)
    pairs = [("The quick", " brown")]
    assert ours.loglikelihood(scored(pairs))[0][0] == pytest.approx(theirs.loglikelihood(scored(pairs))[0][0], abs=1e-4)
    prompts, until = ["The quick"], ["<image>", "\n\n"]
    assert ours.generate_until(continued(prompts, until)) == theirs.generate_until(continued(prompts, until))
    message = rf"task '\w+', document 0.*the token '<image>' with id {rows}, and the model knows {rows} tokens only"
    for ask in (
        lambda lm: lm.generate_until(continued(["see <image>"], ["\n"])),
        lambda lm: lm.loglikelihood(scored([("see", " <image>")])),
        lambda lm: lm.loglikelihood_rolling(rolled(["see <image>"])),
    ):
        with pytest.raises(ValueError, match=message):
            ask(our_lm(folder))


# Stops

LONG = "Q and a long answer"
STOPS: list[tuple[Sequence[str], Sequence[str], str]] = [
    # until, what the model says, the text that lm-eval sees
    (["<|im_end|>"], ["a", "b", "<|im_end|>", "c", "\n"], "ab"),
    (["<|im_end|>", "\n"], ["a", "\n", "<|im_end|>", "c"], "a"),
    (["\n<|im_end|>"], ["a", "\n", "b", "\n", "<|im_end|>", "c"], "a\nb\n"),
    (["<|im_end|>\nQ:"], ["a", "<|im_end|>", "\n", "Q", ":", "c"], "a\nQ:"),
    (["<|im_end|>"], ["<|im_end|>", "c"], ""),
    (["bc"], ["a", "b", "<|x|>", "c", "d"], "a"),
    (["</s>"], ["a", "</s>", "c"], "a"),
    (["</s>\nQ:"], ["a", "</s>", "\n", "Q", ":"], "a"),
    (["\n\n"], ["a", "<", "/", "s", ">", "c"], "a"),
    ([], ["a", "<", "/", "s", ">", "c"], "a"),
    (["b", "ab"], ["x", "a", "b", "c"], "xa"),
    (["ab", "b"], ["x", "a", "b", "c"], "x"),
    (["abcd", "b"], ["a", "b", "c", "d"], "a"),
    (["<|x|>", "<|im_end|>"], ["a", "<|x|>", "<|im_end|>"], "a"),
    (["zz"], ["a", "<|x|>", "b", "<|im_end|>", "c"], "ab" + "c" * 20),
]


@pytest.mark.parametrize(("until", "said", "wanted"), STOPS)
def test_answers_are_cut_where_lm_eval_cuts_them(
    until: Sequence[str], said: Sequence[str], wanted: str, tmp_path: Path
) -> None:
    """A stop that is a special token never stopped, for it is no part of the text; the tokenizer's EOS, spelled out,
    did not either; and of stops that overlap, a block decoder found another than a decoder of single tokens."""
    tokenizer = byte_tokenizer()
    ids = [i for token in said for i in tokenizer.encode(token).ids]
    save_tokenizer(tokenizer, tmp_path)
    save_saying(tmp_path, tokenizer.get_vocab_size(), ids)
    ours, theirs = our_lm(tmp_path), lm_evals_hf(tmp_path)
    [text] = ours.generate_until(continued(["a"], until))
    assert [text] == theirs.generate_until(continued(["a"], until))
    assert text == wanted


@pytest.mark.parametrize("until", [["<|im_end|>"], ["▁quick"], [" quick"], ["ick"], ["brown<|im_end|>"], ["The"]])
def test_stops_with_a_metaspace_tokenizer(until: Sequence[str], tmp_path: Path) -> None:
    tokenizer = piece_tokenizer(["▁The", "▁quick", "▁brown", "ick"])
    said = [tokenizer.token_to_id(token) for token in ("▁The", "▁quick", "▁brown", "<|im_end|>", "ick")]
    save_tokenizer(tokenizer, tmp_path)
    save_saying(tmp_path, tokenizer.get_vocab_size(), said)
    asked = continued(["T"], until, budget=8)
    assert our_lm(tmp_path).generate_until(asked) == lm_evals_hf(tmp_path).generate_until(continued(["T"], until, 8))


class Model:
    """A tokenizer is all that stop rules ask of a model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


@pytest.mark.parametrize(
    ("until", "said", "num_useful", "finish"),
    [
        (["<|im_end|>"], ["a", "b", "<|im_end|>", "c"], 2, "stop"),
        (["b\n<|im_end|>"], ["a", "b", "\n", "<|im_end|>", "c"], 1, "stop"),
        (["bc"], ["a", "<|x|>", "b", "<|x|>", "c"], 2, "stop"),
        (["c"], ["a", "<|x|>", "c"], 2, "stop"),
        (["c"], ["a", "<|x|>", "</s>", "c"], 2, "eos"),
        (["abcd", "b"], ["a", "b", "c", "d"], 1, "stop"),
        (["é"], ["a", "é", "b"], 1, "stop"),
        (["q"], ["a", "b"], 2, "length"),
    ],
)
def test_useful_tokens_end_before_a_stop_with_special_tokens(
    until: Sequence[str], said: Sequence[str], num_useful: int, finish: str, tmp_path: Path
) -> None:
    """However many tokens come at a time: the cut is that of the fewest that hold a stop."""
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    ids = [i for token in said for i in tokenizer.encode(token).ids]
    rules = make_rules(
        Model(load_tokenizer(tmp_path, vocab_size=400)), max_new_tokens=len(ids), eos_token_ids=(1,), stop=until
    )
    made = next(n for n in range(1, len(ids) + 1) if is_finished(ids[:n], 1, rules))
    found = cut(ids, rules)
    assert found == cut(ids[:made], rules)
    assert (len(found[0]), found[2]) == (num_useful, finish)


PARTS = ["a", "b", "<", "/", "s", ">", "|", "x", "\n", " ", "<|x|>", "<|im_end|>", "</s>", "<s>", "ab", "☃"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[OurTokenizer, Any]]:
    """Ours and transformers' of one folder each."""
    found = []
    for tokenizer in (byte_tokenizer(), piece_tokenizer(["▁a", "▁", "ab", "b▁a", "<", "/", "s", ">", "|", "x", "\n"])):
        folder = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(tokenizer, folder)
        ours = load_tokenizer(folder, vocab_size=400)
        assert ours is not None
        found.append((ours, transformers.AutoTokenizer.from_pretrained(folder)))
    return found


def cut_by_lm_eval(tokenizer: Any, ids: Sequence[int], until: Sequence[str]) -> str:
    """The text that lm-eval's hf gives where a model says ``ids`` in turn."""
    stops = handle_stop_sequences(list(until), tokenizer.eos_token)
    criteria = stop_sequences_criteria(tokenizer, stops, 0, 1)
    lengths = range(1, len(ids) + 1)
    ends = [n for n in lengths if any(done(torch.tensor([ids[:n]]), None) for done in criteria)]
    said = tokenizer.decode(ids[: min(ends, default=len(ids))], skip_special_tokens=True)
    text: str = postprocess_generated_text(said, stops, None)
    return text


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_answer_is_cut_as_by_lm_eval(tokenizers: list[tuple[OurTokenizer, Any]], data: st.DataObject) -> None:
    """Stops of any kind, a few of them within the text; token by token or all at once."""
    ours, theirs = data.draw(st.sampled_from(tokenizers))
    said = "".join(data.draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=14)))
    ids = ours.encode(said)
    whole = ours.decode_with_special(ids)
    starts = st.lists(st.tuples(st.integers(0, len(whole)), st.integers(1, 6)), max_size=2)
    until = [stop for start, length in data.draw(starts) if (stop := whole[start : start + length])]
    until += data.draw(st.lists(st.sampled_from(["\n", "<|im_end|>", "b<|x|>", "</s>a", "ab"]), max_size=2))
    model = Model(ours)
    rules = make_rules(model, max_new_tokens=len(ids), eos_token_ids=(1,), stop=stops_of(model, until))
    made = next(n for n in range(1, len(ids) + 1) if is_finished(ids[:n], 1, rules))
    assert cut(ids, rules) == cut(ids[:made], rules)
    assert cut(ids, rules)[1] == cut_by_lm_eval(theirs, ids, until)


def test_every_eos_stops(tmp_path: Path) -> None:
    """The generation settings named one, the config another, the tokenizer a third: the last two did not stop."""
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path, eos_token={"content": "<|x|>"})
    save_random(tmp_path, tokenizer.get_vocab_size(), generation={"eos_token_id": [2]})
    assert load_model(tmp_path).eos_token_ids == (2, 1, 3)
    (tmp_path / "generation_config.json").unlink()
    assert load_model(tmp_path).eos_token_ids == (1, 3)


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>", "<|x|>"])
def test_the_tokenizers_eos_stops_as_in_lm_eval(eos: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    said = [tokenizer.token_to_id(token) for token in ("a", "b", "<|x|>", "c", "<|im_end|>", "d", "</s>")]
    save_tokenizer(tokenizer, tmp_path, eos_token=eos)
    save_saying(tmp_path, tokenizer.get_vocab_size(), said)
    asked = continued(["a"], ["\n\n"])
    assert our_lm(tmp_path).generate_until(asked) == lm_evals_hf(tmp_path).generate_until(continued(["a"], ["\n\n"]))


@pytest.mark.parametrize(
    ("stop", "said", "wanted"),
    [
        (("<|im_end|>",), ["a", "b", "<|im_end|>", "c"], "ab"),
        (("\n",), ["a", "<|x|>", "c"], "a"),
        (("\n",), ["a", "<", "|", "x", "|", ">"], "a"),
    ],
)
def test_timed_prompts_and_answers_are_those_of_an_evaluation(
    stop: tuple[str, ...], said: Sequence[str], wanted: str, tmp_path: Path
) -> None:
    """One rule for both verbs: no second BOS, every EOS, stops with special tokens or spelled out."""
    tokenizer = byte_tokenizer(adds_bos=True)
    save_tokenizer(tokenizer, tmp_path, eos_token="<|x|>")
    ids = [tokenizer.token_to_id(token) for token in [*said, "c", "Ċ"]]
    save_saying(tmp_path, tokenizer.get_vocab_size(), ids)
    lm = our_lm(tmp_path)
    assert lm.generate_until(continued(["<s>"], stop)) == [wanted]
    [row] = lm.journal.generations.values()
    request = TimedPrompt(task="t", doc_id=0, text="<s>", stop=stop, max_new_tokens=24, prompt_sha256="")
    plan = SpeedPlan(
        model=str(tmp_path), baseline=str(tmp_path), decoder="autoregressive", num_prompts=1, min_rounds=1, costs=False
    )
    timed = store.load(speed.run(plan, [request], root=tmp_path / "results"))
    for answer in timed.generations:
        for name in ("token_ids", "text", "finish", "num_prompt_tokens", "num_discarded_tokens"):
            assert getattr(answer.generation, name) == getattr(row.generation, name)
    assert len(timed.generations) == 1


def test_a_timed_prompt_that_no_model_reads_names_its_document(tmp_path: Path) -> None:
    folder = random_folder(tmp_path, stripping(adds_bos=True))
    requests = [TimedPrompt(task="t", doc_id=3, text="☃", stop=(), max_new_tokens=4, prompt_sha256="")]
    plan = SpeedPlan(model=str(folder), baseline=str(folder), decoder="autoregressive", num_prompts=1)
    with pytest.raises(ValueError, match="task 't', document 3: the tokenizer makes no token of the text '☃'"):
        speed.run(plan, requests, root=tmp_path / "results")


# Texts of which nothing is left


def stripping(*, adds_bos: bool) -> Tokenizer:
    """Blanks around a text vanish, and so does what the vocabulary does not know."""
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("☃", ""), normalizers.Strip()])
    return tokenizer


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_that_vanishes_names_its_document(adds_bos: bool, tmp_path: Path) -> None:
    """It was scored 0.0, the best that there is, or answered as if nothing had been asked."""
    folder = random_folder(tmp_path, stripping(adds_bos=adds_bos))
    for ask in (
        lambda lm: lm.generate_until(continued(["a", "☃"], ["\n"])),
        lambda lm: lm.loglikelihood_rolling(rolled(["a", " ☃"])),
        lambda lm: lm.loglikelihood(scored([("a", " b"), ("☃", "b")])),
        lambda lm: lm.loglikelihood(scored([("a", " b"), ("", "☃")])),
    ):
        with pytest.raises(ValueError, match=r"^task '\w+', document 1.*the tokenizer makes no token of the text"):
            ask(our_lm(folder))
    for pair in (("a", "☃"), ("a ", ""), ("a", " "), ("", "<s>")):
        with pytest.raises(ValueError, match=r"^task '\w+', document 1, option 1: .* adds no token to its context"):
            our_lm(folder).loglikelihood(scored([("a", "b"), pair]))


def test_a_joint_shorter_than_its_context_is_no_log_likelihood_of_nothing(tmp_path: Path) -> None:
    merged = Tokenizer(
        models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, "ab": 3, "aab": 4}, merges=[("a", "b"), ("a", "ab")])
    )
    folder = random_folder(tmp_path, merged, eos_token=None)
    lm = our_lm(folder)
    assert len(lm.tok_encode("aab")) < len(lm.tok_encode("aa"))
    with pytest.raises(ValueError, match="document 0, option 1: 'b' adds no token to its context"):
        lm.loglikelihood(scored([("aa", "b")]))


def test_an_empty_document_has_no_likelihood_unless_bos_is_scored(tmp_path: Path) -> None:
    folder = random_folder(tmp_path, byte_tokenizer(adds_bos=True))
    ours, theirs = our_lm(folder), lm_evals_hf(folder)
    assert ours.loglikelihood_rolling(rolled([""])) == pytest.approx(theirs.loglikelihood_rolling(rolled([""])))
    save_tokenizer(byte_tokenizer(), folder)
    with pytest.raises(ValueError, match=r"task '\w+', document 1: the text is empty"):
        our_lm(folder).loglikelihood_rolling(rolled(["a", ""]))


def test_half_a_surrogate_pair_names_its_document(tmp_path: Path) -> None:
    folder = random_folder(tmp_path, byte_tokenizer())
    with pytest.raises(ValueError, match=r"^task '\w+', document 0: 'a\\ud83d' holds half of a surrogate pair"):
        our_lm(folder).generate_until(continued(["a\ud83d"], ["\n"]))


def test_errors_show_the_beginning_of_long_texts_only(tmp_path: Path) -> None:
    save_tokenizer(stripping(adds_bos=False), tmp_path)
    ours = load_tokenizer(tmp_path, vocab_size=400)
    assert isinstance(ours, OurTokenizer)
    with pytest.raises(ValueError, match="makes no token") as caught:
        ours.encode("☃" * 1000)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until", "loglikelihood_rolling"])
def test_a_run_refuses_such_a_text_before_anything_is_computed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task is the second of two, and the document its last."""
    folder = random_folder(tmp_path, stripping(adds_bos=True))
    fine = {"prompt": "Q:", "answer": "a", "text": "a", "choices": ["a", "b"], "gold": 0}
    vanishing = {**fine, "prompt": "☃", "text": "☃"} if kind != "multiple_choice" else {**fine, "choices": ["a", "☃"]}
    metric = {"metric": {"multiple_choice": "acc", "generate_until": "exact_match"}.get(kind, "bits_per_byte")}
    good, bad = (task_yaml(name, name, kind, [metric]) for name in ("good", "bad"))
    write_tasks(tmp_path, [good, bad], {"good": [fine], "bad": [fine, vanishing]})
    use_tasks(monkeypatch, tmp_path)
    plan = RunPlan(model=str(folder), baseline=str(folder), decoder="autoregressive", tasks=("good", "bad"))
    with pytest.raises(ValueError, match=r"task 'bad', document 1(, option 2)?: .*( no token of the text '☃'|adds no)"):
        harness.run(plan, root=tmp_path / "results")
    assert not (tmp_path / "results").exists()
    found = harness.run(dataclasses.replace(plan, tasks=("good",)), root=tmp_path / "results")
    assert all(row.num_tokens for row in store.load(found).likelihoods)


def test_a_journalled_likelihood_of_no_token_is_refused() -> None:
    likelihood = Likelihood(logprob_nats=0.0, is_greedy=True, kind="exact")
    where: dict[str, Any] = {"cell": "c", "task": "t", "doc_id": 0, "request_index": 0, "repeat": 0}
    row = LikelihoodRow(**where, request="loglikelihood", prompt_sha256="a", num_tokens=0, likelihood=likelihood)
    with pytest.raises(ValueError, match="num_tokens"):
        from_json(LikelihoodRow, to_json(row))
