"""Any Hugging Face causal language model as autoregressive baseline: safetensors only, local files, and foreign code
only where it was asked for.

What is loaded has proved itself: see models.proof.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, get_hf_quantizer

from twotower_eval.engine.models import transformers_types
from twotower_eval.engine.models.checkpoint import (
    SINGLE_FILE,
    joint_digest,
    read_json,
    tensor_digest,
    tensor_files,
)
from twotower_eval.engine.models.config import as_ids
from twotower_eval.engine.models.identity import file_digest, metadata_digests, stated, stored_tensors
from twotower_eval.engine.models.proof import prove
from twotower_eval.engine.models.quantised import quantisation_of
from twotower_eval.engine.models.tokenizer import load_tokenizer
from twotower_eval.engine.models.transformers_model import TransformersModel
from twotower_eval.engine.models.transformers_types import CausalLM, Config, Loaded
from twotower_eval.errors import FileError
from twotower_eval.records import HALF_PRECISION, Attention, FileDigest, Quantisation
from twotower_eval.sources import FOREIGN
from twotower_eval.strict import JsonObject

AUTO_CLASS = "AutoModelForCausalLM"  # of transformers' auto_map, which names a checkpoint's own classes
TRUST = "to run its code, give --trust-remote-code (a baseline: --baseline-trust-remote-code)"
ADAPTER_FILE = "adapter_config.json"
LENGTH_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")  # in lm-eval's order
OWN_LENGTH_NAMES = ("max_seq_len", "max_target_positions")  # MPT's and Whisper's: lm-eval takes its default
DEFAULT_LENGTH, NO_LENGTH = 2048, int(1e30)  # lm-eval's, and what tokenizers write where they have no limit
LOAD_ERRORS = (  # what transformers raises for folders that are wrong in one way or another
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)


def load(
    folder: Path,
    *,
    devices: tuple[str, ...],
    dtype: torch.dtype,
    tower: Literal["context"] | None = None,
    trust_remote_code: bool = False,
    attention: Attention | None = None,
) -> TransformersModel:
    """Load a causal language model. UserError with one line for whatever is wrong with the folder.

    ``trust_remote_code``: a class that comes with the folder is run; the checkpoint's ``files`` are then its code.
    ``attention`` is transformers' ``attn_implementation``; None: its own choice.
    """
    if tower is not None:
        raise FileError(f"{folder}: is no two-tower checkpoint, so it has no context tower to take out")
    data = read_json(folder / "config.json")
    _check_config(str(folder), folder, data, trust_remote_code=trust_remote_code)
    files = tensor_files(folder)
    quantised = quantisation_of(data) is not None
    place = _place(data, devices[0])
    how: dict[str, Any] = {} if attention is None else {"attn_implementation": _known_attention(attention)}
    if attention == "flex_attention" and devices[0] == "cpu":  # not loaded after two minutes: a kernel for every length
        raise FileError(f"{folder}: flex_attention compiles anew for every length on a CPU: take sdpa or eager there")
    inner = _load_inner(folder, dtype, trust_remote_code=trust_remote_code, **place, **how)
    inner = inner if place else inner.to(devices[0])
    if attention in transformers_types.HALF_ONLY and str(dtype).removeprefix("torch.") not in HALF_PRECISION:
        raise FileError(
            f"{folder}: {attention} computes in bfloat16 and float16 only, not in {str(dtype).removeprefix('torch.')}: "
            "give --dtype bfloat16, or another attention"
        )
    model = TransformersModel(inner.eval().requires_grad_(False))
    digests = {name: tensor_digest(name, tensor) for name, tensor in stored_tensors(files)}
    model.context_digest = joint_digest({**digests, **(metadata_digests(files) if quantised else {})})
    model.checkpoint = stated(folder, files, digests, family="transformers", dtype=dtype, devices=devices[:1])
    model.checkpoint = dataclasses.replace(
        model.checkpoint,
        digest=model.context_digest,
        files=_foreign_code(inner),
        quantisation=_quantisation(data, inner),
        attention=attention,
    )
    model.vocab_size = inner.get_output_embeddings().weight.shape[0]
    model.tokenizer = load_tokenizer(folder, vocab_size=model.vocab_size, unnamed=_class_tokens)
    model.max_length = _max_length(folder, inner)
    model.eos_token_ids = _eos_ids(folder, inner, model)
    with _quiet():
        prove(model)
    return model


def _known_attention(name: Attention) -> str:
    """UserError for a name that is not among those of the plans: transformers would look it up on the hub."""
    if name not in get_args(Attention):
        raise FileError(f"attention {name!r} is unknown; choose from {', '.join(get_args(Attention))}")
    return name


def _quantisation(data: JsonObject, inner: CausalLM) -> Quantisation | None:
    """How the weights are quantised, and whether they still are."""
    found = quantisation_of(data)
    held = getattr(inner.config, "quantization_config", None)
    if found is None or (held is not None and not getattr(held, "dequantize", False)):
        return found
    return dataclasses.replace(found, dequantised=True)


def _max_length(folder: Path, inner: CausalLM) -> int | None:
    """The longest context: lm-eval's, as far as the model has room for it. None where states are all that it carries
    and its config names no limit: nothing ends there."""
    config = inner.config.get_text_config()
    named = next((found for found in _lengths(config, LENGTH_NAMES)), None)
    if named is None and inner._is_stateful:
        return None
    file = folder / "tokenizer_config.json"
    asked = read_json(file).get("model_max_length") if file.exists() else None
    if not isinstance(asked, int | float) or not 0 < asked < NO_LENGTH:
        asked = DEFAULT_LENGTH
    limit = min(named or int(asked), *_lengths(config, OWN_LENGTH_NAMES), NO_LENGTH)
    return limit - _unused_positions(inner, limit)


def _lengths(config: Config, names: Sequence[str]) -> Iterator[int]:
    """Those that say something: XLNet's -1 does not."""
    values = (getattr(config, name, None) for name in names)
    yield from (int(value) for value in values if isinstance(value, int | float) and value > 0)


