"""Peak memory of one prefill, in a process of its own (``PYTHONPATH=tests python -m bench.memory ARM FOLDER TOKENS``).

What is printed is how far resident memory rose, in bytes, above its level with the model loaded and warmed by a short
prefill. The kernel's high-water mark is put back to that level first, so that loading does not hide the rise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # proc(5): put the peak resident set size back to the present one
WARM_TOKENS = 8


def measure(arm: str, folder: Path, num_tokens: int) -> int | None:
    """Bytes that a prefill took in a fresh process of one thread; None where the system does not tell."""
    if not (STATUS.is_file() and CLEAR.is_file()):
        return None
    command = [sys.executable, "-m", "bench.memory", arm, str(folder), str(num_tokens)]
    found_at = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": found_at}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {arm} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def _status_bytes(field: str) -> int:
    [line] = [line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def _prefill(arm: str, folder: Path) -> Any:
    """A function of token ids; what it returns keeps the cache alive, as decoding would."""
    if arm == "native":
        from bench.native import load_native, prefill

        native = load_native(folder)
        return lambda ids_BS: prefill(native, ids_BS)
    from twotower_eval.engine.models import load_model

    model = load_model(folder)

    @torch.inference_mode()
    def ours(ids_BS: torch.Tensor) -> Any:
        context = model.prefill(ids_BS)
        return context, model.next_logits(context)

    return ours


def main(arm: str, folder: str, num_tokens: str) -> None:
    """Print the rise."""
    torch.set_num_threads(1)
    prefill = _prefill(arm, Path(folder))
    ids_BS = torch.randint(4, 1000, (1, int(num_tokens)), generator=torch.Generator().manual_seed(0))
    prefill(ids_BS[:, :WARM_TOKENS])
    CLEAR.write_text(CLEAR_PEAK, encoding="ascii")
    before = _status_bytes("VmRSS")
    kept = prefill(ids_BS)
    print(_status_bytes("VmHWM") - before)
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
