"""Parity with a folder of reference outputs: logits, states and tokens of another implementation.

The folder holds ``golden.safetensors`` and ``golden.json``, and beside them the checkpoint that they belong to, if it
is not the one verified. Keys: ``{prompt}.ids``, ``.context_logits``, ``.prefill_last_logits``, ``.den.*`` with
``block_ids``, ``t`` (absent: no time conditioning) and ``logits``; ``.ext*`` likewise on an extended context;
``.state.layers.i.{conv,ssm,key,value}``; ``.ar.tokens``, ``.mock_ar.tokens`` and ``.diff.*.tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twotower_eval.engine.decoders import decoder_spec, from_spec
from twotower_eval.engine.decoders.batch import no_denoiser
from twotower_eval.engine.models import FAMILIES, load_model
from twotower_eval.engine.models.context import Context as OwnContext
from twotower_eval.engine.models.protocol import Context, Model, two_tower
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.checks import CheckResult, not_checked, pass_or_fail
from twotower_eval.measure.verify.replay import Reference, table
from twotower_eval.measure.verify.replays import needs_model, replay_results, replays
from twotower_eval.names import plural
from twotower_eval.records import DecoderSpec, Prompt
from twotower_eval.strict import parse_json, read_utf8

TENSORS, DESCRIPTION = "golden.safetensors", "golden.json"
# Absolute, float32. A reference's own rounding counts too: its denoiser lies up to 1.9e-4 from a pass in float64, and a
# CPU of another make sums in another order.
LIMITS = {"golden_context": 1e-4, "golden_denoiser": 3e-4, "golden_states": 1e-4}
NAMES = (*LIMITS, "golden_tokens")
PREFILL = "prefill_last_logits"


@dataclass(frozen=True)
class Golden:
    """Reference outputs, and the model that must give them."""

    model: Model
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    @property
    def prompts(self) -> list[str]:
        """Names of the prompts, in the order of the description."""
        return [name for name in self.meta["prompts"] if f"{name}.ids" in self.tensors]

    def keys(self, start: str, end: str) -> list[str]:
        """The keys with this start and end, both removed."""
        return sorted(k.removesuffix(end) for k in self.tensors if k.startswith(start) and k.endswith(end))


def family_of_numbers(folder: Path) -> str | None:
    """The family of a folder that holds numbers alone, without a checkpoint that they would belong to; else None.
    UserError for what is missing."""
    meta = _described(folder)
    return str(meta["family"]) if replays(meta) and not needs_model(meta) else None


def load_golden(folder: Path, model: Model | None, device: str, *, family: str | None = None) -> Golden:
    """Read a folder. A checkpoint in it replaces ``model``, read by ``family`` where that is a user's own.

    None stands for a model where the folder holds numbers alone. UserError for what is missing.
    """
    meta, ports = _described(folder), list[object]()
    for port in sorted(folder.glob("*_port.json")):  # the same settings by another implementation
        ports.append(parse_json(read_utf8(port), str(port), infinities=True))
    meta = {**meta, "ports": ports} if ports else meta
    brings_own = (folder / "config.json").is_file() and needs_model(meta)
    own_family = None if family in FAMILIES else family  # else its config.json says it
    own = load_model(folder, device=device, family=own_family) if brings_own else model
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise UserError(f"{folder / TENSORS}: not a whole safetensors file ({error}); fetch it again") from error
    return Golden(cast(Model, own), tensors, meta)


def _described(folder: Path) -> dict[str, object]:
    for name in (TENSORS, DESCRIPTION):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: --golden wants a folder of reference outputs")
    meta = parse_json(read_utf8(folder / DESCRIPTION), str(folder / DESCRIPTION), infinities=True)
    if not isinstance(meta, dict) or not (replays(meta) or isinstance(meta.get("prompts"), dict)):
        raise UserError(f"{folder / DESCRIPTION}: no prompts are described in it")
    return meta


def golden_results(golden: Golden) -> Iterator[CheckResult]:
    """Results for context, denoiser, states and tokens, each over everything that the folder holds."""
    if replays(golden.meta):
        yield from replay_results(golden.model, Reference(meta=table(golden.meta), tensors=golden.tensors))
        return
    differences = {"golden_context": _context, "golden_denoiser": _denoiser, "golden_states": _states}
    for name, compare in differences.items():
        if name != "golden_context" and not golden.model.has_denoiser:
            yield not_checked(name, "the model has no denoiser")
            continue
        found = list(compare(golden))
        if not found:
            yield not_checked(name, "the folder holds nothing of this kind")
            continue
        worst, where = max(found)
        detail = f"{plural(len(found), 'tensor')}, the worst at {where}"
        yield pass_or_fail(name, worst <= LIMITS[name], detail, value=worst, limit=LIMITS[name])
    yield _tokens(golden)


Difference = tuple[float, str]


def _worst(ours: Tensor, theirs: Tensor, key: str) -> Difference:
    if ours.shape != theirs.shape:
        raise UserError(f"golden tensor {key} has shape {tuple(theirs.shape)}, the model gives {tuple(ours.shape)}")
    found = float((ours.double().cpu() - theirs.double()).abs().max())
    return (found if found == found else float("inf"), key)  # NaN would be above no limit


def _context(golden: Golden) -> Iterator[Difference]:
    model = golden.model
    for name in golden.prompts:
        ids = golden.tensors[f"{name}.ids"]
        whole, last = (golden.tensors.get(f"{name}.{key}") for key in ("context_logits", PREFILL))
        if whole is not None:
            yield _worst(model.context_logits(ids), whole, f"{name}.context_logits")
        if last is not None:
            yield _worst(model.next_logits(model.prefill(ids)), last, f"{name}.{PREFILL}")


def _denoiser(golden: Golden) -> Iterator[Difference]:
    get, model = golden.tensors.get, two_tower(golden.model, no_denoiser("block_diffusion"))
    for name in golden.prompts:
        context = model.prefill(golden.tensors[f"{name}.ids"])
        for case in golden.keys(f"{name}.den.", ".block_ids"):
            logits = model.denoise(golden.tensors[f"{case}.block_ids"], context, get(f"{case}.t"))
            yield _worst(logits, golden.tensors[f"{case}.logits"], f"{case}.logits")
        for case in golden.keys(f"{name}.ext", ".den_block_ids"):
            extended = model.extend(context, golden.tensors[f"{case}.block_ids"])
            logits = model.denoise(golden.tensors[f"{case}.den_block_ids"], extended, get(f"{case}.den_t"))
            yield _worst(logits, golden.tensors[f"{case}.den_logits"], f"{case}.den_logits")


def _states(golden: Golden) -> Iterator[Difference]:
    model = golden.model
    for origin in sorted({key.partition(".state.layers.")[0] for key in golden.tensors if ".state.layers." in key}):
        context = model.prefill(golden.tensors[origin.split(".")[0] + ".ids"])
        if "." in origin:
            context = model.extend(context, golden.tensors[f"{origin}.block_ids"])
        for key in golden.keys(f"{origin}.state.layers.", ""):
            layer, what = key.partition(".state.layers.")[2].split(".")
            yield _worst(_state(context, int(layer), what), golden.tensors[key], key)


def _state(context: Context, layer: int, what: str) -> Tensor:
    assert isinstance(context, OwnContext)  # of the one family that the reference is of
    found: dict[str, Tensor]
    if what in ("conv", "ssm"):
        found = {"conv": context.mamba[layer].conv_BCW, "ssm": context.mamba[layer].ssm_BhPN}
    else:
        slots = {"key": context.buffer.keys, "value": context.buffer.values}
        found = {what: slots[what][layer][:, :, : context.max_length]}
    return found[what]


def _tokens(golden: Golden) -> CheckResult:
    """Autoregressive, mock-autoregressive and block-diffusion tokens, exactly; a batch by the reference's mean t."""
    wrong, num = [], 0
    for key, spec in _token_cases(golden):
        name, wanted = key.split(".")[0], golden.tensors[key]
        if spec.kind != "autoregressive" and not golden.model.has_denoiser:
            continue
        rows = golden.tensors[f"{name}.ids"].tolist()
        prompts = [Prompt(id=f"{name}.{i}", token_ids=row) for i, row in enumerate(rows)]
        found = from_spec(golden.model, spec).generate(prompts, max_new_tokens=wanted.shape[1])
        num += 1
        if [list(generation.token_ids) for generation in found] != wanted.tolist():
            wrong.append(key)
    if not num:
        return not_checked("golden_tokens", "the folder holds no tokens that this model could give")
    detail = f"{num - len(wrong)} of {num} token sequences are equal" + (f"; not {wrong[0]}" if wrong else "")
    return pass_or_fail("golden_tokens", not wrong, detail, value=len(wrong), limit=0)


def _token_cases(golden: Golden) -> Iterator[tuple[str, DecoderSpec]]:
    for name in golden.prompts:
        for mode, kind in (("ar", "autoregressive"), ("mock_ar", "mock_ar")):
            if f"{name}.{mode}.tokens" in golden.tensors:
                yield f"{name}.{mode}.tokens", decoder_spec(kind)
        for case, settings in golden.meta["prompts"][name].get("diffusion", {}).items():
            key = f"{name}.diff.{case}.tokens"
            # Cases with an end-of-sequence token keep what we cut; sampled ones hang on the generator's order.
            if key in golden.tensors and settings.get("eos_token_id") is None and not settings.get("temperature"):
                spec = decoder_spec(
                    "block_diffusion",
                    block_size=settings["block_size"],
                    steps_per_block=settings["steps_per_block"],
                    threshold=settings["confidence_threshold"],
                    batch_mean_t=len(golden.tensors[f"{name}.ids"]) > 1,
                )
                yield key, spec