def _unused_positions(inner: CausalLM, limit: int) -> int:
    """How many rows of a table of ``limit`` positions no token gets: RoBERTa's begin behind the padding token's."""
    tables = (module for name, module in inner.named_modules() if "position" in name.rpartition(".")[2])
    padded = [t for t in tables if isinstance(t, torch.nn.Embedding) and t.padding_idx is not None]
    return max((1 + (t.padding_idx or 0) for t in padded if t.num_embeddings == limit), default=0)


def knows(kind: object) -> bool:
    """Whether transformers has a causal language model of this ``model_type``."""
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _place(data: JsonObject, device: str) -> dict[str, Any]:
    """Where weights are loaded to at once: packed ones of some methods cannot be moved once they are loaded."""
    return {"device_map": {"": device}} if quantisation_of(data) is not None and device != "cpu" else {}


def check_files(folder: Path, data: JsonObject, *, named: str, trust_remote_code: bool, device: str) -> None:
    """UserError, in which the model is ``named``, for what transformers would refuse before it reads a weight.

    That is a config.json (``data``) that it cannot read, or whose quantisation needs a package or a device that is
    not here.
    """
    _check_config(named, folder, data, trust_remote_code=trust_remote_code)
    auto: Any = transformers.AutoConfig
    check_quantisation: Any = get_hf_quantizer
    try:
        with _quiet():
            config = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
            check_quantisation(config, None, _place(data, device).get("device_map"), True, {})
    except LOAD_ERRORS as error:
        raise _cannot_load(named, error) from error


def _cannot_load(named: str, error: BaseException) -> FileError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return FileError(f"{named}: transformers cannot load it ({reason})")


