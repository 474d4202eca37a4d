"""What a model's small files show is said before its weights are downloaded, of a hub that counts what it is asked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, files_in, go_online, serving, use_cache
from hf_models import save_reading
from own_code import CODE, save_own, use_modules

import twotower_eval as tt
from twotower_eval import cli
from twotower_eval.errors import UserError
from twotower_eval.resources import data_path

Files = dict[str, bytes]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_in(save_reading("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_in(save_own(tmp_path_factory.mktemp("models") / "own"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_cache(monkeypatch, tmp_path / "hub")
    use_modules(monkeypatch, tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    with serving(FakeHub()) as found:
        go_online(monkeypatch, found.url)
        yield found


def configured(files: Files, drop: tuple[str, ...] = (), **changes: Any) -> Files:
    """The same files with another config; ``drop``: without these files or settings."""
    config = {**json.loads(files["config.json"]), **changes}
    kept = {key: value for key, value in config.items() if key not in drop}
    return {name: data for name, data in files.items() if name not in drop} | {"config.json": json.dumps(kept).encode()}


def quantised(method: str, **settings: Any) -> Callable[[Files, Files], Files]:
    return lambda llama, own: configured(llama, quantization_config={"quant_method": method, **settings})


def pair() -> Files:
    return files_in(data_path("miniature", "pair"))


# What is wrong -> the repository's files, what the user adds, what is said of it.
REFUSED: dict[str, tuple[Callable[[Files, Files], Files], list[str], str]] = {
    "unknown model type": (
        lambda llama, own: configured(llama, model_type="zz"),
        [],
        "org/name: transformers {} has no causal language model 'zz'",
    ),
    "not a causal model": (
        lambda llama, own: configured(llama, model_type="vit"),
        [],
        "org/name: transformers {} has no causal language model 'vit'",
    ),
    "code that is not trusted": (
        lambda llama, own: own,
        [],
        "org/name: transformers {} has no causal language model 'own_mean', but one comes with it: to run its code, "
        "give --trust-remote-code (a baseline: --baseline-trust-remote-code)",
    ),
    "trust without code": (
        lambda llama, own: configured(own, drop=("auto_map",)),
        ["--trust-remote-code"],
        "org/name: transformers {} has no causal language model 'own_mean'",
    ),
    "code that lacks a file": (
        lambda llama, own: configured(own, drop=("configuration_own.py",)),
        ["--trust-remote-code"],
        "org/name: transformers cannot load it (",
    ),
    "unknown quantisation": (quantised("zz"), [], "org/name: transformers {} does not know the quantisation 'zz' of"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), [], "pip install -U bitsandbytes"),
    "gptq": (quantised("gptq", bits=4), [], "pip install optimum"),
    "compressed-tensors": (
        quantised("compressed-tensors", format="pack-quantized"),
        [],
        "pip install compressed-tensors>=0.15.0",
    ),
    "gpu only": (quantised("fbgemm_fp8"), [], "org/name: transformers cannot load it (Using fbgemm fp8 quantization"),
    "quantised pair": (
        lambda llama, own: configured(pair(), quantization_config={"quant_method": "fp8"}),
        [],
        "org/name: is quantised (float8 by fp8), and family nemotron_h reads weights that are plain numbers",
    ),
    "unknown family": (
        lambda llama, own: llama,
        ["--family", "nemotron"],
        "model family 'nemotron' is unknown; did you mean nemotron_h?",
    ),
    "family that cannot be imported": (
        lambda llama, own: llama,
        ["--family", "no_such_module:load"],
        "cannot import 'no_such_module' (named by 'no_such_module:load')",
    ),
    "family of servers": (lambda llama, own: llama, ["--family", "openai"], "org/name: family openai is for servers"),
    "family of others": (
        lambda llama, own: llama,
        ["--family", "nemotron_h"],
        "org/name: config.json: model_type is 'llama', expected 'nemotron_h'",
    ),
    "no tokenizer": (
        lambda llama, own: configured(llama, drop=("tokenizer.json",)),
        [],
        "org/name: has no tokenizer.json, and tasks are text: it needs one",
    ),
    "a slow tokenizer": (
        lambda llama, own: configured(llama, drop=("tokenizer.json",)) | {"tokenizer.model": b"pieces"},
        [],
        "org/name: has no tokenizer.json, only tokenizer.model (transformers writes one: "
        "AutoTokenizer.from_pretrained(…).save_pretrained(…)), and tasks are text: it needs one",
    ),
    "a config that is no JSON": (lambda llama, own: llama | {"config.json": b"{"}, [], "config.json"),
    "a config that cannot be": (
        lambda llama, own: configured(llama, hidden_size="wide"),
        [],
        "org/name: transformers cannot load it (",
    ),
    "a pair's config without a size": (
        lambda llama, own: configured(pair(), drop=("hidden_size",)),
        [],
        "org/name: config.json lacks hidden_size",
    ),
    "weights of another name": (
        lambda llama, own: configured(llama, transformers_weights="own.safetensors"),
        [],
        "org/name: transformers_weights names 'own.safetensors' for its weights",
    ),
    "an adapter": (
        lambda llama, own: llama | {"adapter_config.json": b"{}"},
        [],
        "org/name: adapter_config.json adds an adapter to the weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_no_weights_are_asked_for(
    what: str, hub: FakeHub, llama: Files, own: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    files, more, words = REFUSED[what]
    hub.add("org/name", files(llama, own))
    assert cli.main(["run", "--model", "org/name", "--baseline", "miniature", "--limit", "1", *more]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert words.replace("{}", transformers.__version__) in said
    assert "config.json" in hub.downloaded()
    assert WEIGHTS not in hub.downloaded()
    as_baseline = [one.replace("--", "--baseline-", 1) if one.startswith("--") else one for one in more]
    assert cli.main(["speed", "--model", "miniature", "--baseline", "org/name", *as_baseline]) == 2
    assert words.replace("{}", transformers.__version__) in capsys.readouterr().err.splitlines()[-1]
    assert WEIGHTS not in hub.downloaded()
    if "tokenizer" not in what:
        options = {one[2:].replace("-", "_"): True for one in more if one.startswith("--trust")}
        options |= {"family": more[1]} if more[:1] == ["--family"] else {}
        with pytest.raises(UserError) as raised:
            tt.load_model("org/name", **options)
        assert words.replace("{}", transformers.__version__) in str(raised.value)
        assert WEIGHTS not in hub.downloaded()


def test_both_arms_are_looked_at_before_either_is_downloaded(
    hub: FakeHub, llama: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/good", llama)
    hub.add("org/bad", configured(llama, model_type="zz"))
    assert cli.main(["run", "--model", "org/good", "--baseline", "org/bad", "--limit", "1"]) == 2
    assert "org/bad: transformers" in capsys.readouterr().err
    several = ["--baseline", "miniature", "--baseline", "org/bad"]
    assert cli.main(["speed", "--model", "org/good", *several]) == 2
    assert cli.main(["verify", "org/bad"]) == 2
    assert WEIGHTS not in hub.downloaded()


def test_a_draft_model_is_looked_at_before_its_weights(hub: FakeHub, llama: Files) -> None:
    hub.add("org/bad", configured(llama, model_type="zz"))
    drafted = ["--baseline-decoder", "draft", "--baseline-set", "draft=org/bad"]
    assert cli.main(["run", "--model", "miniature", "--limit", "1", *drafted]) == 2
    assert WEIGHTS not in hub.downloaded()


def test_what_can_be_used_is_downloaded_weights_last(hub: FakeHub, llama: Files) -> None:
    hub.add("org/name", llama)
    assert tt.load_model("org/name").checkpoint.name == "org/name"
    asked = [one.rpartition("/")[2] for one in hub.asked if one.startswith("GET") and "/resolve/" in one]
    assert asked[-1] == WEIGHTS
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {*asked[:-1]}


def test_without_a_tokenizer_logits_can_be_verified(hub: FakeHub, llama: Files) -> None:
    hub.add("org/name", configured(llama, drop=("tokenizer.json",)))
    assert tt.load_model("org/name").tokenizer is None


def test_a_known_model_type_with_code_of_its_own_is_transformers_own_class_unless_trusted(
    hub: FakeHub, llama: Files
) -> None:
    """As transformers does: without trust it does not look at the code, with it it runs nothing else."""
    code = CODE["modeling_own.py"].replace("from .configuration_own import OwnConfig\n", "")
    code = code.replace("from .parts_own import running_mean\n", "import transformers\n")
    code = (
        code.partition("class OwnForCausalLM")[0] + "class OwnLlama(transformers.LlamaForCausalLM):\n    own = True\n"
    )
    classes = {"AutoModelForCausalLM": "modeling_llama_own.OwnLlama"}
    hub.add("org/name", configured(llama, auto_map=classes) | {"modeling_llama_own.py": code.encode()})
    model = tt.load_model("org/name")
    assert not model.checkpoint.foreign_code
    assert "modeling_llama_own.py" not in hub.downloaded()
    trusted = tt.load_model("org/name", trust_remote_code=True)
    assert [file.name for file in trusted.checkpoint.foreign_code] == ["modeling_llama_own.py"]
    assert trusted.checkpoint.digest == model.checkpoint.digest
    assert trusted.checkpoint.identity != model.checkpoint.identity


def test_a_tokenizer_for_an_endpoint_needs_no_weights(hub: FakeHub, llama: Files) -> None:
    from twotower_eval.sources import located, read_source

    hub.add("org/words", {"tokenizer.json": llama["tokenizer.json"]})
    hub.add("org/name", llama)
    for name in ("org/words", "org/name"):
        found = located(read_source(name), extent="tokenizer", needs_config=False)
        assert (found.files / "tokenizer.json").is_file()
    assert WEIGHTS not in hub.downloaded()
