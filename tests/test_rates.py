"""What each arm does in absolute terms, beside every ratio: rates, device time, memory, and energy where GPUs tell."""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import report_fixture as made
import torch

from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.rates import rates_frame
from twotower_eval.analyse.report.text import significant
from twotower_eval.measure.speed.clock import Devices
from twotower_eval.records import SpeedSample, to_json

SMALL: dict[str, Any] = {"num_rounds": 4, "num_calls": 3, "batch_sizes": (2,)}


def speed_section(root: Path, path: Path, **options: Any) -> str:
    folder = report.write([path], root / "reports", sections=["speed"], **options)
    return (folder / "report.md").read_text(encoding="utf-8")


def measured_samples(path: Path, arm: str) -> list[SpeedSample]:
    run = store.load(path)
    return [one for one in run.speed if (run.cells[one.cell].arm, one.replica, one.phase) == (arm, 0, "measure")]


def test_answers_per_second_and_device_time_stand_beside_the_speedup(tmp_path: Path) -> None:
    path = made.speed_run(tmp_path, **SMALL)
    frame = rates_frame(runs := Runs([store.load(path)]), runs.speed)
    assert list(frame["arm"]) == ["baseline", "candidate"]
    for arm, row in zip(frame["arm"], frame.to_dict("records"), strict=True):
        samples = measured_samples(path, arm)
        wall_s = sum(one.wall_s for one in samples)
        num_answers = sum(len(one.prompts) for one in samples)
        assert num_answers == 2 * 3 * 4
        assert row["answers_per_s"] == pytest.approx(num_answers / wall_s)
        assert row["answers_per_s_low"] < row["answers_per_s"] < row["answers_per_s_high"]
        num_tokens = sum(prompt.num_tokens for one in samples for prompt in one.prompts)
        assert row["tokens_per_s"] == pytest.approx(num_tokens / wall_s)
        devices = row["num_devices"]
        if devices:
            assert row["device_s_per_1000_answers"] == pytest.approx(1000 * devices * wall_s / num_answers)
    markdown = speed_section(tmp_path, path)
    assert "In absolute terms." in markdown
    assert f"| {significant(frame['answers_per_s'][0])} [" in markdown
    table = markdown.partition("In absolute terms.")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert "energy" not in table, "what nobody told has no column"
    assert "peak memory" not in table


def test_devices_of_an_arm_count_and_energy_and_memory_are_shown_where_known(tmp_path: Path) -> None:
    def telling(row: Any) -> Any:
        if not isinstance(row, SpeedSample):
            return row
        return dataclasses.replace(row, peak_memory_bytes=2**30, peak_memory_reason=None, energy_j=3.0)

    path = made.speed_run(tmp_path, edit=telling, **SMALL)
    frame = rates_frame(runs := Runs([store.load(path)]), runs.speed)
    assert list(frame["energy_j_per_1000_answers"]) == [1500.0, 1500.0], "3 J for a call of two answers"
    markdown = speed_section(tmp_path, path, csv=True)
    assert "| energy per 1,000 answers |" in markdown
    assert "| 1,500 J |" in markdown
    assert "| 1.00 GiB |" in markdown
    assert "the weights of every loaded model among them" in markdown, "it is no arm's own"
    tables = next((tmp_path / "reports").glob("*/tables/rates.csv"))
    assert list(pd.read_csv(tables)["peak_memory_bytes"]) == [2**30, 2**30]


def test_one_call_without_its_energy_leaves_it_unknown(tmp_path: Path) -> None:
    def telling(row: Any) -> Any:
        lacking = isinstance(row, SpeedSample) and (row.round, row.call_id) == (1, "1")
        return dataclasses.replace(row, energy_j=3.0) if isinstance(row, SpeedSample) and not lacking else row

    path = made.speed_run(tmp_path, edit=telling, **SMALL)
    frame = rates_frame(runs := Runs([store.load(path)]), runs.speed)
    assert frame["energy_j_per_1000_answers"].isna().all()


def test_rows_without_energy_are_stored_as_before() -> None:
    assert "energy_j" not in to_json(_sample())
    assert to_json(dataclasses.replace(_sample(), energy_j=1.5))["energy_j"] == 1.5


def _sample() -> SpeedSample:
    return SpeedSample(
        call_id="0", launch_id="l/1", cell="c", replica=0, round=0, phase="measure", batch_size=1, wall_s=1.0,
        prefill_s=None, first_output_s=None, peak_memory_bytes=None, peak_memory_reason="none",
        started_at="2026-11-02T12:00:00.000+00:00", prompts=(),
    )  # fmt: skip


class StandIn(types.ModuleType):
    """NVML as pynvml shows it, with counters in millijoules by UUID."""

    class NVMLError(Exception):
        pass

    def __init__(self, counters: dict[str, int]) -> None:
        super().__init__("pynvml")
        self.counters = counters

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.counters:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.counters[handle]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    nvml = StandIn({"GPU-0": 1_000_000, "GPU-1": 5_000})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = lambda device: types.SimpleNamespace(uuid=str(device.index))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return nvml


def test_energy_is_what_the_counters_of_all_devices_gained(two_gpus: StandIn) -> None:
    meter = Devices(("cuda:0", "cpu", "cuda:1")).energy
    before_j = meter.read_j()
    assert before_j == pytest.approx(1005.0)
    two_gpus.counters = {"GPU-0": 1_002_500, "GPU-1": 5_500}
    assert meter.since_j(before_j) == pytest.approx(3.0)
    two_gpus.counters["GPU-0"] = 10  # a driver that was loaded anew begins at 0
    assert meter.since_j(before_j) is None


def test_energy_is_unknown_where_nvml_does_not_tell(two_gpus: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Devices(("cpu",)).energy.read_j() is None
    two_gpus.counters.pop("GPU-1")  # a part of a GPU has a UUID of its own and no counter
    meter = Devices(("cuda:1",)).energy
    assert meter.read_j() is None
    assert meter.since_j(None) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert Devices(("cuda:0",)).energy.read_j() is None
