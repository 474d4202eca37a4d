"""The script for GPU machines, exercised on a CPU: every step of it runs, and parity holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("device_check.py")


def test_every_step_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step": "')]
    assert [row["step"] for row in rows] == ["parity", "parity", "train", "sweep"]
    assert all(row["held"] for row in rows[:2])
    assert rows[0]["equal_greedy_runs"] == 1.0
    assert Path(rows[-1]["report"]).is_file()
