"""Nothing that a user can type or break ends in a traceback: damaged tables, odd terminals, logs without a terminal."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from antdiff import _progress
from antdiff._command import command
from antdiff._csv import DamagedTableError, read_table, table_text
from antdiff._progress import progress_bar
from antdiff.cli import main
from antdiff.train.log import CsvLogger, read_csv

GOOD = "step,loss\n2,0.5\n4,0.25\n"
DAMAGED = {
    "short row": ("step,loss\n2\n4,0.25\n", "row 2: must hold 2 numbers; got 1", [4]),
    "long row": ("step,loss\n2,0.5,9\n4,0.25\n", "row 2: must hold 2 numbers; got 3", [4]),
    "no header": ("2,0.5\n4,0.25\n", "row 1: must hold the names of the columns, 'step' among them; got '2,0.5'", []),
    "semicolons": (GOOD.replace(",", ";"), "row 1: must hold the names of the columns", []),
    "a name twice": ("step,loss,loss\n2,1,1\n", "row 1: must hold the names of the columns", []),
    "header twice": (GOOD + GOOD, "row 4: step must be a number; got 'step'", [2, 4]),
    "NUL": (GOOD + "\0\0\n", "row 4: must hold 2 numbers; got 1", [2, 4]),
    "words": ("step,loss\n2,low\n4,0.25\n", "row 2: loss must be a number; got 'low'", [4]),
    "half a step": ("step,loss\n2.5,1\n4,0.25\n", "row 2: step must be a whole number above that of the row", [4]),
    "no step": ("step,loss\nnan,1\n4,0.25\n", "row 2: step must be a whole number", [4]),
    "endless step": ("step,loss\ninf,1\n4,0.25\n", "row 2: step must be a whole number", [4]),
    "rows swapped": ("step,loss\n4,0.25\n2,0.5\n", "row 3: step must be a whole number above that of the row", [4]),
    "not text": (GOOD + "\xff\xfe,1\n", "row 4: step must be a number", [2, 4]),
    "line in two": ("step,loss\n2,0.5\n4,\x0b0.25\n", "row 3: must end like a line of text", [2]),
    "endless cell": (GOOD + '6,"' + "1" * 200_000 + "\n", "row 4: field larger than field limit", [2, 4]),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_table_is_named_with_its_row_and_the_run_goes_on(kind: str, tmp_path: Path) -> None:
    text, message, left = DAMAGED[kind]
    path = tmp_path / "a run" / "metrics.csv"
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")) as error:
        read_csv(path)
    assert f"--resume {shlex.quote(str(path.parent))}" in str(error.value)
    with pytest.warns(UserWarning, match=re.escape(message)):
        log = CsvLogger(path, start=4)
    assert [row["step"] for row in read_csv(path)] == left
    assert (path.parent / "metrics.csv.damaged").read_text(encoding="latin-1") == text, "nothing is lost"
    log.log(6, {"loss": 0.125})
    assert [row["step"] for row in read_csv(path)] == [*left, 6]
    CsvLogger(path, start=6)  # is whole again


@pytest.mark.parametrize(
    "text",
    ["\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), GOOD + "\n", GOOD + "6,0.1", '"step","loss"\n2,"0.5"\n4,0.25\n'],
)
def test_what_editors_do_to_a_whole_table_is_no_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(text.encode())
    CsvLogger(tmp_path / "metrics.csv", start=4)
    assert (tmp_path / "metrics.csv").read_text() == GOOD
    assert not (tmp_path / "metrics.csv.damaged").exists()


def test_a_row_with_other_columns_fits_the_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(GOOD)
    log = CsvLogger(path, start=4)
    log.log(6, {"loss": 0.1, "stage": 2.0})
    log.log(8, {"stage": 3.0})
    names, rows = read_table(path, "step")
    assert names == ["step", "loss", "stage"]
    assert table_text(rows, names, "step") == "step,loss,stage\n2,0.5,nan\n4,0.25,nan\n6,0.1,2.0\n8,nan,3.0\n"
    assert issubclass(DamagedTableError, ValueError)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (zlib.error("Error -3 while decompressing"), "error: Error -3 while decompressing"),
        (Image.DecompressionBombError("a large image"), "DecompressionBombError: a large image"),
        (TypeError("wrong"), "TypeError: wrong"),
        (KeyError("loss"), "KeyError: 'loss'"),
        (MemoryError(), "MemoryError"),
        (EOFError("cut"), "EOFError: cut"),
        (RuntimeError("two\n  lines"), "two lines"),
    ],
)
def test_every_error_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("antdiff.train.run.make_clusters", fail)
    assert main(["cluster"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"antdiff: error: {line}"
    assert "ANTDIFF_DEBUG=1" in second
    monkeypatch.setenv("ANTDIFF_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["cluster"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_what_is_printed(encoding: str, tmp_path: Path) -> None:
    code = (
        "import os, sys; from antdiff.cli import main; from antdiff._command import command\n"
        "main(['--version']); print('2.2 \\xb1 0.5', 'Fr\\xe9chet', '\\u2500', '\\U0001f600', os.fsdecode(b'\\xff'))\n"
        "main(['--help'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    line = done.stdout.splitlines()[1]
    expected = {
        "ascii": rb"2.2 +- 0.5 Frechet - \U0001f600 " + b"\xff",
        "latin-1": b"2.2 \xb1 0.5 Fr\xe9chet - " + rb"\U0001f600 " + b"\xff",
        "utf-8": "2.2 ± 0.5 Fréchet ─ \U0001f600 ".encode() + b"\xff",
    }
    assert line == expected[encoding]
    assert b"train" in done.stdout


def test_printed_paths_are_never_options() -> None:
    assert command("report", Path("-run")).endswith(" report ./-run")
    assert command("report", Path("a run")).endswith(" report 'a run'")


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress_bar(100_000, unit="step") as bar:
        for i in range(100_000):
            bar.update()
            if i % 20 == 0:
                bar.set_postfix_str(f"loss {i}", refresh=False)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2, "the start and the end; a minute has not passed"
    assert "\r" not in file.getvalue()
    assert "0/100000" in lines[0]
    assert "100000/100000" in lines[1]
    assert "loss 99980" in lines[1]
    monkeypatch.setattr(_progress, "SECONDS_PER_LINE", 0.0)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress_bar(5, unit="step") as bar:
        for _ in range(5):
            bar.update()
    assert {int(number) for number in re.findall(r"(\d)/5", file.getvalue())} == {*range(6)}
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(5, unit="step") as bar:
        bar.update()


def test_a_stopped_run_promises_no_checkpoint_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("antdiff.experiments.evaluate.execute", lambda *_, **__: None)
    assert main(["train", "--out", str(tmp_path / "a run")]) == 130
    error = capsys.readouterr().err
    assert "there is no checkpoint yet, so it starts again" in error
    assert f"--resume {shlex.quote(str(tmp_path / 'a run'))}\n" in error
    (tmp_path / "a run" / "checkpoints").mkdir()
    (tmp_path / "a run" / "checkpoints" / "step-00000001.safetensors").write_bytes(np.zeros(3).tobytes())
    monkeypatch.undo()
    assert main(["sample", str(tmp_path / "a run")]) == 1
    assert "step-00000001.safetensors cannot be read" in capsys.readouterr().err
