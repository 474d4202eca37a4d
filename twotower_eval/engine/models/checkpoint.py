"""Reads the released checkpoint layout: safetensors, one file or sharded, memory-mapped, checked by name and shape.

Models are built without memory (meta device), and each tensor goes straight to its tower's device. A file is mapped for
a few tensors at a time, so that copied pages do not pile up in host memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.engine.models.base import LanguageModel, source_text
from twotower_eval.engine.models.config import NemotronHConfig, as_ids, parse_config
from twotower_eval.engine.models.nemotron_h import Gate, MixtureOfExperts, Tower
from twotower_eval.engine.models.tokenizer import Tokenizer, load_tokenizer
from twotower_eval.engine.models.twotower import Denoiser, TwoTower
from twotower_eval.errors import FileError, UserError
from twotower_eval.records import INDEX_FILE as INDEX_FILE
from twotower_eval.records import SINGLE_FILE as SINGLE_FILE
from twotower_eval.records import Checkpoint, FileDigest
from twotower_eval.strict import parse_json, read_utf8

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MAPPED_BYTES = 64 << 20  # bytes of tensors read per mapping of a file
STORED_DTYPES = ("BF16", "F16", "F32", "F64")
DENOISER_PREFIXES = ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")
FLOAT32_PARAMETERS = ("gate.weight", "gate.e_score_correction_bias")  # float32 in every dtype, as in the reference


@dataclass(frozen=True)
class Slot:
    """The destination of a checkpoint tensor: a parameter, or one expert's slice of a stacked one.

    ``canonical`` is its name in the pair's layout, so that digests of a pair and its baseline can be compared.
    """

    parameter: Tensor
    expert: int | None
    canonical: str

    @property
    def target(self) -> Tensor:
        """The tensor to fill."""
        return self.parameter.detach() if self.expert is None else self.parameter.detach()[self.expert]


def read_json(file: Path) -> dict[str, object]:
    """A JSON object from a file; UserError with one line if it is missing or malformed."""
    if not file.is_file():
        raise FileError(f"{file}: not found")
    data = parse_json(read_utf8(file), str(file), infinities=True)  # transformers writes time_step_limit so
    if not isinstance(data, dict):
        raise FileError(f"{file}: expected a JSON object")
    return data


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it; a single file is preferred over shards, as in transformers.

    Pickles are refused, and a missing shard is named.
    """
    single = folder / SINGLE_FILE
    if single.is_file():
        with opened(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    if (folder / INDEX_FILE).exists():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FileError(f"{folder / INDEX_FILE}: has no weight_map")
        files = {str(name): folder / str(file) for name, file in weight_map.items()}
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            raise FileError(f"{folder / INDEX_FILE}: names a shard that is not there: {missing[0]}")
        _check_index(folder, files)
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise FileError(f"{folder}: only pickled weights ({pickles[0]}); convert them to safetensors first")
    raise FileError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} found")


def _check_index(folder: Path, files: Mapping[str, Path]) -> None:
    """FileError unless index and shards name the same tensors."""
    for file in sorted(set(files.values())):
        named = {name for name, where in files.items() if where == file}
        with opened(file) as handle:
            held = set(handle.keys())
        if named - held:
            raise FileError(f"{folder / INDEX_FILE}: {file.name} does not hold {min(named - held)}")
        if held - named:
            raise FileError(f"{folder / INDEX_FILE}: does not name {min(held - named)} of {file.name}")


