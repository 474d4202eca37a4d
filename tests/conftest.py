"""Shared fixtures: golden and benchmark folders found through environment variables, the hub always off."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a missing set then fails at once
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make tiny models many times slower

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers beside each other have one core each

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers' models do


def _folder_named_by(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names the folder with {what}")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable} names {folder}, which is no folder")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``real`` download a pretrained model: only when they are asked for by name of the marker."""
    if "real" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason="downloads a pretrained model: make test-real"))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference checkpoints and outputs; skips where the environment names none."""
    return _folder_named_by("TWOTOWER_EVAL_GOLDEN", "reference checkpoints and their outputs")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of published benchmark files; skips where the environment names none."""
    return _folder_named_by("TWOTOWER_EVAL_DATA", "published benchmark files")


@pytest.fixture(scope="session")
def cases_dir() -> Path:
    """Folder of cases that people reported, with their inputs; skips where the environment names none."""
    return _folder_named_by("TWOTOWER_EVAL_CASES", "reported cases and their inputs")
