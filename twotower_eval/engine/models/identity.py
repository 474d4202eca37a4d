"""What makes two models the same: their weights, and every other file that affects a logit or a text.

There are two questions. Is this the folder that was measured before? Then the bytes of each file count. Do two folders
give the same causal model? Then the content of the files counts, wherever they lie and however they are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from twotower_eval.engine.models.base import source_text
from twotower_eval.engine.models.chat import TEMPLATE_FOLDER
from twotower_eval.engine.models.checkpoint import file_weights, joint_digest, opened, tensor_digest, tensor_files
from twotower_eval.engine.models.protocol import Model, text_codec
from twotower_eval.errors import FileError
from twotower_eval.records import CONFIG_FILES, Checkpoint, FileDigest, sha256_text

CONFIG, GENERATION_CONFIG = CONFIG_FILES
FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
)
BOOKKEEPING = frozenset(  # bookkeeping settings: where a folder came from and who wrote it
    {
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",  # the dtype that the model was loaded in counts
        "name_or_path",
        "tokenizer_file",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
SETTINGS = (CONFIG, GENERATION_CONFIG, "tokenizer_config.json")  # the files whose names are names of settings
# Settings that transformers' generate follows even in greedy decoding, and no decoder here does -> neutral values.
GREEDY_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
}
OF_PAIRS = ("mask_token_id",)  # what a pair's config says beyond that of its causal tower


def read_whole(
    folder: Path, *, family: str, dtype: torch.dtype, devices: tuple[str, ...]
) -> tuple[dict[str, Tensor], Checkpoint]:
    """All tensors of a folder's safetensors files as they are stored, on the CPU, and the checkpoint that they make.

    What the ``load`` of a family of one's own needs first. UserError for files that are missing, cut short, or hold NaN
    or infinite values.

    >>> tensors, checkpoint = read_whole(folder, family="mine", dtype=torch.float32, devices=("cpu",))  # doctest: +SKIP
    """
    files = tensor_files(folder)
    tensors = dict(stored_tensors(files))
    digests = {name: tensor_digest(name, tensor) for name, tensor in tensors.items()}
    return tensors, stated(folder, files, digests, family=family, dtype=dtype, devices=devices)


def stored_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and stored tensors, file by file, by ``files``. FileError for NaN or infinite values."""
    for file in sorted(set(files.values())):
        with opened(file) as handle:
            for name in sorted(name for name, where in files.items() if where == file):
                tensor = handle.get_tensor(name)
                wide = tensor.float() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
                if tensor.is_floating_point() and not torch.isfinite(wide).all():
                    raise FileError(f"{file}: {name} holds NaN or infinite values")
                yield name, tensor


def metadata_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """One digest of what the files say beside their tensors: how packed ones are to be read."""
    held: dict[str, str] = {}
    for file in sorted(set(files.values())):
        with opened(file) as handle:
            held |= dict(handle.metadata() or {})
    return {"__metadata__": sha256_text(json.dumps(held, sort_keys=True))}


def stated(
    folder: Path,
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    *,
    family: str,
    dtype: torch.dtype,
    devices: tuple[str, ...],
) -> Checkpoint:
    """The checkpoint of a folder with these tensor digests, by the names in ``files``."""
    return Checkpoint(
        name=folder.resolve().name,
        family=family,
        source=source_text(folder),
        digest=joint_digest(digests),
        dtype=str(dtype).removeprefix("torch."),
        devices=devices,
        weights=file_weights(files, digests),
    )


def file_digests(folder: Path) -> tuple[FileDigest, ...]:
    """Digests of the files beside the weights that affect a logit or a text."""
    return tuple(dataclasses.replace(file_digest(folder / name), name=name) for name in _names_there(folder))


def file_digest(file: Path) -> FileDigest:
    """A file's name, and the sha256 of its bytes."""
    return FileDigest(name=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def _names_there(folder: Path) -> list[str]:
    """Those of the files that a folder has, and its chat templates with names of their own."""
    named = sorted(file.relative_to(folder).as_posix() for file in (folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [*(name for name in FILES if (folder / name).is_file()), *named]


def folder_settings(folder: Path, read: object = None) -> dict[str, object]:
    """The settings in these files, by file, without bookkeeping.

    ``read`` is a family's record of its config: its fields replace the config's own, so that a stated and an omitted
    default are equal.
    """
    said = {name: _content(folder / name) for name in _names_there(folder)}
    config, generation = _settings(said.get(CONFIG)), _settings(said.pop(GENERATION_CONFIG, None))
    if dataclasses.is_dataclass(read) and not isinstance(read, type):
        config = {**config, **{field.name: getattr(read, field.name) for field in dataclasses.fields(read)}}
    said[CONFIG] = {key: value for key, value in config.items() if key not in OF_PAIRS}
    # transformers writes a copy of the config's own ids there.
    own = {key: value for key, value in generation.items() if key not in config or config[key] != value}
    return {**said, **({GENERATION_CONFIG: own} if own else {})}


def _settings(said: object) -> Mapping[str, object]:
    """The settings of a file; none if it is missing or holds something else, which only its digest identifies."""
    return said if isinstance(said, Mapping) else {}


def unheeded_settings(models: Iterable[Model]) -> dict[str, dict[str, object]]:
    """Checkpoint -> the generation settings for greedy decoding that no decoder here follows."""
    found = {model.checkpoint.name: _unheeded(model) for model in models}
    return {name: settings for name, settings in found.items() if settings}


def _unheeded(model: Model) -> dict[str, object]:
    asked = model.folder_settings.get(GENERATION_CONFIG, {})
    if not isinstance(asked, Mapping):
        return {}
    heeded = {name: value for name in GREEDY_SETTINGS if (value := asked.get(name)) is not None}
    return {name: value for name, value in heeded.items() if value not in GREEDY_SETTINGS[name]}


def causal_identity(model: Model) -> str:
    """Equal for two models only if everything is equal that affects a logit or a text of their causal towers."""
    devices = model.checkpoint.devices[:1]
    parts: list[object] = [model.checkpoint.family, model.context_digest, model.checkpoint.dtype, devices]
    parts += [model.vocab_size, model.max_length, model.eos_token_ids, dict(model.folder_settings)]
    return sha256_text(json.dumps(parts, sort_keys=True))  # a limit of time steps may be infinite


def reader_identity(model: Model) -> str:
    """Equal for two models only if they read every text alike: same tokens, same limits, same refusals."""
    files = {name: said for name, said in model.folder_settings.items() if name not in (CONFIG, GENERATION_CONFIG)}
    tokenizer = text_codec(model)
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.special_token_ids)]
    parts = [files, named, model.vocab_size, model.max_length, model.eos_token_ids]
    return sha256_text(json.dumps(parts, sort_keys=True))


def _content(file: Path) -> object:
    """A file's content: its JSON without bookkeeping, else its digest."""
    content = file.read_bytes()
    try:
        data = json.loads(content) if file.suffix == ".json" else None
    except ValueError:  # reading the file will report what is wrong
        data = None
    if data is None:
        return hashlib.sha256(content).hexdigest()
    if file.name in SETTINGS and isinstance(data, Mapping):  # elsewhere, and deeper, a name may be a token's text
        return {key: value for key, value in data.items() if key not in BOOKKEEPING}
    return data
