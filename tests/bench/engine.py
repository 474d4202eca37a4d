"""The engine at batch 1 against transformers' own nemotron_h: AR, block diffusion, prefill, memory of a prefill."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import Findings, Say
from bench import native as theirs
from bench.measure import interleave, ratios, spread
from bench.memory import measure
from bench.subject import CONFIG, num_parameters, random_pair, write_tower
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.protocol import as_model
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.records import Prompt

BLOCK_SIZE, NUM_STEPS, THRESHOLD = 16, 16, 0.8
HEADER = ("batch 1", "transformers / plain", "this engine", "ratio", "quartiles")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed: tokens of the prompts and of the answer, and processes per arm that measure memory."""

    prompt: int
    new: int  # a multiple of BLOCK_SIZE
    long_prompt: int
    memory_runs: int


SMALL, FULL = (
    Sizes(prompt=32, new=32, long_prompt=256, memory_runs=1),
    Sizes(prompt=64, new=64, long_prompt=1024, memory_runs=3),
)


def run(*, rounds: int, full: bool, say: Say) -> Findings:
    """Time all arms interleaved; every pair must give the same tokens, else ValueError."""
    pair, sizes = random_pair(), FULL if full else SMALL
    say(_card(pair, sizes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tower in ("context_tower", "denoiser_tower"):
            write_tower(folder / tower, pair, tower)
        arms, nfe = _arms(pair, folder, sizes)
        wall_s = interleave(arms, rounds)
        memory = {arm: [measure(arm, folder / "context_tower", sizes.long_prompt) for _ in range(sizes.memory_runs)]
                  for arm in ("native", "ours")}  # fmt: skip
    return _findings(wall_s, memory, nfe, sizes)


def _card(pair: TwoTower, sizes: Sizes) -> str:
    tower = num_parameters(pair.context_tower)
    blocks = sizes.new // BLOCK_SIZE
    return (
        f"engine: {CONFIG['hybrid_override_pattern']}, hidden {CONFIG['hidden_size']}, {CONFIG['n_routed_experts']} "
        f"experts top-{CONFIG['num_experts_per_tok']}, vocabulary {CONFIG['vocab_size']}, random weights, float32\n"
        f"weights: {tower / 1e6:.1f} million a tower ({4 * tower / 2**20:.0f} MiB), {torch.get_num_threads()} threads\n"
        f"prompt {sizes.prompt}, {sizes.new} new tokens: AR {sizes.new} context forwards; diffusion (block 16, 16 "
        f"steps, threshold 0.8) {blocks} context forwards and at most {blocks * NUM_STEPS} denoiser "
        "forwards\n"
    )


def _arms(pair: TwoTower, folder: Path, sizes: Sizes) -> tuple[dict[str, Any], int]:
    """Functions to time, checked to give the same tokens, and the denoiser forwards of one call."""
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(4, CONFIG["vocab_size"], (1, sizes.prompt), generator=generator)
    long_BS = torch.randint(4, CONFIG["vocab_size"], (1, sizes.long_prompt), generator=generator)
    prompts = [Prompt(id="p", token_ids=tuple(ids_BS[0].tolist()))]
    context, denoiser = (theirs.load_native(folder / f"{tower}_tower") for tower in ("context", "denoiser"))
    for layer in denoiser.model.layers:  # chunks no longer than a block: longer ones would be padding
        if layer.block_type == "linear_attention":
            layer.mixer.chunk_size = BLOCK_SIZE
    plain = theirs.PlainDiffusion(context, denoiser, pair)
    block: dict[str, Any] = {"block_size": BLOCK_SIZE, "steps_per_block": NUM_STEPS, "threshold": THRESHOLD}
    model = as_model(pair)
    ar, diffusion = (make_decoder(model, "autoregressive"), make_decoder(model, "block_diffusion", **block))

    def ours(decoder: Any) -> Any:
        return decoder.generate(prompts, max_new_tokens=sizes.new)[0]

    def plainly() -> list[int]:
        return plain.generate(ids_BS, sizes.new, block_size=BLOCK_SIZE, num_steps=NUM_STEPS, threshold=THRESHOLD)

    @torch.inference_mode()
    def prefill(ids: torch.Tensor) -> torch.Tensor:
        return pair.next_logits(pair.prefill(ids))

    generation = ours(diffusion)
    if list(ours(ar).token_ids) != theirs.generate(context, ids_BS, sizes.new)[0]:
        raise ValueError("the engine and transformers disagree on autoregressive tokens: nothing to time")
    if list(generation.token_ids) != plainly():
        raise ValueError("the engine and the plain denoiser disagree on diffusion tokens: nothing to time")
    arms = {
        "AR native": lambda: theirs.generate(context, ids_BS, sizes.new),
        "AR ours": lambda: ours(ar),
        "diffusion native": plainly,
        "diffusion ours": lambda: ours(diffusion),
        "prefill native": lambda: theirs.prefill(context, ids_BS),
        "prefill ours": lambda: prefill(ids_BS),
        "long prefill native": lambda: theirs.prefill(context, long_BS),
        "long prefill ours": lambda: prefill(long_BS),
    }
    return arms, generation.num_denoiser_forwards


def _findings(wall_s: dict[str, list[float]], memory: dict[str, list[int | None]], nfe: int, sizes: Sizes) -> Findings:
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    rates = {"AR": f"AR, {sizes.new} tokens", "diffusion": f"diffusion, {sizes.new} tokens, {nfe} denoiser forwards"}
    times = {"prefill": f"prefill, {sizes.prompt} tokens", "long prefill": f"prefill, {sizes.long_prompt:,} tokens"}
    for name, title in {**rates, **times}.items():
        native_s, ours_s = wall_s[f"{name} native"], wall_s[f"{name} ours"]
        ratio = ratios(native_s, ours_s)
        cells = [
            _rate(sizes.new, statistics.median(s)) if name in rates else _time(statistics.median(s))
            for s in (native_s, ours_s)
        ]
        rows.append((title, *cells, f"{ratio['median']:.2f}x", f"{ratio['low']:.2f}–{ratio['high']:.2f}"))
        figures[name] = {"native_s": spread(native_s), "ours_s": spread(ours_s), "ratio": ratio}
    peaks = {arm: [value for value in values if value is not None] for arm, values in memory.items()}
    if all(peaks.values()):
        share = statistics.median(peaks["ours"]) / statistics.median(peaks["native"])
        cells = [f"{statistics.median(peaks[arm]) / 2**20:.1f} MiB" for arm in ("native", "ours")]
        rows.append((f"peak memory, prefill of {sizes.long_prompt:,}", *cells, f"{share:.2f} of it", "–"))
        figures["prefill memory"] = {"native_bytes": peaks["native"], "ours_bytes": peaks["ours"], "share": share}
    return Findings(header=HEADER, rows=tuple(rows), summary={"num_denoiser_forwards": nfe, "figures": figures})


def _rate(num_tokens: int, wall_s: float) -> str:
    return f"{num_tokens / wall_s:.0f} tokens/s"


def _time(wall_s: float) -> str:
    return f"{1000 * wall_s:.1f} ms"
