"""Loading: right checkpoints in every form, and one clear line for each thing that can be wrong with one."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from checkpoint_files import base_names, tensors_of, write_checkpoint, write_config, write_shards
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, SIZES, VOCAB, tiny_config, tiny_pair

from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.engine.models.checkpoint import INDEX_FILE, SINGLE_FILE, build, pair_slots
from twotower_eval.engine.models.config import parse_config
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.errors import FileError

IDS = torch.tensor([[5, 6, 7, 8]])
BLOCK = torch.tensor([[3, 9, 3, 3]])
ANY_LAYER = "context_tower.layers.0.norm.weight"


def answers(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        context = model.prefill(IDS)
        return [model.context_logits(IDS), model.denoise(BLOCK, context, 0.5)]


# --- what is right


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_file_and_shards_load_alike(name: str, tmp_path: Path) -> None:
    """Same outputs as the model they were written from, same digests."""
    whole = load_model(write_checkpoint(tmp_path / "whole", name))
    write_config(tmp_path / "shards", name)
    shards = load_model(write_shards(tmp_path / "shards", tensors_of(name)))
    for model in (whole, shards):
        for ours, wanted in zip(answers(model), answers(tiny_pair(name)), strict=True):
            assert torch.equal(ours, wanted)
    assert whole.checkpoint.digest == shards.checkpoint.digest
    assert whole.context_digest == shards.context_digest
    assert (whole.vocab_size, whole.has_denoiser) == (VOCAB, True)
    assert whole.mask_token_id == {**SIZES, **ARCHITECTURES[name]}["mask_token_id"]


def test_identity(tmp_path: Path) -> None:
    """Stated, not inferred: one changed weight is another digest, another folder is not."""
    first = load_model(write_checkpoint(tmp_path / "a"))
    assert (first.checkpoint.name, first.checkpoint.family, first.checkpoint.dtype) == ("a", "nemotron_h", "float32")
    assert (first.checkpoint.devices, first.checkpoint.tower, first.tokenizer) == (("cpu",), None, None)
    assert load_model(write_checkpoint(tmp_path / "b")).checkpoint.digest == first.checkpoint.digest
    tensors = tensors_of()
    tensors["lm_head.weight"][0, 0] += 1e-3
    other = load_model(write_checkpoint(tmp_path / "c", tensors=tensors))
    assert other.checkpoint.digest != first.checkpoint.digest
    assert other.context_digest == first.context_digest


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_base_checkpoint_is_the_pairs_context_tower(name: str, tmp_path: Path) -> None:
    """``backbone.*`` names, the tower taken out of the pair, and the pair: same logits, same context digest."""
    write_checkpoint(tmp_path / "pair", name)
    write_checkpoint(tmp_path / "base", name, base_names(tensors_of(name)))
    pair, base = load_model(tmp_path / "pair"), load_model(tmp_path / "base")
    tower = load_model(tmp_path / "pair", tower="context")
    for model in (base, tower):
        assert isinstance(model, ContextTower)
        assert not model.has_denoiser
        assert model.mask_token_id is None
        assert torch.equal(model.context_logits(IDS), pair.context_logits(IDS))
        assert model.context_digest == pair.context_digest
    assert base.checkpoint.digest == tower.checkpoint.digest != pair.checkpoint.digest
    assert (base.checkpoint.tower, tower.checkpoint.tower) == (None, "context")


def test_other_dtypes(tmp_path: Path) -> None:
    """A bfloat16 checkpoint as float32 gives the stored values; in its own dtype the router still is float32."""
    write_checkpoint(tmp_path, tensors=tensors_of(dtype=torch.bfloat16))
    stored = load_file(tmp_path / SINGLE_FILE)
    wide, narrow = load_model(tmp_path, dtype="float32"), load_model(tmp_path, dtype="bfloat16")
    assert (wide.checkpoint.dtype, narrow.checkpoint.dtype) == ("float32", "bfloat16")
    assert wide.checkpoint.digest == narrow.checkpoint.digest
    for name, slot in pair_slots(wide).items():
        assert slot.target.dtype == torch.float32
        assert torch.equal(slot.target, stored[name].float())
    for name, slot in pair_slots(narrow).items():
        assert slot.target.dtype == (torch.float32 if "mixer.gate." in name else torch.bfloat16), name
        assert torch.equal(slot.target, stored[name].to(slot.target.dtype))


def test_weights_cannot_be_trained_by_accident(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_each_tower_on_its_own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Context first. The denoiser reads the context's states wherever they are, here on the device of no memory."""
    monkeypatch.setattr("twotower_eval.engine.models.check_device_name", lambda name: None)  # refuses it to users
    model = load_model(write_checkpoint(tmp_path), devices=("cpu", "meta"))
    assert {p.device.type for p in model.context_tower.parameters()} == {"cpu"}
    assert {p.device.type for p in model.denoiser.parameters()} == {"meta"}
    assert model.checkpoint.devices == ("cpu", "meta")
    context = model.prefill(IDS)
    assert torch.equal(model.next_logits(context), tiny_pair().next_logits(tiny_pair().prefill(IDS)))
    logits = model.denoise(BLOCK, context, 0.5)
    assert (logits.device.type, logits.shape) == ("meta", (1, 4, VOCAB))
    extended = model.extend(context, BLOCK)
    assert extended.last_hidden_BH.device.type == "cpu"


