"""Tests of the command line: every command runs, and every mistake ends in one line that says what to do."""

from __future__ import annotations

import gzip
import html
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from antdiff import balancing
from antdiff._command import command
from antdiff.cli import main
from antdiff.cli.cluster import Schedule
from antdiff.diffusion import SCHEDULES
from antdiff.info import train_extra_remedy
from antdiff.train.config import TrainConfig
from antdiff.train.run import start_run

QUICK = [
    "--steps",
    "3",
    "--batch-size",
    "6",
    "--eval-samples",
    "12",
    "--eval-seeds",
    "1",
    "--sample-steps",
    "2",
    "--device",
    "cpu",
]


@pytest.mark.usefixtures("few_digits")
def test_train_resume_sample_and_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "-k", "4"]) == 0
    out = capsys.readouterr().out
    assert "FD (digits-CNN)" in out
    assert "runs/digits-pcgrad-0/samples.png" in out
    run = Path("runs/digits-pcgrad-0")

    assert main(["report", str(run), "--out", "."]) == 1
    assert "out must be the path of a file; . is a folder" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/report.html\n"
    assert "digits, pcgrad" in (run / "report.html").read_text()

    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
    assert (run / "checkpoints" / "step-00000004.safetensors").exists()
    assert TrainConfig.load(run / "config.json").steps == 4  # so that another resumption also runs to step 4
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 1
    assert "steps must be at least 4" in capsys.readouterr().err

    assert main(["sample", str(run), "--steps", "1001"]) == 1
    assert "steps must be in [1, 1000]" in capsys.readouterr().err
    assert main(["sample", str(run), "-n", "13", "--steps", "1", "--out", "here/pictures.v1"]) == 0
    with np.load("here/pictures.v1.npz") as archive:
        images = archive["arr_0"]
    assert (images.dtype, images.shape) == (np.uint8, (13, 8, 8, 1))
    with Image.open("here/pictures.v1.png") as grid:  # the first image of the grid is the first image of the archive
        pixels = np.asarray(grid)
    assert np.array_equal(pixels[4:68:8, 4:68:8], images[0, :, :, 0])

    capsys.readouterr()
    assert main(["cluster", str(run), "--save", "new/c.json", "--plot", "c.png"]) == 0
    assert "4 clusters of 1000 timesteps" in capsys.readouterr().out
    assert main(["cluster", "--by", "new/c.json", "-k", "4"]) == 0
    assert Path("c.png").stat().st_size > 1000


def test_cluster_knows_every_schedule() -> None:
    assert set(get_args(Schedule)) == set(SCHEDULES)