def _check_config(named: str, folder: Path, data: JsonObject, *, trust_remote_code: bool) -> None:
    """Without trust a class that comes with a checkpoint is ignored where transformers has one of its own, as
    transformers does."""
    kind = data.get("model_type")
    brings_own = isinstance(own := data.get("auto_map"), dict) and AUTO_CLASS in own
    if not knows(kind) and not (brings_own and trust_remote_code):
        only = f", but one comes with it: {TRUST}" if brings_own else ""
        raise FileError(f"{named}: transformers {transformers.__version__} has no causal language model {kind!r}{only}")
    if kind == "nemotron_h":  # transformers clamps its time steps otherwise than the released model
        raise FileError(f"{named}: nemotron_h is read by this project's own family; leave family out")
    quantised = quantisation_of(data)
    known = AUTO_QUANTIZATION_CONFIG_MAPPING  # some with a width behind the method's name
    if quantised is not None and not any(
        name.partition("_")[0] == quantised.method.partition("_")[0] for name in known
    ):
        raise FileError(
            f"{named}: transformers {transformers.__version__} does not know the quantisation {quantised.method!r} of "
            "its config.json, and would read the weights as if they were not quantised"
        )
    if (others := data.get("transformers_weights")) is not None:
        raise FileError(f"{named}: transformers_weights names {others!r} for its weights; call them {SINGLE_FILE}")
    if (folder / ADAPTER_FILE).exists():  # transformers adds it to the weights where peft is installed, else not
        raise FileError(f"{named}: {ADAPTER_FILE} adds an adapter to the weights; merge it into them, or remove it")


def _load_inner(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool, **more: Any) -> CausalLM:
    """The transformers model; missing, unexpected or misshapen weights are errors, not warnings."""
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with _quiet():
            loaded: Loaded = auto.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **more,
            )
    except LOAD_ERRORS as error:
        raise _cannot_load(str(folder), error) from error
    inner, report = loaded
    for problem, key in (("lacks", "missing_keys"), ("has unexpected", "unexpected_keys")):
        names = sorted(map(str, report[key]))
        if names:
            also = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise FileError(f"{folder}: checkpoint {problem} tensor {names[0]}{also}; it does not fit its config.json")
    return inner


def _foreign_code(inner: CausalLM) -> tuple[FileDigest, ...]:
    """The files that came with a model and were run: those of its class and of its config's, and what these import."""
    homes = {kind.__module__.rpartition(".")[0] for one in (inner, inner.config) for kind in type(one).__mro__}
    foreign = tuple(f"{home}." for home in homes if home.partition(".")[0] == FOREIGN)
    ran = (module for name, module in [*sys.modules.items()] if name.startswith(foreign))
    files = {Path(file) for module in ran if (file := getattr(module, "__file__", None))}
    # The config's class may have been copied a second time for the model's.
    return tuple(
        dict.fromkeys(file_digest(file) for file in sorted(files, key=lambda one: one.name) if file.stem != "__init__")
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports on stderr while transformers loads; we report ourselves."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _class_tokens(folder: Path) -> dict[str, str]:
    """BOS and EOS that a folder's tokenizer has by its class alone, as GPT-2's has; none where there is no class."""
    auto: Any = transformers.AutoTokenizer
    try:
        with _quiet():
            tokenizer = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS:
        return {}  # nobody else reads this tokenizer by its class either
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    return {name: str(token) for name, token in named.items() if token is not None}


def _eos_ids(folder: Path, inner: CausalLM, model: TransformersModel) -> tuple[int, ...]:
    """All that the generation settings, the config and the tokenizer name: each of them stops.

    The settings are read here too: transformers goes on without them where their file is no JSON to it.
    """
    file = folder / "generation_config.json"
    chosen = as_ids(file.name, read_json(file).get("eos_token_id")) if file.exists() else ()
    own = model.tokenizer.eos_token_id if model.tokenizer else None
    # A class that comes with its checkpoint need not have generation settings.
    settings = (getattr(inner, "generation_config", None), inner.config.get_text_config())
    named = [value for one in settings if one for value in as_ids(type(one).__name__, one.eos_token_id)]
    return tuple(dict.fromkeys([*chosen, *named, *([] if own is None else [own])]))
