"""Everything that wants a GPU, in one script of named steps, each resumable by itself and under ten minutes.

    python tests/device_check.py --device cuda:0                 # all steps; by estimate under 25 minutes
    python tests/device_check.py --device cuda:0 --brief         # with smaller sweeps; by estimate some 5
    python tests/device_check.py --device cuda:0 --step sizing   # one of them; --step may be given several times
    python tests/device_check.py --device cpu --quick            # the same code in minutes; `make test` runs this

Steps: parity (float32 and bfloat16 against reference outputs), kernels (which prove themselves, which are refused),
graphs (captured steps give the same tokens, and how much faster), quality, sweep and sweep_graphs (quality of the
miniature, its speed with both arms without CUDA graphs and with them), sizing and sizing_graphs (AR and denoise steps
of the released size on random weights, beside the floor), native (AR against transformers' own generate on the same
config), report (one over all runs, with the run folders beside it, ready to be published). `train` (the shipped
recipe on the device) runs only when it is named. Each step prints one JSON line. A failed parity check ends with exit
code 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import native as theirs
from safetensors.torch import load_file

import twotower_eval as tt
from twotower_eval import store
from twotower_eval.analyse import report as report_room
from twotower_eval.analyse.compare.sizing import SizingRun, is_sizing_run
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.config import NemotronHConfig, parse_config
from twotower_eval.engine.models.graphs import StepGraphs, use_graphs
from twotower_eval.engine.ops import kernels as kernel_room
from twotower_eval.measure.sizing.pairs import build_random_pair
from twotower_eval.measure.sizing.run import config_file
from twotower_eval.measure.speed.clock import CallClock, Devices
from twotower_eval.measure.verify.golden import LIMITS
from twotower_eval.miniature import evaluate
from twotower_eval.miniature.train import read_recipe, train_pair
from twotower_eval.resources import data_path

GOLDEN = Path(__file__).parent / "data" / "golden" / "public"
RELEASED_NAME = "nemotron-labs-twotower-30b-a3b"
RELEASED = config_file(RELEASED_NAME)
# Float32: the reference ran on a CPU; a GPU sums in another order. Largest absolute difference of a logit.
FLOAT32_LIMITS = {
    "cpu": {"context": LIMITS["golden_context"], "denoiser": LIMITS["golden_denoiser"]},
    "cuda": {"context": 1e-3, "denoiser": 2e-3},
}
# Bfloat16: random routers flip experts on rounding, so single logits may be far off. Mean over cases of the
# root-mean-square error relative to the logits' spread (measured on a CPU: 0.07 and 0.11), and of equal argmaxes.
BFLOAT16_ERROR = {"context": 0.15, "denoiser": 0.25}
BFLOAT16_AGREEMENT = {"context": 0.90, "denoiser": 0.80}
STEP_LIMIT_S = 570  # of one verb; what it had is kept, and --resume goes on
AIMS = {"ar_step": 1.5, "denoise": 2.0}  # times the floor, at batch 1
NATIVE_LAYERS, NATIVE_PROMPT, NATIVE_NEW, NATIVE_ROUNDS = 13, 64, 64, 5


def main() -> int:
    """Run the steps; 0 if all parity checks hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="cpu, cuda:0, ...")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for runs, training and report")
    parser.add_argument("--model", help="pair to sweep [the shipped miniature]")
    parser.add_argument("--step", action="append", choices=[*STEPS, "train"], help="one step [all but train]")
    parser.add_argument("--brief", action="store_true", help="one block size, fewer rounds; no run without CUDA graphs")
    parser.add_argument("--quick", action="store_true", help="a few layers, rounds and documents of everything")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    held = []
    steps = [name for name in STEPS if not (options.brief and name in EAGER)]
    for name in options.step or steps:
        started = time.perf_counter()
        held.append(ALL_STEPS[name](options))
        say("timing", of=name, seconds=round(time.perf_counter() - started, 1))
    return 0 if all(held) else 1


