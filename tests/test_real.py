"""A real pretrained model on real benchmark files: our scores are those of lm-eval's own ``hf`` model.

Opt-in (``make test-real``). The model is the folder that TWOTOWER_EVAL_REAL_MODEL names, made by
``tests/real/prepare.py``; without it the model is made in pytest's cache folder. The benchmark files are those
that TWOTOWER_EVAL_DATA names.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twotower_eval import store
from twotower_eval.measure import harness
from twotower_eval.measure.suites import FEWSHOT_SEED, lm_tasks
from twotower_eval.measure.suites.datafiles import prepare
from twotower_eval.plan import RunPlan

pytestmark = [pytest.mark.real, pytest.mark.slow]

PREPARE = Path(__file__).parent / "real" / "prepare.py"
TASKS = ("gsm8k", "hellaswag", "mmlu_anatomy")
LIMIT, BUDGET = 4, 48


@pytest.fixture(scope="module")
def real_model(request: pytest.FixtureRequest) -> Path:
    named = os.environ.get("TWOTOWER_EVAL_REAL_MODEL")
    if named:
        return Path(named)
    folder = Path(request.config.cache.mkdir("smollm2-135m"))
    # A process of its own: what converting the file warns of is no failure of ours.
    subprocess.run([sys.executable, str(PREPARE), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def files(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    prepare(data_dir, folder, ["gsm8k", "hellaswag", "mmlu"])
    return folder


@pytest.fixture(scope="module")
def ours(real_model: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    plan = RunPlan(
        model=str(real_model),
        decoder="autoregressive",
        tasks=TASKS,
        data_dir=str(files),
        limit=LIMIT,
        max_new_tokens=BUDGET,
        batch_size=4,
    )
    return store.load(harness.run(plan, root=tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def theirs(real_model: Path, files: Path) -> dict[str, dict[tuple[int, str], Any]]:
    """lm-eval's logged samples by task, document and filter; its logits cache off, which can give a wrong answer."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    with lm_tasks.quiet():
        sources = {name: lm_tasks.load_task(name, {}, files) for name in TASKS}
    sources["gsm8k"].config.generation_kwargs["max_gen_toks"] = BUDGET
    for source in sources.values():
        source.set_fewshot_seed(FEWSHOT_SEED)
    lm = HFLM(pretrained=str(real_model), dtype="float32", device="cpu", batch_size=1, logits_cache=False)
    results = lm_eval.evaluator.evaluate(lm, {"tasks": sources}, limit=LIMIT, bootstrap_iters=0)
    return {name: {(s["doc_id"], s["filter"]): s for s in found} for name, found in results["samples"].items()}


def test_every_score_equals_lm_evals(ours: store.Run, theirs: dict[str, dict[tuple[int, str], Any]]) -> None:
    assert len(ours.scores) == LIMIT * (2 + 2 + 1)
    for score in ours.scores:
        sample = theirs[score.task][score.doc_id, score.filter]
        assert score.value == sample[score.metric], score
        assert (score.doc_sha256, score.target_sha256) == (sample["doc_hash"], sample["target_hash"])
        if score.task == "gsm8k":
            assert score.prompt_sha256 == sample["prompt_hash"]


def test_every_answer_equals_lm_evals(ours: store.Run, theirs: dict[str, dict[tuple[int, str], Any]]) -> None:
    assert len(ours.generations) == LIMIT
    for row in ours.generations:
        [[text]] = theirs["gsm8k"][row.doc_id, "strict-match"]["resps"]
        assert row.generation.text == text


def test_every_log_likelihood_equals_lm_evals(ours: store.Run, theirs: dict[str, dict[tuple[int, str], Any]]) -> None:
    assert len(ours.likelihoods) == LIMIT * (4 + 4)
    for row in ours.likelihoods:
        [[logprob_nats, is_greedy]] = [theirs[row.task][row.doc_id, "none"]["resps"][row.request_index][0]]
        assert row.likelihood.logprob_nats == pytest.approx(logprob_nats, abs=1e-3)
        assert row.likelihood.is_greedy == is_greedy
        assert row.likelihood.kind == "exact"
