"""Verbs called as Python functions leave the process as they found it."""

from __future__ import annotations

import contextlib
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
import matplotlib
import numpy as np
import pytest
import torch
import transformers
from hf_models import save_tiny
from test_miniature_training import tiny_recipe

from twotower_eval import api as verbs
from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.engine.models import load_model
from twotower_eval.measure import verify
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.miniature import evaluate, train
from twotower_eval.plan import RunPlan, SpeedPlan, VerifyPlan

TASKS = ("miniature_arithmetic", "miniature_choice")
TIMED = SpeedPlan(
    tasks=("miniature_arithmetic",),
    num_prompts=2,
    min_rounds=2,
    warmup_rounds=0,
    thresholds=(0.9,),
    threads=2,
    new_tokens=8,
    costs=False,
    probes=0,
)
LOGGERS = ("", "lm_eval", "datasets", "transformers", "torch", "matplotlib", "twotower_eval", "huggingface_hub")


def process_state() -> dict[str, Any]:
    """What code outside could notice."""
    log: Any = transformers.utils.logging
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "argv": list(sys.argv),
        "hooks": (sys.excepthook, sys.stdout, sys.stderr, threading.excepthook),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": (list(warnings.filters), warnings.showwarning),
        "loggers": {name: _logger(name) for name in LOGGERS},
        "transformers": (log.get_verbosity(), log.is_progress_bar_enabled()),
        "datasets": (datasets.is_progress_bar_enabled(), datasets.is_caching_enabled()),
        "lm-eval": (lm_eval.api.task.tqdm, dict(vars(lm_eval.utils.env))),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.mkldnn.enabled,
        ),
        "random": (random.getstate(), _plain(np.random.get_state()), torch.get_rng_state().tolist()),
        "matplotlib": (
            matplotlib.get_backend(auto_select=False),
            {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"},
        ),
        "garbage": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "decimals": (np.get_printoptions(), np.geterr(), locale.setlocale(locale.LC_ALL)),
    }


def _logger(name: str) -> tuple[Any, ...]:
    logger = logging.getLogger(name)
    return logger.level, logger.disabled, logger.propagate, list(logger.handlers), list(logger.filters)


def _plain(state: Any) -> Any:
    return tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in state)


@contextlib.contextmanager
def nothing_changes() -> Iterator[None]:
    before = process_state()
    yield
    after = process_state()
    assert [name for name in before if before[name] != after[name]] == []


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a speed run. They come first, as packages change things when they are first imported."""
    root = tmp_path_factory.mktemp("results")
    verbs.evaluate(RunPlan(tasks=TASKS, limit=1), out=root)
    verbs.time(TIMED, out=root)
    return root


def test_run_leaves_no_trace(tmp_path: Path) -> None:
    with nothing_changes():
        verbs.evaluate(RunPlan(tasks=TASKS, limit=1), out=tmp_path)


def test_speed_and_the_scoring_behind_it_leave_no_trace(tmp_path: Path) -> None:
    with nothing_changes():
        path = verbs.time(TIMED, out=tmp_path)
    assert store.load(path.path).scores


def test_report_leaves_no_trace(runs: Path, tmp_path: Path) -> None:
    matplotlib.rcParams["lines.linewidth"] = 3.25  # as a notebook may have set it
    with nothing_changes():
        report.write(store.find_runs(runs), tmp_path, html=True, csv=True)


def test_verify_leaves_no_trace(tmp_path: Path) -> None:
    with nothing_changes():
        verify.verify(VerifyPlan(), root=tmp_path)


def test_training_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe()
    monkeypatch.setattr(train, "read_recipe", lambda file: recipe)
    monkeypatch.setattr(train, "POOL_SIZE", 24)
    monkeypatch.setattr(evaluate, "DOCUMENTS_PER_KIND", 1)
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 8)
    with nothing_changes():
        train.train_pair(tmp_path, device="cpu")


def test_training_can_be_called_from_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals are the main thread's: elsewhere nobody may say who hears them."""
    monkeypatch.setattr(train, "_train", lambda folder, *_: folder)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.train_pair, tmp_path, device="cpu").result() == tmp_path


def test_what_stops_training_leaves_no_trace_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> Path:
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_train", stopped)
    with nothing_changes(), pytest.raises(KeyboardInterrupt):
        train.train_pair(tmp_path, device="cpu")


def test_loading_a_hugging_face_model_leaves_no_trace(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    load_model(folder)
    with nothing_changes():
        load_model(folder)


def test_quiet_within_quiet_is_undone_in_order() -> None:
    assert lm_eval.api.task.tqdm.__module__.startswith("tqdm")
    assert "from_string" not in vars(lm_eval.utils.env)
    with nothing_changes():
        with lm_tasks.quiet():
            outer = process_state()["lm-eval"]
            with pytest.raises(ValueError, match="boom"), lm_tasks.quiet():
                raise ValueError("boom")
            assert process_state()["lm-eval"] == outer
            compiled = lm_eval.utils.env.from_string("{{ a }}")
        with lm_tasks.quiet():
            assert lm_eval.utils.env.from_string("{{ a }}") is compiled