def command() -> int:
    """:func:`main`; what the user can mend is one line and exit code 2."""
    try:
        return main()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def say(step: str, **facts: Any) -> None:
    """One JSON line."""
    print(json.dumps({"step": step, **facts}), flush=True)


def parity(options: argparse.Namespace) -> bool:
    """In both precisions."""
    held = [parity_in(options.device, dtype) for dtype in ("float32", "bfloat16")]
    return all(held)


@torch.no_grad()
def parity_in(device: str, dtype: str) -> bool:
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


def train(options: argparse.Namespace) -> bool:
    """The shipped recipe on the device; with ``--quick`` a few steps of it."""
    recipe, folder = None, options.out / "device-training"
    if options.quick:
        evaluate.DOCUMENTS_PER_KIND = 1
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.toml"
        recipe.write_text(_short_recipe(), encoding="utf-8")
    started = time.perf_counter()
    pair = train_pair(folder, recipe_file=recipe, device=options.device)
    say("train", device=options.device, seconds=round(time.perf_counter() - started, 1), pair=str(pair))
    return True


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


def kernels(options: argparse.Namespace) -> bool:
    """Which foreign kernels prove themselves here, in which precision; the others with the reason. None is needed."""
    for dtype in ("float32", "bfloat16"):
        told = kernel_room.describe([options.device], dtype)
        say("kernels", device=options.device, dtype=dtype, kernels=told or "a CPU has none")
    return True


def graphs(options: argparse.Namespace) -> bool:
    """Greedy tokens with captured steps equal those without, in float32; seconds of both.

    Of the shipped miniature, whose heads, unlike those of the golden checkpoint, are wide enough for every kernel.
    """
    tokens: dict[str, list[tuple[int, ...]]] = {}
    seconds: dict[str, float] = {}
    clock = CallClock(Devices([options.device]), time.perf_counter)
    for arm in ("plain", "captured"):
        model = tt.load_model(data_path("miniature", "pair"), device=options.device, dtype="float32")
        if arm == "captured":
            # Without a GPU the steps run from their fixed buffers, uncaptured.
            model.graphs = model.context_tower.graphs = StepGraphs()
        ask = [tt.Prompt(id="p", token_ids=tuple(range(4, 21)))]
        for kind in ("autoregressive", "block_diffusion"):
            decoder = tt.make_decoder(model, kind)
            decoder.generate(ask, max_new_tokens=48)  # captures
            started_s = clock()
            [answer] = decoder.generate(ask, max_new_tokens=48)
            seconds[f"{arm} {kind}"] = clock() - started_s
            tokens.setdefault(arm, []).append(answer.token_ids)
    held = tokens["plain"] == tokens["captured"]
    say("graphs", device=options.device, held=held, seconds=seconds)
    return held


def quality(options: argparse.Namespace) -> bool:
    """Quality of the pair on the device, by the command that everybody uses."""
    size = ["--limit", "2"] if options.quick else ["--limit", "100", "--batch-size", "32"]
    run = _command("run", "--tasks", "miniature", *_pair(options), *_grid(options), *size)
    say("quality", device=options.device, run=run)
    return True


def sweep(options: argparse.Namespace) -> bool:
    """Speed of the pair on the device, by the command that everybody uses."""
    return _sweep(options, "sweep")


def sweep_graphs(options: argparse.Namespace) -> bool:
    """The same, the small steps of both arms launched as CUDA graphs."""
    if torch.device(options.device).type != "cuda":
        say("sweep_graphs", device=options.device, skipped="a CPU has no CUDA graphs")
        return True
    return _sweep(options, "sweep_graphs", "--cuda-graphs")


def _sweep(options: argparse.Namespace, step: str, *more: str) -> bool:
    if options.quick:
        rounds = ["--num-prompts", "2", "--min-rounds", "2", "--tasks", "miniature_sort"]
    else:
        rounds = ["--min-rounds", "6", "--batch-sizes", "1,8", "--tasks", "miniature"]
    timed = _command("speed", *_pair(options), *_grid(options), *rounds, *more)
    captured = [event for event in store.load(Path(timed)).events if event["kind"] == "timed_again"]
    say(step, timed_again=len(captured), device=options.device, speed=timed)
    return True


