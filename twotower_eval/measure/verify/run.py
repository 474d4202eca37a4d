"""The ``verify`` verb: all checks of a checkpoint, journalled as a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from twotower_eval import store
from twotower_eval.engine.decoders import decoder_spec
from twotower_eval.engine.models.identity import file_digest
from twotower_eval.engine.models.protocol import Model
from twotower_eval.engine.models.tokenizer import naming, prompt_ids
from twotower_eval.engine.ops import kernels
from twotower_eval.measure.chosen import without_auto
from twotower_eval.measure.verify.checks import (
    NUM_TOKENS,
    CheckResult,
    batch_logic,
    batch_numerics,
    block_sample,
    blockwise_context,
    drafts_verified,
    finite_logits,
    informative,
    masked_results,
    mock_ar_agreement,
    not_checked,
    only_masked,
    proved,
    seeded_scan,
    static_verified,
)
from twotower_eval.measure.verify.golden import (
    DESCRIPTION,
    TENSORS,
    Golden,
    family_of_numbers,
    golden_results,
    load_golden,
)
from twotower_eval.measure.verify.golden import NAMES as GOLDEN_NAMES
from twotower_eval.plan import VerifyPlan
from twotower_eval.plan_sources import model_source
from twotower_eval.records import (
    Cell,
    Check,
    Checkpoint,
    Chosen,
    Prompt,
    RunManifest,
    Ways,
    Workload,
    canonical_json,
    document_prompt_id,
    make_cell,
    sha256_text,
)
from twotower_eval.resources import data_path
from twotower_eval.store.environment import new_manifest, package_versions

FILES = (DESCRIPTION, TENSORS)  # of reference outputs
KERNELS = ("mamba-ssm", "causal-conv1d")
PROMPTS_OF = ("miniature_arithmetic", "miniature_recall", "miniature_sort", "miniature_program")
PROMPTS_PER_TASK = 2
RANDOM_LENGTHS = (3, 9, 17, 33)  # around a block's ends, unequal so that batches are padded


def verify(plan: VerifyPlan, *, root: Path) -> Path:
    """Check a checkpoint; the run's folder, whose ``checks.jsonl`` holds the results.

    A failed check raises no error. UserError for whatever the user can mend.
    """
    from twotower_eval.engine.models import family_calls, load_model
    from twotower_eval.engine.models.arms import prove_arms

    plan = without_model(plan)
    if plan.golden is not None and plan.model is None and (family := family_of_numbers(Path(plan.golden))) is not None:
        return _verify_numbers(plan, family, root)
    if plan.draft is not None:
        decoder_spec("draft", draft=plan.draft)  # a slip in it is found before weights are loaded
    plan, chosen = without_auto(plan)
    with torch.inference_mode(), family_calls((model_source(plan), plan.family)):
        model = load_model(model_source(plan), dtype=plan.dtype, devices=plan.devices, family=plan.family)
        golden = None
        if plan.golden is not None:
            golden = load_golden(Path(plan.golden), model, plan.devices[0], family=plan.family)
        prompts = make_prompts(model, plan.seed)
        longest = max(len(prompt.token_ids) for prompt in prompts) + NUM_TOKENS
        ways = prove_arms((model,), lambda _: longest)
        cell = _cell(plan, model, prompts)
        with store.create(root, _manifest(plan, cell, ways, chosen)) as writer:
            for result in (*map(proved, ways), *_results(plan, model, prompts, golden)):
                writer.append(Check(cell=cell.id, **dataclasses.asdict(result)))
            writer.finish()
    return writer.path


def without_model(plan: VerifyPlan) -> VerifyPlan:
    """The plan without its model where that is a folder of reference outputs that has no checkpoint."""
    if plan.golden is None or plan.model is None or Path(plan.model).resolve() != Path(plan.golden).resolve():
        return plan
    return plan if family_of_numbers(Path(plan.golden)) is None else dataclasses.replace(plan, model=None)


def _verify_numbers(plan: VerifyPlan, family: str, root: Path) -> Path:
    """Replay a folder that has no checkpoint: nothing else is checked."""
    folder = Path(str(plan.golden))
    golden = load_golden(folder, None, "cpu")
    plan = dataclasses.replace(plan, dtype="float32", devices=("cpu",))
    digest = sha256_text(canonical_json([file_digest(folder / name).sha256 for name in FILES]))
    checkpoint = Checkpoint(
        name=folder.resolve().name, family=family, source=str(folder), digest=digest, dtype="float32", devices=("cpu",)
    )
    workload = Workload(kind="checks", name="checks", digest=digest, num_devices=1)
    cell = make_cell("candidate", checkpoint, decoder_spec("autoregressive"), workload)
    with store.create(root, _manifest(plan, cell, (), ())) as writer:
        for result in golden_results(golden):
            writer.append(Check(cell=cell.id, **dataclasses.asdict(result)))
        writer.finish()
    return writer.path


def make_prompts(model: Model, seed: int) -> list[Prompt]:
    """A few prompts of unequal lengths: text if the model can read it, as random ids say little about a trained
    model."""
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        usable = [token for token in range(model.vocab_size) if token != model.mask_token_id]
        drawn = [torch.randint(len(usable), (n,), generator=generator).tolist() for n in RANDOM_LENGTHS]
        rows = [tuple(usable[index] for index in indices) for indices in drawn]
        return [Prompt(id=f"random/{n}", token_ids=row) for n, row in zip(RANDOM_LENGTHS, rows, strict=True)]
    prompts = []
    for task in PROMPTS_OF:
        lines = data_path("tasks", "miniature", f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        for doc_id, line in enumerate(lines[:PROMPTS_PER_TASK]):
            text = json.loads(line)["prompt"]
            with naming(f"task {task!r}, document {doc_id}"):
                ids = tuple(prompt_ids(model, text))
            prompts.append(Prompt(id=document_prompt_id(task, doc_id), token_ids=ids, text=text))
    return prompts


def _results(plan: VerifyPlan, model: Model, prompts: Sequence[Prompt], golden: Golden | None) -> Iterator[CheckResult]:
    if only_masked(model):
        yield from masked_results(model, prompts, plan.dtype)
    else:
        yield from _causal_results(plan, model, prompts)
    if golden is None:
        yield from (not_checked(name, "no reference outputs named: --golden DIR") for name in GOLDEN_NAMES)
    else:
        yield from golden_results(golden)
    yield _kernels(plan)


def _causal_results(plan: VerifyPlan, model: Model, prompts: Sequence[Prompt]) -> Iterator[CheckResult]:
    yield finite_logits(model, prompts)
    yield seeded_scan(model, plan.seed)
    yield blockwise_context(model, prompts, plan.dtype)
    yield _batch_gate(plan, model, prompts)
    yield batch_numerics(model, prompts, plan.dtype)
    yield from drafts_verified(model, prompts, plan.dtype)
    if plan.draft is not None:
        yield from drafts_verified(model, prompts, plan.dtype, plan.draft)
    yield static_verified(model, prompts, plan.dtype)
    yield mock_ar_agreement(model, prompts)
    yield from block_sample(model, prompts)


def _batch_gate(plan: VerifyPlan, model: Model, prompts: Sequence[Prompt]) -> CheckResult:
    """The batch check on the model itself in float32, else on a float32 copy if memory allows."""
    if plan.dtype == "float32":
        return batch_logic(model, prompts)
    from twotower_eval.engine.models import load_model

    try:
        wide = dataclasses.replace(model_source(plan), attention=None)  # some kernels take no float32
        copy = load_model(wide, dtype="float32", devices=plan.devices, family=plan.family)
        return batch_logic(copy, prompts)
    except torch.OutOfMemoryError:
        return not_checked("batch_equals_single", "no memory for a float32 copy: verify with --dtype float32 elsewhere")


def _kernels(plan: VerifyPlan) -> CheckResult:
    versions = package_versions()
    absent = [name for name in KERNELS if name not in versions]
    there = [f"{name} {versions[name]}" for name in ("torch", *KERNELS) if name in versions]
    without = f"; not installed: {', '.join(absent)}" if absent else ""
    found = kernels.describe(plan.devices, plan.dtype) or {}
    proofs = "".join(f"; {name} {state}" for name, state in found.items())
    return informative(
        "kernels", f"the project's own operations in {plan.dtype} on {', '.join(there)}{without}{proofs}"
    )


def _cell(plan: VerifyPlan, model: Model, prompts: Sequence[Prompt]) -> Cell:
    spec = decoder_spec("block_diffusion" if model.has_denoiser else "autoregressive")
    asked = canonical_json([list(prompt.token_ids) for prompt in prompts])
    workload = Workload(kind="checks", name="checks", digest=sha256_text(asked), num_devices=len(plan.devices))
    return make_cell("candidate", model.checkpoint, spec, workload)


def _manifest(plan: VerifyPlan, cell: Cell, ways: Sequence[Ways], chosen: Sequence[Chosen]) -> RunManifest:
    return new_manifest(
        "verify",
        run_id=store.new_run_id("verify"),
        plan=plan,
        cells=[cell],
        devices=plan.devices,
        seeds={"run": plan.seed},
        ways=ways,
        chosen=chosen,
    )
