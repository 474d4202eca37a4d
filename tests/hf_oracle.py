"""lm-eval's own model of Hugging Face checkpoints as the oracle of what a text becomes, one prompt at a time."""

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.measure.harness.adapter import HarnessLM


def lm_evals_hf(folder: Path, **options: Any) -> Any:
    """lm-eval's ``hf`` on a checkpoint folder, without its cache of logits, which can give a wrong answer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return _module().HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, logits_cache=False, **options
    )


def _module() -> Any:
    """The module imports accelerate for several processes and devices only: where there is none, an empty one does."""
    if find_spec("accelerate"):
        return importlib.import_module("lm_eval.models.huggingface")
    stand_ins: dict[str, Any] = {name: ModuleType(name) for name in ("accelerate", "accelerate.utils")}
    for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
        setattr(stand_ins["accelerate"], name, None)
    stand_ins["accelerate.utils"].get_max_memory = None
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("lm_eval.models.huggingface")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def our_lm(folder: Path) -> HarnessLM:
    """The project's adapter on the same folder, with an empty journal."""
    model = load_model(folder)
    return HarnessLM(model, decoder=make_decoder(model, "autoregressive"), scorer=make_scorer(model, "exact"))


def scored(pairs: Sequence[tuple[str, str]]) -> list[Instance]:
    return [_ask("loglikelihood", i, pair) for i, pair in enumerate(pairs)]


def rolled(texts: Sequence[str]) -> list[Instance]:
    return [_ask("loglikelihood_rolling", i, (text,)) for i, text in enumerate(texts)]


def continued(prompts: Sequence[str], until: Sequence[str], budget: int = 24) -> list[Instance]:
    settings = {"until": list(until), "max_gen_toks": budget}
    return [_ask("generate_until", i, (prompt, dict(settings))) for i, prompt in enumerate(prompts)]


def _ask(kind: str, doc_id: int, arguments: tuple[Any, ...]) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(kind, doc_id, 1))
