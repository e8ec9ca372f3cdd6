"""Runs do not touch each other: each has its own folder, which it locks, and no file of the user is overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from antdiff._files import folder_written_whole, write_atomically
from antdiff._folders import MARKER, FolderInUseError, holds_results, locked, new_folder, output_folder, owner
from antdiff.cli import main
from antdiff.data import ImageData, load_data
from antdiff.experiments.compare import compare
from antdiff.plotting import new_figure
from antdiff.plotting._figure import save_figure
from antdiff.plotting.images import save_grid
from antdiff.train.config import TrainConfig
from antdiff.train.loop import train
from antdiff.train.models import noise_schedule
from antdiff.train.run import RUN_FILES, start_run

TINY = TrainConfig(
    steps=4, batch_size=9, log_every=2, checkpoint_every=2, device="cpu", eval_samples=12, eval_seeds=1, sample_steps=1
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Path], int]]:
    """A function that lets another process lock a folder and returns the process. All of them end with the test."""
    code = (
        "import sys; from pathlib import Path; from antdiff._folders import locked\n"
        "with locked(Path(sys.argv[1]), 'run'): print('locked', flush=True); sys.stdin.read()"
    )
    with ExitStack() as stack:

        def lock(folder: Path) -> int:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.communicate)
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            return process.pid

        yield lock


# ---- folders -----------------------------------------------------------------------------------------------------


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    new = partial(new_folder, tmp_path / "runs" / "digits")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-1").write_text("a file counts as taken")
    noise_schedule()  # the first import of diffusers is not safe in several threads
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda seed: start_run(replace(TINY, seed=seed), new), range(8)))
    assert sorted(made) == sorted(tmp_path / "runs" / f"digits-{i}" for i in (0, *range(2, 9)))
    assert {TrainConfig.load(run / "config.json").seed for run in made} == set(range(8))


def test_a_folder_is_locked_while_its_process_lives_and_no_longer(
    tmp_path: Path, elsewhere: Callable[[Path], int]
) -> None:
    pid = elsewhere(tmp_path)
    with pytest.raises(FolderInUseError, match=rf"is in use: process {pid} on \S+ has been writing in it since 20\d\d"):
        locked(tmp_path, "run").__enter__()
    assert owner(tmp_path)["pid"] == pid, "the refused process leaves the name of the owner alone"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path, "run"), locked(tmp_path, "run"):  # a thread may lock again what it holds
        assert owner(tmp_path)["pid"] == os.getpid()
        with ThreadPoolExecutor(1) as pool, pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
            pool.submit(locked(tmp_path, "run").__enter__).result()
    with pytest.raises(ValueError, match="holds a run, so it cannot hold a comparison"):
        locked(tmp_path, "comparison").__enter__()


def test_a_second_resumption_is_refused_by_name_of_the_first(
    digits: ImageData, tmp_path: Path, elsewhere: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run(TINY, tmp_path / "run")
    assert train(replace(TINY, steps=2), digits, run, progress=False)
    pid = elsewhere(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run), "--steps", "9"]) == 1
    assert f"is in use: process {pid} on " in capsys.readouterr().err
    with pytest.raises(FolderInUseError):
        train(TINY, digits, run, progress=False)
    with pytest.raises(ValueError, match="already holds a run"):
        start_run(TINY, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_repeated_comparison_waits_for_the_first(tmp_path: Path, elsewhere: Callable[[Path], int]) -> None:
    elsewhere(tmp_path)
    with pytest.raises(ValueError, match="holds a run, so it cannot hold a comparison"):
        compare(TINY, ["uw"], [0], tmp_path, progress=False)
    with ThreadPoolExecutor(1) as pool, output_folder(tmp_path / "c", "comparison", ()):
        with pytest.raises(FolderInUseError):
            pool.submit(compare, TINY, ["uw"], [0], tmp_path / "c", progress=False).result()
        assert [path.name for path in (tmp_path / "c").iterdir()] == [MARKER]


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_the_user_are_not_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("my own")
    assert main(["train", "--out", str(mine), "--steps", "2", "--device", "cpu"]) == 1
    assert f"{mine} holds {name}. Pass another --out" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [(name, "my own")]


@pytest.mark.parametrize("name", ["table.txt", "comparison.png", "uw-seed0/metrics.csv"])
def test_a_comparison_leaves_files_of_the_user_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("my own")
    with pytest.raises(ValueError, match=r"out must not hold files that a \w+ would overwrite"):
        compare(TINY, ["uw"], [0], tmp_path, progress=False)
    assert (tmp_path / name).read_text() == "my own"
    assert not (tmp_path / "vanilla-seed0").exists()


def test_an_analysis_leaves_files_of_the_user_alone(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run(TINY, tmp_path / "run")
    assert train(replace(TINY, steps=2), digits, run, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text("my own")
    clusters = (run / "clusters.json").read_text()
    small = {"affinity": ["--timesteps", "3", "--images", "2"], "conflict": ["--batches", "2", "--repeats", "2"],
             "transfer": ["--steps", "1", "--samples", "10"]}  # fmt: skip
    for kind, options in small.items():
        for out, message in ((tmp_path / "mine", "holds summary.json"), (run, "holds a run, so it cannot hold")):
            assert main(["analyze", kind, str(run), *options, "--device", "cpu", "--out", str(out)]) == 1
            assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["summary.json"]
    assert (run / "clusters.json").read_text() == clusters


def test_a_start_that_was_killed_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antdiff.train.run.write_atomically", lambda *_: os._exit(9))
    child = os.fork()
    if child == 0:  # dies before config.json is written
        start_run(TINY, tmp_path / "run")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {MARKER, "clusters.json"}
    start_run(TINY, tmp_path / "run")
    assert TrainConfig.load(tmp_path / "run" / "config.json") == TINY


def test_a_restart_by_torchrun_resumes_only_what_the_same_torchrun_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("antdiff.experiments.evaluate.execute", lambda config, run, **_: resumed.append(run))
    start_run(TINY, Path("foreign"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    settings = ["--steps", "4", "--batch-size", "9", "--log-every", "2", "--checkpoint-every", "2", "--device", "cpu",
                "--eval-samples", "12", "--eval-seeds", "1", "--sample-steps", "1"]  # fmt: skip
    assert main(["train", *settings, "--out", "foreign"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", *settings, "--out", "mine"]) == 130  # the status of a stopped run
    assert main(["train", *settings, "--out", "mine"]) == 130
    assert main(["train", *settings]) == 130
    start_run(TINY, Path("runs/digits-pcgrad-1"))
    monkeypatch.setattr("antdiff.train.ranks.os.getppid", lambda: 1)
    start_run(TINY, Path("runs/digits-pcgrad-2"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("antdiff.experiments.evaluate.execute", lambda config, run, **_: resumed.append(run))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", *settings]) == 130
    assert resumed == [Path("mine"), Path("mine"), Path("runs/digits-pcgrad-0"), Path("runs/digits-pcgrad-0")]


# ---- names and files ---------------------------------------------------------------------------------------------


def test_names_of_folders_are_never_empty() -> None:
    for data in ("images", "images/", ".", "./", "..", "/", "a/.."):
        assert replace(TINY, data=data).data_name.strip("./ "), data
    assert replace(TINY, data=".").data_name == Path.cwd().name


def test_a_folder_is_known_as_results(tmp_path: Path) -> None:
    assert not holds_results(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # many other programs write one
    assert not holds_results(tmp_path)
    assert holds_results(start_run(TINY, tmp_path / "run"))
    (tmp_path / "run" / MARKER).unlink()
    assert holds_results(tmp_path / "run")


@pytest.mark.parametrize("name", ["grid.png", "figure.pdf", "model"])
def test_pictures_and_networks_are_whole_or_unchanged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name

    def write() -> None:
        if name == "grid.png":
            save_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), path)
        elif name == "figure.pdf":
            save_figure(new_figure(2, 2)[0], path)
        else:
            with folder_written_whole(path) as folder:
                (folder / "weights").write_bytes(b"new")
                np.save(folder / "array.npy", np.zeros(1))

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    write()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert before
    monkeypatch.setattr(np, "save", fail)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_symbolic_links_and_pipes_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"one"
    code = "from antdiff._files import write_atomically as w; from pathlib import Path; w(Path('/dev/stdout'), b'two')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"two"
