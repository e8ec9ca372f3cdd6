"""SIGKILL at random points of the commands that write: ``python tests/kill_study.py --kills 100``.

A history is one folder. Its command is started, killed at a random moment, started again as its documentation says
(``--resume`` for a run that has its settings, else the same command), killed again, and in the end left alone. After
every kill each file of the folder must be whole. At the end the results must equal, bit for bit, those of a command
that was never killed, and no temporary file may be left.

The commands run in children that are forked from a process that has imported everything, so that a start takes a second
and not ten. Four ranks are four such children that find each other as those of torchrun do; one of them is killed, or
all. A rank that does not end by itself after another one was killed counts as a fault.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

RUN = ["--batch-size", "10", "--k", "2", "--log-every", "2", "--checkpoint-every", "3", "--grid-every", "6",
       "--device", "cpu", "--eval-samples", "10", "--eval-seeds", "1", "--sample-steps", "1"]  # fmt: skip
LIMIT = 300.0  # seconds for a command, on a machine that others use too
ALONE = 90.0  # seconds in which the other ranks must end after one was killed
MODULES = (
    "antdiff.cli", "antdiff.cli.train", "antdiff.cli.compare", "antdiff.cli.analyze", "antdiff.experiments.evaluate",
    "antdiff.experiments.compare", "antdiff.experiments.analyze", "antdiff.experiments.transfer", "antdiff.plotting",
    "antdiff.experiments.quality", "diffusers.models.unets.unet_2d", "diffusers.models.transformers.dit_transformer_2d",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "sklearn.datasets", "scipy.stats",
    "torch.utils.tensorboard", "torchmetrics", "torch.distributed", "torch.optim", "antdiff.train.loop",
    "antdiff.train.run",
)  # fmt: skip


class Fault(Exception):  # noqa: N818  # it is a finding
    """What a kill has done that it must not."""


class Command:
    """A command line with its folder of results, how it is started again, and what of the results is compared."""

    def __init__(self, name: str, argv: Callable[[Path], list[str]], ranks: int = 1, source: bool = False) -> None:
        self.name, self.argv, self.ranks, self.source = name, argv, ranks, source

    def start(self, folder: Path) -> list[str]:
        argv = self.argv(folder)
        if argv[0] == "train" and (folder / "config.json").exists():
            return ["train", "--resume", str(folder)]
        return argv


def commands(source: Path) -> list[Command]:
    """Return all commands. Those that analyse read the finished run ``source``."""

    def train(folder: Path) -> list[str]:
        return ["train", "--steps", "14", *RUN, "--out", str(folder)]

    def compare(folder: Path) -> list[str]:
        return ["compare", "--methods", "uw", "--seeds", "0", "--steps", "6", *RUN, "--out", str(folder)]

    def affinity(folder: Path) -> list[str]:
        settings = ["--timesteps", "8", "--images", "16", "--memory", "64"]
        return ["analyze", "affinity", str(source), *settings, "--device", "cpu", "--out", str(folder)]

    def conflict(folder: Path) -> list[str]:
        return ["analyze", "conflict", str(source), "--device", "cpu", "--out", str(folder)]

    return [
        Command("train", train),
        Command("train on four ranks", train, ranks=4),
        Command("compare", compare),
        Command("analyze affinity", affinity, source=True),
        Command("analyze conflict", conflict, source=True),
    ]


# ---- processes -------------------------------------------------------------------------------------------------------


def fork(argv: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run ``antdiff <argv>`` in a child; its output goes to ``log``."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(fd, "wb", closefd=False), write_through=True) for fd in (1, 2)
        )
        os.environ.update(environment)
        from antdiff.cli import main

        code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def launch(argv: list[str], ranks: int, log: Path) -> list[int]:
    if ranks == 1:
        return [fork(argv, log, {})]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    return [fork(argv, log, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]


def running(children: list[int]) -> dict[int, int]:
    """Return the exit codes of the children that have ended; a negative code is a signal."""
    ended = {}
    for child in children:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            ended[child] = os.waitstatus_to_exitcode(status)
    return ended


def finish(children: list[int], limit: float) -> dict[int, int]:
    """Wait until all children have ended, and return their exit codes. What takes longer than the limit is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + limit
    left = list(children)
    while left and time.monotonic() < deadline:
        codes.update(running(left))
        left = [child for child in left if child not in codes]
        time.sleep(0.005)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        codes[child] = -999
    return codes


