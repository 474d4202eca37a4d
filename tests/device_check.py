"""Everything that wants a GPU, in one script: parity on the device, the miniature trained there, its sweep, a report.

    python tests/device_check.py --device cuda:0            # the whole of it, about 20 minutes on one large GPU
    python tests/device_check.py --device cpu --quick       # the same code in two minutes; `make test` runs this

Each step prints one JSON line. Runs and the report go to ``--out``; a failed parity check ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import twotower_eval as tt
from twotower_eval.miniature import evaluate
from twotower_eval.miniature.train import read_recipe, train_pair

GOLDEN = Path(__file__).parent / "data" / "golden" / "public"
# Float32: the reference ran on a CPU; a GPU sums in another order. Largest absolute difference of a logit.
FLOAT32_LIMITS = {"cpu": {"context": 1e-4, "denoiser": 2e-4}, "cuda": {"context": 1e-3, "denoiser": 2e-3}}
# Bfloat16: random routers flip experts on rounding, so single logits may be far off. Mean over cases of the
# root-mean-square error relative to the logits' spread (measured on a CPU: 0.07 and 0.11), and of equal argmaxes.
BFLOAT16_ERROR = {"context": 0.15, "denoiser": 0.25}
BFLOAT16_AGREEMENT = {"context": 0.90, "denoiser": 0.80}


def main() -> int:
    """Run the steps; 0 if all parity checks hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="cpu, cuda:0, ...")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for runs, training and report")
    parser.add_argument("--model", help="pair to sweep [the shipped miniature]")
    parser.add_argument("--quick", action="store_true", help="a few steps and documents of everything")
    options = parser.parse_args()
    held = [parity(options.device, dtype) for dtype in ("float32", "bfloat16")]
    train(options.device, options.out / "device-training", options.quick)
    sweep(options.device, options.out, options.model, options.quick)
    return 0 if all(held) else 1


def say(step: str, **facts: Any) -> None:
    """One JSON line."""
    print(json.dumps({"step": step, **facts}), flush=True)


@torch.no_grad()
def parity(device: str, dtype: str) -> bool:
    """Context and denoiser logits and greedy tokens on the device against the reference outputs."""
    model = tt.load_model(GOLDEN, device=device, dtype=dtype)
    largest, errors, agreements = {}, {}, {}
    for part, cases in (("context", _context_cases(model)), ("denoiser", _denoiser_cases(model))):
        pairs = list(cases)
        largest[part] = max(float((ours - reference).abs().max()) for ours, reference in pairs)
        spread = [float((ours - reference).pow(2).mean().sqrt() / reference.std()) for ours, reference in pairs]
        equal = [float((ours.argmax(-1) == reference.argmax(-1)).float().mean()) for ours, reference in pairs]
        errors[part], agreements[part] = sum(spread) / len(spread), sum(equal) / len(equal)
    share = _token_share(model)
    if dtype == "float32":
        limits = FLOAT32_LIMITS[torch.device(device).type]
        held = all(largest[part] <= limits[part] for part in limits) and share == 1.0
    else:
        held = all(errors[p] <= BFLOAT16_ERROR[p] and agreements[p] >= BFLOAT16_AGREEMENT[p] for p in BFLOAT16_ERROR)
    facts = {"largest_difference": largest, "relative_error": errors, "equal_argmax": agreements}
    say("parity", device=device, dtype=dtype, held=held, equal_greedy_runs=share, **facts)
    return held


def _golden() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(GOLDEN / "golden.safetensors"), json.loads((GOLDEN / "golden.json").read_text())


def _context_cases(model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    tensors, facts = _golden()
    for name in facts["prompts"]:
        yield model.context_logits(tensors[f"{name}.ids"]).cpu(), tensors[f"{name}.context_logits"]


def _denoiser_cases(model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    tensors, facts = _golden()
    for name, prompt in facts["prompts"].items():
        context = model.prefill(tensors[f"{name}.ids"])
        for case in prompt["denoiser_cases"]:
            key = f"{name}.den.{case}"
            if f"{key}.block_ids" in tensors:
                logits = model.denoise(tensors[f"{key}.block_ids"], context, tensors.get(f"{key}.t"))
                yield logits.cpu(), tensors[f"{key}.logits"]


def _token_share(model: Any) -> float:
    """Share of greedy runs (AR and block diffusion, single prompts) that give exactly the reference's tokens."""
    tensors, facts = _golden()
    equal = []
    for name, prompt in facts["prompts"].items():
        if tensors[f"{name}.ids"].shape[0] > 1:
            continue
        ask = [tt.Prompt(id=name, token_ids=tuple(tensors[f"{name}.ids"][0].tolist()))]
        [tokens] = prompt["ar_tokens"]
        [ours] = tt.make_decoder(model, "autoregressive").generate(ask, max_new_tokens=len(tokens))
        equal.append(list(ours.token_ids) == tokens)
        for case in prompt["diffusion"].values():
            params = {key: case[key] for key in ("block_size", "steps_per_block")}
            decoder = tt.make_decoder(model, "block_diffusion", threshold=case["confidence_threshold"], **params)
            [ours] = decoder.generate(ask, max_new_tokens=case["max_new_tokens"])
            equal.append([list(ours.token_ids)] == case["tokens"])
    return sum(equal) / len(equal)


def train(device: str, folder: Path, quick: bool) -> None:
    """The shipped recipe on the device; with ``quick`` a few steps of it."""
    recipe = None
    if quick:
        evaluate.DOCUMENTS_PER_KIND = 1
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.toml"
        recipe.write_text(_short_recipe(), encoding="utf-8")
    started = time.perf_counter()
    pair = train_pair(folder, recipe_file=recipe, device=device)
    say("train", device=device, seconds=round(time.perf_counter() - started, 1), pair=str(pair))


def _short_recipe() -> str:
    """The shipped recipe with two steps of each stage."""
    recipe = read_recipe(None)
    lines = [f"seed = {recipe['seed']}"]
    for section in ("model", "context", "denoiser"):
        values = dict(recipe[section])
        if section != "model":
            values |= {"steps": 2, "warmup_steps": 1, "evaluate_every": 1000, "columns_per_batch": 400}
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def sweep(device: str, out: Path, model: str | None, quick: bool) -> None:
    """Quality, speed and report of the pair on the device, by the commands that everybody uses."""
    chosen = ["--model", model] if model else []
    place = ["--devices", device, "--dtype", "float32", "--out", str(out)]
    grid = ["--block-sizes", "16"] if quick else ["--block-sizes", "8,16,32", "--thresholds", "0.7,0.8,0.9,0.95"]
    size = ["--limit", "2"] if quick else []
    rounds = (
        ["--num-prompts", "2", "--min-rounds", "2", "--tasks", "miniature_sort"] if quick else ["--min-rounds", "8"]
    )
    batches = [] if quick else ["--batch-sizes", "1,8"]
    run = _command("run", "--tasks", "miniature", *chosen, *place, *grid, *size)
    timed = _command("speed", *chosen, *place, *grid, *rounds, *batches)
    report = _command("report", run, timed, "--out", str(out / "reports"))
    say("sweep", device=device, run=run, speed=timed, report=report)


def _command(*arguments: str) -> str:
    """Run one verb in a process of its own; the path that it prints last."""
    command = [sys.executable, "-m", "twotower_eval.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
