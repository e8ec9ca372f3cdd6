"""Runs do not touch each other: each has its own folder, which it locks, and no file of the user is overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from antdiff._devices import choose_device
from antdiff._files import folder_written_whole, write_atomically
from antdiff._folders import MARKER, FolderInUseError, holds_results, locked, new_folder, output_folder, owner
from antdiff.cli import main
from antdiff.data import ImageData, load_data
from antdiff.experiments.compare import compare
from antdiff.plotting import new_figure
from antdiff.plotting._figure import save_figure
from antdiff.plotting.images import save_grid
from antdiff.train import run as runs
from antdiff.train.checkpoint import CheckpointError
from antdiff.train.config import TrainConfig
from antdiff.train.loop import train
from antdiff.train.models import noise_schedule
from antdiff.train.run import RUN_FILES, load_run_data, start_run

TINY = TrainConfig(
    steps=4, batch_size=9, log_every=2, checkpoint_every=2, device="cpu", eval_samples=12, eval_seeds=1, sample_steps=1
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def last_state(run: Path) -> dict[str, Any]:
    state = runs.last_state(run)
    assert state is not None
    return state


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
    monkeypatch.setattr("antdiff.distributed.launch.os.getppid", lambda: 1)
    start_run(TINY, Path("runs/digits-pcgrad-2"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("antdiff.experiments.evaluate.execute", lambda config, run, **_: resumed.append(run))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", *settings]) == 130
    assert resumed == [Path("mine"), Path("mine"), Path("runs/digits-pcgrad-0"), Path("runs/digits-pcgrad-0")]


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 0.5}, r"lr=0\.5 \(saved: 0\.001\)"),
        ({"seed": 5, "method": "nash"}, r"method='nash' \(saved: 'pcgrad'\), seed=5 \(saved: 0\)"),
        ({"batch_size": 10}, r"batch_size=10 \(saved: 9\)"),
        ({"clusters": "timestep"}, r"clusters='timestep' \(saved: 'log-snr'\), clusters\.json with starts \[0, 200,"),
    ],
)
def test_checkpoints_of_other_settings_are_not_adopted(
    changes: dict[str, object], difference: str, digits: ImageData, tmp_path: Path
) -> None:
    run = start_run(TINY, tmp_path / "run")
    assert train(replace(TINY, steps=2), digits, run, progress=False)
    other = replace(TINY, **changes)  # type: ignore[arg-type]
    start_run(other, tmp_path / "other")
    shutil.copytree(run / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match=rf"step-00000002\.safetensors does not fit .*; got {difference}"):
        train(other, digits, tmp_path / "other", progress=False)


def test_checkpoints_of_other_images_are_not_adopted(digits: ImageData, tmp_path: Path) -> None:
    run = start_run(TINY, tmp_path / "run")
    assert train(replace(TINY, steps=2), digits, run, progress=False)
    few = replace(digits, train=digits.train[:-3], train_labels=None, held_out_labels=None)
    brighter = replace(digits, held_out=digits.held_out.clamp(min=1))
    larger = replace(digits, train=torch.nn.functional.pad(digits.train, (1, 1, 1, 1)))
    relabelled = replace(digits, train_labels=None, held_out_labels=None)
    for data, difference in (
        (few, r"1344 training images \(recorded: 1347; 0 are new, 3 are missing\)\. Restore .*--accept-changed-data"),
        (brighter, r"got 450 held-out images \(recorded: 450; 450 are new, 450 are missing\)"),
        (larger, r"images of 10x10 pixels with 1 channel \(recorded: 8x8 .* its own size only"),
        (relabelled, "got the same images in another order or with other classes"),
    ):
        with pytest.raises(CheckpointError, match=difference):
            train(TINY, data, run, progress=False)


def test_a_comparison_and_an_analysis_do_not_adopt_runs_on_other_images(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(digits, train=digits.train[:30], held_out=digits.held_out[:20], train_labels=None,
                  held_out_labels=None)  # fmt: skip
    cell = tmp_path / "c" / "vanilla-seed0"
    config = replace(TINY, method="vanilla", timesteps="uniform", steps=2)
    start_run(config, cell)
    assert train(config, few, cell, progress=False)
    (cell / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the data must be the images"):
        compare(replace(TINY, steps=2), ["uw"], [0], tmp_path / "c", progress=False)
    for kind in ("affinity", "conflict", "transfer"):
        assert main(["analyze", kind, str(cell), "--device", "cpu", "--out", str(tmp_path / kind)]) == 1
        assert "the data must be the images" in capsys.readouterr().err


def small_images(folder: Path, numbers: Iterable[int]) -> None:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


QUICK = ["--image-size", "8", "--batch-size", "10", "--log-every", "1", "--checkpoint-every", "1", "--device", "cpu",
         "--eval-samples", "10", "--eval-seeds", "1", "--sample-steps", "1", "--grid-every", "0"]  # fmt: skip


def test_changed_images_are_refused_and_can_be_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("antdiff.experiments.evaluate.evaluate", lambda *_, **__: {})
    small_images(Path("images"), range(40))
    run = Path("a run")
    assert main(["train", "--data", "images", *QUICK, "--steps", "2", "--out", str(run)]) == 0
    before = load_data("images", image_size=8)
    small_images(Path("images"), range(1000, 1030))  # new images change the split of load_data
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 1
    error = capsys.readouterr().err
    assert "training images (recorded: 36; " in error
    assert "'a run' --accept-changed-data" in error
    assert last_state(run)["step"] == 2
    assert main(["train", "--resume", str(run), "--steps", "4", "--accept-changed-data"]) == 0
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0  # the new images are now those of the run
    state = last_state(run)
    assert state["step"] == 5
    recorded = state["origin"]["data"]
    data = load_run_data(TrainConfig.load(run / "config.json"), run)
    assert recorded["digest"] == data.digest()
    assert len(data.train) + len(data.held_out) == 70
    for old, new in ((before.train, data.train), (before.held_out, data.held_out)):
        assert {image.numpy().tobytes() for image in old} <= {image.numpy().tobytes() for image in new}
    for path in sorted(Path("images").iterdir())[30:]:  # fewer images than the rows of the epoch that was begun
        path.unlink()
    assert main(["train", "--resume", str(run), "--steps", "6"]) == 1
    assert "are missing" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--steps", "6", "--accept-changed-data"]) == 0
    assert main(["train", "--data", "images", "--accept-changed-data"]) == 1
    assert "Pass --resume RUN too" in capsys.readouterr().err


def test_a_run_is_sampled_without_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("antdiff.experiments.evaluate.evaluate", lambda *_, **__: {})
    small_images(Path("images"), range(20))
    assert main(["train", "--data", "images", *QUICK, "--steps", "1", "--out", "run"]) == 0
    shutil.rmtree("images")
    assert main(["sample", "run", "-n", "2", "--device", "cpu"]) == 0
    with np.load("run/samples-2.npz") as archive:
        assert archive["arr_0"].shape == (2, 8, 8, 3)
    assert main(["sample", "run", "-n", "2", "--out", "."]) == 1
    assert "out must be the path of the results" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("steps", [2, 4])
def test_damaged_settings_and_clusters_are_read_from_the_checkpoint(
    steps: int, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 4 steps the run is finished, with 2 it goes on."""
    monkeypatch.setattr("antdiff.experiments.evaluate.evaluate", lambda *_, **__: {})
    whole, run = (start_run(replace(TINY, lr=0.002), tmp_path / name) for name in ("whole", "run"))
    config = TrainConfig.load(run / "config.json")
    assert train(config, digits, whole, progress=False)
    assert train(replace(config, steps=steps), digits, run, progress=False)
    good = {name: (run / name).read_text() for name in ("config.json", "clusters.json")}
    for name, text in good.items():
        for damage in (text[:-20], "", "[]", text.replace("5", "five"), text.encode()[:9] + b"\xff\xfe", None):
            if damage is None:
                (run / name).unlink()
            else:
                (run / name).write_bytes(damage if isinstance(damage, bytes) else damage.encode())
            assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
            assert re.search(rf"^antdiff: warning: .*{name}.* checkpoint are used$", capsys.readouterr().err, re.M)
            assert (run / name).read_text() == good[name], damage
    states = [last_state(folder) for folder in (whole, run)]
    for key, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][key], value)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    damage: str, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("antdiff.experiments.evaluate.evaluate", lambda *_, **__: {})
    run = start_run(TINY, tmp_path / "run")
    assert train(TINY, digits, run, progress=False)
    whole, path = last_state(run), run / "checkpoints" / "step-00000004.safetensors"
    raw = path.read_bytes()
    damaged = {"cut": raw[:-3], "flipped": raw[:-1] + bytes([raw[-1] ^ 1]), "empty": b""}[damage]
    path.write_bytes(damaged)
    assert main(["train", "--resume", str(run)]) == 0
    error = capsys.readouterr().err
    assert re.search(r"step-00000004\.safetensors is damaged .*, and step-00000002\.safetensors is tried$", error, re.M)
    assert path.with_name(f"{path.name}.damaged").read_bytes() == damaged
    for key, value in last_state(run)["model"].items():
        assert torch.equal(whole["model"][key], value)
    for other in (path, path.with_name("step-00000002.safetensors")):
        other.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="step-00000002"):
        train(TINY, digits, run, progress=False)


