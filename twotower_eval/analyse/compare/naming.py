"""Names of checkpoints and operating points."""

from __future__ import annotations

import json
from typing import Any

from twotower_eval.records import Checkpoint, DecoderSpec, canonical_json, sha256_text


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """A checkpoint's name, and which of its towers if only one is meant."""
    return f"{checkpoint.name} ({checkpoint.tower} tower)" if checkpoint.tower else checkpoint.name


def setting(decoder: DecoderSpec, name: str) -> Any:
    """A decoder's parameter, ``None`` without it; steps left open are the block size."""
    value = decoder.params.get(name)
    return decoder.params.get("block_size") if name == "steps_per_block" and value is None else value


def long_name(decoder: DecoderSpec) -> str:
    """``block 16, 16 steps, threshold 0.8`` for what has these; parameters off their default follow."""
    if "block_size" not in decoder.params:
        return ", ".join(unusual(decoder))
    parts = [f"block {setting(decoder, 'block_size')}", f"{setting(decoder, 'steps_per_block')} steps"]
    if "threshold" in decoder.params:
        parts.append(f"threshold {decoder.params['threshold']:g}")
    return ", ".join([*parts, *unusual(decoder)])


def short_name(decoder: DecoderSpec) -> str:
    """``16/16/0.8``: block size, steps, threshold."""
    if "block_size" not in decoder.params:
        return decoder.kind
    parts = [f"{setting(decoder, name)}" for name in ("block_size", "steps_per_block")]
    if "threshold" in decoder.params:
        parts.append(f"{decoder.params['threshold']:g}")
    return ", ".join(["/".join(parts), *unusual(decoder)])


def code_name(decoder: DecoderSpec) -> str:
    """Which code of a plug-in it is."""
    if decoder.code is None:
        return "code not recorded"
    return f"code {sha256_text(canonical_json([[file.name, file.sha256] for file in decoder.code]))[:8]}"


def unusual(decoder: DecoderSpec) -> list[str]:
    """The kind, unless it is block diffusion, and each parameter that is on beside block size, steps and threshold."""
    named = ("block_size", "steps_per_block", "threshold")
    kind = [] if decoder.kind == "block_diffusion" else [decoder.kind]
    rest = {name: value for name, value in decoder.params.items() if name not in named and value}
    return kind + [f"{name.replace('_', ' ')} {json.dumps(value)}" for name, value in rest.items() if name != "trace"]
