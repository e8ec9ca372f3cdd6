"""A sample of ``kill_study.py``: a few SIGKILLs of ``antdiff train``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import antdiff


def test_a_killed_training_ends_as_if_nothing_had_happened() -> None:
    program = Path(__file__).with_name("kill_study.py")
    command = [sys.executable, "-W", "ignore", str(program), "--kills", "4", "--seed", "11", "--only", "train"]
    package = str(Path(antdiff.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    last = done.stdout.splitlines()[-2:]
    assert last[0].startswith("4 kills {'train': 4}"), last
    assert last[1] == "0 faults"
