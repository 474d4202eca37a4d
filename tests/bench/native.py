"""What the engine is compared with: transformers' own nemotron_h, and a denoiser written plainly from its blocks.

Settings are the ones that favour it: cached, greedy, SDPA, inference mode, no chunk longer than what is run. Its
experts are left at its default, grouped_mm: of the others that run in float32 on a CPU, eager was level with it (471
against 468 ms for 64 AR tokens) and batched_mm slower. Shape letters: see ops/__init__.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from twotower_eval.engine.models.twotower import TwoTower


def load_native(folder: Path, *, experts: str | None = None, chunk_size: int | None = None) -> Any:
    """transformers' model in float32. Its time steps are corrected first: it clamps them from below with
    ``time_step_min``, which only initialises. ``chunk_size`` changes how long its scan's chunks are, not its result.
    """
    log: Any = transformers.utils.logging
    log.disable_progress_bar()
    log.set_verbosity_error()  # it would say that CUDA kernels are not there
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    if experts is not None:
        model.set_experts_implementation(experts)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
            layer.mixer.chunk_size = chunk_size or layer.mixer.chunk_size
    return model


@torch.inference_mode()
def generate(model: Any, ids_BS: Tensor, num_new: int) -> list[list[int]]:
    """Greedy tokens by its own ``generate``, end-of-text ignored."""
    out = model.generate(
        ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=num_new,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[list[int]] = out[:, ids_BS.shape[1] :].tolist()
    return tokens


@torch.inference_mode()
def prefill(model: Any, ids_BS: Tensor) -> Any:
    """Its output with a filled cache and the last position's logits."""
    return model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)


class PlainDiffusion:
    """Block diffusion as one would write it down from transformers' blocks: one loop, no tricks, nothing handicapped.

    The context tower's cache is extended block by block; each denoise step runs the denoiser's blocks on a cache that
    shares the context's keys and values and starts from a copy of its Mamba states.
    """

    def __init__(self, context: Any, denoiser: Any, pair: TwoTower) -> None:
        self.context, self.denoiser, self.pair = context, denoiser, pair

    @torch.inference_mode()
    def generate(self, ids_1S: Tensor, num_new: int, *, block_size: int, num_steps: int, threshold: float) -> list[int]:
        """``num_new`` tokens, a multiple of the block size, behind one prompt."""
        cache, mask_id = prefill(self.context, ids_1S).past_key_values, self.pair.config.mask_token_id
        produced: list[int] = []
        while True:
            block_1K = torch.full((1, block_size), mask_id)
            for step in range(num_steps):
                num_masked = int((block_1K == mask_id).sum())
                if num_masked == 0:
                    break
                logits_KV = self.denoise(block_1K, cache, num_masked / block_size)[0]
                logits_KV[:, mask_id] = -torch.inf
                sure_K, tokens_K = logits_KV.softmax(-1).max(-1)
                sure_K[block_1K[0] != mask_id] = -1.0
                floor = -(-num_masked // (num_steps - step))
                count = min(max(int((sure_K > threshold).sum()), floor, 1), num_masked)
                chosen = sure_K.argsort(stable=True)[block_size - count :]
                block_1K[0, chosen] = tokens_K[chosen]
            produced += block_1K[0].tolist()
            if len(produced) >= num_new:
                return produced
            self.context(input_ids=block_1K, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def denoise(self, block_1K: Tensor, cache: Any, t: float) -> Tensor:
        """Denoiser logits (1, K, V)."""
        denoiser, model = self.pair.denoiser, self.denoiser.model
        time_3H = denoiser.t_block(denoiser.t_embedder(torch.tensor([t])))[0].unflatten(-1, (3, -1))
        seeded = _seeded(cache)
        x = model.embeddings(block_1K)
        for index, layer in enumerate(model.layers):
            shift, scale, gate = denoiser.scale_shift_tables[index] + time_3H
            if layer.block_type in ("linear_attention", "full_attention"):
                normed = layer.norm(x * (1 + scale) + shift)
            else:
                normed = layer.norm(x) * (1 + scale) + shift
            if layer.block_type == "linear_attention":
                out = layer.mixer(normed, cache_params=seeded)
            elif layer.block_type == "full_attention":
                layer.mixer.is_causal = False
                out, _ = layer.mixer(normed, past_key_values=seeded)
            else:
                out = layer.mixer(normed)
            x = x + gate * out
        return cast(Tensor, self.denoiser.lm_head(model.norm_f(x)))


def _seeded(cache: Any) -> Any:
    """A cache that may be written to: its attention layers append to new tensors anyway, Mamba states are copied."""
    seeded = copy.copy(cache)
    seeded.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in seeded.layers:
        for name in ("conv_states", "recurrent_states"):
            if hasattr(layer, name):
                setattr(layer, name, {index: state.clone() for index, state in getattr(layer, name).items()})
    return seeded
