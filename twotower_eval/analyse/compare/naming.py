"""Names of checkpoints and operating points."""

from __future__ import annotations

import json
from collections.abc import Collection

from twotower_eval.records import Checkpoint, DecoderSpec, Scalar, canonical_json, sha256_text

NAMED = ("block_size", "steps_per_block", "threshold")  # parameters with a place of their own in a name


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """A checkpoint's name, and which of its towers if only one is meant."""
    return f"{checkpoint.name} ({checkpoint.tower} tower)" if checkpoint.tower else checkpoint.name


def setting(decoder: DecoderSpec, name: str) -> Scalar:
    """A decoder's parameter, ``None`` without it; steps left open are the block size."""
    value = decoder.params.get(name)
    return decoder.params.get("block_size") if name == "steps_per_block" and value is None else value


def number(decoder: DecoderSpec, name: str) -> float | None:
    """A decoder's parameter that is a number, ``None`` without it and where it is none: a switch, a word."""
    value = setting(decoder, name)
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)


def long_name(decoder: DecoderSpec) -> str:
    """``block 16, 16 steps, threshold 0.8`` for what has these; other parameters follow (see :func:`unusual`)."""
    if "block_size" not in decoder.params:
        return ", ".join(unusual(decoder))
    parts = [f"block {setting(decoder, 'block_size')}", f"{setting(decoder, 'steps_per_block')} steps"]
    if "threshold" in decoder.params:
        parts.append(f"threshold {decoder.params['threshold']:g}")
    return ", ".join([*parts, *unusual(decoder)])


def short_name(decoder: DecoderSpec) -> str:
    """``16/16/0.8``: block size, steps, threshold; a decoder without blocks has no shorter name."""
    if "block_size" not in decoder.params:
        return long_name(decoder)
    parts = [f"{setting(decoder, name)}" for name in ("block_size", "steps_per_block")]
    if "threshold" in decoder.params:
        parts.append(f"{decoder.params['threshold']:g}")
    return ", ".join(["/".join(parts), *unusual(decoder)])


def code_name(decoder: DecoderSpec) -> str:
    """Which code of a plug-in it is."""
    if decoder.code is None:
        return "code not recorded"
    return f"code {sha256_text(canonical_json([[file.name, file.sha256] for file in decoder.code]))[:8]}"


def unusual(decoder: DecoderSpec, *, without: Collection[str] = ()) -> list[str]:
    """The kind, unless it is block diffusion, and each parameter that has no place of its own in a name.

    Of ours those that are on; of a plug-in, whose defaults are not known here, all but those that are None and a
    temperature of 0. What keeps traces changes no answer.
    """
    named = (*(NAMED if "block_size" in decoder.params else ()), "trace", *without)
    kind = [] if decoder.kind == "block_diffusion" else [decoder.kind]
    told = [
        f"{name.replace('_', ' ')} {json.dumps(value)}"
        for name, value in decoder.params.items()
        if name not in named and (value or (decoder.is_plug_in and value is not None and name != "temperature"))
    ]
    return kind + told