def _pair(options: argparse.Namespace) -> list[str]:
    chosen = ["--model", options.model] if options.model else []
    return [*chosen, "--dtype", "float32", *_place(options)]


def _grid(options: argparse.Namespace) -> list[str]:
    """Block sizes and thresholds of the miniature, which is right at high thresholds only."""
    sizes = "16" if options.quick or options.brief else "8,16,32"
    return ["--block-sizes", sizes, "--thresholds", "0.9" if options.quick else "0.99,0.9"]


def sizing(options: argparse.Namespace) -> bool:
    """Steps of the released size on random weights, all layers if both towers or one set of weights fit, else some."""
    return _sizing(options)


def sizing_graphs(options: argparse.Namespace) -> bool:
    """The same, each small step launched as a CUDA graph."""
    if torch.device(options.device).type != "cuda":
        say("sizing_graphs", device=options.device, skipped="a CPU has no CUDA graphs")
        return True
    return _sizing(options, "--cuda-graphs")


def _sizing(options: argparse.Namespace, *more: str) -> bool:
    if options.quick:
        small = [str(_small_config(options.out)), "--dtype", "float32", "--repeats", "2", "--prompt-tokens", "32"]
        run = _command("size", *small, "--layers", "8", "--min-rounds", "2", *more, *_place(options))
    else:
        run = _largest_that_fits(options, more)
    found = SizingRun(store.load(Path(run)))
    for step in found.steps:
        value = step.seconds.estimate
        if step.batch_size == 1 and step.part in AIMS and value is not None and step.floor_s:
            facts = {"part": step.part, "routing": step.routing, "block_size": step.block_size}
            ratio = value.value / step.floor_s
            facts |= {"ms": 1000 * value.value, "floor_ms": 1000 * step.floor_s, "times_floor": ratio}
            say("floor", device=options.device, extrapolated=step.extrapolated, aim=AIMS[step.part], **facts)
    say(
        "sizing_graphs" if more else "sizing",
        device=options.device,
        run=run,
        layers=len(found.pattern),
        of=len(found.full_pattern),
    )
    return True


def _largest_that_fits(options: argparse.Namespace, more: Sequence[str]) -> str:
    """Two towers, else one set of weights for both, else the first 26, 13 or 6 layers."""
    sizes = ["--batch-sizes", "1,8", "--block-sizes", "16", "--prompt-tokens", "512", "--repeats", "4"]
    sizes += ["--min-rounds", "5" if options.brief else "10"]
    ways: list[list[str]] = [[], ["--share-towers"], *(["--layers", str(n)] for n in (26, 13, 6))]
    for way in ways:
        done = _run_verb("size", RELEASED_NAME, *sizes, *way, *more, *_place(options))
        if done.returncode == 0:
            return str(done.stdout.strip().splitlines()[-1])
        if "free: take" not in done.stderr and "out of memory" not in done.stderr:
            raise _failure(done)
    raise RuntimeError(f"not even 6 layers fit on {options.device}")


def _place(options: argparse.Namespace) -> list[str]:
    return ["--devices", options.device, "--out", str(options.out)]