def opened(file: Path) -> safe_open:
    """A safetensors file, memory-mapped; FileError if it is not whole."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error


def context_slots(model: ContextTower, *, prefix: str, head: str) -> dict[str, Slot]:
    """Checkpoint name -> slot for a causal tower and its head."""
    slots = dict(_tower_slots(model.tower, prefix, "context_tower."))
    slots[head] = Slot(model.head.weight, None, "context_lm_head.weight")
    return slots


def pair_slots(model: TwoTower) -> dict[str, Slot]:
    """Checkpoint name -> slot for a whole pair, time modules and tables included."""
    slots = context_slots(model.context_tower, prefix="context_tower.", head="context_lm_head.weight")
    denoiser = model.denoiser
    slots.update(_tower_slots(denoiser.tower, "denoiser_tower.", "denoiser_tower."))
    slots["lm_head.weight"] = Slot(denoiser.head.weight, None, "lm_head.weight")
    for part in ("t_embedder", "t_block", "scale_shift_tables"):
        for name, parameter in denoiser.get_submodule(part).named_parameters():
            slots[f"{part}.{name}"] = Slot(parameter, None, f"{part}.{name}")
    return slots


def _tower_slots(tower: Tower, prefix: str, canonical: str) -> Iterator[tuple[str, Slot]]:
    stacked = {}
    for index, layer in enumerate(tower.layers):
        if isinstance(layer.mixer, MixtureOfExperts):
            stacked[f"layers.{index}.mixer.experts_up_EIH"] = "up_proj"
            stacked[f"layers.{index}.mixer.experts_down_EHI"] = "down_proj"
    for name, parameter in tower.named_parameters():
        if name not in stacked:
            yield prefix + name, Slot(parameter, None, canonical + name)
            continue
        for expert in range(parameter.shape[0]):
            own = f"{name.rsplit('.', 1)[0]}.experts.{expert}.{stacked[name]}.weight"
            yield prefix + own, Slot(parameter, expert, canonical + own)


def build(
    config: NemotronHConfig, kind: Literal["pair", "context"], dtype: torch.dtype, devices: tuple[str, ...]
) -> TwoTower | ContextTower:
    """An uninitialised model in ``dtype``, router weights in float32, each tower on its own device.

    With ``devices=("meta",)`` nothing is allocated.
    """
    with torch.device("meta"):
        model = TwoTower(config) if kind == "pair" else ContextTower(config)
    if isinstance(model, TwoTower):
        materialise(model.context_tower, dtype, devices[0])
        materialise(model.denoiser, dtype, devices[-1])
    else:
        materialise(model, dtype, devices[0])
    return model.eval()


def materialise(part: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Allocate the parameters on ``device`` that have no memory yet; routers are float32 in every dtype."""
    for path, module in part.named_modules():
        # The denoiser reads blocks, the context tower mostly single tokens. Its time modules read one row.
        turned = isinstance(part, Denoiser) and path.startswith(("tower.", "head"))
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            wanted = torch.float32 if isinstance(module, Gate) else dtype
            empty = _allocate(module, parameter.shape, wanted, device, turned=turned)
            replacement = nn.Parameter(empty, requires_grad=False)
            if isinstance(module, nn.ParameterList):
                module[int(name)] = replacement
            else:
                setattr(module, name, replacement)


def _allocate(module: nn.Module, shape: torch.Size, dtype: torch.dtype, device: str, *, turned: bool) -> Tensor:
    """Allocate a parameter. ``turned`` stores float32 weights on a CPU transposed.

    A block of 16 rows reads a transposed weight from memory a quarter faster, one row (see ops/product) half as fast.
    """
    if turned and isinstance(module, nn.Linear) and len(shape) == 2 and dtype == torch.float32 and device == "cpu":
        return torch.empty(shape[::-1], dtype=dtype, device=device).t()
    return torch.empty(shape, dtype=dtype, device=device)