def test_cluster_prints_the_published_optimum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["0..132", "133..371", "372..652", "653..880", "881..999"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--data", "nowhere"], "the folder 'nowhere' does not exist"),
        (["train", "--resume", "nowhere"], "nowhere must be the folder of a run"),
        (["train", "--resume", "a", "--out", "b"], "out and resume are mutually exclusive"),
        (["train", "--clusters", "none"], "clusters must be timestep, log-snr or a saved clusters JSON"),
        (["train", "--wandb", "project"], "wandb is not installed: pip install wandb"),
        (["sample", "nowhere"], "nowhere must be the folder of a run"),
        (["compare", "--seeds", "1", "1"], "seeds must be distinct"),
        (["cluster", "-k", "2000"], "k must be at most T"),
        (["train", "--sample-steps", "1001"], "sample_steps must be in [1, 1000], since each DDIM step"),
        (["train", "--steps", "0"], "error: steps must be at least 1; got 0"),
        (["compare", "-k", "9", "--batch-size", "3"], "error: k must be at most batch_size"),
    ],
)
def test_mistakes_end_in_one_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("antdiff: error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "cuda:99"], "device must be one that torch can use; got 'cuda:99'"),
        (["--data", "images", "--image-size", "15"], "image_size must be a multiple of 2, for the UNet"),
        (["--data", "images", "--image-size", "34", "--model", "dit"], "image_size must be a multiple of 4, the patch"),
    ],
)
def test_a_setting_that_does_not_fit_leaves_no_folder_behind(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i in range(20):
        Image.new("L", (8, 8), i).save(f"images/{i}.png")
    assert main(["train", *args, "--out", "run"]) == 1
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("start", [["train"], ["compare", "--methods", "linear"]])
@pytest.mark.parametrize("kind", ["few", "none", "not square", "empty string", "conflict", "bomb", "damaged gzip"])
def test_data_that_cannot_be_used_leaves_no_folder_behind(
    start: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, shape, message = "images", (30, 8, 8), ""
    Path(data).mkdir()
    if kind in ("not square", "none", "damaged gzip"):
        shape = (30, 8, 6) if kind == "not square" else (0, 8, 8) if kind == "none" else shape
        for part in ("train", "t10k"):
            for stem, size in ((f"{part}-images-idx3-ubyte", shape), (f"{part}-labels-idx1-ubyte", shape[:1])):
                header = struct.pack(f">{1 + len(size)}i", 0x800 + len(size), *size)
                Path(data, f"{stem}.gz").write_bytes(gzip.compress(header + bytes(math.prod(size))))
        message = "images must be square" if kind == "not square" else "train-images-idx3-ubyte.gz must hold at least 2"
        if kind == "damaged gzip":
            path, message = Path(data, "t10k-images-idx3-ubyte.gz"), "t10k-images-idx3-ubyte.gz must be a complete gzip"
            path.write_bytes(path.read_bytes()[:12] + bytes(9))
    else:
        for i in range(19 if kind == "few" else 20):
            Image.new("L", (8, 8), i).save(f"images/{i}.png")
        message = "images must hold at least 20 images (.bmp .gif .jpeg .jpg .png .tif .tiff .webp); found 19"
        if kind == "empty string":
            data, message = "", "got an empty string"
        elif kind == "conflict":
            Path(data).rename("digits")
            data, message = "digits", "Pass ./digits for the folder"
        elif kind == "bomb":
            Image.new("1", (10_000, 9_000)).save("images/bomb.png")
            message = "images/bomb.png must have at most"
    assert main([*start, *QUICK, "--data", data, "--image-size", "8", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("antdiff: error: ")
    assert message in error
    assert error.count("\n") == 2  # the second line says how to see the traceback
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_run_in_the_folder_of_its_images_does_not_train_on_its_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from antdiff.data import load_data

    monkeypatch.chdir(tmp_path)
    for i in range(24):
        Image.new("L", (8, 8), i).save(f"{i}.png")
    before = load_data(".", image_size=8)
    args = [*QUICK, "--data", ".", "--image-size", "8", "--grid-every", "2"]
    assert main(["train", *args]) == 0
    run = Path("runs") / f"{tmp_path.name}-pcgrad-0"
    assert main(["sample", str(run), "-n", "2", "--steps", "1"]) == 0
    assert main(["compare", *args, "--methods", "linear", "--seeds", "0"]) == 0
    assert len(list(Path("runs").rglob("*.png"))) > 10
    assert load_data(".", image_size=8).digest() == before.digest()
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0


def test_a_run_that_stops_early_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("antdiff.experiments.evaluate.execute", lambda *_, **__: None)
    assert main(["train", "--out", str(tmp_path / "r")]) == 130
    assert f"antdiff train --resume {tmp_path / 'r'}\n" in capsys.readouterr().err

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # while the run is measured

    monkeypatch.setattr("antdiff.experiments.evaluate.execute", interrupted)
    assert main(["train", "--out", str(tmp_path / "s")]) == 130
    assert f"antdiff train --resume {tmp_path / 's'}\n" in capsys.readouterr().err
    monkeypatch.setattr("antdiff.experiments.compare.execute", interrupted)
    assert main(["compare", "--out", str(tmp_path / "c")]) == 130
    assert "repeat the same command to resume" in capsys.readouterr().err
    # the folder now holds a run, which a second run does not overwrite
    assert main(["train", "--out", str(tmp_path / "r")]) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.usefixtures("few_digits")
def test_printed_commands_work_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program = re.escape(command())
    tried: list[str] = []

    def follow(text: str, *further: str) -> None:
        (printed,) = re.findall(rf"{program} (.+)$", text, re.MULTILINE)
        arguments = shlex.split(printed)
        assert main([*arguments, *further]) == 0, printed
        tried.append(" ".join(arguments[:2]))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert main(["train", *QUICK, "--out", "a run"]) == 0
    follow(capsys.readouterr().out)
    assert Path("a run/report.html").exists()

    assert main(["train", *QUICK, "--out", "a run"]) == 1  # the folder already holds a run
    follow(capsys.readouterr().err)

    with monkeypatch.context() as patched:
        patched.setattr("antdiff.experiments.evaluate.execute", stop)
        assert main(["train", *QUICK, "--out", "my other run"]) == 130
        stopped = capsys.readouterr().err
    assert main(["sample", "my other run"]) == 1  # no checkpoint yet
    without_checkpoint = capsys.readouterr().err
    assert main(["analyze", "conflict", "my other run"]) == 1
    follow(capsys.readouterr().err)
    follow(without_checkpoint)
    follow(stopped)

    start_run(TrainConfig.load(Path("my other run/config.json")), Path("a third"))
    assert main(["report", "a third"]) == 0
    page = Path("a third/report.html").read_text()
    (of_report,) = re.findall(r"<code>(.+?)</code> resumes", page)
    follow(html.unescape(of_report))

    capsys.readouterr()
    assert main(["analyze", "affinity", "a run", "--timesteps", "5", "--images", "8", "--device", "cpu"]) == 0
    follow(capsys.readouterr().out, *QUICK, "-k", "5")
    assert tried == ["report a run", *["train --resume"] * 5, "train --clusters"]


def test_printed_commands_start_the_right_installation(tmp_path: Path) -> None:
    done = subprocess.run(command("info"), shell=True, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("antdiff")


def test_help_and_mistyped_names_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from antdiff.cli import main\n"
        "for args in ([], ['train', '--help'], ['compare', '--help'], ['train', '--method', 'pcgard']):\n"
        "    try: main(args)\n"
        "    except SystemExit as exit: print(exit.code)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "0", "0", "2"]
    assert done.stdout.endswith("False\n")
    assert "aligned_mtl" in done.stdout
    assert "'imtl_l', 'famo', 'stch'" in done.stderr


def test_help_wraps_at_the_width_of_the_terminal_and_not_where_the_source_does() -> None:
    code = "import sys; from antdiff.cli import main; main(sys.argv[1:])"
    for args in (["train"], ["analyze", "affinity"]):
        run = [sys.executable, "-c", code, *args, "--help"]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "1000"})
        text = re.sub(r"[│ ]+", " ", done.stdout)
        assert "linear (the plain mean over clusters)" in text or args != ["train"]
        assert "auto is exact if that fits into the memory" in text or args == ["train"]
        assert "{None}|PATH" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("antdiff ")


def test_compare_all_is_every_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("antdiff.experiments.compare.compare", lambda config, methods, *_, **__: asked.extend(methods))
    assert main(["compare", "--methods", "all", "--out", str(tmp_path)]) == 130
    assert asked == ["vanilla", *balancing.names()]


def test_help_needs_no_diffusers_and_a_missing_package_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import antdiff.cli\n"
        "try: antdiff.cli.main(['train', '--help'])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert antdiff.cli.main(['cluster']) == 0\n"
        "assert antdiff.cli.main(['train']) == 1\n"
        "sys.modules['tyro'] = None\n"
        "assert antdiff.cli.main(['train']) == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--timesteps" in done.stdout
    assert done.stderr.count(train_extra_remedy()) == 2