# ---- folders ---------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """Return the files that a reader may open: all but temporary ones and tensorboard's own log."""
    found = []
    for path in sorted(folder.rglob("*")) if folder.exists() else []:
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part == "tensorboard" for part in inside):
            found.append(path)
    return found


def require_whole(folder: Path, *, finished: bool = False) -> None:
    """Raise a Fault unless every file can be read to its end.

    metrics.csv is a log to which rows are appended. In an unfinished run it may be empty or end within a row, which the
    next start completes.
    """
    for path in files(folder):
        try:
            if path.suffix == ".csv" and not finished:
                rows = list(csv.reader(io.StringIO(path.read_text())))[:-1]
                if len({len(row) for row in rows}) > 1:
                    raise ValueError("rows before the last one are not complete")
                continue
            read(path)
        except Exception as error:
            raise Fault(f"{path.relative_to(folder)} is damaged: {error!r:.300}") from error


def read(path: Path) -> Any:
    """Return the content of a file in a form that can be compared. Raises an error if it is not whole."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".safetensors":
        with safe_open(path, "numpy") as archive:
            return {name: archive.get_tensor(name).tobytes() for name in archive.keys()}  # noqa: SIM118
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return {name: archive[name].tobytes() for name in archive.files}
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image).tobytes()
    if path.suffix == ".csv":
        text = path.read_text()
        rows = list(csv.reader(io.StringIO(text)))
        if not text.endswith("\n") or len({len(row) for row in rows}) > 1:
            raise ValueError(f"the last row is not complete: {text[-80:]!r}")
        return rows
    return path.read_bytes()


def results(folder: Path) -> dict[str, Any]:
    """Return the contents of a finished folder, without what differs between any two runs."""
    found = {}
    for path in files(folder):
        name = str(path.relative_to(folder))
        if path.name in ("antdiff.lock", "environment.json", "rows.bin", "progress.json", "report.html"):
            continue
        found[name] = cleaned(read(path), str(folder))
    return found


def cleaned(value: Any, folder: str) -> Any:
    """Leave out times, and replace the name of the folder."""
    if isinstance(value, dict):
        return {
            k: cleaned(x, folder)
            for k, x in value.items()
            if not any(w in str(k) for w in ("seconds", "time_", "host"))
        }
    if isinstance(value, list):
        return [cleaned(x, folder) for x in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value


def difference(got: dict[str, Any], want: dict[str, Any]) -> str | None:
    if got.keys() != want.keys():
        return f"files {sorted(got.keys() ^ want.keys())} are in one of the two only"
    for name, content in want.items():
        if got[name] != content:
            parts = [k for k in content if got[name].get(k) != content[k]] if isinstance(content, dict) else []
            return f"{name} differs {parts[:5]}"
    return None


# ---- the study -------------------------------------------------------------------------------------------------------


class Study:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.seed = folder, Random(seed), seed
        self.kills: dict[str, int] = {}
        self.phases: dict[str, int] = {}
        self.histories = 0
        self.faults: list[str] = []
        self.wanted: dict[str, tuple[dict[str, Any], float]] = {}

    def reference(self, command: Command) -> tuple[dict[str, Any], float]:
        """Return the results of the command without a kill, and how long it took."""
        if command.name not in self.wanted:
            folder, log = self.folder / f"reference {command.name}" / "run", self.folder / f"{command.name}.log"
            folder.parent.mkdir()
            started = time.monotonic()
            codes = finish(launch(command.argv(folder), command.ranks, log), LIMIT)
            if set(codes.values()) != {0}:
                raise SystemExit(f"{command.name} fails without a kill: {codes}\n{log.read_text()[-3000:]}")
            self.wanted[command.name] = results(folder), time.monotonic() - started
        return self.wanted[command.name]

    def history(self, command: Command, kills: int) -> None:
        want, took = self.reference(command)
        number = self.histories
        self.histories += 1
        folder, log = self.folder / f"{number} {command.name}" / "run", self.folder / f"{number}.log"
        folder.parent.mkdir()
        moments = []
        try:
            done = 0
            while done < kills:
                moment = self.rng.uniform(0.0, took) if self.rng.random() < 0.7 else None
                struck = self.strike(command, folder, log, moment, took)
                if struck is None:  # the command ended before the kill
                    break
                moments.append(round(struck, 2))
                done += 1
                self.kills[command.name] = self.kills.get(command.name, 0) + 1
                require_whole(folder)
            codes = finish(launch(command.start(folder), command.ranks, log), LIMIT)
            if set(codes.values()) != {0}:
                raise Fault(f"the restart ended with {sorted(codes.values())}: {log.read_text()[-1500:]}")
            require_whole(folder, finished=True)
            left = [path.name for path in folder.rglob(".antdiff-*")]
            if left:
                raise Fault(f"temporary files are left: {left}")
            if found := difference(results(folder), want):
                raise Fault(f"after the restarts, {found}")
            shutil.rmtree(folder.parent)
        except Fault as fault:
            text = f"{command.name}, seed {self.seed}, history {number}, killed after {moments} s: {fault}"
            self.faults.append(text)
            print(f"FAULT {text}\n  folder kept: {folder}", flush=True)

    def strike(self, command: Command, folder: Path, log: Path, moment: float | None, took: float) -> float | None:
        """Start the command and kill it; return when, or None if it ended by itself before.

        With ``moment`` None the kill comes as soon as a random number of changes has been seen in the folder, and so
        hits the writing itself more often.
        """
        children = launch(command.start(folder), command.ranks, log)
        started, seen, changes = time.monotonic(), fingerprint(folder), 0
        target = self.rng.randint(1, 12)
        while True:
            codes = running(children)
            if codes:
                others = [child for child in children if child not in codes]
                codes.update(finish(others, ALONE))
                if set(codes.values()) != {0}:
                    raise Fault(f"a start ended with {sorted(codes.values())}: {log.read_text()[-1500:]}")
                return None
            now = time.monotonic() - started
            if moment is not None and now >= moment:
                break
            if moment is None:
                current = fingerprint(folder)
                changes, seen = changes + (current != seen), current
                if changes >= target or now > 3 * took:
                    break
            time.sleep(0.0005)
        struck = time.monotonic() - started
        one = command.ranks > 1 and self.rng.random() < 0.5
        victims = [self.rng.choice(children)] if one else children
        for child in victims:
            os.kill(child, signal.SIGKILL)
        codes = finish(children, ALONE)
        if -999 in codes.values():
            raise Fault(f"{sum(code == -999 for code in codes.values())} ranks hang after another was killed")
        phase = "before the settings" if not (folder / "config.json").exists() else "later"
        self.phases[phase] = self.phases.get(phase, 0) + 1
        return struck


def fingerprint(folder: Path) -> tuple[tuple[str, int], ...]:
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found.append((f"{root}/{name}", os.stat(f"{root}/{name}").st_mtime_ns))
            except OSError:
                continue
    return tuple(sorted(found))


def main() -> int:
    parser = argparse.ArgumentParser(description="SIGKILL at random points of antdiff's commands.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-history", type=int, default=5, help="the most kills of one folder")
    parser.add_argument("--only", nargs="*", help="names of commands such as train; default all")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"})
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:  # a module of an optional package, or one that has moved
            print(f"not imported beforehand: {error}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="antdiff-kills-"))
    source = folder / "source" / "run"
    source.parent.mkdir()
    every = commands(source)
    chosen = [c for c in every if not options.only or c.name in options.only]
    if any(c.source for c in chosen):
        codes = finish(launch(every[0].argv(source), 1, folder / "source.log"), LIMIT)
        if set(codes.values()) != {0}:
            raise SystemExit((folder / "source.log").read_text()[-3000:])
    study = Study(folder, options.seed)
    print(f"seed {options.seed}, folder {folder}", flush=True)
    deadline = time.monotonic() + 60 * options.minutes
    turn = 0
    while sum(study.kills.values()) < options.kills and time.monotonic() < deadline and len(study.faults) < 10:
        command = chosen[turn % len(chosen)]
        turn += 1
        most = min(options.per_history, options.kills - sum(study.kills.values()))
        study.history(command, study.rng.randint(1, most))
        print(f"{sum(study.kills.values())} kills in {study.histories} histories: {study.kills}", flush=True)
    print(f"\n{sum(study.kills.values())} kills {study.kills}, {study.phases}, in {study.histories} histories;")
    print(f"{len(study.faults)} faults")
    if not study.faults:
        shutil.rmtree(folder)
    return 1 if study.faults else 0


if __name__ == "__main__":
    sys.exit(main())