def _small_config(out: Path) -> Path:
    """The released config, a hundredth as wide, twelve layers long."""
    config = read_json(RELEASED) | {"hybrid_override_pattern": "MEM*EMEM*EME", "num_hidden_layers": 12}
    config |= {"hidden_size": 64, "vocab_size": 512, "num_attention_heads": 4, "head_dim": 16, "ssm_state_size": 16}
    config |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "n_routed_experts": 8}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64}
    file = out / "small.config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def native(options: argparse.Namespace) -> bool:
    """Greedy AR, batch 1, by our decoder and by transformers' generate: same sizes, random weights of their own."""
    file = _small_config(options.out) if options.quick else RELEASED
    dtype = torch.float32 if options.quick else torch.bfloat16
    values = read_json(file)
    pattern = values["hybrid_override_pattern"][: 8 if options.quick else NATIVE_LAYERS]
    values |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    num_new = 8 if options.quick else NATIVE_NEW
    arms = {"ours": _our_arm(parse_config(values), options.device, dtype, num_new, captured=False),
            "transformers": _native_arm(values, options.device, dtype, num_new)}  # fmt: skip
    if torch.device(options.device).type == "cuda":
        arms["ours, CUDA graphs"] = _our_arm(parse_config(values), options.device, dtype, num_new, captured=True)
    clock = CallClock(Devices([options.device]), time.perf_counter)
    wall_s: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(1 + (2 if options.quick else NATIVE_ROUNDS)):
        for name in arms if number % 2 else reversed(arms):
            started_s = clock()
            arms[name]()
            if number:  # the first warms up
                wall_s[name].append(clock() - started_s)
    rates = {name: num_new / statistics.median(times_s) for name, times_s in wall_s.items()}
    ratios = {name: rate / rates["transformers"] for name, rate in rates.items() if name != "transformers"}
    facts = {"tokens_per_s": rates, "ratios": ratios, "layers": pattern}
    say("native", device=options.device, dtype=str(dtype), wall_s=wall_s, **facts)
    return True


def _our_arm(
    config: NemotronHConfig, device: str, dtype: torch.dtype, num_new: int, *, captured: bool
) -> Callable[[], object]:
    pair = build_random_pair(config, name="native", dtype=dtype, devices=(device,), seed=0, share_towers=True)
    if captured:
        use_graphs(pair)
    decoder = tt.make_decoder(pair, "autoregressive")
    prompts = [tt.Prompt(id="p", token_ids=tuple(range(4, 4 + NATIVE_PROMPT)))]
    return lambda: decoder.generate(prompts, max_new_tokens=num_new)


def _native_arm(values: dict[str, Any], device: str, dtype: torch.dtype, num_new: int) -> Callable[[], object]:
    import transformers

    config = transformers.AutoConfig.for_model(**{k: v for k, v in values.items() if k != "auto_map"})
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids_BS = torch.arange(4, 4 + NATIVE_PROMPT, device=device)[None]
    return lambda: theirs.generate(model, ids_BS, num_new)


def report(options: argparse.Namespace) -> bool:
    """One report over all runs under ``--out``, and the run folders beside it: what is published."""
    runs = store.find_runs(options.out)
    if not runs:
        raise SystemExit(f"no runs in {options.out}: take the steps sweep and sizing first")
    sized = [path for path in runs if is_sizing_run(store.load(path))]
    decoded = [path for path in runs if path not in sized]
    folder = options.out / "published"
    # A report is about one pair; random weights are another.
    reports = [report_room.write(group, folder) / "report.md" for group in (decoded, sized) if group]
    for path in runs:
        shutil.copytree(path, folder / path.name / "run", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock"))
    say("report", reports=[str(path) for path in reports], runs=[path.name for path in runs])
    return True


def _failure(done: subprocess.CompletedProcess[str]) -> Exception:
    """What a verb said: its one line where the user can mend it, else all of it."""
    if done.returncode == 2:
        return ValueError(done.stderr.strip().splitlines()[-1])
    return RuntimeError(done.stderr)


def _command(*arguments: str) -> str:
    """Run one verb; the path that it prints last."""
    done = _run_verb(*arguments)
    if done.returncode:
        raise _failure(done)
    return str(done.stdout.strip().splitlines()[-1])


def _run_verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One verb in a process of its own."""
    command = [sys.executable, "-m", "twotower_eval.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=STEP_LIMIT_S)


STEPS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "parity": parity,
    "kernels": kernels,
    "graphs": graphs,
    "quality": quality,
    "sweep": sweep,
    "sweep_graphs": sweep_graphs,
    "sizing": sizing,
    "sizing_graphs": sizing_graphs,
    "native": native,
    "report": report,
}
EAGER = ("sweep", "sizing")  # left out with --brief
ALL_STEPS = STEPS | {"train": train}

if __name__ == "__main__":
    sys.exit(command())
