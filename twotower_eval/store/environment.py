"""The environment of a run: machine, driver, packages, commit. What the system does not report is ``None``.

Torch is read only if something else has imported it already, so that the reading arm never imports it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from twotower_eval.records import (
    SCHEMA_VERSION,
    Cell,
    ChatUse,
    Chosen,
    Override,
    RunManifest,
    Verb,
    Ways,
    canonical_json,
    sha256_text,
    to_json,
)
from twotower_eval.store.journal import now_text
from twotower_eval.version import __version__

SCORING_PACKAGES = (  # what lm-eval's tasks and metrics import to score answers
    "lm-eval",
    "evaluate",
    "sacrebleu",
    "rouge-score",
    "scikit-learn",
    "nltk",
    "math-verify",
    "sympy",
    "antlr4-python3-runtime",
    "langdetect",
)
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
    "triton",
    "ray",
    *SCORING_PACKAGES,
)
GIT_TIMEOUT_S = 10.0
WAIT_POLICY = "OMP_WAIT_POLICY"
BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def new_manifest(
    verb: Verb,
    *,
    run_id: str,
    plan: object,
    cells: Sequence[Cell],
    devices: Sequence[str],
    seeds: Mapping[str, int],
    notes: Sequence[str] = (),
    tasks: Mapping[str, Mapping[str, str]] | None = None,
    overrides: Sequence[Override] = (),
    unheeded: Mapping[str, Mapping[str, object]] | None = None,
    joined: Mapping[str, int] | None = None,
    ways: Sequence[Ways] = (),
    chosen: Sequence[Chosen] = (),
    chats: tuple[ChatUse, ...] | None = None,
) -> RunManifest:
    """The manifest of a run that starts now, on this machine, with this command line. ``plan`` is a record."""
    commit, dirty = git_state()
    plan_json = to_json(plan)
    dtype = str(plan_json["dtype"]) if plan_json.get("dtype") else None
    return RunManifest(
        schema=SCHEMA_VERSION,
        run_id=run_id,
        verb=verb,
        argv=tuple(sys.argv),
        plan=plan_json,
        plan_sha256=sha256_text(canonical_json(plan_json)),
        cells=tuple(cells),
        started_at=now_text(),
        project_version=__version__,
        commit=commit,
        dirty=dirty,
        packages=package_versions(),
        machine=describe_machine(devices) | {"kernels": _active_kernels(devices, dtype)},
        seeds=seeds,
        notes=tuple(notes),
        tasks=dict(tasks or {}),
        overrides=tuple(overrides),
        unheeded=dict(unheeded or {}),
        joined=dict(joined or {}),
        ways=tuple(ways),
        omp_wait_policy=os.environ.get(WAIT_POLICY),
        chosen=tuple(chosen),
        chats=chats,
    )


def let_threads_sleep() -> None:
    """Have idle OpenMP threads sleep, unless ``OMP_WAIT_POLICY`` says otherwise: spinning ones make small models many
    times slower where cores are shared. Torch reads it as it loads, so nothing is changed after that."""
    if "torch" not in sys.modules:
        os.environ.setdefault(WAIT_POLICY, "PASSIVE")


def read_on_one_thread() -> None:
    """Have numpy multiply on one thread, unless ``OPENBLAS_NUM_THREADS`` says otherwise: the products of a report are
    small, and more threads only spin. Numpy reads it as it loads, so nothing is changed after that."""
    if "numpy" not in sys.modules:
        os.environ.setdefault(BLAS_THREADS, "1")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that can change results; a package that is absent has no entry."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def with_scoring_of_now(recorded: Mapping[str, str]) -> dict[str, str]:
    """Recorded versions, with those of the scoring packages replaced by the installed ones: for scores made after
    answers.

    A manifest without versions stays without them.
    """
    now = {name: version for name, version in package_versions().items() if name in SCORING_PACKAGES}
    others = {name: version for name, version in recorded.items() if name not in SCORING_PACKAGES}
    return {**others, **now} if recorded else {}


def describe_machine(devices: Sequence[str] = ("cpu",)) -> dict[str, object]:
    """The machine, as far as it affects results: no host name, nothing that changes between two calls."""
    torch = sys.modules.get("torch")
    return {
        "system": platform.system(),
        "python": platform.python_version(),
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "num_cores": _num_usable_cores(),
        "memory_bytes": _memory_bytes(),
        "num_threads": torch.get_num_threads() if torch else None,
        "cuda": torch.version.cuda if torch else None,
        "driver": _nvidia_driver(),
        "devices": [_describe_device(device) for device in devices],
    }


def _active_kernels(devices: Sequence[str], dtype: str | None) -> dict[str, str] | None:
    """Which kernels are active, if something has loaded the operations."""
    ops = sys.modules.get("twotower_eval.engine.ops.kernels")
    states: dict[str, str] | None = ops.describe(devices, dtype) if ops and dtype else None
    return states


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from, and whether it has changes; ``(None, None)`` in a wheel."""
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    # A virtual environment inside another repository must not give that repository's commit.
    if top is None or Path(top).resolve() != root:
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *args: str) -> str | None:
    command = ["git", "-C", str(folder), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or None


def _num_usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _nvidia_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    return text.splitlines()[0].removeprefix("NVRM version:").strip()


def _describe_device(device: str) -> dict[str, object]:
    torch = sys.modules.get("torch")
    if not device.startswith("cuda") or torch is None or not torch.cuda.is_available():
        return {"device": device}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": device,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
