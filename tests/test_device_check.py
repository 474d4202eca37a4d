"""The script for GPU machines, exercised on a CPU: every step of it runs, and parity holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("device_check.py")


def test_every_step_runs_on_a_cpu(tmp_path):
    steps = ["parity", "kernels", "graphs", "quality", "sweep", "sweep_graphs"]
    steps += ["sizing", "sizing_graphs", "native", "train", "report"]
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    command += [word for step in steps for word in ("--step", step)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step": "')]
    names = list(dict.fromkeys(row["step"] for row in rows if row["step"] != "timing"))
    at = steps.index("sizing")
    assert names == [*steps[:at], "floor", *steps[at:]]
    assert [row["of"] for row in rows if row["step"] == "timing"] == steps
    of = {name: [row for row in rows if row["step"] == name] for name in names}
    assert [row["held"] for row in (*of["parity"], *of["graphs"])] == [True, True, True]
    assert of["parity"][0]["equal_greedy_runs"] == 1.0
    assert {row["part"] for row in of["floor"]} == {"ar_step", "denoise"}
    assert of["native"][0]["ratios"]["ours"] > 0
    assert len(of["report"][0]["reports"]) == 2
    assert all(Path(path).is_file() for path in of["report"][0]["reports"])
    assert len(of["report"][0]["runs"]) == 3