# ---- settings ----------------------------------------------------------------------------------------------------


def test_every_setting_has_its_type_checked(tmp_path: Path) -> None:
    wrong: dict[str, tuple[object, ...]] = {
        "int": ("100", 100.0, None, True, [1]),
        "float": ("0.1", None, False),
        "bool": (0, "true", None),
        "int | None": ("1", 1.0, True),
    }
    for field in fields(TrainConfig):
        for value in wrong.get(str(field.type), (1, None, ["uw"], 0.5)):
            message = rf"{field.name} must be of type .*; got {re.escape(repr(value))}, of type {type(value).__name__}"
            with pytest.raises(TypeError, match=message):
                replace(TINY, **{field.name: value})
            path = tmp_path / "config.json"
            path.write_text(json.dumps({**asdict(TINY), field.name: value}))
            with pytest.raises(ValueError, match=rf"config\.json has a setting that is not allowed: {message}"):
                TrainConfig.load(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"k": 1001, "batch_size": 2000}, "k must be at most 1000, the number of timesteps; got 1001"),
        ({"log_every": 10**9}, "log_every must be at most 3355443 with 5 clusters"),
        ({"experts": -1}, "experts must be at least 0; got -1"),
        ({"patience": -1}, "patience must be at least 0; got -1"),
        ({"data": ""}, "data must not be empty"),
        ({"clusters": " "}, "clusters must not be empty"),
        ({"sample_steps": 1001}, r"sample_steps must be in \[1, 1000\]"),
        ({"lr": float("inf")}, "lr must be positive and finite"),
        ({"ema": float("nan")}, r"ema must be in \[0, 1\)"),
    ],
)
def test_every_bound_is_checked_at_the_start(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **setting)


@pytest.mark.parametrize("name", ["meta", "mps", "gpu", "cuda:x", ""])
def test_devices_that_cannot_train_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:<n>; got"):
        choose_device(name)


@pytest.mark.parametrize("damage", ["[]", "1", '{"steps": 3}', "[" * 100_000, '{"steps": 1e4', "\xff"])
def test_damaged_settings_are_one_line_that_names_the_file(damage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(damage, encoding="latin-1")
    with pytest.raises(ValueError, match=r"/config\.json (is not the config\.json of a run: |must have every setting)"):
        TrainConfig.load(tmp_path / "config.json")


def test_data_that_cannot_be_measured_are_refused_before_training(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for few, message in (
        (replace(digits, held_out=digits.held_out[:1]), "at least 2 held-out images, for their covariance; got 1"),
        (replace(digits, train=digits.train[:1]), "at least 2 training images, for their covariance; got 1"),
    ):
        monkeypatch.setattr(runs, "load_data", lambda *_, few=few, **__: few)
        assert main(["train"]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