def test_time_step_limit_of_newer_configs() -> None:
    for limit in ([0.0, {"__float__": "Infinity"}], [0.0, float("inf")], ["0.0", "inf"], [0, "Infinity"]):
        assert tiny_config(time_step_limit=limit).time_step_limit == (0.0, float("inf"))
    assert tiny_config(time_step_limit=[0, 1]).time_step_limit == (0.0, 1.0)
    assert tiny_config().time_step_limit is None


def test_mask_token_is_3_where_the_config_names_none() -> None:
    config = {key: value for key, value in {**SIZES, **ARCHITECTURES["mamba only"]}.items() if key != "mask_token_id"}
    assert parse_config(config).mask_token_id == 3


def tokenizer_json(vocabulary: dict[str, int]) -> str:
    text: str = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")).to_str()
    return text


def test_tokenizer_is_attached(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json({"<unk>": 0, "</s>": 2, "last": VOCAB - 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None}))
    model = load_model(tmp_path)
    assert model.tokenizer.encode("last") == [VOCAB - 1]
    assert (model.tokenizer.eos_token_id, model.tokenizer.bos_token_id) == (2, None)
    assert model.eos_token_ids == (2,)
    write_config(tmp_path, eos_token_id=[7, 8])
    assert load_model(tmp_path).eos_token_ids == (7, 8, 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert load_model(tmp_path).eos_token_ids == (9, 2, 7, 8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be a token id or a list of them"):
        load_model(tmp_path)


# --- what is wrong: each case spoils a folder, and has a pattern that the one line must match


def changed(tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Spoil the tensors of the single file."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / SINGLE_FILE)
        tensors(held)
        save_file(held, str(folder / SINGLE_FILE))

    return spoil


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, **changes)


def text(file: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def truncate(folder: Path) -> None:
    whole = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(whole[: len(whole) // 2])


def only_a_pickle(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def shards(index: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    """Replace the single file by shards, and spoil their index or files."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_FILE)
        (folder / SINGLE_FILE).unlink()
        write_shards(folder, tensors)
        data = json.loads((folder / INDEX_FILE).read_text())
        index(data, folder)
        (folder / INDEX_FILE).write_text(json.dumps(data))

    return spoil


def with_value(value: float) -> Callable[[Path], None]:
    return changed(lambda t: t[ANY_LAYER].__setitem__(3, value))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing weight": (changed(lambda t: t.pop(ANY_LAYER)), f"lacks tensor {ANY_LAYER}; it does not fit"),
    "missing time weights": (
        changed(lambda t: [t.pop(n) for n in list(t) if n.startswith("t_embedder")]),
        "lacks tensor t_embedder.mlp.0.bias and 3 more",
    ),
    "missing tables": (changed(lambda t: t.pop("scale_shift_tables.2")), "lacks tensor scale_shift_tables.2"),
    "missing expert": (
        changed(lambda t: t.pop("denoiser_tower.layers.1.mixer.experts.7.up_proj.weight")),
        r"lacks tensor denoiser_tower.layers.1.mixer.experts.7.up_proj.weight",
    ),
    "unexpected weight": (changed(lambda t: t.update(extra=torch.ones(2))), "has unexpected tensor extra"),
    "wrong shape": (
        changed(lambda t: t.update({ANY_LAYER: torch.ones(31)})),
        r"norm.weight has shape \(31,\), the config asks for \(32,\)",
    ),
    "another config": (configured(hidden_size=64), "has shape .* the config asks for"),
    "huge config": (configured(vocab_size=10**12), "has shape .* the config asks for"),
    "one layer less": (configured(hybrid_override_pattern="ME*-"), "has unexpected tensor"),
    "one layer more": (configured(hybrid_override_pattern="ME*-MM"), "lacks tensor"),
    "NaN": (with_value(float("nan")), f"{ANY_LAYER} holds NaN or infinite values"),
    "infinity": (with_value(float("-inf")), f"{ANY_LAYER} holds NaN or infinite values"),
    "whole numbers": (changed(lambda t: t.update({ANY_LAYER: torch.ones(32, dtype=torch.int8)})), "is stored as I8"),
    "truncated file": (truncate, "not a whole safetensors file"),
    "empty file": (text(SINGLE_FILE, b""), "not a whole safetensors file"),
    "not safetensors": (text(SINGLE_FILE, b"hello " * 100), "not a whole safetensors file"),
    "only a pickle": (only_a_pickle, r"only pickled weights \(pytorch_model.bin\); convert them"),
    "no weights": (lambda folder: (folder / SINGLE_FILE).unlink(), "neither model.safetensors nor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is no checkpoint folder: it has no config.json"),
    "malformed config": (text("config.json", "{'a': 1}"), "config.json: not valid JSON"),
    "config is no object": (text("config.json", "[1]"), "config.json: expected a JSON object"),
    "config is no text": (text("config.json", b'{"a": "\xff"}'), r"config.json, line 1: not UTF-8 \(byte 0xff\)"),
    "config in UTF-16": (text("config.json", "{}".encode("utf-16")), "config.json: it is UTF-16"),
    "a key twice": (text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), "key 'vocab_size' is defined twice"),
    "beyond a double": (text("config.json", '{"a": 1e999}'), "config.json: the number 1e999 is beyond"),
    "too deep": (text("config.json", '{"a": ' + "[" * 9000), "config.json: nested too deeply"),
    "too many digits": (text("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "more digits than Python reads"),
    "half a pair": (
        text("config.json", '{"_name_or_path": "\\ud800"}'),
        "'_name_or_path': half a surrogate pair",
    ),
    "missing shard": (
        shards(lambda _, folder: (folder / "model-00002-of-00003.safetensors").unlink()),
        "names a shard that is not there: model-00002-of-00003.safetensors",
    ),
    "index names too much": (
        shards(lambda data, _: data["weight_map"].update(extra="model-00001-of-00003.safetensors")),
        "model-00001-of-00003.safetensors does not hold extra",
    ),
    "index names too little": (
        shards(lambda data, _: data["weight_map"].pop(ANY_LAYER)),
        f"does not name {ANY_LAYER} of model-0000",
    ),
    "index without map": (shards(lambda data, _: data.pop("weight_map")), "has no weight_map"),
    "truncated shard": (
        shards(lambda _, folder: (folder / "model-00003-of-00003.safetensors").write_bytes(b"12345678")),
        "model-00003-of-00003.safetensors: not a whole safetensors file",
    ),
    "unknown layer letter": (configured(hybrid_override_pattern="MEX-M"), "unknown layer letter 'X' .* known are M"),
    "unknown layer type": (
        configured(hybrid_override_pattern=None, layers_block_type=["mamba", "rnn"]),
        "unknown layers_block_type 'rnn'; known are linear_attention, mamba",
    ),
    "layer count": (configured(num_hidden_layers=7), "num_hidden_layers is 7, but the pattern has 5"),
    "mask outside": (configured(mask_token_id=VOCAB), "mask_token_id 40 is outside vocab_size 40"),
    "negative mask": (configured(mask_token_id=-1), "mask_token_id -1 is outside"),
    "biases": (configured(attention_bias=True), "attention_bias = True is not part of the released model"),
    "sliding window": (configured(sliding_window=512), "sliding_window = 512 is not part of the released model"),
    "tokenizer of another model": (
        text("tokenizer.json", tokenizer_json({"<unk>": 0, "beyond": VOCAB})),
        "has token id 40, but the model's vocab_size is 40",
    ),
    "malformed tokenizer": (text("tokenizer.json", "{}"), "not a readable tokenizer.json"),
    "tokenizer is no text": (text("tokenizer.json", b"\xff\xfe"), "cannot read .*tokenizer.json: it is UTF-16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_get_one_clear_line(case: str, tmp_path: Path) -> None:
    """Naming the file or field, in a single line, before anything large is allocated."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    spoil, pattern = WRONG[case]
    spoil(folder)
    with pytest.raises(ValueError, match=pattern) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["[]", "{", "7"])
def test_wrong_tokenizer_settings(content: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json({"<unk>": 0}))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: (not valid JSON|expected a JSON object)"):
        load_model(tmp_path)


NONSENSE = ["x", -1, 0, [], {}, 1.5, True, [1, "a"], float("nan"), "5", {"__float__": "x"}, None]


@pytest.mark.parametrize("field", [*SIZES, "hybrid_override_pattern", "time_step_limit", "eos_token_id", "n_group"])
def test_any_nonsense_in_a_config_is_named_or_harmless(field: str) -> None:
    """Never anything but a ValueError of one line that names the field; what passes can be built."""
    for value in NONSENSE:
        complaint = ""
        try:
            config = parse_config({**SIZES, **ARCHITECTURES["all kinds"], field: value})
            build(config, "pair", torch.float32, ("meta",))
        except ValueError as error:
            complaint = str(error)
        assert "\n" not in complaint
        if complaint:
            assert re.search(rf"config.json.*{field}", complaint), value
        else:
            assert value is None or isinstance(value, int | float) or (field, value) == ("eos_token_id", [])


def test_bad_arguments(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    for path, options, pattern in (
        (tmp_path / "nowhere", {}, "no such checkpoint folder"),
        (folder, {"dtype": "float8"}, "dtype 'float8' is unknown; choose from"),
        (folder, {"devices": ("cpu", "cpu", "cpu")}, "two towers, but 3 devices"),
        (folder, {"devices": "cpu"}, "devices names one for each tower"),
        (folder, {"device": "tpux"}, "device 'tpux' cannot be used here"),
        (folder, {"family": "nemotron"}, "model family 'nemotron' is unknown; did you mean nemotron_h"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            load_model(path, **options)
        assert "\n" not in str(caught.value)


def test_an_error_names_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a folder whose short name is in the message by chance, as "config" is."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("config"))
    config = json.loads(Path("config/config.json").read_text())
    for change, message in (
        ({"head_dim": None}, "config: config.json lacks head_dim"),
        ({"vocab_size": 1000}, "config/model.safetensors: "),
    ):
        Path("config/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(FileError) as caught:
            load_model("config")
        assert str(caught.value).startswith(message)
    Path("config/config.json").write_text("{")
    with pytest.raises(FileError, match=r"^config/config\.json: not valid JSON"):
        load_model("config")


def test_torchs_own_devices_and_dtypes_will_do(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (model.checkpoint.devices, model.checkpoint.dtype) == (("cpu",), "bfloat16")


def test_build_leaves_nothing_uninitialised_on_meta() -> None:
    model = build(tiny_config(), "pair", torch.bfloat16, ("meta",))
    assert isinstance(model, TwoTower)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
