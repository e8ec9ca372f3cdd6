"""``torchrun -m antdiff train`` gives the same run on any number of processes, and after one of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from antdiff._folders import locked
from antdiff.train.checkpoint import latest_checkpoint, load_checkpoint
from antdiff.train.config import TrainConfig
from antdiff.train.log import read_csv
from antdiff.train.run import start_run

LIMIT = 240.0  # seconds; a run takes 10 to 30 on an idle machine
SETTINGS = ["--steps", "40", "--batch-size", "22", "--log-every", "10", "--checkpoint-every", "10", "--grid-every", "0",
            "--device", "cpu",
            "--eval-samples", "10", "--eval-seeds", "1", "--sample-steps", "1"]  # fmt: skip


def start(ranks: int, out: Path, *, restarts: int = 0) -> subprocess.Popen[str]:
    return launch(ranks, ["-m", "antdiff", "train", *SETTINGS, "--out", str(out)], restarts)


def launch(ranks: int, program: list[str], restarts: int = 0) -> subprocess.Popen[str]:
    package = Path(sys.modules["antdiff"].__file__ or "").parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package), "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                f"--max-restarts={restarts}", "--monitor-interval=0.1"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 else []), *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return the output of a process. In every case the process and its children have ended afterwards."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, output
        return output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_state(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def process_of_rank(launcher: int, rank: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no child of {launcher} is rank {rank}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("torchrun") / "four"
    output = finish(start(4, run))
    assert output.count("run folder") == 1, "rank 0 alone prints"
    assert output.count("FD (digits-CNN)") == 1
    return run


def test_four_ranks_train_as_one_process_does(uninterrupted: Path, tmp_path: Path) -> None:
    finish(start(1, tmp_path / "one"))
    one, four = last_state(tmp_path / "one"), last_state(uninterrupted)
    assert one["rng"].keys() == four["rng"].keys()
    assert all(torch.equal(state, four["rng"][name]) for name, state in one["rng"].items())
    alone, together = (read_csv(run / "metrics.csv") for run in (tmp_path / "one", uninterrupted))
    for a, b in zip(alone, together, strict=True):
        # The sums have another order, and Adam turns the sign of a gradient near zero into a full step of size lr.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    files = {path.name for path in uninterrupted.iterdir()}
    assert files >= {"metrics.csv", "results.json", "samples.png", "curves.png", "model"}


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    process = start(4, run, restarts=1)
    try:
        deadline = time.monotonic() + LIMIT
        while not (run / "checkpoints" / "step-00000010.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"  # noqa: PT018
            time.sleep(0.02)
        os.kill(process_of_rank(process.pid, 2), signal.SIGKILL)
    finally:
        output = finish(process)
    assert "has died or hangs" in output
    assert output.count("run folder") == 2, "it was started twice"
    killed, whole = last_state(run), last_state(uninterrupted)
    assert killed["step"] == whole["step"] == 40
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(killed[part][name], value), name
    assert [row["step"] for row in read_csv(run / "metrics.csv")] == [10, 20, 30, 40]


def test_a_run_that_is_in_use_is_refused_on_every_rank(tmp_path: Path) -> None:
    run = start_run(TrainConfig(batch_size=22, steps=1, device="cpu"), tmp_path / "run")
    with locked(run, "run"):
        process = launch(2, ["-m", "antdiff", "train", "--resume", str(run)])
        output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert output.count(f"{run} is in use: process {os.getpid()} on ") == 1, "rank 0 alone prints"
    assert not (run / "metrics.csv").exists()


def test_the_accelerate_example_trains_alike_on_two_ranks() -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "accelerate_digits.py"
    output = finish(launch(2, [str(example), "--cpu", "--steps", "40"]))
    losses = [float(line.split()[3]) for line in output.splitlines() if line.startswith("step")]
    assert len(losses) == 2, "the first process alone prints"
    assert losses[1] < losses[0] < 1, "guessing nothing costs 1"
    assert "weights alike on 2 ranks: True" in output