def check(slots: Mapping[str, Slot], files: Mapping[str, Path]) -> None:
    """Check names, shapes and dtypes of a checkpoint against the slots, using the files' headers only; UserError if
    wrong.

    The slots may be those of a model on the meta device, so that nothing is allocated for a wrong checkpoint.
    """
    for problem, names in (("lacks", slots.keys() - files.keys()), ("has unexpected", files.keys() - slots.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"checkpoint {problem} tensor {min(names)}{more}; it does not fit its config.json")
    for file in sorted(set(files.values())):
        with opened(file) as handle:
            for name in sorted(name for name, where in files.items() if where == file):
                stored, wanted = handle.get_slice(name), tuple(slots[name].target.shape)
                if tuple(stored.get_shape()) != wanted:
                    shape = tuple(stored.get_shape())
                    raise FileError(f"{file}: {name} has shape {shape}, the config asks for {wanted}")
                if stored.get_dtype() not in STORED_DTYPES:
                    raise FileError(
                        f"{file}: {name} is stored as {stored.get_dtype()}; supported are {', '.join(STORED_DTYPES)}"
                    )


def fill(slots: Mapping[str, Slot], files: Mapping[str, Path]) -> dict[str, str]:
    """Copy every tensor into its slot; canonical name -> sha256 of name, dtype, shape and bytes as stored.

    The slots must have passed :func:`check`. Raises UserError for NaN or infinite weights.
    """
    digests: dict[str, str] = {}
    for file in sorted(set(files.values())):
        held = sorted(name for name, where in files.items() if where == file)
        while held:
            held = _fill_batch(file, held, slots, digests)
    return digests


def _fill_batch(file: Path, names: list[str], slots: Mapping[str, Slot], digests: dict[str, str]) -> list[str]:
    """Map the file once, read up to MAPPED_BYTES, unmap; the names left to read."""
    num_bytes = 0
    with opened(file) as handle:
        for position, name in enumerate(names):
            if num_bytes >= MAPPED_BYTES:
                return names[position:]
            slot = slots[name]
            tensor = handle.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise FileError(f"{file}: {name} holds NaN or infinite values")
            digests[slot.canonical] = tensor_digest(slot.canonical, tensor)
            slot.target.copy_(tensor)
            num_bytes += tensor.nbytes
    return []


def tensor_digest(name: str, tensor: Tensor) -> str:
    """Hex sha256 of a tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def joint_digest(digests: Mapping[str, str], prefix: tuple[str, ...] = ("",)) -> str:
    """One digest over all tensors whose canonical names start with ``prefix``."""
    lines = [f"{name} {value}\n" for name, value in sorted(digests.items()) if name.startswith(prefix)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_weights(files: Mapping[str, Path], digests: Mapping[str, str]) -> tuple[FileDigest, ...]:
    """One digest per file over its tensors; ``digests`` are by the names in ``files``."""
    return tuple(
        FileDigest(name=held.name, sha256=joint_digest({n: digests[n] for n, file in files.items() if file == held}))
        for held in sorted(set(files.values()))
    )


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> LanguageModel:
    """Load a pair, its context tower alone (``tower="context"``), or an AR base checkpoint (``backbone.*`` names)."""
    data = read_json(folder / "config.json")
    config = parse_config(data)
    files = tensor_files(folder)
    is_base = any(name.startswith("backbone.") for name in files)
    kind: Literal["pair", "context"] = "context" if is_base or tower else "pair"
    if tower and not is_base:
        files = {name: file for name, file in files.items() if not name.startswith(DENOISER_PREFIXES)}

    def slots_of(model: TwoTower | ContextTower) -> dict[str, Slot]:
        if isinstance(model, TwoTower):
            return pair_slots(model)
        prefix, head = ("backbone.", "lm_head.weight") if is_base else ("context_tower.", "context_lm_head.weight")
        return context_slots(model, prefix=prefix, head=head)

    check(slots_of(build(config, kind, dtype, ("meta",))), files)
    tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
    model = build(config, kind, dtype, devices)
    slots = slots_of(model)
    digests = fill(slots, files)
    model.tokenizer = tokenizer
    name = str(data.get("_name_or_path") or folder.resolve().name)
    _identify(model, name, folder, config, digests, tower=tower, devices=devices, dtype=dtype)
    if tower is None:  # a pair's files hold more than its context tower
        weights = file_weights(files, {name: digests[slot.canonical] for name, slot in slots.items()})
        model.checkpoint = dataclasses.replace(model.checkpoint, weights=weights)
    return model


def _identify(
    model: TwoTower | ContextTower,
    name: str,
    folder: Path,
    config: NemotronHConfig,
    digests: Mapping[str, str],
    *,
    tower: Literal["context"] | None,
    devices: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    """Attach identity and limits."""
    is_pair = isinstance(model, TwoTower)
    model.context_digest = joint_digest(digests, ("context_",))
    model.checkpoint = Checkpoint(
        name=name,
        family="nemotron_h",
        source=source_text(folder),
        digest=joint_digest(digests),
        dtype=str(dtype).removeprefix("torch."),
        devices=devices if is_pair else devices[:1],
        tower=tower,
    )
    model.vocab_size = config.vocab_size
    model.max_length = config.max_position_embeddings
    model.eos_token_ids = _eos_ids(folder, config, model.tokenizer)
    model.mask_token_id = config.mask_token_id if is_pair else None
    model.has_denoiser = is_pair


def _eos_ids(folder: Path, config: NemotronHConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The EOS ids that generation settings, config and tokenizer name: each of them stops."""
    file = folder / "generation_config.json"
    chosen = as_ids(file.name, read_json(file).get("eos_token_id")) if file.exists() else ()
    own = tokenizer.eos_token_id if tokenizer else None
    return tuple(dict.fromkeys([*chosen, *config.eos_token_id, *([] if own is None else [own])]))
