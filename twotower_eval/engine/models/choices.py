"""What ``auto`` stands for: the first device that torch can use here, and the dtype that a checkpoint is stored in.

Both depend on the machine and the checkpoint alone, never on a measurement, so that a run can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from twotower_eval.engine.models.checkpoint import DENOISER_PREFIXES, opened, read_json, tensor_files
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import FileError
from twotower_eval.records import HALF_PRECISION, Chosen

# Families whose towers choose experts in float64, as the reference does; Apple's GPUs have no such numbers.
NEED_FLOAT64 = ("nemotron_h",)
DTYPE_NAMES = ("dtype", "torch_dtype")  # in config.json; the second is the older name
HELD = 6  # a parallel decoder may hold the contexts of so many batches: see decoders.Decoder
HALF, SINGLE = HALF_PRECISION, "float32"
STORED_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def choose_device(families: Iterable[str]) -> Chosen:
    """The device that ``auto`` stands for with models of these families: CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return Chosen(setting="device", value="cuda:0", reason="first there is")
    if not torch.backends.mps.is_available():
        return Chosen(setting="device", value="cpu", reason="no accelerator")
    if any(family in NEED_FLOAT64 for family in families):
        return Chosen(setting="device", value="cpu", reason="needs float64")
    return Chosen(setting="device", value="mps", reason="first there is")


def choose_dtype(folder: Path, device: str) -> Chosen:
    """The dtype that ``auto`` stands for: the one that the checkpoint is stored in, but float32 instead of half
    precision on a CPU.

    Float64 is computed in float32. Without a word or a tensor that says
    what is stored, it is float32.
    """
    stored = stored_dtype(folder)
    if stored is None:
        return Chosen(setting="dtype", value=SINGLE, reason="not stated")
    if stored not in (*HALF, SINGLE):
        return Chosen(setting="dtype", value=SINGLE, reason="not computed in", stored=stored)
    if stored in HALF and torch.device(device).type == "cpu":
        return Chosen(setting="dtype", value=SINGLE, reason="slow on CPUs", stored=stored)
    return Chosen(setting="dtype", value=stored, reason="as stored", stored=stored)


def stored_dtype(folder: Path) -> str | None:
    """The dtype that a checkpoint's config.json names, as transformers' own ``auto`` reads it, else that of most of
    its floating-point tensors; ``None`` where neither says it.

    FileError for a config.json or weights that cannot be read.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    named = next((part[name] for part in parts for name in DTYPE_NAMES if part.get(name)), None)
    if isinstance(named, str) and named != "auto":
        return named.removeprefix("torch.")
    return _most_common(folder)


def _most_common(folder: Path) -> str | None:
    """Of the floating-point tensors, by their number of values; from the files' headers alone."""
    try:
        files = tensor_files(folder)
    except FileError:  # a family of one's own may store its weights in any way, and loading will say what is wrong
        return None
    num_values: dict[str, int] = {}
    for file in sorted(set(files.values())):
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                tensor = handle.get_slice(name)
                dtype = STORED_NAMES.get(tensor.get_dtype())
                if dtype is not None:
                    num_values[dtype] = num_values.get(dtype, 0) + torch.Size(tensor.get_shape()).numel()
    return max(num_values, key=lambda dtype: num_values[dtype], default=None)


def may_denoise(folder: Path, family: str) -> bool | None:
    """Whether a checkpoint has a denoiser, from its files' headers; ``None`` of a family that is not this project's."""
    if family == "transformers":
        return False
    if family != "nemotron_h":
        return None
    return any(name.startswith(DENOISER_PREFIXES) for name in tensor_files(folder))


def fits(model: Model, num_rows: int, num_tokens: int) -> bool:
    """Whether so many rows of so many tokens can be read at once, beside all contexts that a decoder keeps."""
    kept, contexts = (HELD if model.has_denoiser else 1), []
    ids_BS = torch.ones(num_rows, max(1, num_tokens - 1), dtype=torch.int64)
    try:
        with torch.inference_mode():
            for _ in range(kept):
                contexts.append(model.extend(model.prefill(ids_BS), ids_BS[:, :1]))
    except torch.OutOfMemoryError:
        return False
    finally:
        contexts.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True
